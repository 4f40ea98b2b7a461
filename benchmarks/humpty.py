"""How often the model of config/humpty_chat.py answers right, on compositions that no training conversation has.

    python -m benchmarks.humpty out/humpty_chat
    python -m benchmarks.humpty out/humpty_chat 20        shows 20 wrong answers of each kind

A reply is right if it is one of those that the composition allows, letter by letter. Replies are greedy. The earlier
turns of a conversation have the replies that were composed, not the model's own.
"""

import sys
from collections import Counter

import sample
from humptygpt.data.builtin import data_set
from humptygpt.generation.sampling import Context, stream_texts
from humptygpt.tokenizers.chat import Turn

HUMPTY = data_set("humpty_chat")

AT_ONCE = 50  # conversations
TOLD = ("name", "colour", "animal", "food", "town", "age")


def main(source: str, shown: str = "3") -> None:
    loaded = sample.load(source)
    composer = HUMPTY.Composer(seed=2, held_out=True)
    tests = {
        "first turns": [composer.conversation(1) for _ in range(500)],
        "later turns that need an earlier one": [later(composer) for _ in range(300)],
        "what he cannot know": [[any_exchange(composer, "unknown ")] for _ in range(100)],
        "new names two turns later": [name_recalled(composer) for _ in range(100)],
        "new sums": [[composer.exchange("sum", {})] for _ in range(100)],
    }
    for title, conversations in tests.items():
        replies = answer(loaded, conversations)
        pairs = list(zip(conversations, replies, strict=True))
        wrong = [(asked, reply) for asked, reply in pairs if reply not in asked[-1].replies]
        topics = Counter(asked[-1].topic for asked, _ in wrong)
        right = len(pairs) - len(wrong)
        print(f"\n{title}: {right} of {len(pairs)} ({right / len(pairs):.1%})")
        print(
            "  wrong:",
            ", ".join(f"{topic} {count}" for topic, count in topics.most_common()),
        )
        for asked, reply in wrong[: int(shown)]:
            for exchange in asked[:-1]:
                print(f"    {exchange.said}\n    = {exchange.replies[0]}")
            print(f"    {asked[-1].said}\n    > {reply}\n")


def later(composer: "HUMPTY.Composer") -> list["HUMPTY.Exchange"]:
    """Compose a conversation whose last turn needs an earlier one: "why?", or something that he was told."""
    told = {}
    if composer.random.random() < 0.4:
        (first,) = composer.conversation(1)
        return [first, composer.exchange("why", {}, before=first.topic)]
    kind = composer.random.choice(TOLD)
    first = composer.exchange(f"tell {kind}", told)
    between = [any_exchange(composer) for _ in range(composer.random.randint(0, 2))]
    return [first, *between, composer.exchange(f"ask {kind}", told)]


def name_recalled(composer: "HUMPTY.Composer") -> list["HUMPTY.Exchange"]:
    """Compose a conversation in which a made-up name is told, and asked two turns later."""
    told = {"name": composer.values["name"][0]}
    while told["name"] in composer.values["name"]:
        first = composer.exchange("tell name", told)
    return [first, any_exchange(composer), composer.exchange("ask name", told)]


def any_exchange(composer: "HUMPTY.Composer", start: str = "") -> "HUMPTY.Exchange":
    """Compose an exchange that neither tells nor asks a value. start: beginning of the topic's name."""
    names = [name for name, topic in composer.topics.items() if topic.weight]
    names = [name for name in names if name.startswith(start)]
    names = [name for name in names if not name.startswith(("tell ", "ask "))]
    return composer.exchange(composer.random.choice(names), {})


def answer(loaded: sample.Pipeline, conversations: list[list["HUMPTY.Exchange"]]) -> list[str]:
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
        for piece in stream_texts(context, loaded.tokenizer, range(len(some)), max_new_tokens=60, temperature=0):
            replies[first + piece.row] += piece.text
    return replies


if __name__ == "__main__":
    main(*sys.argv[1:])
