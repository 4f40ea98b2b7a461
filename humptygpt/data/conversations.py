"""Read conversations from JSON or tables, assign each to a split, and encode them.

A record has "messages" (OpenAI, Hugging Face), "conversations" (ShareGPT), "instruction" and "output" (Alpaca), or two
keys that --text_key names.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, cycle
from pathlib import Path

import numpy as np

from humptygpt.cli import UserError
from humptygpt.data.corpus import Corpus, Encoded, draw, read_all
from humptygpt.data.documents import LEFT_OUT, READERS, Flaws, file_suffix, read_records
from humptygpt.files import check_schema
from humptygpt.tokenizers.basic import Tokenizer
from humptygpt.tokenizers.chat import (
    BEGIN,
    CONTENT,
    END,
    ROLES,
    ChatTokenizer,
    Turn,
    make_turn,
)

ROLE = {*ROLES, "human", "gpt", "developer"}
TURNS = {
    "messages": [{"role": ROLE, "content": CONTENT[:2], "weight?": (range(1, 2), None)}],
    "conversations": [{"from": ROLE, "value": str}],
}
KEYS = {"messages": ("role", "content"), "conversations": ("from", "value")}
ALPACA = ("instruction", "output")
NO_CONVERSATION = (
    "it is no conversation of texts in a form of docs/chat.md; if it has a question and its answer, name their keys, as"
    " in --text_key=prompt,completion"
)
OFTEN = 3  # a reply of a training split that occurs so many times is one token
FEWEST_CHARACTERS = 20  # if it has at least so many characters
FAQ = 2 / 3  # if this share of the replies recurs, as in a FAQ, all of them are tokens
MOST_BYTES = 2_000_000  # bytes of conversations; larger ones teach a model to spell
EXAMPLE_CHARACTERS = 1500  # maximum length of the conversation in the summary, in characters
# a short question with which a conversation begins: what precedes it is no turn
QUESTION = re.compile(rf"(?<!{re.escape(END)}\n){re.escape(BEGIN)}user\n(.{{1,80}}){re.escape(END)}")
REPLY = re.compile(rf"({re.escape(BEGIN)}assistant\n)(.*?({re.escape(END)}|$))", re.DOTALL)


class Conversation(tuple[Turn, ...]):
    """Turns up to the last reply."""

    @property
    def texts(self) -> list[str]:
        return [turn.text for turn in self]

    @property
    def replies(self) -> list[str]:
        return [turn.content for turn in self if turn.role == "assistant"]


class Conversations(Corpus):
    """A corpus of conversations, which are read from files."""

    task = "chat"
    counts = (
        "conversations",
        "turns",
        "characters",
        "bytes",
        "tokens",
        "target_bytes",
        "target_tokens",
    )
    missing = "conversation with a reply of the assistant"
    held_out: frozenset = frozenset()  # draws of the validation split; empty: see limits

    def wrap(self, tokenizer: Tokenizer) -> Tokenizer:
        """Add the tokens of conversations, unless the tokenizer is one of a chat model, which has them."""
        if tokenizer.name == "chat":
            return tokenizer
        # only a small model, whose own tokenizer is chosen here, needs help
        small = self.config.tokenizer == "auto" and self.text_size <= MOST_BYTES
        return ChatTokenizer(tokenizer, self.frequent_replies() if small else ())

    def survey(self) -> None:
        """Also choose what a small file holds out: other wordings of what is taught, which tell what was learned.

        A conversation is held out if it has the replies of another one, which stays: those with the lowest draws. If
        there are few of this kind, the lowest draws of all are held out.
        """
        super().survey()
        fraction = self.config.val_fraction
        if self.text_size > MOST_BYTES or fraction in (0, 1):  # there is a val_input
            return
        every = read_all(self, "choosing what is held out")
        draws = dict(sorted((self.draw(x), tuple(x.replies)) for _, x in every))
        last = {*{replies: drawn for drawn, replies in draws.items()}.values()}
        others = [drawn for drawn in draws if drawn not in last]
        count = max(1, round(fraction * len(draws)))
        chosen = others if len(others) >= count / 2 else [*draws]
        self.held_out = frozenset(chosen[:count])

    def split_of(self, conversation: Conversation) -> str:
        if self.held_out:
            return "val" if self.draw(conversation) in self.held_out else "train"
        return super().split_of(conversation)

    def frequent_replies(self) -> list[str]:
        """Find the FEWEST_CHARACTERS replies that occur OFTEN, or all of those of a FAQ, most frequent first."""
        counted = Counter(
            reply
            for split, conversation in read_all(self, "counting replies")
            for reply in conversation.replies
            if split == "train" and len(reply) >= FEWEST_CHARACTERS
        )
        recur = sum(count for count in counted.values() if count > 1)
        often = 1 if recur >= FAQ * counted.total() else OFTEN
        return [text for text, count in counted.most_common() if count >= often]

    def read(self, number: int) -> Iterator[tuple[str, Conversation]]:
        """Read the conversations of a file."""
        path, config = self.files[number], self.config
        columns = asked_columns(config.text_key)
        for where, record in read_records(path, columns, self.flaws):
            try:
                conversation = parse(record, columns)
            except ValueError as error:
                self.flaws.add(LEFT_OUT, f"{where}: {error}")
                continue
            yield self.split_of(conversation), conversation

    def draw(self, conversation: Conversation) -> float:
        """Draw by the whole text, so that equal conversations are in the same split."""
        return draw("\n".join(conversation.texts), hashed=None)

    def encode(self, tokenizer: ChatTokenizer, split: str, conversations: list[Conversation]) -> Encoded:
        ids = []
        counted = Counter()
        header = len(tokenizer.encode("assistant\n"))
        for conversation in conversations:
            ids.append(np.append(tokenizer.encode_turns(conversation), tokenizer.base.eot))
            text = "".join(conversation.texts)
            counted.update(
                conversations=1,
                turns=len(conversation),
                characters=len(text),
                bytes=len(text.encode()),
                target_bytes=len("".join(conversation.replies).encode()),
                # each with its end
                target_tokens=sum(
                    len(tokenizer.encode_turn(turn)) - header + 1 for turn in conversation if turn.role == "assistant"
                ),
            )
        return ids, counted

    def extra_meta(self, splits: dict[str, Counter], first_text: str) -> dict:
        # after a conversation's last turn comes the token that separates conversations, whatever its text is
        first = re.split(rf"(?<={re.escape(END)}\n)(?!{re.escape(BEGIN)})", first_text)[0]
        return {
            "questions": QUESTION.findall(first_text)[:8],
            "example": REPLY.sub(r"\1[\2]", first[:EXAMPLE_CHARACTERS].strip()),
        }


def asked_columns(text_key: str) -> list[str]:
    """Return the keys of a question and its answer, if text_key is keys separated by a comma, otherwise []."""
    return [key.strip() for key in text_key.split(",")] if "," in text_key else []


def is_conversations(path: Path, text_key: str | None) -> bool:
    """True if text_key names a question and its answer, or the first record of a file is a conversation."""
    suffix = file_suffix(path)
    if asked_columns(text_key or ""):
        return suffix in READERS
    if text_key or suffix not in (".jsonl", ".json", ".parquet"):
        return False
    with suppress(UserError, StopIteration):
        _, first = next(read_records(path, [], Flaws()))
        return not first.keys().isdisjoint(TURNS) or first.keys() >= {*ALPACA}
    return False


def parse(record: dict, columns: list[str]) -> Conversation:
    """Read a record. columns: keys of a question and its answer, or []. Raises ValueError if it is no conversation."""
    try:
        turns = read_columns(record, *columns) if columns else read_turns(record)
    except ValueError:
        raise ValueError(NO_CONVERSATION) from None
    turns = [turn for turn in turns if turn.content or turn.role != "system"]
    while turns and turns[-1].role != "assistant":
        turns.pop()
    if not turns or not all(turn.content for turn in turns if turn.role == "assistant"):
        raise ValueError(NO_CONVERSATION)
    return Conversation(turns)


def read_turns(record: dict) -> list[Turn]:
    """Read the turns of a known form, after what ShareGPT and Alpaca have beside them."""
    check_schema(record, {"system?": (str, None), "history?": ([[str]], None)})
    roles = chain(["system"], cycle(["user", "assistant"]))
    texts = [record.get("system") or "", *chain(*record.get("history") or ())]
    turns = list(map(make_turn, roles, texts))
    for key, (role, content) in KEYS.items():
        if key in record:
            check_schema(record, {key: TURNS[key]})
            return turns + [make_turn(x[role], x[content]) for x in record[key]]
    return turns + read_columns(record, *ALPACA, "input")


def read_columns(record: dict, question: str, answer: str, *more: str) -> list[Turn]:
    """Read a question and its answer. more: keys of what follows the question, which may be missing or empty."""
    optional = {f"{key}?": (str, None) for key in more}
    check_schema(record, {question: str, answer: str} | optional)
    asked = "\n\n".join(filter(None, map(record.get, [question, *more])))
    return [make_turn("user", asked), make_turn("assistant", record[answer])]
