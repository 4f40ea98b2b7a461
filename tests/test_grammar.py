"""Sentences that are made of a dictionary's words."""

import re
from collections import Counter
from pathlib import Path

import pytest

from humptygpt.data import dictionary
from humptygpt.data.grammar import (
    HABEN,
    PATTERNS,
    SEIN,
    Adjective,
    Noun,
    Verb,
    Words,
    Writer,
    english_third,
    finite,
)

LIVE = Verb("wohnen", "", "wohnt", None, "gewohnt", HABEN, "none", "live", "lived")
WORK = Verb("arbeiten", "", "arbeitet", None, "gearbeitet", HABEN, "none", "work", "worked")
RISE = Verb("aufstehen", "auf", "steht", None, "aufgestanden", SEIN, "none", "get up", "got up")
READ = Verb("lesen", "", "liest", "liest", "gelesen", HABEN, "thing", "read", "read")
HELP = Verb("helfen", "", "hilft", "hilfst", "geholfen", HABEN, "dative", "help", "helped")
SOUP, BOY = Noun("Suppe", "f", "soup"), Noun("Junge", "m", "boy")
TIRED = Adjective("müde", "tired")


def writer(*words: Verb | Noun | Adjective) -> Writer:
    """Of these words, and for each kind that is not among them one more."""
    kinds = [
        {word: 1.0 for word in words if isinstance(word, kind)} for kind in (Verb, Noun, Adjective)
    ]
    return Writer(
        Words(
            *(kind or {other: 1.0} for kind, other in zip(kinds, (LIVE, SOUP, TIRED), strict=True))
        )
    )


def made(pattern, *words) -> dict[str, str]:
    """{German: English} of thousands of sentences."""
    found = writer(*words)
    tidy = lambda side: re.sub(r" (?=[.?!])", "", " ".join(side.split()))  # noqa: E731
    return {
        tidy(german): tidy(english) for german, english in (pattern(found) for _ in range(5000))
    }


@pytest.mark.parametrize(
    ("verb", "forms"),
    [
        (LIVE, ["wohne", "wohnst", "wohnt", "wohnen", "wohnt"]),
        (WORK, ["arbeite", "arbeitest", "arbeitet", "arbeiten", "arbeitet"]),
        (RISE, ["stehe", "stehst", "steht", "stehen", "steht"]),
        (READ, ["lese", "liest", "liest", "lesen", "lest"]),
        (HELP, ["helfe", "hilfst", "hilft", "helfen", "helft"]),
        (
            LIVE._replace(infinitive="sammeln", third="sammelt"),
            ["sammle", "sammelst", "sammelt", "sammeln", "sammelt"],
        ),
        (
            LIVE._replace(infinitive="reisen", third="reist"),
            ["reise", "reist", "reist", "reisen", "reist"],
        ),
    ],
    ids=lambda x: getattr(x, "infinitive", ""),
)
def test_verbs_are_conjugated(verb, forms):
    assert [finite(verb, person) for person in range(5)] == forms


def test_the_third_person_in_english():
    words = ["live", "get up", "wash", "carry", "play", "go", "have", "fix"]
    assert list(map(english_third, words)) == [
        "lives", "gets up", "washes", "carries", "plays", "goes", "has", "fixes"
    ]  # fmt: skip


def test_statements_and_questions_agree_with_their_subject_in_both_languages():
    found = made(Writer.question, RISE)
    assert found["wann stehst du auf?"] == "when do you get up?"
    assert found["steht er auf?"] == "does he get up?"
    found = made(Writer.statement, RISE)
    assert (
        found["er steht auf."] == "he gets up."
        and found["ich stehe nicht auf."] == "I do not get up."
    )
    assert found["heute stehen wir auf."] == "we get up today."


def test_objects_are_in_the_case_that_the_verb_takes():
    found = made(Writer.statement, READ, BOY)
    assert (
        found["ich lese den Jungen."] == "I read the boy." and found["ich lese es."] == "I read it."
    )
    found = made(Writer.statement, HELP, BOY)
    assert (
        found["ich helfe dem Jungen."] == "I help the boy."
        and found["ich helfe dir."] == "I help you."
    )
    assert "ich helfe den Jungen." not in found
    assert made(Writer.statement, READ, SOUP)["ich lese meine Suppe."] == "I read my soup."


