"""Read sentence pairs for translation from TSV files; clean, split and encode them.

A pair is a source text and its translation, the target. Token files alternate between sources and targets, each ending
in the end-of-text token. Pairs that are unsuitable for training are dropped, and the summary counts them. If a
validation or test split is given, it keeps every pair that has both sides, so that scores on it stay comparable.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from humptygpt.data.corpus import Corpus, Encoded
from humptygpt.data.documents import LEFT_OUT, Flaws, read_text
from humptygpt.data.settings import PrepareConfig
from humptygpt.tokenizers.basic import Tokenizer

RATIO = 3  # drop a pair if one side is more than this many times longer
SLACK = 8  # but one side may always be this many tokens longer, as in "Stop!" and "Halt, stehen bleiben!"
DROPPED = ("too_long", "empty", "lopsided")  # reasons to drop a pair
LINE_RULE = "each line must be SOURCE, one tab, TARGET"
PairFiles = list[tuple[str | None, Path]]  # a split and its file, or None: the file's pairs are split at random


class Pair(NamedTuple):
    source: str
    target: str

    @property
    def texts(self) -> tuple[str, str]:
        return self


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
    }

    def __init__(self, config: PrepareConfig, files: PairFiles, source: str, skipped: list[str]):
        super().__init__(config, files, source, skipped)
        self.paths = [path for _, path in files]
        self.given = any(split for split, _ in files)
        if config.val_fraction or self.given:
            self.splits = ("train", "val", "test")
            self.limits["test"] = 2 * config.val_fraction

    def read(self, number: int) -> Iterator[tuple[str, Pair]]:
        """Read one pair per line from self.files[number]. One without both sides is yielded empty."""
        split, path = self.files[number]
        for pair in read_pairs(path, self.flaws):
            if not all(pair):
                pair = Pair("", "")
            yield split or self.split_of(pair), pair

    def encode(self, tokenizer: Tokenizer, split: str, pairs: list[Pair]) -> Encoded:
        """Encode pairs of one split. Returns arrays of token ids, and the counts for meta.json.

        Unless its split is given, a pair is dropped if one side, including end-of-text, is longer than
        self.config.max_pair_tokens, or longer than RATIO times the other side plus SLACK.
        """
        ids = []
        counted = Counter()
        cleans = split == "train" or not (self.given or self.config.val_input)
        for pair in pairs:
            source, target = (np.append(tokenizer.encode(text), tokenizer.eot) for text in pair)
            shorter, longer = sorted((len(source), len(target)))
            if not pair.source:
                counted["empty"] += 1
            elif cleans and longer > self.config.max_pair_tokens:
                counted["too_long"] += 1
            elif cleans and longer > RATIO * shorter + SLACK:
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


def read_pairs(path: Path, flaws: Flaws) -> Iterator[Pair]:
    """Read one pair per line from a TSV file. Whitespace is trimmed and collapsed.

    flaws: counts bad bytes, and the lines that do not have exactly one tab. Blank lines are left out.
    """
    for number, line in enumerate(read_text(path, flaws, newline="\n"), start=1):
        sides = line.split("\t")
        if len(sides) == 2:
            yield Pair(*(" ".join(side.split()) for side in sides))
        elif line.strip():
            flaws.add(LEFT_OUT, f"{path}, line {number:,}: {LINE_RULE}")
