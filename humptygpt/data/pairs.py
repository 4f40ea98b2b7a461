"""Sentence pairs for translation: read from TSV or from two aligned files, cleaned, split and encoded.

A pair is a source text and its translation. On disk each side ends in the end-of-text token: source, target, source,
target. Pairs unsuitable for training are dropped and reported. A given validation or test split keeps every pair, so
that scores on it stay comparable.
"""

import re
import sys
import unicodedata
from collections.abc import Iterator
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from humptygpt.core.errors import UserError
from humptygpt.data.corpus import draw, file_fingerprint, progress_bar, read_from
from humptygpt.data.documents import SKIP, kind_of, read_lines, unpacked_name
from humptygpt.data.token_files import token_dtype
from humptygpt.tokenizer.tokenizers import END_OF_TEXT, Tokenizer

SLACK = 8  # tokens by which one side may always be longer, for "Stop!" and "Halt, stehen bleiben!"


class Pair(NamedTuple):
    source: str
    target: str
    read: int  # bytes of the files read so far


class Pairs:
    """Files of sentence pairs, and the split of each pair. Offers what corpus.Corpus does."""

    task = "translation"
    separated = True
    counts = ("pairs", "characters", "bytes", "tokens", "target_bytes", "target_tokens")
    other_counts = ("longest", "too_long", "lopsided")  # the most tokens of a side; dropped pairs

    def __init__(self, config, parts: list[tuple[str | None, tuple[Path, ...]]], source: str):
        """Reads everything once, so that errors are reported before anything is written.

        config: a resolved prepare_data.PrepareConfig. parts: (split, (TSV,) or (source file, target file)); split None:
        each pair's split is drawn from its source. source: what the files are called in meta.json.
        """
        self.config, self.parts, self.source = config, parts, source
        self.sizes = [sum(path.stat().st_size for path in paths) for _, paths in parts]
        self.drawn = any(split is None for split, _ in parts)
        self.splits = (
            ("train", "val", "test") if config.test_fraction or not self.drawn else ("train", "val")
        )
        cleaned = {split: self.drawn or split == "train" for split in self.splits}
        self.encoder = partial(encode_pairs, cleaned, config.max_pair_tokens, config.max_pair_ratio)
        if config.text_key != "text":
            print(f"note: text_key={config.text_key} has no effect on pairs", file=sys.stderr)
        self.found = {}  # what corpus.Corpus notes of its files
        self.held_out = self.held_out_sources()
        self.pairs, self.empty, self.first_empty, self.left_out = 0, 0, None, 0
        self.val_below, self.test_below = self.survey()
        if self.empty == self.pairs:
            only_empty = (
                f" but empty ones, the first of them {self.first_empty}"
                if self.pairs
                else "; it is empty"
            )
            raise UserError(f"{source} has no pairs{only_empty}")

    def survey(self) -> tuple[float, float]:
        """Count the pairs and the empty ones. Returns the thresholds: draws below them are for validation and test.

        Of few pairs, the thresholds rise to the next draws, so that three different sources give three splits.
        """
        val, test = self.config.val_fraction, self.config.test_fraction
        any_val, above = False, []  # whether a draw is below val; the two lowest draws that are not
        with progress_bar(sum(self.sizes), "checking the pairs") as bar:
            for number, line, pair, read in read_from(self, 0, 0):
                self.pairs += 1
                if self.pairs % 1000 == 0:
                    bar.update(read - bar.n)
                if not (pair.source and pair.target):
                    self.count_empty(number, line, pair)
                elif self.is_held_out(pair, number):
                    self.left_out += 1
                elif self.drawn:
                    drawn = draw(pair.source)
                    any_val |= drawn < val
                    if drawn >= val and drawn not in above:
                        above = sorted([*above, drawn])[:2]
        just_above = [float(np.nextafter(drawn, 1)) for drawn in above]
        if just_above and not any_val:
            val = just_above.pop(0)
        return val, max(
            self.config.val_fraction + test, just_above[0]
        ) if just_above and test else val

    def count_empty(self, number: int, line: int, pair: Pair) -> None:
        split, paths = self.parts[number]
        where = f"{paths[0] if len(paths) == 1 or not pair.source else paths[1]}, line {line:,}"
        if split in ("val", "test"):
            raise UserError(f"{where} is empty; a {split} split keeps every pair")
        self.empty += 1
        self.first_empty = self.first_empty or where

    def held_out_sources(self) -> set[str]:
        """The normalised sources in the file held_out and in given validation and test splits; none without the key."""
        if self.config.held_out is None:
            return set()
        found = set(
            map(normalised, read_sources(Path(self.config.held_out), self.config.encoding_errors))
        ) - {""}
        if not found:
            raise UserError(
                f"held_out={self.config.held_out} has no sentences; write one source per line"
            )
        for number, (split, _) in enumerate(self.parts):
            if split in ("val", "test"):
                found.update(normalised(pair.source) for pair in self.read(number))
        return found

    def is_held_out(self, pair: Pair, number: int) -> bool:
        """Whether a pair of part number is left out; a given validation or test split keeps every pair."""
        if not self.held_out or self.parts[number][0] in ("val", "test"):
            return False
        return normalised(pair.source) in self.held_out

    def fingerprint(self) -> list:
        held_out = (
            [] if self.config.held_out is None else [("held_out", (Path(self.config.held_out),))]
        )
        return [
            [split, [file_fingerprint(path) for path in paths]]
            for split, paths in [*self.parts, *held_out]
        ]

    def read(self, number: int) -> Iterator[Pair]:
        """The pairs of part number, one for each line, empty ones too."""
        _, paths = self.parts[number]
        if len(paths) == 1:
            return read_tsv(paths[0], self.config.encoding_errors, self.config.skip_bad_lines)
        return read_aligned(*paths, self.config.encoding_errors)

    def assign(self, pair: Pair, number: int, split: str) -> list[tuple]:
        """The entry of a pair of part number, as in corpus.Unit; none where it is left out. split: unused."""
        if not (pair.source and pair.target) or self.is_held_out(pair, number):
            return []
        drawn, given = draw(pair.source), self.parts[number][0]
        drawn_split = (
            "val" if drawn < self.val_below else "test" if drawn < self.test_below else "train"
        )
        return [(given or drawn_split, (pair.source, pair.target), True)]

    def why_short(self, splits: dict[str, dict[str, int]]) -> str:
        """Why a split may have too few tokens, and the way out."""
        dropped = (
            ", ".join(f"{count:,} {why}" for why, count in self.dropped(splits).items() if count)
            or "none"
        )
        keys = ("val_fraction", "test_fraction") if self.drawn else ()
        limits = [
            f"{key}={getattr(self.config, key)}"
            for key in (*keys, "max_pair_tokens", "max_pair_ratio")
        ]
        return (
            f"{self.pairs:,} pairs, dropped: {dropped}; change {' or '.join(limits)}, or add pairs"
        )

    def dropped(self, splits: dict[str, dict[str, int]]) -> dict[str, int]:
        too_long, lopsided = (
            sum(counted[why] for counted in splits.values()) for why in ("too_long", "lopsided")
        )
        return {
            "too_long": too_long,
            "empty": self.empty,
            "lopsided": lopsided,
            "held_out": self.left_out,
        }

    def extra_meta(self, splits: dict[str, dict[str, int]], first_text: str) -> dict:
        """The entries of meta.json that only this kind of data has. first_text: the start of the training split."""
        sides = first_text.split(END_OF_TEXT)[:-1]
        return {
            "languages": languages(self.parts[0][1]),
            "longest": max(
                counted["longest"] for counted in splits.values()
            ),  # tokens of a side, end-of-text included
            "dropped": self.dropped(splits),
            "first_empty": self.first_empty,
            "examples": list(zip(sides[::2], sides[1::2], strict=False))[:3],
        }

    def notes(self) -> list[str]:
        return []  # the summary has all

    def summary(self, meta: dict) -> dict[str, str]:
        """The lines of the summary that only this kind of data has."""
        empty = "with an empty side" + " or not one tab" * self.config.skip_bad_lines
        reasons = {
            "too_long": f"longer than {self.config.max_pair_tokens} tokens",
            "empty": f"{empty} (the first: {meta['first_empty']})",
            "lopsided": f"with a side longer than {self.config.max_pair_ratio:g} times the other plus {SLACK} tokens",
            "held_out": "held out",
        }
        dropped = ", ".join(
            f"{count:,} {reasons[why]}" for why, count in meta["dropped"].items() if count
        )
        return {
            "longest side": f"{meta['longest']:,} tokens, end-of-text included",
            "dropped pairs": dropped or "none",
            "examples": ("\n" + 17 * " ").join(
                f"{source} -> {target}" for source, target in meta["examples"]
            ),
        }


