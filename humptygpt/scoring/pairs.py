"""Minimal pairs and multiple choice: which of several texts does a model find likeliest?

A file has one JSON object per line, in one of two forms; "group" is optional:

    {"good": "The dogs bark.", "bad": "The dogs barks.", "group": "agreement"}
    {"context": "Snow is", "choices": [" white.", " black."], "answer": 0}

A test is passed if the right choice has the highest log-probability. A tie of n choices counts as 1 / n.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

from humptygpt.cli import UserError
from humptygpt.files import refuse_damaged
from humptygpt.generation.sampling import read_text
from humptygpt.scoring.text import log_probabilities, standard_error
from humptygpt.tokenizers.basic import Tokenizer

SUITES = ("english", "python")
RULE = "it must be an object with texts: good and bad, or choices, which differ, and answer, the index of the right one"


class Test(NamedTuple):
    choices: list[str]
    answer: int  # index of the right choice
    context: str = ""
    group: str = "all"


def read_tests(source: str) -> list[Test]:
    """Read a suite or a file of tests. Raises UserError if a line is not valid, which it names, or if there is none."""
    own = Path(__file__).parent / f"suites/{source}.jsonl"
    path = str(own) if source in SUITES else source
    tests = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            with refuse_damaged(f"{source}, line {number}", RULE):
                tests.append(parse(line))
    if not tests:
        raise UserError(f"{source} is empty; it should have one JSON object per line")
    return tests


def parse(line: str) -> Test:
    """Read a line. Raises some error if it is not valid."""
    row = json.loads(line)
    if "good" in row:
        row |= {"choices": [row["good"], row["bad"]], "answer": 0}
    choices = row["choices"]
    answer = range(len(choices)).index(row["answer"])
    test = Test(choices, answer, row.get("context", ""), row.get("group", "all"))
    "".join([test.context, test.group, *choices])  # raises TypeError unless all are texts
    if "" in choices or len({*choices}) < max(2, len(choices)):
        raise ValueError
    return test


def run_tests(model: nn.Module, tokenizer: Tokenizer, tests: list[Test]) -> np.ndarray:
    """Score every choice of every test. Returns (tests,): 1 if a test is passed, 0 if not, 1 / n for a tie, or nan.

    nan: the tokenizer lacks one of the characters.
    """
    encoded = {}
    for index, test in enumerate(tests):
        with suppress(UserError):  # a character that the tokenizer lacks
            encoded[index] = encode(test, tokenizer, model.config.block_size + 1)
    if not encoded:
        raise UserError("the tokenizer lacks characters of every test; choose other tests")
    sequences = [ids for choices in encoded.values() for ids, _ in choices]
    scores = iter(log_probabilities(model, sequences))
    passed = np.full(len(tests), np.nan)
    for index, choices in encoded.items():
        sums = np.array([next(scores)[-n:].sum(dtype=float) for _, n in choices])
        best = sums == sums.max()
        passed[index] = best[tests[index].answer] / best.sum()
    return passed


def encode(test: Test, tokenizer: Tokenizer, room: int) -> list[tuple[np.ndarray, int]]:
    """Encode each choice after the context. Returns the last `room` ids, and how many of them belong to the choice.

    Raises UserError if the tokenizer lacks a character.
    """
    # spaces that end the context may share a token with a choice, as in lm-evaluation-harness
    before = len(tokenizer.encode(test.context.rstrip()))
    texts = [tokenizer.encode(test.context + choice) for choice in test.choices]
    return [(np.concatenate([tokenizer.start(), ids])[-room:], max(1, len(ids) - before)) for ids in texts]


def by_group(tests: list[Test], values: np.ndarray) -> dict[str, tuple[int, float, float]]:
    """Summarize the tests: {group: (number of tests, mean, standard error)}, with a group "all".

    values: one per test; nan is left out.
    """
    groups = np.array([test.group for test in tests])
    table = {}
    for group in (*dict.fromkeys(groups), "all"):
        chosen = values[((groups == group) | (group == "all")) & ~np.isnan(values)]
        if len(chosen):
            table[str(group)] = len(chosen), float(chosen.mean()), standard_error(chosen)
    return table
