"""Conversations with Humpty Dumpty, composed at random from the lines in humpty_chat.txt.

What somebody says is composed of a topic, a phrasing, values such as a name, and a greeting. Some compositions, sums
and made-up words are held out: no training conversation has them, so that a test of them shows more than memory.
"""

import json
import random
import re
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import NamedTuple

from humptygpt.data.builtin import keep
from humptygpt.data.corpus import draw, normalised

LINES = Path(__file__).with_name("humpty_chat.txt")
HUMPTY_CHATS = 85_000  # conversations in the data set
HELD_OUT = 0.1  # the share of the compositions, of the sums and of the made-up words
# exchanges in a conversation: one of these numbers at random
TURNS = [1, 1, 1, 1, 2, 2, 2, 3, 3, 4]
# kinds of values that are numbers: from, to; the large ones are too large for him
NUMBERS = {"age": (3, 99), "large": (21, 999), "larger": (100, 9999)}
MADE_UP = ("name", "town", "word")  # kinds of values that are made up two times in three
QUESTION = re.compile(
    r"(who|what|why|when|where|which|how|are|is|am|do|does|did|can|could|will|would|have|has|was|were|may)\b"
)

tokenizer = "bpe"
vocab_size = 2048
split_digits = True
val_fraction = 0.01


def fetch(config):
    composer = Composer(seed=1)
    lines = [json.dumps({"messages": messages(composer.conversation())}) + "\n" for _ in range(HUMPTY_CHATS)]
    path = keep("humpty_chat.jsonl", "".join(lines))
    return path, f"{len(lines):,} composed conversations"


class Topic(NamedTuple):
    weight: int  # how often it comes up, compared with the others
    phrasings: list[str]
    # {"": the answers, "why": those to "why?", "none": those if nothing was told}
    answers: dict[str, list[str]]


class Exchange(NamedTuple):
    said: str
    replies: list[str]  # all that are right; the first is the one that was chosen
    topic: str


def read() -> tuple[dict[str, Topic], dict[str, list[str]]]:
    """Read humpty_chat.txt. Returns the topics and the values."""
    topics, values = {}, defaultdict(list)
    for line in LINES.read_text(encoding="utf-8").splitlines():
        match line[:1]:
            case "" | "#":
                continue
            case "{":
                name, _, some = line[1:].partition("} ")
                values[name] += some.split("|")
            case "[":
                name, _, weight = line[1:].partition("]")
                topic = topics[name] = Topic(int(weight or 1), [], defaultdict(list))
            case _:
                line = re.sub(r"<(\w+)>", lambda kind: f"({'|'.join(values[kind[1]])})", line)
                kind, equals, answer = line.partition("= ")
                if equals:
                    topic.answers[kind] += expand(answer)
                else:
                    topic.phrasings.extend(expand(line))
    return topics, values


def expand(line: str) -> list[str]:
    """Expand (one|another) to all texts that a line stands for."""
    parts = re.split(r"\(([^)]*)\)", line)
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return [" ".join("".join(each).split()) for each in product(*choices)]


def is_held_out(text: str) -> bool:
    return draw(text) < HELD_OUT


