"""Sentence pairs for translation: read from TSV or from two aligned files, cleaned, split and encoded.

A pair is a source text and its translation. On disk each side ends in the end-of-text token: source, target, source,
target. Pairs unsuitable for training are dropped and reported. A given validation or test split keeps every pair that
has both sides, so that scores on it stay comparable.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from humptygpt.config import UserError
from humptygpt.prepare.corpus import draw, read_from
from humptygpt.prepare.documents import SKIP_HINT, file_size, read_text_lines
from humptygpt.tokenizers import END_OF_TEXT, Tokenizer

SLACK = 8  # tokens by which one side may always be longer, for "Stop!" and "Halt, stehen bleiben!"
DROPPED = {  # why pairs are dropped, as the summary says it
    "too_long": "longer than {max_pair_tokens} tokens",
    "empty": "empty on one side",
    "lopsided": f"with a side longer than {{max_pair_ratio:g}} times the other plus {SLACK} tokens",
    "held_out": "held out",
}

# (split, (TSV,) or (source file, target file)); split None: each pair's split is drawn
PairFiles = list[tuple[str | None, tuple[Path, ...]]]


class Pair(NamedTuple):
    source: str
    target: str
    read: int  # bytes of the files read so far

    @property
    def texts(self) -> tuple[str, str]:
        return self[:2]


class Pairs:
    """Files of sentence pairs, and the split of each pair. Offers what corpus.Documents does."""

    task = "translation"
    separated = True
    cuts = None
    counts = ("pairs", "characters", "bytes", "tokens", "target_bytes", "target_tokens")

    def __init__(self, config, files: PairFiles, source: str):
        """Reads everything once, so that errors are reported before anything is written.

        config: a resolved prepare_data.PrepareConfig. source: what the files are called in meta.json.
        """
        self.config = config
        self.files = files
        self.source = source
        self.paths = [path for _, paths in files for path in paths]
        if config.held_out is not None:
            self.paths.append(Path(config.held_out))
        self.sizes = [sum(map(file_size, paths)) for _, paths in files]
        self.drawn = any(split is None for split, _ in files)
        with_test = config.test_fraction or not self.drawn
        self.splits = ("train", "val", "test") if with_test else ("train", "val")
        cleaned = self.splits if self.drawn else ("train",)
        self.encoder = partial(
            encode_pairs, cleaned, config.max_pair_tokens, config.max_pair_ratio
        )
        self.held_out = self.read_held_out()
        self.left_out = Counter()  # how many pairs, by reason
        self.val_below, self.test_below = self.survey()

    def survey(self) -> tuple[float, float]:
        """Count what will be left out. Returns the thresholds: draws below them are for validation and test.

        Of few pairs, the thresholds rise to the next draws, so that three different sources give three splits.
        """
        val = self.config.val_fraction
        test = self.config.test_fraction
        any_val = False
        any_pair = False
        self.text_size = 0
        above = []  # the two lowest draws that are not below val
        for position, pair in read_from(self, "checking the pairs"):
            if reason := self.why_left_out(pair, position.file):
                self.left_out[reason] += 1
                continue
            any_pair = True
            self.text_size += len("".join(pair.texts).encode())
            drawn = draw(pair.source)
            if drawn < val:
                any_val = True
            else:
                above = sorted({drawn, *above})[:2]
        if not any_pair:
            rule = "write a line as SOURCE, one tab, TARGET"
            raise UserError(
                f"{self.source} has no pairs; {rule}; left out: {dict(self.left_out)}"
            )
        just_above = [math.nextafter(drawn, 1) for drawn in above]
        val_below = val if any_val else just_above.pop(0)
        test_below = max([val + test, *just_above[:1]]) if test else val_below
        return val_below, test_below

    def read_held_out(self) -> set[str]:
        """Read the normalised sentences in the file held_out and in given validation and test splits, and all that
        pairs connect with them: their translations, the other translations of these, and so on; none without the file.
        """
        if self.config.held_out is None:
            return set()
        lines = read_text_lines(Path(self.config.held_out), self.config.encoding_errors)
        held_out = {normalised(line.partition("\t")[0]) for line, _ in lines}
        for number, (split, _) in enumerate(self.files):
            if split in ("val", "test"):
                held_out.update(normalised(pair.source) for pair in self.read(number))
        held_out.discard("")
        before = 0
        while len(held_out) > before:
            before = len(held_out)
            for number, (split, _) in enumerate(self.files):
                for pair in self.read(number) if split not in ("val", "test") else ():
                    texts = set(map(normalised, pair.texts)) - {""}
                    if texts & held_out:
                        held_out |= texts
        return held_out

    def why_left_out(self, pair: Pair, number: int) -> str:
        """Return why a pair of files number is left out, or "". Nothing is held out of a given val or test split."""
        if not all(pair.texts):
            return "empty"
        if not self.held_out or self.files[number][0] in ("val", "test"):
            return ""
        return "" if self.held_out.isdisjoint(map(normalised, pair.texts)) else "held_out"

    def read(self, number: int) -> Iterator[Pair]:
        """Read the pairs of files number, one for each line, empty ones too."""
        _, paths = self.files[number]
        if len(paths) == 1:
            return read_tsv(
                paths[0], self.config.encoding_errors, self.config.skip_bad_lines
            )
        return read_aligned(*paths, self.config.encoding_errors)

    def assign(self, pair: Pair, number: int) -> list[tuple[str, Pair]]:
        """Return (split, pair) for a pair of files number; none where it is left out."""
        if self.why_left_out(pair, number):
            return []
        if given := self.files[number][0]:
            return [(given, pair)]
        drawn = draw(pair.source)
        if drawn < self.val_below:
            return [("val", pair)]
        return [("test" if drawn < self.test_below else "train", pair)]

    def extra_meta(self, splits: dict[str, Counter], first_text: str) -> dict:
        """Return the entries of meta.json that only pairs have. first_text: the start of the training split."""
        sides = first_text.split(END_OF_TEXT)[:-1]
        dropped = sum(splits.values(), self.left_out)
        return {
            "longest": max(counted["longest"] for counted in splits.values()),
            "dropped": {why: dropped[why] for why in DROPPED},
            "examples": list(zip(sides[::2], sides[1::2], strict=False))[:3],
        }

    def summary(self, meta: dict) -> dict[str, str]:
        """Return the lines of the summary that only pairs have."""
        dropped = [
            f"{count:,} {DROPPED[why].format(**vars(self.config))}"
            for why, count in meta["dropped"].items()
            if count
        ]
        examples = [f"{source} -> {target}" for source, target in meta["examples"]]
        return {
            "longest side": f"{meta['longest']:,} tokens, end-of-text included",
            "dropped pairs": ", ".join(dropped) or "none",
            "examples": ("\n" + 17 * " ").join(examples),
        }


# --------------------------------------------------------------------------------------
# Files -> pairs


def clean(text: str) -> str:
    """Return the text without spaces around it, and with each run of white space as one space."""
    return " ".join(text.split())


def normalised(text: str) -> str:
    """Return the words of a text alone: texts that differ in case, punctuation or white space are the same."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text.casefold())))


