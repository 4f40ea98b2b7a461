"""Minimal pairs and multiple choice: which of several texts does a model find likeliest?

A file has one JSON object per line, in one of two forms; "group" is optional:

    {"good": "The dogs bark.", "bad": "The dogs barks.", "group": "agreement"}
    {"context": "Snow is", "choices": [" white.", " black."], "answer": 0}

A test is passed by sum if the right choice has the highest log-probability, and by byte if it has the highest
log-probability per byte, so that short choices have no advantage. A tie of n choices counts as 1 / n.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from humptygpt.config import UserError, note
from humptygpt.sampling import read_text
from humptygpt.scoring.text import score, standard_error, tokens_at_once
from humptygpt.tokenizers import Tokenizer

SUITES = Path(__file__).parent / "suites"


class Test(NamedTuple):
    context: str
    choices: list[str]
    answer: int  # index of the right choice
    group: str


def read_tests(path: str) -> list[Test]:
    """Read a file of tests. Raises UserError, which names the line, if one is not valid, or if there are none."""
    tests = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                tests.append(parse(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: {error}") from error
    if not tests:
        raise UserError(f"{path} is empty; it should have one JSON object per line")
    return tests


def parse(row: object) -> Test:
    """Check a line. Raises ValueError if it is not valid."""
    if not isinstance(row, dict):
        raise ValueError("it is not a JSON object")
    if "good" in row:
        row = {"choices": [row["good"], row.get("bad")], "answer": 0} | row
    context, group = row.get("context", ""), row.get("group", "all")
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list):
        raise ValueError("it has neither good and bad nor choices and answer")
    if not all(isinstance(each, str) and each for each in (*choices, group)):
        raise ValueError("good, bad, choices and group must be texts that are not empty")
    if not isinstance(context, str):
        raise ValueError("context must be a text")
    if len(set(choices)) < max(2, len(choices)):
        raise ValueError("its choices do not differ")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"answer={answer} is not an index of its {len(choices)} choices")
    return Test(context, choices, answer, group)


def run_tests(model: nn.Module, tokenizer: Tokenizer, tests: list[Test]) -> np.ndarray:
    """Score every choice of every test. Returns (tests, 2): passed by sum and by byte, 0 to 1, or nan.

    nan: the tokenizer lacks one of the characters.
    """
    passed = np.full((len(tests), 2), np.nan)
    sequences, lengths, readable = [], [], []
    for index, (context, choices, *_) in enumerate(tests):
        try:
            before, *whole = map(
                tokenizer.encode, [context, *(context + x for x in choices)]
            )
        except UserError:  # a character that the tokenizer lacks
            continue
        readable.append(index)
        sequences += [np.concatenate([tokenizer.start(), ids]) for ids in whole]
        lengths += [max(1, len(ids) - len(before)) for ids in whole]
    if not readable:
        raise UserError("the tokenizer lacks characters of every test; choose other tests")
    sums = iter(sum_log_probabilities(model, sequences, lengths))
    for index in readable:
        _, choices, answer, _ = tests[index]
        own = np.array([next(sums) for _ in choices])
        sizes = [len(choice.encode()) for choice in choices]
        scores = np.stack([own, own / sizes], axis=1)
        best = scores == scores.max(axis=0)
        passed[index] = best[answer] / best.sum(axis=0)
    if missing := len(tests) - len(readable):
        what = "have characters that the tokenizer lacks; they are left out"
        note(f"{missing} of {len(tests)} tests {what}")
    return passed


@torch.inference_mode()
def sum_log_probabilities(
    model: nn.Module, sequences: list[np.ndarray], lengths: list[int]
) -> np.ndarray:
    """Sum the log-probabilities of the last lengths[i] tokens of each sequence, which has at least one more token.

    A sequence longer than the context loses its beginning. Sequences of similar length share a padded batch: later
    tokens do not affect earlier ones, so each is scored as if it were alone.
    """
    room = model.config.block_size + 1
    device = next(model.parameters()).device
    sequences = [ids[-room:] for ids in sequences]
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    at_once = tokens_at_once(model)
    sums = np.empty(len(sequences))
    while order:
        longest = len(sequences[order[-1]])
        count = max(1, at_once // longest)
        rows, order = order[-count:], order[:-count]
        texts = [torch.from_numpy(sequences[i]) for i in rows]
        batch = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        scores = score(model, batch.to(device), at_once)
        for row, i in zip(scores.cpu().double().numpy(), rows, strict=True):
            end = len(sequences[i]) - 1
            sums[i] = row[max(0, end - lengths[i]) : end].sum()
    return sums


def by_group(tests: list[Test], values: np.ndarray) -> dict[str, tuple[int, float, float]]:
    """Return {group: (number of tests, mean, standard error)}, with a group "all".

    values: one per test; nan is left out.
    """
    groups = np.array([test.group for test in tests])
    table = {}
    for group in (*dict.fromkeys(groups), "all"):
        own = values[((groups == group) | (group == "all")) & ~np.isnan(values)]
        if len(own):
            table[str(group)] = len(own), float(own.mean()), standard_error(own)
    return table
