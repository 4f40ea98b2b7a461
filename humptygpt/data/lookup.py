"""Look up the taught question that is nearest to a new one: what a bot has to be better than."""

from collections import Counter
from itertools import chain
from math import log, sqrt

from humptygpt.data.corpus import normalised

LONGEST = 200  # characters of a question that count


def look_up(taught: dict[str, str], questions: list[str]) -> list[str]:
    """Answer each question as the nearest one taught is answered. taught: {question: answer}.

    The nearest has the largest cosine similarity of its character 3- and 4-grams, of which rare ones weigh more.
    """
    known = {question: ngrams(question) for question in taught}
    counted = Counter(chain.from_iterable(known.values()))
    weights = {ngram: log(1 + len(known) / counted[ngram]) ** 2 for ngram in counted}

    def weight(some: set[str]) -> float:
        return sum(map(weights.__getitem__, some))

    lengths = {question: sqrt(1 + weight(found)) for question, found in known.items()}

    def nearest(asked: set[str]) -> str:
        return max(known, key=lambda near: weight(asked & known[near]) / lengths[near])

    return [taught[nearest(ngrams(question))] for question in questions]


def ngrams(text: str) -> set[str]:
    text = f" {normalised(text[:LONGEST])} "
    return {text[i : i + n] for n in (3, 4) for i in range(len(text) - n + 1)}
