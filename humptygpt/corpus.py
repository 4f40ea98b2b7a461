"""Documents -> units of text, each part of it for training or for validation, and the tokens of a unit.

What prepare_data.py asks of a corpus, this one of documents or the one of sentence pairs in pairs.py: its files, its
splits, its texts in units of a bearable size, and how a unit is encoded.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from humptygpt.configurator import UserError
from humptygpt.documents import Piece, kind_of, read_documents
from humptygpt.download import file_sha256
from humptygpt.known_texts import TINY_SHAKESPEARE_SHA256
from humptygpt.token_files import token_dtype
from humptygpt.tokenizer import Tokenizer

UNIT = 1 << 19  # characters that are encoded at once
DRAWN_BY = 4096  # characters of a document that decide where it goes; fewer than the first piece of it has
LEARNED_FROM = 100_000_000  # bytes of text that a vocabulary is learnt from, drawn evenly from a longer corpus


# (tokenizer, the texts of a unit) -> {split: (token ids, what was counted)}
Encoder = Callable[[Tokenizer, list[tuple]], dict[str, tuple[np.ndarray, dict]]]


class Unit(NamedTuple):
    """Some text, and where reading goes on after it."""

    texts: list[tuple]  # (split, text, whether it ends its document); of pairs (split, source, target)
    split: str  # of the document that is open; of no meaning to pairs
    file: int  # number of the file that is open
    piece: int  # pieces or pairs read of that file
    read: int  # bytes read of all files


@dataclass
class Progress:
    """How far the encoding has come. Saved every now and then, so that a stopped preparation goes on from there."""

    made_from: str  # tells the files and settings that this belongs to from others
    command: str  # the one to go on with
    tokenizer: dict  # its state
    splits: dict[str, dict[str, int]]  # what was counted of each
    file: int = 0  # as in Unit
    piece: int = 0
    read: int = 0
    split: str = "train"
    counts: list[int] = field(default_factory=list)  # how often each token occurs


class Corpus:
    """The files, and which of their documents are for training and which for validation."""

    task = "language modelling"
    splits = ("train", "val")
    counts = ("documents", "characters", "bytes", "tokens")

    def __init__(self, config, files: list[Path], source: str):
        """config: a prepare_data.PrepareConfig without open ends."""
        self.config, self.files, self.source = config, files, source
        self.sizes = [file.stat().st_size for file in files]
        self.separated = len(files) > 1 or kind_of(files[0]) != ".txt"
        if not any(self.sizes):
            raise UserError(f"{source} is empty; there is nothing to learn from")
        if config.text_key != "text" and all(kind_of(file) == ".txt" for file in files):
            print(f"note: text_key={config.text_key} has no effect on text files", file=sys.stderr)
        if source == str(files[0]) and not self.separated and file_sha256(files[0]) == TINY_SHAKESPEARE_SHA256:
            self.source = "tiny Shakespeare"
        elif len(files) > 1:
            self.source = f"{len(files):,} files: {source}"
        # One document is cut: the last tenth of its characters is for validation. Of several, each goes where its draw
        # says; if that leaves none for validation, the one with the lowest draw.
        self.cut = None if self.separated else int(sum(len(p.text) for p in self.read(0)) * (1 - config.val_fraction))
        self.highest = max(config.val_fraction, self.lowest_draw()) if self.separated else None

    def nothing_counted(self) -> dict[str, dict[str, int]]:
        return {split: dict.fromkeys(self.counts, 0) for split in self.splits}

    def description(self) -> list:
        return [[file.as_posix(), file.stat().st_mtime_ns, file.stat().st_size] for file in self.files]

    def read(self, number: int) -> Iterator[Piece]:
        """The documents of file number, in pieces."""
        return read_documents(self.files[number], self.config.text_key, self.config.encoding_errors)

    def lowest_draw(self) -> float:
        """Of all documents, where they are so few that it matters; else 0."""
        texts = len(self.files) < 1000 and all(kind_of(file) == ".txt" for file in self.files)
        if not texts and sum(self.sizes) > 64_000_000:
            return 0.0
        first_pieces = (
            piece.text
            for number in range(len(self.files))
            for piece in (islice(self.read(number), 1) if texts else self.read(number))
            if piece.first
        )
        return min(map(draw, first_pieces), default=0.0)

    def units(self, progress: Progress) -> Iterator[Unit]:
        """The texts with their splits, about UNIT characters at a time, from where progress stands."""
        split, at = progress.split, sum(counted["characters"] for counted in progress.splits.values())
        texts, length = [], 0
        skip = progress.piece
        for number in range(progress.file, len(self.files)):
            before, count = sum(self.sizes[:number]), skip
            for count, piece in enumerate(islice(self.read(number), skip, None), start=skip + 1):
                if self.separated:
                    if piece.first:
                        split = "val" if draw(piece.text) <= self.highest else "train"
                    texts.append((split, piece.text, piece.last))
                else:
                    train_part = piece.text[: max(0, self.cut - at)]
                    texts += [("train", train_part, False), ("val", piece.text[len(train_part) :], piece.last)]
                at += len(piece.text)
                length += len(piece.text)
                if length >= UNIT:
                    yield Unit(texts, split, number, count, before + piece.read)
                    texts, length = [], 0
            skip = 0
        if texts:
            yield Unit(texts, split, number, count, sum(self.sizes))

    def texts_to_learn_from(self, everything: bool) -> Iterator[str]:
        """Pieces for a tokenizer to learn from: everything, or a part of the training split, evenly drawn."""
        share = min(1.0, LEARNED_FROM / sum(self.sizes))
        start = Progress(made_from="", command="", tokenizer={}, splits=self.nothing_counted())
        with progress_bar(sum(self.sizes), "learning the vocabulary") as bar:
            for unit in self.units(start):
                bar.update(unit.read - bar.n)
                for split, text, _ in unit.texts:
                    if everything or (split == "train" and draw(text, "vocabulary") < share):
                        yield text

    def encoder(self) -> Encoder:
        """What makes tokens of a unit's texts; a process that encodes gets it by pickle."""
        return encode_unit

    def check(self, splits: dict[str, dict[str, int]]) -> None:
        """Raises UserError where what was counted leaves a split without a token to predict, or one to do it from."""
        documents = sum(counted["documents"] for counted in splits.values())
        if not documents:
            raise UserError(f"{self.source} has no text; there is nothing to learn from")
        alone = "; a document is cut in two only where it is a .txt file alone" if self.separated else ""
        for split, counted in splits.items():
            if counted["tokens"] < 2:
                raise UserError(
                    f"{split}.bin would have {counted['tokens']} of the 2 tokens that it takes to predict one, with"
                    f" val_fraction={self.config.val_fraction} and documents: {documents:,}; take another"
                    f" --val_fraction, or more text{alone}"
                )

    def about(self, splits: dict[str, dict[str, int]], beginning: str) -> dict:
        """What meta.json has of this kind of data alone; beginning: of the training split."""
        return {}

    def rows(self, meta: dict) -> dict[str, str]:
        """The rows of the summary that are of documents alone."""
        rows = {key: split_row(meta, key) for key in ("documents", "characters", "bytes", "tokens")}
        if meta["documents"] == 1:
            rows["documents"] = f"{1:>15,}   cut in two: its end is for validation"
        return rows


