"""Sentence pairs for translation: read from TSV or from two files that go line by line, cleaned, drawn, encoded.

A pair is a source text and its translation. On disk both end in the end-of-text token, one behind the other: source,
target, source, target. What training should not see is dropped, counted and told; a split that was given for
validation or test keeps every pair, or its scores would be of another test.
"""

import sys
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from humptygpt import corpus
from humptygpt.configurator import UserError
from humptygpt.corpus import Encoder, Progress, Unit, draw, progress_bar, split_row
from humptygpt.documents import kind_of, read_lines, unpacked_name
from humptygpt.token_files import token_dtype
from humptygpt.tokenizer import END_OF_TEXT, Tokenizer

SLACK = 8  # tokens that one side may be longer in any case, so that "Stop!" may be "Halt, stehen bleiben!"


class Pair(NamedTuple):
    source: str
    target: str
    read: int  # bytes read of the files up to here


class Pairs:
    """The files of sentence pairs, and which of them are for training, validation and test."""

    task = "translation"
    separated = True
    counts = ("pairs", "characters", "bytes", "tokens", "target_bytes", "target_tokens")
    also_counted = ("longest", "too_long", "lopsided")  # the most tokens of a side; pairs that were dropped

    def __init__(self, config, parts: list[tuple[str | None, tuple[Path, ...]]], source: str):
        """Reads everything once, so that what is wrong is told before anything is written.

        config: a prepare_data.PrepareConfig without open ends. parts: (split, (TSV,) or (source file, target file));
        split None: pairs are drawn for the splits, by their source alone. source: where they are from, in words.
        """
        self.config, self.parts, self.source = config, parts, source
        self.sizes = [sum(path.stat().st_size for path in paths) for _, paths in parts]
        self.drawn = any(split is None for split, _ in parts)
        self.splits = ("train", "val", "test") if config.test_fraction or not self.drawn else ("train", "val")
        if config.text_key != "text":
            print(f"note: text_key={config.text_key} has no effect on pairs", file=sys.stderr)
        self.pairs, self.empty, self.first_empty = 0, 0, None
        self.val_below, self.test_below = self.survey()
        if self.empty == self.pairs:
            raise UserError(
                f"{source} has no pairs"
                + (f" but empty ones, the first of them {self.first_empty}" if self.pairs else "; it is empty")
            )

    def survey(self) -> tuple[float, float]:
        """Count the pairs and the empty ones; (draws below this are for validation, others below this for test).

        Of a few pairs, the next higher draws are taken, so that no split is empty as long as there are three sources.
        """
        val, test = self.config.val_fraction, self.config.test_fraction
        some_val, above = False, []  # whether a draw is below val; the two lowest draws that are not
        with progress_bar(sum(self.sizes), "looking at the pairs") as bar:
            for number, (split, paths) in enumerate(self.parts):
                before = sum(self.sizes[:number])
                for line, pair in enumerate(self.read(number), start=1):
                    self.pairs += 1
                    if self.pairs % 1000 == 0:
                        bar.update(before + pair.read - bar.n)
                    if not (pair.source and pair.target):
                        path = paths[0] if len(paths) == 1 or not pair.source else paths[1]
                        if split in ("val", "test"):
                            raise UserError(f"{path}, line {line:,} is empty; a {split} split keeps every pair")
                        self.empty += 1
                        self.first_empty = self.first_empty or f"{path}, line {line:,}"
                    elif self.drawn:
                        drawn = draw(pair.source)
                        some_val |= drawn < val
                        if drawn >= val and drawn not in above:
                            above = sorted([*above, drawn])[:2]
        just_above = [float(np.nextafter(drawn, 1)) for drawn in above]
        if just_above and not some_val:
            val = just_above.pop(0)
        return val, max(self.config.val_fraction + test, just_above[0]) if just_above and test else val

    def nothing_counted(self) -> dict[str, dict[str, int]]:
        return {split: dict.fromkeys((*self.counts, *self.also_counted), 0) for split in self.splits}

    def description(self) -> list:
        return [
            [split, [[path.as_posix(), path.stat().st_mtime_ns, path.stat().st_size] for path in paths]]
            for split, paths in self.parts
        ]

    def read(self, number: int) -> Iterator[Pair]:
        """All pairs of part number, one for each line, empty ones too."""
        _, paths = self.parts[number]
        return (read_tsv if len(paths) == 1 else read_aligned)(*paths, self.config.encoding_errors)

    def split_of(self, source: str) -> str:
        drawn = draw(source)
        return "val" if drawn < self.val_below else "test" if drawn < self.test_below else "train"

    def units(self, progress: Progress) -> Iterator[Unit]:
        """The pairs with their splits, about corpus.UNIT characters at a time, from where progress stands."""
        texts, length, skip = [], 0, progress.piece
        for number in range(progress.file, len(self.parts)):
            before, (given, _) = sum(self.sizes[:number]), self.parts[number]
            for count, pair in enumerate(islice(self.read(number), skip, None), start=skip + 1):
                if pair.source and pair.target:
                    texts.append((given or self.split_of(pair.source), pair.source, pair.target))
                    length += len(pair.source) + len(pair.target)
                if length >= corpus.UNIT:
                    yield Unit(texts, "", number, count, before + pair.read)
                    texts, length = [], 0
            skip = 0
        if texts:
            yield Unit(texts, "", len(self.parts), 0, sum(self.sizes))

    def texts_to_learn_from(self, everything: bool) -> Iterator[str]:
        """Both sides of the pairs for a tokenizer to learn from: of all, or of training's, an even part."""
        share = min(1.0, corpus.LEARNED_FROM / sum(self.sizes))
        start = Progress(made_from="", command="", tokenizer={}, splits=self.nothing_counted())
        with progress_bar(sum(self.sizes), "learning the vocabulary") as bar:
            for unit in self.units(start):
                bar.update(unit.read - bar.n)
                for split, source, target in unit.texts:
                    if everything or (split == "train" and draw(source, "vocabulary") < share):
                        yield from (source, target)

    def encoder(self) -> Encoder:
        """What makes tokens of a unit's texts; a process that encodes gets it by pickle."""
        cleaned = self.splits if self.drawn else ("train",)
        return partial(encode_pairs, self.splits, cleaned, self.config.max_pair_tokens, self.config.max_pair_ratio)

    def check(self, splits: dict[str, dict[str, int]]) -> None:
        """Raises UserError where what was counted leaves a split empty."""
        for split, counted in splits.items():
            if not counted["pairs"]:
                dropped = ", ".join(f"{number:,} {why}" for why, number in self.dropped(splits).items() if number)
                shares = [f"{key}={getattr(self.config, key)}" for key in ("val_fraction", "test_fraction")]
                rule = f", with {' and '.join(shares)}" if self.drawn else ""
                raise UserError(
                    f"{split}.bin would be empty{rule}, of {self.pairs:,} pairs; dropped: {dropped or 'none'};"
                    f" the limits are --max_pair_tokens={self.config.max_pair_tokens} and"
                    f" --max_pair_ratio={self.config.max_pair_ratio}"
                )

    def dropped(self, splits: dict[str, dict[str, int]]) -> dict[str, int]:
        dropped = {why: sum(counted[why] for counted in splits.values()) for why in ("too_long", "lopsided")}
        return {"too_long": dropped["too_long"], "empty": self.empty, "lopsided": dropped["lopsided"]}

    def about(self, splits: dict[str, dict[str, int]], beginning: str) -> dict:
        """What meta.json has of this kind of data alone; beginning: of the training split."""
        sides = beginning.split(END_OF_TEXT)[:-1]
        return {
            "languages": languages(self.parts[0][1]),
            "longest": max(counted["longest"] for counted in splits.values()),  # tokens of a side with its end
            "dropped": self.dropped(splits),
            "first_empty": self.first_empty,
            "examples": list(zip(sides[::2], sides[1::2], strict=False))[:3],
        }

    def rows(self, meta: dict) -> dict[str, str]:
        """The rows of the summary that are of pairs alone."""
        first = f", the first {meta['first_empty']}" if meta["first_empty"] else ""
        why = {
            "too_long": f"longer than {self.config.max_pair_tokens} tokens",
            "empty": f"empty on a side{first}",
            "lopsided": f"lopsided, over {self.config.max_pair_ratio:g} times and {SLACK} tokens longer",
        }
        reasons = "; ".join(f"{number:,} {why[key]}" for key, number in meta["dropped"].items() if number)
        return {
            "pairs": split_row(meta, "pairs"),
            "tokens": split_row(meta, "tokens"),
            "longest": f"{meta['longest']:>15,}   tokens on one side, its end included",
            "dropped": f"{sum(meta['dropped'].values()):>15,}   {reasons}".rstrip(),
        }