class Composer:
    """Composes exchanges. held_out: those that no training conversation has."""

    def __init__(self, seed: int, held_out: bool = False):
        self.random = random.Random(seed)
        self.held_out = held_out
        self.topics, self.values = read()

    def conversation(self, turns: int | None = None) -> list[Exchange]:
        """Compose a conversation of a number of exchanges; None: a random one."""
        weights = [topic.weight for topic in self.topics.values()]
        told = {}
        exchanges = []
        name = ""
        for _ in range(turns or self.random.choice(TURNS)):
            before = name
            drawn = self.random.random()
            if before not in ("", "why") and drawn < 0.2:
                name = "why"
            elif told and drawn < 0.6:
                name = f"ask {self.random.choice([*told])}"
            else:
                (name,) = self.random.choices([*self.topics], weights)
            exchanges.append(self.exchange(name, told, before))
        return exchanges

    def exchange(self, name: str, told: dict[str, str | int], before: str = "") -> Exchange:
        """Compose an exchange on a topic.

        told: {kind: value} that somebody has told so far; it is updated. before: the topic of the exchange before it.
        """
        topic = self.topics[name]
        kind, _, value = name.partition(" ")
        values = Values(self)
        answers = topic.answers[""]
        if kind == "why":
            answers = self.topics[before].answers["why"]
        elif kind == "tell":
            told[value] = values[value]
        elif kind == "ask" and value in told:
            values[value] = told[value]
        elif kind == "ask":
            answers = topic.answers["none"]
        while True:
            said = self.typed(self.random.choice(topic.phrasings).format_map(values))
            # two words, such as "Good morning", are too common to be held out
            if self.held_out == (said.count(" ") > 1 and is_held_out(normalised(said))):
                break
        replies = [capital(answer.format_map(values)) for answer in answers]
        self.random.shuffle(replies)
        return Exchange(said, replies, name)

    def draw(self, kind: str) -> dict[str, str | int]:
        """Draw a value of a kind; for a sum, also its other parts."""
        if kind in NUMBERS:
            return {kind: self.random.randint(*NUMBERS[kind])}
        if kind in ("a", "b", "ones", "sum"):
            return self.draw_sum()
        if kind in MADE_UP and self.random.random() < 2 / 3:
            word = self.made_up()
            return {kind: word if kind == "word" else word.capitalize()}
        return {kind: self.random.choice(self.values[kind])}

    def draw_sum(self) -> dict[str, str | int]:
        """Draw two numbers, their sum, and what he says before it."""
        while True:
            a, b = self.random.randint(0, 20), self.random.randint(0, 20)
            if is_held_out(f"{min(a, b)}+{max(a, b)}") == self.held_out:
                break
        # adding the ones first, in writing, makes it easier to learn
        ones = f"{a % 10} and {b % 10} make {a % 10 + b % 10}, so "
        return {"a": a, "b": b, "sum": a + b, "ones": ones if max(a, b) > 9 else ""}

    def made_up(self) -> str:
        """Make up a word of one to three syllables."""
        while True:
            kinds = ["onset", "vowel"] * self.random.choice((1, 2, 2, 3)) + ["ending"]
            first, last = self.random.randint(0, 1), len(kinds) - self.random.randint(0, 1)
            word = "".join(self.random.choice(self.values[kind]) for kind in kinds[first:last])
            if len(word) > 2 and is_held_out(word) == self.held_out:
                return word

    def typed(self, text: str) -> str:
        """Type a text as people do: some greet or address him, some leave out words, capitals or punctuation."""
        chance = self.random.random
        end = "?" if QUESTION.match(text) else self.random.choice(".!..")
        *words, _ = text.split()  # the last word always stays
        small = [word for word in words if word in self.values["small"]]
        if len(words) > 1 and small and chance() < 0.1:
            text = re.sub(rf"\b{self.random.choice(small)}\b ?", "", text, count=1)
        drawn = chance()
        if drawn < 0.3:
            text = f"{self.random.choice(self.values['start'])} {text}"
        elif drawn < 0.45 and text[-1].isalnum():
            text = f"{text}, {self.random.choice(self.values['end'])}"
        if chance() < 0.7:
            text = re.sub(r"\bi\b", "I", capital(text))
        elif chance() < 0.3:
            text = text.lower()
        if chance() < 0.7 and text[-1] not in "=?":
            text += end
        elif chance() < 0.1:
            text = text.replace("'", "")
        return text


class Values(dict):
    """The values of an exchange, {kind: value}, each drawn by a Composer when it is first needed."""

    def __init__(self, composer: Composer):
        self.composer = composer

    def __missing__(self, kind: str) -> str | int:
        self.update(self.composer.draw(kind))
        return self[kind]


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def messages(exchanges: list[Exchange]) -> list[dict[str, str]]:
    """Write a conversation as its messages, in OpenAI's form."""
    found = []
    for each in exchanges:
        found += [
            {"role": "user", "content": each.said},
            {"role": "assistant", "content": each.replies[0]},
        ]
    return found