# --------------------------------------------------------------------------------------
# Files -> pairs


def is_tsv(path: Path) -> bool:
    return kind_of(path) == ".tsv"


def clean(text: str) -> str:
    """The text without spaces around it, and with each run of white space as one space."""
    return " ".join(text.split())


def normalised(text: str) -> str:
    """The words of the text alone: texts that differ in case, punctuation or white space are the same."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text.casefold())))


def read_sources(path: Path, errors: str) -> Iterator[str]:
    """The source of each pair of a TSV, or each line of another file."""
    if is_tsv(path):
        return (pair.source for pair in read_tsv(path, errors))
    return (line for line, _ in read_lines(path, errors))


def read_tsv(path: Path, errors: str, skip_bad_lines: bool = False) -> Iterator[Pair]:
    """SOURCE, a tab, TARGET on each line. A blank line is an empty pair; with skip_bad_lines, so is any other line."""
    for number, (line, read) in enumerate(read_lines(path, errors), start=1):
        sides = line.split("\t")
        if len(sides) != 2:
            if line.strip() and not skip_bad_lines:
                tabs = f"{len(sides) - 1:,} tabs" if len(sides) > 1 else "no tab"
                raise UserError(
                    f"{path}, line {number:,} has {tabs}; write a line as SOURCE, one tab, TARGET; {SKIP}"
                )
            sides = ("", "")
        yield Pair(*map(clean, sides), read)


def read_aligned(source: Path, target: Path, errors: str) -> Iterator[Pair]:
    """The pairs of two files with a sentence per line. Raises UserError where one has more lines."""
    lines = [0, 0]
    for both in zip_longest(read_lines(source, errors), read_lines(target, errors)):
        lines = [number + (side is not None) for number, side in zip(lines, both, strict=True)]
        if lines[0] == lines[1]:
            (text, read), (translation, also_read) = both
            yield Pair(clean(text), clean(translation), read + also_read)
    if lines[0] != lines[1]:
        raise UserError(
            f"{source} has {lines[0]:,} lines, but {target} has {lines[1]:,}; each line must be the other's translation"
        )


def languages(paths: tuple[Path, ...]) -> list[str] | None:
    """Language codes from names like a.de and a.en, or pairs.de-en.tsv; None where the names have none."""
    names = [unpacked_name(path) for path in paths]
    if len(names) == 1:
        found = Path(names[0]).stem.replace(".", "-").replace("_", "-").split("-")[-2:]
    else:
        found = [name.rpartition(".")[2] for name in names]
    codes = len(found) == 2 and all(
        len(code) == 2 and code.isalpha() and code.islower() for code in found
    )
    return found if codes and found[0] != found[1] else None


# --------------------------------------------------------------------------------------
# Pairs -> tokens


def encode_pairs(
    cleaned: dict[str, bool],
    max_tokens: int,
    max_ratio: float,
    tokenizer: Tokenizer,
    entries: list[tuple],
) -> dict[str, tuple[np.ndarray, dict]]:
    """{split: (token ids, counts)} of the entries of a unit; cleaned: {split: whether pairs are dropped from it}.

    Dropped are pairs with a side, end-of-text included, over max_tokens, or over max_ratio times the other plus SLACK.
    """
    encoded = {}
    for split, cleans in cleaned.items():
        ids, counted = (
            [np.empty(0, np.int64)],
            dict.fromkeys((*Pairs.counts, *Pairs.other_counts), 0),
        )
        pairs = [pair for entry_split, pair, _ in entries if entry_split == split]
        sides = iter(tokenizer.encode_batch(chain.from_iterable(pairs)))
        for pair, *both in zip(pairs, sides, sides, strict=True):
            source, target = (np.append(side, tokenizer.eot) for side in both)
            shorter, longer = sorted((len(source), len(target)))
            if cleans and longer > max_tokens:
                counted["too_long"] += 1
            elif cleans and longer > max_ratio * shorter + SLACK:
                counted["lopsided"] += 1
            else:
                ids += [source, target]
                counted["pairs"] += 1
                counted["characters"] += sum(map(len, pair))
                counted["bytes"] += sum(len(side.encode()) for side in pair)
                counted["target_bytes"] += len(pair[1].encode())
                counted["target_tokens"] += len(target)
                counted["longest"] = max(counted["longest"], longer)
        tokens = np.concatenate(ids).astype(token_dtype(tokenizer))
        encoded[split] = tokens, counted | {"tokens": len(tokens)}
    return encoded
