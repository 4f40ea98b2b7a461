"""Read documents from files, assign each to a split, and iterate over a corpus of documents or sentence pairs.

A corpus has files, splits and items. The items of Documents, below, are pieces of documents; data/pairs.py has a
corpus of sentence pairs, and data/conversations.py one of conversations.
"""

import hashlib
import re
import unicodedata
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from tqdm import tqdm

from humptygpt.cli import UserError, note
from humptygpt.data.documents import NAMED, Flaws, Piece, file_format, read_documents
from humptygpt.data.settings import PrepareConfig
from humptygpt.tokenizers.basic import Tokenizer

UNIT = 1 << 19  # characters that a thread encodes at once
# the first HASHED characters of a document determine its split; must be less than PIECE
HASHED = 4096
Encoded = tuple[list[np.ndarray], Counter]  # arrays of token ids, and what meta.json counts
# Do not start tqdm's monitor thread: if memory is too short to start it, tqdm waits for it forever.
tqdm.monitor_interval = 0


class Corpus:
    """The interface of all corpora, and what most of them share.

    Each also has these methods:
        read(number)                        read the items of self.files[number]; yields (split, item)
        encode(tokenizer, split, items)     encode items of one split; returns arrays of token ids, and their counts
    An item is a tuple that has `texts`.
    parts: the corpus itself, and that of val_input, if it is given.
    """

    task: str
    counts: tuple[str, ...]  # what meta.json counts in each split, the items first
    splits = ("train", "val")
    separated = True  # each item ends with the end-of-text token
    missing: str  # what an input without items lacks
    text_size: int | None = None  # bytes of UTF-8; set by survey()
    trains_on_all = False  # the training split also has what is in the validation split
    defaults: ClassVar = {  # of keys that the user leaves unset
        "val_fraction": 0.1,
        "text_key": "text",
        "vocab_size": 4096,
    }

    def __init__(self, config: PrepareConfig, files: list, source: str, skipped: list[str]):
        """config: without unset keys. source: description of the files for meta.json. skipped: from find_files."""
        self.config = config
        self.files = self.paths = files
        self.source = source
        self.skipped = skipped
        self.parts = (self,)
        self.flaws = Flaws()  # of what was read last
        # {split: the largest draw of its items}; train has the rest
        self.limits = {"val": config.val_fraction}

    def draw(self, item: NamedTuple) -> float:
        """Draw a number in [0, 1) that decides the split, by the first text: equal ones are in the same split."""
        return draw(item.texts[0])

    def split_of(self, item: NamedTuple) -> str:
        drawn = self.draw(item)
        return next((split for split, x in self.limits.items() if drawn <= x), "train")

    def note_skipped(self) -> None:
        if self.skipped:
            note("; ".join([f"skipped files: {len(self.skipped):,}", *self.skipped[:NAMED]]))

    def survey(self) -> None:
        """Read everything once, to check it and to find the size of the text. Raises UserError if there is none.

        A split with less than half of its share, as happens by chance if there are few items, gets the lowest draws.
        """
        self.note_skipped()
        size = taken = before = 0
        draws = array("d")
        for _, item in read_all(self, f"checking the {self.counts[0]}"):
            if text := "".join(item.texts):
                size += len(text.encode())
                draws.append(self.draw(item))
        if not size:
            raise UserError(self.nothing_in(self.source))
        self.text_size = size
        draws = np.sort(draws)
        for split, limit in self.limits.items():
            share, before = (limit - before) * len(draws), limit
            count = bisect_right(draws, limit) - taken
            if count < share / 2:
                count = max(1, round(share))
                self.limits[split] = draws[: taken + count][-1]
            taken += count

    def nothing_in(self, what: str | Path) -> str:
        """Describe an input without items, with the first reason."""
        why = f": {self.flaws.first}" if self.flaws.first else ""
        return f"{what} has no {self.missing}{why}"

    def extra_meta(self, splits: dict[str, Counter], first_text: str) -> dict:
        """Return the entries of meta.json that only this kind of corpus has.

        splits: the counts of each. first_text: the start of the training split.
        """
        return {}

    def wrap(self, tokenizer: Tokenizer) -> Tokenizer:
        """Return the tokenizer that encodes the corpus, given the one of its text."""
        return tokenizer


