"""Sentences made of a dictionary's words, by the rules of a first German grammar book.

A dictionary has an example or two for most of its words, and none for most of their forms. Here verbs are conjugated
and join nouns and adjectives in statements, questions, commands and so on, in both languages at once. What they say is
often nonsense ("Does the soup sing?"), but a model learns from them what the forms mean and where the words stand.
"""

import random
import re
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

Pair = tuple[str, str]  # German, English

# (German, English, person) of the subjects; persons: 0 ich, 1 du, 2 er, 3 wir, sie and Sie, 4 ihr
PRONOUNS = [("ich", "I", 0), ("du", "you", 1), ("er", "he", 2), ("sie", "she", 2), ("es", "it", 2)]
PRONOUNS += [("wir", "we", 3), ("ihr", "you", 4), ("sie", "they", 3), ("Sie", "you", 3)]
OBJECTS = {
    "person": [("mich", "me"), ("dich", "you"), ("ihn", "him"), ("sie", "her"), ("uns", "us")],
    "dative": [("mir", "me"), ("dir", "you"), ("ihm", "him"), ("ihr", "her"), ("uns", "us")],
}
REFLEXIVE = ["mich", "dich", "sich", "uns", "euch"]
HABEN, SEIN = ("habe", "hast", "hat", "haben", "habt"), ("bin", "bist", "ist", "sind", "seid")
BE = ["am", "are", "is", "are", "are"]
MODALS = {
    "can": ["kann", "kannst", "kann", "können", "könnt"],
    "have to": ["muss", "musst", "muss", "müssen", "müsst"],
    "want to": ["will", "willst", "will", "wollen", "wollt"],
    "should": ["soll", "sollst", "soll", "sollen", "sollt"],
    "may": ["darf", "darfst", "darf", "dürfen", "dürft"],
    "would like to": ["möchte", "möchtest", "möchte", "möchten", "möchtet"],
}
QUESTIONS = [
    ("wo", "where"),
    ("wann", "when"),
    ("warum", "why"),
    ("wie", "how"),
    ("wie oft", "how often"),
]
ADVERBS = [
    ("heute", "today"),
    ("jetzt", "now"),
    ("oft", "often"),
    ("immer", "always"),
    ("hier", "here"),
]
DETERMINERS = {
    "d": "the",
    "ein": "a",
    "mein": "my",
    "dein": "your",
    "sein": "his",
    "ihr": "her",
    "unser": "our",
}
# of ein, mein and so on; d has its own forms
ENDINGS = {"nominative": {"m": "", "f": "e", "n": ""}, "accusative": {"m": "en", "f": "e", "n": ""}}
ENDINGS |= {"dative": {"m": "em", "f": "er", "n": "em"}}
ARTICLES = {
    "nominative": {"m": "der", "f": "die", "n": "das"},
    "accusative": {"m": "den", "f": "die", "n": "das"},
}
ARTICLES |= {"dative": {"m": "dem", "f": "der", "n": "dem"}}
PREPOSITIONS = [
    ("mit", "with", "dative"),
    ("in", "in", "dative"),
    ("auf", "on", "dative"),
    ("von", "from", "dative"),
]
PREPOSITIONS += [
    ("neben", "next to", "dative"),
    ("für", "for", "accusative"),
    ("ohne", "without", "accusative"),
]
CLAUSES = [
    ("ich weiß, dass", "I know that"),
    ("er sagt, dass", "he says that"),
    ("ich glaube, dass", "I think that"),
]
DEGREES = [
    ("", ""),
    ("sehr", "very"),
    ("zu", "too"),
    ("so", "so"),
    ("nicht", "not"),
    ("nicht mehr", "no longer"),
]


class Noun(NamedTuple):
    german: str
    gender: str  # m, f or n
    english: str


class Verb(NamedTuple):
    infinitive: str  # with its prefix: aufstehen
    prefix: str  # that is separated: auf
    third: str  # er steht
    second: str | None  # du stehst, where the dictionary has it
    participle: str | None  # aufgestanden
    auxiliary: tuple[str, ...] | None  # of the perfect: HABEN or SEIN
    object: str  # thing, person, dative, reflexive or none
    base: str  # get up
    past: str | None  # got up

    def stem(self) -> str:
        """steh-"""
        return stem_of(self.infinitive.removeprefix(self.prefix))

    def english(self, person: int) -> str:
        """get up, or gets up"""
        return english_third(self.base) if person == 2 else self.base


class Adjective(NamedTuple):
    german: str
    english: str


class Words(NamedTuple):
    """A vocabulary, and how often each of its words is to be used."""

    verbs: dict[Verb, float]
    nouns: dict[Noun, float]
    adjectives: dict[Adjective, float]


def stem_of(infinitive: str) -> str:
    """wohnen -> wohn-, sammeln -> sammel-"""
    return re.sub("e?n$", "", infinitive)


def with_t(stem: str) -> str:
    """wohn- -> wohnt, arbeit- -> arbeitet"""
    return stem + ("et" if re.search("[td]$", stem) else "t")


