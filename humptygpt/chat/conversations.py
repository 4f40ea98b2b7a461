"""Read conversations from JSON lines, assign each to a split, and encode them.

A line has "messages" (OpenAI, Hugging Face), "conversations" (ShareGPT) or "instruction" and "output" (Alpaca).
"""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from textwrap import indent

import numpy as np

from humptygpt.chat.tokens import BEGIN, END, MESSAGES, ROLES, ChatTokenizer, Turn
from humptygpt.cli import refuse
from humptygpt.files import parse_json
from humptygpt.prepare.corpus import Corpus, draw
from humptygpt.prepare.documents import read_lines
from humptygpt.tokenizers import Tokenizer

SHAREGPT = {"human": "user", "gpt": "assistant"}  # its names of the roles
FIRST_LINE = r'\s*\{.*"(messages|conversations|instruction)"\s*:'
SCHEMA = {
    "messages?": MESSAGES,
    "conversations?": [{"from": {*ROLES, *SHAREGPT}, "value": str}],
    "instruction?": str,
    "input?": str,
    "output?": str,
}
SHOWN = 1500  # maximum length of the conversation in the summary, in characters
REPLY = re.compile(rf"({re.escape(BEGIN)}assistant\n)(.*?({re.escape(END)}|$))", re.DOTALL)


class Conversation(tuple[Turn, ...]):
    """Turns up to the last reply; () if there is none."""

    @property
    def texts(self) -> list[str]:
        return [turn.text for turn in self]


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

    def wrap(self, tokenizer: Tokenizer) -> Tokenizer:
        """Add the tokens that mark turns, unless the tokenizer is one of a chat model, which has them."""
        return tokenizer if tokenizer.name == "chat" else ChatTokenizer(tokenizer)

    def read(self, number: int) -> Iterator[tuple[str, Conversation]]:
        """Read one conversation per line of a file. Equal conversations are in the same split."""
        path = self.files[number]
        for line, text in enumerate(read_lines(path, self.config.encoding_errors), start=1):
            if text.strip():
                with refuse(f"{path}, line {line:,}: "):
                    conversation = parse(text)
                drawn = draw("\n".join(conversation.texts), hashed=None)
                yield "val" if drawn <= self.config.val_fraction else "train", conversation

    def encode(
        self, tokenizer: ChatTokenizer, split: str, conversations: list[Conversation]
    ) -> tuple[list[np.ndarray], Counter]:
        ids = []
        counted = Counter()
        for conversation in conversations:
            if not conversation:
                counted["without_reply"] += 1
                continue
            tokens = tokenizer.encode_turns(conversation)
            ids.append(np.append(tokens, tokenizer.base.eot))
            replies = [turn.content for turn in conversation if turn.role == "assistant"]
            text = "".join(conversation.texts)
            counted.update(
                conversations=1,
                turns=len(conversation),
                characters=len(text),
                bytes=len(text.encode()),
                target_bytes=len("".join(replies).encode()),
                target_tokens=sum(len(tokenizer.encode(reply)) + 1 for reply in replies),
            )
        return ids, counted

    def extra_meta(self, splits: dict[str, Counter], first_text: str) -> dict:
        # after a conversation's last turn comes the token that separates conversations, whatever its text is
        first = re.split(rf"(?<={re.escape(END)}\n)(?!{re.escape(BEGIN)})", first_text)[0]
        return {
            "without_reply": sum(splits.values(), Counter())["without_reply"],
            "longest": max(counted["longest"] for counted in splits.values()),
            "example": REPLY.sub(r"\1[\2]", first[:SHOWN].strip()),
        }

    def summary(self, meta: dict) -> dict[str, str]:
        longest = f"{meta['longest']:,} tokens; train.py cuts longer ones than block_size before a question"
        lines = {"longest": longest}
        if meta["without_reply"]:
            lines["left out"] = f"{meta['without_reply']:,} without a reply"
        example = indent(meta["example"], 17 * " ")
        return lines | {"example": f"the model learns what is in brackets\n\n{example}"}


def parse(line: str) -> Conversation:
    """Read a line. Raises ValueError if it is not valid."""
    row = parse_json(line, SCHEMA)
    if "messages" in row:
        turns = [(each["role"], each["content"]) for each in row["messages"]]
    elif "conversations" in row:
        turns = [(each["from"], each["value"]) for each in row["conversations"]]
    elif {"instruction", "output"} <= row.keys():
        asked = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
        turns = [("user", asked), ("assistant", row["output"])]
    else:
        raise ValueError(
            "it has neither messages, conversations, nor instruction and output"
        )
    turns = [
        Turn(SHAREGPT.get(role, role), re.sub("\r\n?", "\n", text.strip()))
        for role, text in turns
    ]
    for before, turn in pairwise(turns):
        if before.role == turn.role == "assistant":
            raise ValueError("the assistant replies twice in a row")
    while turns and turns[-1].role != "assistant":
        turns.pop()
    return Conversation(turns)


def is_conversations(path: Path) -> bool:
    """True if the first line of a file of JSON lines is a conversation."""
    return bool(re.match(FIRST_LINE, next(read_lines(path, "replace"), "")))