def test_the_other_patterns():
    assert made(Writer.perfect, RISE)["sie ist aufgestanden."] == "she got up."
    assert made(Writer.perfect, READ)["hast du es gelesen?"] == "did you read it?"
    assert made(Writer.modal, READ)["er will es lesen."] == "he wants to read it."
    assert made(Writer.modal, LIVE)["wo willst du wohnen?"] == "where do you want to live?"
    assert made(Writer.modal, LIVE)["kann ich wohnen?"] == "can I live?"
    assert made(Writer.command, LIVE)["wohn bitte!"] == "please live!"
    assert made(Writer.command, RISE)["stehen Sie auf!"] == "get up!"
    assert (
        made(Writer.clause, RISE)["ich weiß nicht, wann er aufsteht."]
        == "I do not know when he gets up."
    )
    assert made(Writer.description)["warum bist du so müde?"] == "why are you so tired?"
    assert made(Writer.possession)["ich habe keine Suppe."] == "I have no soup."
    assert made(Writer.possession)["wo ist deine Suppe?"] == "where is your soup?"


def test_sentences_are_different_and_the_same_for_a_seed():
    found = writer(LIVE, READ, RISE, HELP, SOUP, BOY).sentences(2000)
    assert found == writer(LIVE, READ, RISE, HELP, SOUP, BOY).sentences(2000)
    assert len(set(found)) == len(found) > 1200
    for german, english in found:
        assert german[0].isupper() and german[-1] in ".?!" and english[-1] == german[-1], (
            german,
            english,
        )
        assert not re.search(" [ .?!]", german + english)
    assert len(PATTERNS) == 8


LINES = """Suppe {f} | Suppen {pl} :: soup; broth | soups
Junge {m} :: boy; lad
müde {adj} :: tired; weary
Achse {f} [techn.] :: axle
wohnen {vi} | wohnend | gewohnt :: to dwell; to live | dwelling; living | dwelled; lived
aufstehen {vi} | aufstehend | aufgestanden | er/sie steht auf | er/sie ist/war aufgestanden :: to get up {got; got} | getting up | got up | he/she gets up | he/she has/had got up
etw. lesen {vt} | lesend | gelesen | du liest | er/sie liest :: to read sth. {read; read} | reading | read | you read | he/she reads
singen {vi} | singend | gesungen :: to sing {sang; sung} | singing | sung
müde sein {v} :: to be tired
auf etw. warten {vi} | wartend | gewartet :: to wait for sth. | waiting | waited
"""  # noqa: E501
IN_USE = [
    "Die Suppe ist gut.",
    "Der Junge ist müde.",
    "Wir wohnen hier.",
    "Ich will aufstehen.",
    "Du liest.",
]
IN_ENGLISH = [
    "The soup is good.",
    "The boy is tired.",
    "We live here.",
    "I want to get up.",
    "You read.",
]


def test_the_vocabulary_has_what_is_in_use_with_its_usual_translation():
    pairs = [pair for pair in zip(IN_USE, IN_ENGLISH, strict=True) for _ in range(5)]
    shares = dictionary.translation_shares(LINES.splitlines(), pairs)
    assert shares["Suppe"] == {"soup": 1.0, "broth": 0.0} and shares["wohnen"] == {
        "to dwell": 0.0,
        "to live": 1.0,
    }
    in_use = Counter(word for german, _ in pairs for word in dictionary.WORDS.findall(german))
    found = dictionary.vocabulary(LINES.splitlines(), shares, in_use)
    assert list(found.verbs) == [
        LIVE._replace(auxiliary=None),
        RISE,
        READ,
    ]  # nothing says how singen is conjugated
    assert list(found.nouns) == [SOUP, BOY] and list(found.adjectives) == [TIRED]
    assert found.nouns[SOUP] == 5**0.5


def test_regular_verbs_are_recognised_by_their_participle():
    weak = dictionary.conjugate_weak
    assert weak("wohnen", "gewohnt") == ("", "wohnt") and weak("arbeiten", "gearbeitet") == (
        "",
        "arbeitet",
    )
    assert weak("einkaufen", "eingekauft") == ("ein", "kauft") and weak("besuchen", "besucht") == (
        "",
        "besucht",
    )
    assert weak("lesen", "gelesen") is None and weak("denken", "gedacht") is None


def test_a_dictionary_of_few_words_makes_no_sentences(folder):
    Path("de-en").write_text(
        "Satz | Ein Satz. | Ein Satz! :: sentence | A sentence. | A sentence!\n", encoding="utf-8"
    )
    assert dictionary.everyday_pairs(Path("de-en"))["generated sentence"] == []