def finite(verb: Verb, person: int) -> str:
    """The verb with this person as its subject, without its prefix."""
    if person == 1 and verb.second:
        return verb.second
    if person == 1:
        base = verb.third.removesuffix("t")
        return base + ("t" if base[-1] in "sßxz" else "st")
    plural, stem = verb.infinitive.removeprefix(verb.prefix), verb.stem()
    first = re.sub("e([lr])$", r"\1e", stem) if plural.endswith("ln") else stem + "e"
    return [first, "", verb.third, plural, with_t(stem)][person]


def english_third(base: str) -> str:
    """get up -> gets up, carry -> carries"""
    first, space, rest = base.partition(" ")
    if first == "have":
        first = "ha"
    if re.search("(s|x|z|ch|sh|o)$", first):
        first += "e"
    return re.sub("([^aeiou])y$", r"\1ie", first) + "s" + space + rest


def do(person: int) -> str:
    return "does" if person == 2 else "do"


def a_or_an(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


class Writer:
    """Writes sentences with the words of a vocabulary; what it chooses depends on the seed."""

    def __init__(self, words: Words, seed: int = 0):
        self.random = random.Random(seed)
        self.cumulative = [(list(weights), list(accumulate(weights.values()))) for weights in words]

    def word(self, kind: int) -> Verb | Noun | Adjective:
        """kind: 0 verb, 1 noun, 2 adjective."""
        words, cumulative = self.cumulative[kind]
        return self.random.choices(words, cum_weights=cumulative)[0]

    def noun_phrase(self, case: str) -> Pair:
        """("mein Hund", "my dog")"""
        noun, determiner = self.word(1), self.random.choice(list(DETERMINERS))
        german = noun.german
        if (
            noun.gender == "m" and german.endswith("e") and case != "nominative"
        ):  # der Junge, den Jungen
            german += "n"
        if determiner == "d":
            return f"{ARTICLES[case][noun.gender]} {german}", f"the {noun.english}"
        english = a_or_an(noun.english) if determiner == "ein" else DETERMINERS[determiner]
        return f"{determiner}{ENDINGS[case][noun.gender]} {german}", f"{english} {noun.english}"

    def subject(self) -> tuple[str, str, int]:
        if self.random.random() < 0.25:
            return *self.noun_phrase("nominative"), 2
        return self.random.choice(PRONOUNS)

    def object(self, verb: Verb, person: int) -> Pair:
        if verb.object == "reflexive":
            return REFLEXIVE[person], ""
        if verb.object == "none":
            return "", ""
        if verb.object == "thing" or self.random.random() < 0.2:
            case = "dative" if verb.object == "dative" else "accusative"
            return (
                self.noun_phrase(case)
                if self.random.random() < 0.85 or case == "dative"
                else ("es", "it")
            )
        return self.random.choice(OBJECTS[verb.object])

    def modifier(self) -> Pair:
        """An adverb, or a preposition with its noun, or nothing."""
        drawn = self.random.random()
        if drawn < 0.2:
            return self.random.choice(ADVERBS)
        if drawn < 0.4:
            german, english, case = self.random.choice(PREPOSITIONS)
            noun = self.noun_phrase(case)
            return f"{german} {noun[0]}", f"{english} {noun[1]}"
        return "", ""

    # Each pattern below returns a pair without its capital letter; a question ends in "?", a command in "!".

    def statement(self) -> Pair:
        (subject, who, person), verb = self.subject(), self.word(0)
        (thing, what), (how, manner) = self.object(verb, person), self.modifier()
        english = f"{verb.english(person)} {what} {manner}"
        negation = self.random.random()
        if negation < 0.2:
            how, english = f"nicht {how}", f"{do(person)} not {verb.base} {what} {manner}"
        if how and negation > 0.7:  # what comes first swaps with the subject
            return (
                f"{how} {finite(verb, person)} {subject} {thing} {verb.prefix}.",
                f"{who} {english}.",
            )
        return f"{subject} {finite(verb, person)} {thing} {how} {verb.prefix}.", f"{who} {english}."

    def question(self) -> Pair:
        (subject, who, person), verb = self.subject(), self.word(0)
        word, asked = self.random.choice([("", ""), *QUESTIONS])
        if verb.object == "thing" and self.random.random() < 0.2:
            (word, asked), (thing, what) = ("was", "what"), ("", "")
        else:
            thing, what = self.object(verb, person)
        return (
            f"{word} {finite(verb, person)} {subject} {thing} {verb.prefix}?",
            f"{asked} {do(person)} {who} {verb.base} {what}?",
        )

    def modal(self) -> Pair:
        (subject, who, person), verb = self.subject(), self.word(0)
        (thing, what), (how, manner) = self.object(verb, person), self.modifier()
        modal = self.random.choice(list(MODALS))
        german, rest = MODALS[modal][person], f"{verb.base} {what} {manner}"
        main = modal.replace("have", "has").replace("want", "wants") if person == 2 else modal
        if self.random.random() < 0.5:
            return f"{subject} {german} {thing} {how} {verb.infinitive}.", f"{who} {main} {rest}."
        word, asked = self.random.choice([("", ""), ("", ""), *QUESTIONS])
        first, _, second = modal.partition(" ")
        if first in ("have", "want"):
            first, second = do(person), modal
        return (
            f"{word} {german} {subject} {thing} {how} {verb.infinitive}?",
            f"{asked} {first} {who} {second} {rest}?",
        )

    def perfect(self) -> Pair:
        verb = self.word(0)
        if not (verb.participle and verb.auxiliary and verb.past):
            return self.question()
        subject, who, person = self.subject()
        (thing, what), (how, manner), auxiliary = (
            self.object(verb, person),
            self.modifier(),
            verb.auxiliary[person],
        )
        drawn = self.random.random()
        if drawn < 0.5:
            return (
                f"{subject} {auxiliary} {thing} {how} {verb.participle}.",
                f"{who} {verb.past} {what} {manner}.",
            )
        if drawn < 0.65:
            return (
                f"{subject} {auxiliary} {thing} nicht {verb.participle}.",
                f"{who} did not {verb.base} {what}.",
            )
        word, asked = self.random.choice([("", ""), ("", ""), *QUESTIONS])
        return (
            f"{word} {auxiliary} {subject} {thing} {how} {verb.participle}?",
            f"{asked} did {who} {verb.base} {what} {manner}?",
        )

    def command(self) -> Pair:
        verb = self.word(0)
        if verb.object == "reflexive":
            return self.statement()
        (thing, what), please = self.object(verb, 3), self.random.random() < 0.5
        bitte, polite = ("bitte", "please ") if please else ("", "")
        stem = verb.stem()
        if (
            verb.third in (stem + "t", stem + "et") and self.random.random() < 0.6
        ):  # e becomes i in some of the others
            german = f"{with_t(stem).removesuffix('t')} {bitte} {thing} {verb.prefix}!"
        else:
            german = f"{finite(verb, 3)} Sie {bitte} {thing} {verb.prefix}!"
        return german, f"{polite}{verb.base} {what}!"

    def clause(self) -> Pair:
        (subject, who, person), verb = self.subject(), self.word(0)
        thing, what = self.object(verb, person)
        start, beginning = self.random.choice(CLAUSES)
        if self.random.random() < 0.5:
            word, asked = self.random.choice(QUESTIONS)
            start, beginning = f"ich weiß nicht, {word}", f"I do not know {asked}"
        german = f"{start} {subject} {thing} {verb.prefix}{finite(verb, person)}."
        return german, f"{beginning} {who} {verb.english(person)} {what}."

    def description(self) -> Pair:
        (subject, who, person), adjective = self.subject(), self.word(2)
        degree, extent = self.random.choice(DEGREES)
        drawn = self.random.random()
        if drawn < 0.5:
            return (
                f"{subject} {SEIN[person]} {degree} {adjective.german}.",
                f"{who} {BE[person]} {extent} {adjective.english}.",
            )
        word, asked = ("", "") if drawn < 0.75 else ("warum", "why")
        return (
            f"{word} {SEIN[person]} {subject} {degree} {adjective.german}?",
            f"{asked} {BE[person]} {who} {extent} {adjective.english}?",
        )

    def possession(self) -> Pair:
        (subject, who, person), noun, drawn = self.subject(), self.word(1), self.random.random()
        have = "has" if person == 2 else "have"
        ending = ENDINGS["accusative"][noun.gender]
        if drawn < 0.3:
            return (
                f"{subject} {HABEN[person]} kein{ending} {noun.german}.",
                f"{who} {have} no {noun.english}.",
            )
        if drawn < 0.6:
            english = f"{do(person)} {who} have {a_or_an(noun.english)} {noun.english}?"
            return f"{HABEN[person]} {subject} ein{ending} {noun.german}?", english
        thing, what = self.noun_phrase("nominative")
        if drawn < 0.8:
            return f"wo ist {thing}?", f"where is {what}?"
        return f"das ist {thing}.", f"this is {what}."

    def sentence(self) -> Pair:
        pattern = self.random.choices(list(PATTERNS), weights=list(PATTERNS.values()))[0]
        german, english = (" ".join(side.split()) for side in pattern(self))
        return tuple(
            re.sub(r" (?=[.?!])", "", side[0].upper() + side[1:]) for side in (german, english)
        )

    def sentences(self, n: int) -> list[Pair]:
        """Those of n that differ, in the order in which they were made; none where a kind of word is missing."""
        if not all(words for words, _ in self.cumulative):
            return []
        return list(dict.fromkeys(self.sentence() for _ in range(n)))


PATTERNS: dict[Callable[[Writer], Pair], int] = {
    Writer.statement: 5,
    Writer.question: 5,
    Writer.modal: 5,
    Writer.perfect: 4,
    Writer.command: 2,
    Writer.clause: 2,
    Writer.description: 3,
    Writer.possession: 3,
}
