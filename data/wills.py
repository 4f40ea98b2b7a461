"""Sentences like one in the article linked in README.md. Some words are determined by much earlier words.

Example: "Damian had a secret child, a girl in Rome, and he had written in his will that the magical orb and the old
boat should belong to her and be sent to Rome." With enough context, only the random choices are unpredictable: the
name, the child, the city, and one to four things.
"""

import random

from humptygpt.data.builtin import keep

WILLS = 40_000
# one line for each group: men, women, cities, adjectives, nouns
WORDS = """
Damian Albert Bruno Carl Edgar
Agnes Bertha Clara Doris Emma
Rome Paris Vienna Lisbon Athens Cairo Delhi Tokyo Lima Oslo Kyoto Bern
magical old silver broken golden little heavy painted wooden green
orb boat clock ring house garden mirror piano sword table horse book
"""

tokenizer = "sentencepiece"
vocab_size = 512


def fetch(config):
    return keep(f"{config.name}.txt", write_wills(WILLS)), f"{WILLS:,} generated wills"


def write_wills(count: int) -> str:
    """Generate sentences, one per line."""
    men, women, cities, adjectives, nouns = map(str.split, WORDS.strip().splitlines())
    draw = random.Random(0)
    lines = []
    for _ in range(count):
        person = draw.choice(men + women)
        city = draw.choice(cities)
        he, his = ("he", "his") if person in men else ("she", "her")
        child, her = draw.choice([("girl", "her"), ("boy", "him")])
        things = [f"the {draw.choice(adjectives)} {draw.choice(nouns)}" for _ in range(draw.randint(1, 4))]
        *others, last = things
        listed = f"{', '.join(others)} and {last}" if others else last
        lines.append(
            f"{person} had a secret child, a {child} in {city}, and {he} had written in {his} will that {listed}"
            f" should belong to {her} and be sent to {city}.\n"
        )
    return "".join(lines)
