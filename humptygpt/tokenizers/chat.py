"""Conversations as tokens: ChatML, in which two special tokens mark where each turn begins and ends.

<|im_start|>user
Who are you?<|im_end|>
<|im_start|>assistant
I am Humpty Dumpty.<|im_end|>
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from humptygpt.tokenizers.basic import Tokenizer

BEGIN, END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
# other names of the roles in files and requests; a tool's result is read as if the user had said it
ALIASES = {
    "developer": "system",
    "human": "user",
    "tool": "user",
    "function": "user",
    "gpt": "assistant",
}
# blank lines before a text, and a single space as in OpenAI's older files; more are the indentation of code
BEFORE = re.compile(r"\A(?:\s*\n)?(?: (?=\S))?")
CONTENT = (str, [{"type": {"text"}, "text": str}], None)  # schema of a message's content
# ChatML for transformers and llama.cpp; Ollama knows the template by this very text
TEMPLATE = (
    r"{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    r" + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Turn(NamedTuple):
    role: str
    content: str

    @property
    def text(self) -> str:
        """The turn without its special tokens."""
        return f"{self.role}\n{self.content}"


def make_turn(role: str, content: str | list[dict] | None) -> Turn:
    """Make a turn of a message without the white space around it. A reply may be code, so it keeps its indentation.

    role: one of ROLES, or a key of ALIASES. content: as in the schema CONTENT.
    """
    role = ALIASES.get(role, role)
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content)
    text = re.sub("\r\n?", "\n", content or "").rstrip()
    return Turn(role, BEFORE.sub("", text) if role == "assistant" else text.lstrip())


class ChatTokenizer(Tokenizer):
    """A tokenizer with two more tokens, BEGIN and END, to which no text is encoded, and one for each of some replies.

    Its eot is END, so that a text that a model generates ends with the turn. base: the tokenizer of the text, whose own
    eot separates conversations in token files. If another project's tokenizer has BEGIN and END, they are used.
    replies: a model chooses each of them as a whole, so it never mixes two.
    """

    name = "chat"
    chat_template = TEMPLATE

    def __init__(self, base: Tokenizer, replies: Sequence[str] = ()):
        self.base = base
        self.alphabet = base.alphabet
        marks = [BEGIN.encode(), END.encode()]
        self.pieces = base.pieces + [mark for mark in marks if mark not in base.pieces]
        self.marks = [self.pieces.index(mark) for mark in marks]
        self.begin, self.eot = self.marks
        self.replies = {text: i for i, text in enumerate(replies, len(self.pieces))}
        self.pieces += [text.encode() for text in replies]

    def encode(self, text: str) -> np.ndarray:
        """Encode a part of a turn. It follows BEGIN, so no space is added before it."""
        return self.base.encode_plain(text)

    def encode_turn(self, turn: Turn) -> np.ndarray:
        if turn.role == "assistant" and turn.content in self.replies:
            return np.append(self.encode("assistant\n"), self.replies[turn.content])
        return self.encode(turn.text)

    def start(self) -> np.ndarray:
        return np.array([self.begin])

    def encode_turns(self, turns: Iterable[Turn], reply: bool = False) -> np.ndarray:
        """Encode turns. reply: also the beginning of the assistant's next one."""
        ids = []
        line_break = self.encode("\n")
        for turn in turns:
            ids += [[self.begin], self.encode_turn(turn), [self.eot], line_break]
        if reply:
            ids += [[self.begin], self.encode("assistant\n")]
        return np.concatenate(ids)

    def state(self) -> dict:
        return {
            "tokenizer": self.name,
            "base": self.base.state(),
            "replies": list(self.replies),
        }