class Documents(Corpus):
    """A corpus of documents, which are read from files. Each document is assigned to a split."""

    task = "language modelling"
    counts = ("documents", "characters", "bytes", "tokens")
    missing = "text to learn from"
    # set by survey(): per file, characters in the training part; None: documents stay whole
    cuts: list[int] | None = None

    @property
    def separated(self) -> bool:
        """True if each document ends with the end-of-text token. False if a single text is the whole corpus."""
        is_text = file_format(self.files[0]) == ".txt" and not self.config.lines
        return len(self.files) > 1 or not is_text

    def survey(self) -> None:
        """Read everything once, to skip the files that are not text and to decide how to split the rest.

        Documents whose draw() is at most val_fraction are for validation. If their share of the text is not between
        0.5 * val_fraction and 1.5 * val_fraction, the end of each file is used for validation instead. A single text
        file is always split this way. Raises UserError if there is no text.
        """
        sizes = {}
        with progress_bar("checking the files") as bar:
            for number, file in enumerate(self.files):
                try:
                    sizes[file] = self.measure(number, bar)
                except UserError as error:
                    self.skipped.append(str(error))
        if not sizes:
            raise UserError("; ".join(self.skipped[:NAMED]))
        self.note_skipped()
        self.files = list(sizes)
        if len(self.files) > 1:
            self.source = f"{len(self.files):,} files: {self.source}"
        total = sum(sizes.values(), Counter())
        self.text_size = total.pop("bytes")
        fraction = self.config.val_fraction
        wanted = fraction * total.total()
        if not self.separated or not 0.5 * wanted <= total["val"] <= 1.5 * wanted:
            lengths = (size["train"] + size["val"] for size in sizes.values())
            self.cuts = [int(length * (1 - fraction)) for length in lengths]

    def measure(self, number: int, bar: tqdm) -> Counter:
        """Count a file's characters in each split, and its bytes of UTF-8. Raises UserError if there are none."""
        self.flaws = Flaws()
        size = Counter()
        for split, piece in self.read(number):
            read = len(piece.text.encode())
            size.update({split: len(piece.text), "bytes": read})
            bar.update(read)
        if not size["bytes"]:
            raise UserError(self.nothing_in(self.files[number]))
        return size

    def read(self, number: int) -> Iterator[tuple[str, Piece]]:
        """Read the documents of a file in pieces."""
        config = self.config
        before = 0  # characters of the file before this piece
        for piece in read_documents(self.files[number], config.text_key, self.flaws, config.lines):
            if piece.first:
                split = self.split_of(piece)
            if self.cuts is None:
                yield split, piece
                continue
            begun, rest = piece.cut(max(0, self.cuts[number] - before))
            before += len(piece.text)
            if begun.text:
                yield "train", begun
            if rest.text:
                yield "val", rest

    def encode(self, tokenizer: Tokenizer, split: str, pieces: list[Piece]) -> Encoded:
        ids = []
        counted = Counter()
        for piece in pieces:
            if piece.first and tokenizer.bos is not None:
                ids.append([tokenizer.bos])
            encode = tokenizer.encode if piece.first else tokenizer.encode_rest
            ids.append(encode(piece.text))
            if piece.last and tokenizer.eot is not None:
                ids.append([tokenizer.eot])
            counted.update(
                documents=int(piece.first),
                characters=len(piece.text),
                bytes=len(piece.text.encode()),
            )
        return ids, counted


# --------------------------------------------------------------------------------------
# The items of a corpus, in order


def progress_bar(what: str, total: int | None = None) -> tqdm:
    """Make a progress bar that counts bytes of text. what: its title. total: None if it is unknown."""
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, delay=2, disable=None)


def read_all(corpus: Corpus, what: str) -> Iterator[tuple[str, NamedTuple]]:
    """Yield (split, item) in order, with a progress bar. what: title of the bar."""
    corpus.flaws = Flaws()
    with progress_bar(what, corpus.text_size) as bar:
        for number in range(len(corpus.files)):
            for split, item in corpus.read(number):
                bar.update(len("".join(item.texts).encode()))
                yield split, item


def units(corpus: Corpus) -> Iterator[tuple[str, list[NamedTuple]]]:
    """Group the items of each split into units of about UNIT characters. Yields (split, items)."""
    items = defaultdict(list)
    lengths = Counter()
    for split, item in chain.from_iterable(read_all(each, "encoding") for each in corpus.parts):
        twice = corpus.trains_on_all and split == "val"
        for to in ("train", "val") if twice else (split,):
            items[to].append(item)
            lengths[to] += sum(map(len, item.texts))
            if lengths[to] >= UNIT:
                yield to, items.pop(to)
                lengths[to] = 0
    yield from items.items()


def draw(text: str, salt: str = "split", hashed: int | None = HASHED) -> float:
    """Derive a pseudorandom number in [0, 1) from a text: a hash of salt and of its first characters; None: of all."""
    start = f"{salt}\n{text[:hashed]}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(start, digest_size=6).digest(), "little") / 2**48


def normalised(text: str) -> str:
    """Reduce a text to its words, so that texts that differ only in case, punctuation or spaces become identical."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text.casefold())))
