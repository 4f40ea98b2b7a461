"""Compose conversations with Humpty Dumpty from the lines in humpty.txt.

What somebody says is composed of a topic, a phrasing, a value such as a name, and a way of typing. Some phrasings,
sums and names are held out: no training conversation has them, so that a test of them shows more than memory.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

LINES = Path(__file__).with_name("humpty.txt")
HELD_OUT = 0.1  # share of phrasings, sums and made-up names that are held out
TURNS = (1, 1, 1, 2, 2, 2, 3, 3, 4, 4)  # lengths of conversations, one of them at random
TOLD = (
    "name",
    "colour",
    "animal",
    "food",
    "town",
    "age",
)  # what he is told and asked again
KINDS = {
    "topic": 50,
    "tell": 14,
    "ask": 5,
    "sum": 12,
    "unknown": 13,
    "meaning": 6,
}  # weights
QUESTION = re.compile(
    r"(who|what|why|when|where|which|how|are|is|am|do|does|did|can|could|will|would|have|has|was|were|may|shall|isn't"
    r"|aren't|wouldn't|don't|whats|what's|when's|how's)\b"
)
VOWELS = "aeiou"
ENDS = ["", *"lmnrstkx"]


class Topic(NamedTuple):
    says: list[str]  # phrasings
    replies: list[str]
    why: list[str]
    none: list[str]


class Exchange(NamedTuple):
    """What somebody says, and the replies that are right; the first is the one that was chosen."""

    said: str
    replies: list[str]
    topic: str


def read() -> tuple[dict[str, Topic], dict[str, list[str]]]:
    """Read humpty.txt. Returns the topics and the values."""
    topics = {}
    for line in LINES.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            topic = topics[line[1:-1]] = Topic([], [], [], [])
            continue
        kind, equals, text = line.partition("= ")
        if equals and kind in ("", "why", "none"):
            {"": topic.replies, "why": topic.why, "none": topic.none}[kind].append(text)
        else:
            topic.says.extend(expand(line))
    values = {name: topics.pop(f"values {name}").replies for name in value_names(topics)}
    return topics, values


def value_names(topics: dict[str, Topic]) -> list[str]:
    return [name.removeprefix("values ") for name in topics if name.startswith("values ")]


def expand(line: str) -> list[str]:
    """Expand (one|another) to all texts that a line stands for."""
    parts = re.split(r"\(([^)]*)\)", line)
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return [" ".join("".join(each).split()) for each in product(*choices)]


def is_held_out(*what: object) -> bool:
    digest = hashlib.blake2b(repr(what).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") < HELD_OUT * 2**32


class Composer:
    """Composes exchanges. held_out: with the phrasings, sums and names that training conversations do not have."""

    def __init__(self, seed: int, held_out: bool = False):
        self.random = random.Random(seed)
        self.held_out = held_out
        self.topics, self.values = read()
        for name, topic in self.topics.items():
            own = [text for text in topic.says if is_held_out(name, text) == held_out]
            topic.says[:] = own or topic.says
        self.names = {
            kind: [name for name in self.topics if name.split()[0] == kind]
            for kind in KINDS
        }
        special = {name for names in self.names.values() for name in names} | {"why"}
        self.names["topic"] = [name for name in self.topics if name not in special]

    def conversation(self) -> list[Exchange]:
        told = {}
        exchanges = []
        for _ in range(self.random.choice(TURNS)):
            exchanges.append(self.next(exchanges, told))
        return exchanges

    def next(self, exchanges: list[Exchange], told: dict[str, str]) -> Exchange:
        """Compose the next exchange. told: values that were told so far; new ones are added."""
        drawn = self.random.random()
        if exchanges and drawn < 0.2 and self.topics[exchanges[-1].topic].why:
            return self.why(exchanges[-1], told)
        if told and drawn < 0.5:
            return self.exchange(f"ask {self.random.choice(list(told))}", told)
        kind = self.random.choices([*KINDS], [*KINDS.values()])[0]
        return self.exchange(self.random.choice(self.names[kind]), told)

    def why(self, before: Exchange, told: dict[str, str]) -> Exchange:
        word = next(
            (word for word in self.values["word"] if word in before.said.lower()), "it"
        )
        replies = [text.format(word=word) for text in self.topics[before.topic].why]
        said = self.typed(self.random.choice(self.topics["why"].says))
        return Exchange(said, self.shuffled(replies), "why")

    def exchange(self, name: str, told: dict[str, str]) -> Exchange:
        """Compose an exchange on a topic."""
        topic = self.topics[name]
        kind, _, value = name.partition(" ")
        values = {key: self.random.choice(those) for key, those in self.values.items()}
        values |= self.numbers() | {"age": str(self.random.randint(3, 99))}
        values["name"] = (
            self.made_up("name") if self.random.random() < 0.5 else values["name"]
        )
        for key in ("town", "word"):
            if self.random.random() < 0.2:
                values[key] = self.made_up(key)
        animal = values["animal"]
        values["an animal"] = f"{'an' if animal[0] in VOWELS else 'a'} {animal}"
        own = f"an {value}" if value == "animal" else value
        if kind == "ask" and value in told:
            values[own] = told[value]
        replies = topic.replies if kind != "ask" or value in told else topic.none
        if kind == "tell":
            told[value] = values[own]
        said = self.random.choice(topic.says)
        if "{cannot}" in replies:
            replies = self.values["cannot"]
        elif name == "meaning":
            replies = [
                text.replace("{meaning}", each)
                for text in replies
                for each in self.values["meaning"]
            ]
        replies = [capital(fill(text, values)) for text in replies]
        return Exchange(self.typed(fill(said, values)), self.shuffled(replies), name)

    def numbers(self) -> dict[str, str]:
        """Draw two addends, which are held out or not, and a large number."""
        while True:
            a, b = self.random.randint(0, 20), self.random.randint(0, 20)
            if is_held_out("sum", *sorted((a, b))) == self.held_out:
                large = str(self.random.randint(100, 9999))
                return {"a": str(a), "b": str(b), "sum": str(a + b), "large": large}

    def made_up(self, key: str) -> str:
        """Make up a word, which is held out or not; a name or a town with a capital letter."""
        while True:
            count = self.random.choice((1, 2, 2, 3))
            text = "".join(
                self.random.choice(self.values["onset"]) + self.random.choice(VOWELS)
                for _ in range(count)
            )
            text += self.random.choice(ENDS)
            if len(text) > 2 and is_held_out("made up", text) == self.held_out:
                return text if key == "word" else text.capitalize()

    def shuffled(self, texts: list[str]) -> list[str]:
        return self.random.sample(texts, len(texts))

    def typed(self, text: str) -> str:
        """Type a text as people do: with or without a capital letter, a greeting and punctuation."""
        draw = self.random.random
        question = QUESTION.match(text)
        if draw() < 0.12:
            text = f"{self.random.choice(self.values['start'])} {text}"
        if draw() < 0.7:
            text = re.sub(r"\bi\b", "I", capital(text))
        elif draw() < 0.3:
            text = text.lower()
        if draw() < 0.7 and not text.endswith("="):
            text += "?" if question else self.random.choice(".!..")
        elif draw() < 0.1:
            text = text.replace("'", "")
        return text


def fill(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\{([a-z ]+)\}", lambda slot: values[slot[1]], text)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def messages(exchanges: list[Exchange]) -> Iterator[dict[str, str]]:
    for exchange in exchanges:
        yield {"role": "user", "content": exchange.said}
        yield {"role": "assistant", "content": exchange.replies[0]}