# --------------------------------------------------------------------------------------
# Files -> pairs


def is_tsv(path: Path) -> bool:
    return kind_of(path) == ".tsv"


def clean(text: str) -> str:
    """The text without spaces around it, and with a single one wherever there were some, tabs or the like."""
    return " ".join(text.split())


def read_tsv(path: Path, errors: str) -> Iterator[Pair]:
    """SOURCE, a tab, TARGET on each line. A blank line is an empty pair."""
    for number, (line, read) in enumerate(read_lines(path, errors), start=1):
        sides = line.split("\t")
        if len(sides) != 2:
            if line.strip():
                tabs = f"{len(sides) - 1:,} tabs" if len(sides) > 1 else "no tab"
                raise UserError(f"{path}, line {number:,} has {tabs}; write a line as SOURCE, one tab, TARGET")
            sides = ("", "")
        yield Pair(*map(clean, sides), read)


def read_aligned(source: Path, target: Path, errors: str) -> Iterator[Pair]:
    """Line by line of two files. Raises UserError where one has more lines."""
    lines = [0, 0]
    for both in zip_longest(read_lines(source, errors), read_lines(target, errors)):
        lines = [number + (side is not None) for number, side in zip(lines, both, strict=True)]
        if lines[0] == lines[1]:
            (text, read), (translation, read_too) = both
            yield Pair(clean(text), clean(translation), read + read_too)
    if lines[0] != lines[1]:
        raise UserError(
            f"{source} has {lines[0]:,} lines, but {target} has {lines[1]:,}; each line must be the other's translation"
        )