def read_tsv(path: Path, errors: str, skip_bad_lines: bool = False) -> Iterator[Pair]:
    """Read SOURCE, a tab, TARGET on each line. A blank line is an empty pair; with skip_bad_lines, so is a bad line."""
    for number, (line, read) in enumerate(read_text_lines(path, errors), start=1):
        sides = line.split("\t")
        if len(sides) != 2:
            if line.strip() and not skip_bad_lines:
                rule = "write a line as SOURCE, one tab, TARGET"
                raise UserError(
                    f"{path}, line {number:,} has {len(sides) - 1:,} tabs; {rule}; {SKIP_HINT}"
                )
            sides = ("", "")
        yield Pair(*map(clean, sides), read)


def read_aligned(source: Path, target: Path, errors: str) -> Iterator[Pair]:
    """Read the pairs of two files with a sentence per line. Raises UserError where one has more lines."""
    lines = zip_longest(read_text_lines(source, errors), read_text_lines(target, errors))
    for both in lines:
        if None in both:
            rule = "each line must be the translation of the other's"
            raise UserError(f"{source} has not as many lines as {target}; {rule}")
        (source_line, read), (target_line, also_read) = both
        yield Pair(clean(source_line), clean(target_line), read + also_read)


# --------------------------------------------------------------------------------------
# Pairs -> tokens


def encode_pairs(
    cleaned: tuple[str, ...],
    max_tokens: int,
    max_ratio: float,
    tokenizer: Tokenizer,
    split: str,
    pairs: list[Pair],
) -> tuple[list[np.ndarray], Counter]:
    """Return (token ids, counts) of the pairs, which are of one split.

    Dropped from the splits `cleaned` are pairs with a side, end-of-text included, over max_tokens, or over max_ratio
    times the other plus SLACK.
    """
    ids = []
    counted = Counter()
    sides = iter(tokenizer.encode_batch(chain.from_iterable(pair.texts for pair in pairs)))
    for pair, *both in zip(pairs, sides, sides, strict=True):
        source, target = (np.append(side, tokenizer.eot) for side in both)
        shorter, longer = sorted((len(source), len(target)))
        if split in cleaned and longer > max_tokens:
            counted["too_long"] += 1
        elif split in cleaned and longer > max_ratio * shorter + SLACK:
            counted["lopsided"] += 1
        else:
            ids += [source, target]
            counted["pairs"] += 1
            counted["characters"] += len(pair.source + pair.target)
            counted["target_bytes"] += len(pair.target.encode())
            counted["bytes"] += len((pair.source + pair.target).encode())
            counted["target_tokens"] += len(target)
            counted["longest"] = max(counted["longest"], longer)
    return ids, counted
