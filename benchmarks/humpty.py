"""How often the model of config/humpty_chat.py answers right, on compositions that no training conversation has.

    python -m benchmarks.humpty out/humpty_chat

A reply is right if it is one of those that the composition allows, letter by letter. Replies are greedy. Earlier turns
of a conversation have the replies that were composed, not the model's own.
"""

import sys
from collections import Counter

import sample
from humptygpt.chat.compose import TOLD, Composer, Exchange
from humptygpt.chat.tokens import Turn
from humptygpt.sampling import Context, stream_texts

AT_ONCE = 50


def main(source: str, shown: int = 5) -> None:
    loaded = sample.load(source)
    composer = Composer(seed=2, held_out=True)
    tests = {
        "first turns": [[composer.next([], {})] for _ in range(500)],
        "later turns": [later(composer) for _ in range(300)],
        "what he cannot know": [
            [composer.exchange(composer.random.choice(composer.names["unknown"]), {})]
            for _ in range(100)
        ],
        "new names two turns later": [name_recalled(composer) for _ in range(100)],
        "new sums": [[composer.exchange("sum", {})] for _ in range(100)],
    }
    for title, conversations in tests.items():
        replies = answer(loaded, conversations)
        wrong = [
            (conversation, reply)
            for conversation, reply in zip(conversations, replies, strict=True)
            if reply not in conversation[-1].replies
        ]
        count = len(conversations)
        print(f"\n{title}: {count - len(wrong)} of {count} ({1 - len(wrong) / count:.1%})")
        print(
            "  wrong topics:",
            dict(Counter(each[-1].topic for each, _ in wrong).most_common(8)),
        )
        for conversation, reply in wrong[:shown]:
            for exchange in conversation[:-1]:
                print(f"    {exchange.said}\n  = {exchange.replies[0]}")
            print(f"    {conversation[-1].said}\n  > {reply}\n")


def later(composer: Composer) -> list[Exchange]:
    """Compose a conversation whose last turn needs an earlier one."""
    told = {}
    if composer.random.random() < 0.4:
        first = composer.next([], told)
        while not composer.topics[first.topic].why:
            first = composer.next([], told)
        return [first, composer.why(first, told)]
    what = composer.random.choice(TOLD)
    first = composer.exchange(f"tell {what}", told)
    between = [filler(composer) for _ in range(composer.random.randint(0, 2))]
    return [first, *between, composer.exchange(f"ask {what}", told)]


def name_recalled(composer: Composer) -> list[Exchange]:
    told = {"name": composer.values["name"][0]}
    while told["name"] in composer.values["name"]:
        first = composer.exchange("tell name", told)
    return [first, filler(composer), composer.exchange("ask name", told)]


def filler(composer: Composer) -> Exchange:
    return composer.exchange(composer.random.choice(composer.names["topic"]), {})


def answer(loaded: sample.Pipeline, conversations: list[list[Exchange]]) -> list[str]:
    prompts = []
    for exchanges in conversations:
        turns = []
        for exchange in exchanges:
            turns += [Turn("user", exchange.said), Turn("assistant", exchange.replies[0])]
        prompts.append(loaded.tokenizer.encode_turns(turns[:-1], reply=True).tolist())
    replies = [""] * len(prompts)
    for first in range(0, len(prompts), AT_ONCE):
        some = prompts[first : first + AT_ONCE]
        context = Context(loaded.model, some)
        for piece in stream_texts(
            context, loaded.tokenizer, range(len(some)), max_new_tokens=60, temperature=0
        ):
            replies[first + piece.row] += piece.text
    return replies


if __name__ == "__main__":
    main(*sys.argv[1:])
