"""Read sentence pairs for translation from TSV files or pairs of aligned files; clean, split and encode them.

A pair is a source text and its translation, the target. Token files alternate between sources and targets, each ending
in the end-of-text token. Pairs that are unsuitable for training are dropped, and the summary counts them. If a
validation or test split is given, it keeps every pair that has both sides, so that scores on it stay comparable.
"""

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from humptygpt.cli import UserError
from humptygpt.data.corpus import Corpus, Encoded, normalised
from humptygpt.data.documents import LEFT_OUT, Flaws, read_text
from humptygpt.data.settings import PrepareConfig
from humptygpt.tokenizers.basic import Tokenizer

SLACK = 8  # one side may always be this many tokens longer, as in "Stop!" and "Halt, stehen bleiben!"
DROPPED = ("too_long", "empty", "lopsided", "held_out")  # reasons to drop a pair
LINE_RULE = "each line must be SOURCE, one tab, TARGET"
# [(split, files)], where files is (TSV file,) or (source file, target file). If split is None, its pairs are split at
# random
PairFiles = list[tuple[str | None, tuple[Path, ...]]]


class Pair(NamedTuple):
    source: str
    target: str
    dropped: str = ""  # one of DROPPED if the pair is left out; its texts are then empty

    @property
    def texts(self) -> tuple[str, str]:
        return self[:2]


class Pairs(Corpus):
    """A corpus of sentence pairs, which are read from files."""

    task = "translation"
    counts = ("pairs", "characters", "bytes", "tokens", "target_bytes", "target_tokens")
    missing = f"pairs; {LINE_RULE}"
    defaults: ClassVar = Corpus.defaults | {
        "val_fraction": 0.02,
        "tokenizer": "sentencepiece",
        "vocab_size": 8192,
        "max_pair_tokens": 128,
        "max_pair_ratio": 3.0,
    }

    def __init__(
        self, config: PrepareConfig, files: PairFiles, source: str, skipped: list[str]
    ):
        super().__init__(config, files, source, skipped)
        self.paths = [path for _, paths in files for path in paths]
        if config.held_out is not None:
            self.paths.append(Path(config.held_out))
        # indices of files that are given as a validation or test split
        self.given = [n for n, (split, _) in enumerate(files) if split in ("val", "test")]
        if config.test_fraction or self.given:
            self.splits = ("train", "val", "test")
            self.limits["test"] = config.val_fraction + config.test_fraction

    @cached_property
    def held_out(self) -> set[str]:
        """The normalised sentences to exclude from training: those in the file held_out and in given splits."""
        if self.config.held_out is None:
            return set()
        lines = read_text(Path(self.config.held_out), self.flaws, newline="\n")
        given = chain.from_iterable(map(self.read, self.given))
        sides = chain(
            (line.split("\t") for line in lines), (pair.texts for _, pair in given)
        )
        return set(map(normalised, chain.from_iterable(sides))) - {""}

    def read(self, number: int) -> Iterator[tuple[str, Pair]]:
        """Read one pair per line from self.files[number]. A dropped pair is yielded empty, with a reason."""
        held_out = set() if number in self.given else self.held_out
        given, paths = self.files[number]
        for pair in read_pairs(paths, self.flaws):
            if not all(pair.texts):
                pair = Pair("", "", "empty")
            elif held_out and not held_out.isdisjoint(map(normalised, pair.texts)):
                pair = Pair("", "", "held_out")
            yield given or self.split_of(pair), pair

    def encode(self, tokenizer: Tokenizer, split: str, pairs: list[Pair]) -> Encoded:
        """Encode pairs of one split. Returns arrays of token ids, and the counts for meta.json.

        Unless its split is given, a pair is dropped if one side, including end-of-text, is longer than
        self.config.max_pair_tokens, or longer than self.config.max_pair_ratio times the other side plus SLACK.
        """
        ids = []
        counted = Counter()
        cleans = split == "train" or not (self.given or self.config.val_input)
        for pair in pairs:
            source, target = (
                np.append(tokenizer.encode(text), tokenizer.eot) for text in pair.texts
            )
            shorter, longer = sorted((len(source), len(target)))
            if pair.dropped:
                counted[pair.dropped] += 1
            elif cleans and longer > self.config.max_pair_tokens:
                counted["too_long"] += 1
            elif cleans and longer > self.config.max_pair_ratio * shorter + SLACK:
                counted["lopsided"] += 1
            else:
                ids += [source, target]
                text = pair.source + pair.target
                counted.update(
                    pairs=1,
                    characters=len(text),
                    bytes=len(text.encode()),
                    target_bytes=len(pair.target.encode()),
                    target_tokens=len(target),
                )
        return ids, counted

    def extra_meta(self, splits: dict[str, Counter], first_text: str) -> dict:
        dropped = sum(splits.values(), Counter())
        return {
            "longest": max(counted["longest"] for counted in splits.values()),
            "dropped": {why: dropped[why] for why in DROPPED},
        }


# --------------------------------------------------------------------------------------
# Files -> pairs


def read_pairs(paths: tuple[Path, ...], flaws: Flaws) -> Iterator[Pair]:
    """Read one pair per line from a TSV file, or from two aligned files. Whitespace is trimmed and collapsed.

    flaws: counts bad bytes, and the lines of a TSV file that do not have exactly one tab. Blank lines are left out.
    """
    files = (read_text(path, flaws, newline="\n") for path in paths)
    for number, lines in enumerate(zip_longest(*files), start=1):
        if None in lines:
            raise UserError(
                f"{paths[0]} and {paths[1]} have different numbers of lines; each line must translate the same line"
                " in the other file"
            )
        sides = lines if len(paths) == 2 else lines[0].split("\t")
        if len(sides) == 2:
            yield Pair(*(" ".join(side.split()) for side in sides))
        elif lines[0].strip():
            flaws.add(LEFT_OUT, f"{paths[0]}, line {number:,}: {LINE_RULE}")