def split_row(meta: dict, key: str) -> str:
    """A row of the summary: how many in all, and in each split."""
    names = {"train": "training", "val": "validation", "test": "test"}
    parts = ", ".join(f"for {names[split]} {counted[key]:,}" for split, counted in meta["splits"].items())
    return f"{meta[key]:>15,}   {parts}"


def draw(text: str, salt: str = "split") -> float:
    """A number in [0, 1) that depends on the beginning of the text alone."""
    beginning = f"{salt}\n{text[:DRAWN_BY]}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(beginning, digest_size=6).digest(), "little") / 2**48


def progress_bar(total: int, what: str, start: int = 0) -> tqdm:
    """Bytes of the files, with MB/s and time left; what is over in two seconds needs none."""
    often = 0.1 if sys.stderr.isatty() else 30  # seconds
    return tqdm(desc=what, total=total, initial=start, unit="B", unit_scale=True, mininterval=often, delay=2)


def encode_unit(tokenizer: Tokenizer, texts: list[tuple[str, str, bool]]) -> dict[str, tuple[np.ndarray, dict]]:
    """{split: (token ids, what was counted)}; texts as in Unit."""
    encoded = {}
    for split in Corpus.splits:
        ids, counted = [np.empty(0, np.int64)], dict.fromkeys(Corpus.counts, 0)
        for _, text, ends in (entry for entry in texts if entry[0] == split):
            ids.append(tokenizer.encode(text))
            if ends and tokenizer.eot is not None:
                ids.append(np.array([tokenizer.eot]))
            counted["documents"] += ends
            counted["characters"] += len(text)
            counted["bytes"] += len(text.encode())
        ids = np.concatenate(ids).astype(token_dtype(tokenizer))
        encoded[split] = ids, counted | {"tokens": len(ids)}
    return encoded