def languages(paths: tuple[Path, ...]) -> list[str] | None:
    """What the endings a.de and a.en say, or the name pairs.de-en.tsv; None where they say nothing."""
    names = [unpacked_name(path) for path in paths]
    if len(names) == 1:
        found = names[0].removesuffix(".tsv").replace(".", "-").replace("_", "-").split("-")[-2:]
    else:
        found = [name.rpartition(".")[2] for name in names]
    codes = len(found) == 2 and all(len(code) == 2 and code.isalpha() and code.islower() for code in found)
    return found if codes and found[0] != found[1] else None


# --------------------------------------------------------------------------------------
# Pairs -> tokens


def encode_pairs(
    splits: tuple[str, ...],
    cleaned: tuple[str, ...],
    max_tokens: int,
    max_ratio: float,
    tokenizer: Tokenizer,
    texts: list[tuple[str, str, str]],
) -> dict[str, tuple[np.ndarray, dict]]:
    """{split: (token ids, what was counted)}; texts: (split, source, target); cleaned: splits where pairs are dropped.

    A side has max_tokens at most, its end included, and max_ratio times those of the other and SLACK.
    """
    encoded = {}
    for split in splits:
        ids, counted = [np.empty(0, np.int64)], dict.fromkeys((*Pairs.counts, *Pairs.also_counted), 0)
        pairs = [pair for entry, *pair in texts if entry == split]
        sides = iter(tokenizer.encode_batch(chain.from_iterable(pairs)))
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
                counted["characters"] += sum(map(len, pair))
                counted["bytes"] += sum(len(side.encode()) for side in pair)
                counted["target_bytes"] += len(pair[1].encode())
                counted["target_tokens"] += len(target)
                counted["longest"] = max(counted["longest"], longer)
        ids = np.concatenate(ids).astype(token_dtype(tokenizer))
        encoded[split] = ids, counted | {"tokens": len(ids)}
    return encoded
