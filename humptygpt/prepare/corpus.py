"""Files of documents, the split of each document, and what documents and sentence pairs share: the way through them.

Documents here and Pairs in pairs.py have one interface: files, splits, items of text (pieces of documents, or pairs),
and an encoder of items.
"""

import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from humptygpt.config import UserError
from humptygpt.prepare.documents import Piece, file_format, file_size, read_documents
from humptygpt.tokenizers import TOKENIZERS, Tokenizer

UNIT = 1 << 19  # characters that are encoded at once
HASHED = 4096  # characters at the start of a document that decide its split; fewer than its first piece has
MANY = 64_000_000  # bytes of text; in more, lines or rows are many documents
VOCABULARY_BYTES = (
    100_000_000  # a tokenizer is trained on an even sample of a longer corpus
)
# keys that say what to do, and change no byte
COMMANDS = ("verify", "overwrite")
CHANGES_NOTHING = ("input", "source", "target", "files", "workers")

# ({split: its pieces or pairs}, position after them)
Unit = tuple[dict[str, list[NamedTuple]], "Position"]


class Position(NamedTuple):
    """How far the files of a corpus have been read."""

    file: int = 0  # number of the open file
    item: int = 0  # pieces or pairs read from it
    read: int = 0  # bytes read of all files


START = Position()


class Documents:
    """Files of documents, and the split of each document."""

    task = "language modelling"
    splits = ("train", "val")
    counts = ("documents", "characters", "bytes", "tokens")  # of each split, in meta.json
    chosen_for = ""  # what of the text its tokenizer was chosen for, where tokenizer=auto

    def __init__(self, config, files: list[Path], skipped: Counter, source: str):
        """config: a resolved prepare_data.PrepareConfig. source: what the files are called in meta.json.

        files, skipped: as from find_files.
        """
        self.config = config
        self.skipped = skipped
        self.files = self.paths = files
        self.source = source
        self.encoder = encode_documents
        self.sizes = [file_size(file) for file in files]
        self.only_text = all(file_format(file) == ".txt" for file in files)
        # documents end in the end-of-text token
        self.separated = len(files) > 1 or not self.only_text
        self.cuts = self.survey()

    def survey(self) -> list[int] | None:
        """Decide how to split. Returns where each file is cut, in characters; None: between documents.

        Documents with a draw up to val_fraction are for validation. Files are cut if these are less than half or more
        than one and a half times that fraction of the text, and so is a single text. Raises UserError if there is none.
        Also sets text_size, the bytes of UTF-8. Of many lines or rows, MANY bytes are read, and the rest is estimated.
        """
        fraction = self.config.val_fraction
        lengths = [0] * len(self.files)
        held_out = self.text_size = 0
        for number in range(len(self.files)):
            for piece in self.read(number):
                lengths[number] += len(piece.text)
                held_out += len(piece.text) * (piece.draw <= fraction)
                self.text_size += len(piece.text.encode())
                # many documents come close to the fraction
                if self.text_size > MANY and not self.only_text:
                    read = sum(self.sizes[:number]) + piece.read
                    self.text_size = self.text_size * sum(self.sizes) // read
                    return None
        if not any(lengths):
            raise UserError(f"{self.source} has no text; there is nothing to learn from")
        if self.separated and 0.5 <= held_out / (fraction * sum(lengths)) <= 1.5:
            return None
        return [int(length * (1 - fraction)) for length in lengths]

    def read(self, number: int) -> Iterator[Piece]:
        """Read the documents of file number, in pieces, each with its place and the draw of its document."""
        config = self.config
        keys = (config.text_key, config.encoding_errors, config.skip_bad_lines)
        place = 0
        for piece in read_documents(self.files[number], *keys):
            if piece.start == 0:
                drawn = draw(piece.text)
            yield piece._replace(draw=drawn, place=place)
            place += len(piece.text)

    def assign(self, piece: Piece, number: int) -> list[tuple[str, Piece]]:
        """Return (split, the part of the piece that is in it). number: of its file."""
        if self.cuts is None:
            return [("val" if piece.draw <= self.config.val_fraction else "train", piece)]
        in_train = min(len(piece.text), max(0, self.cuts[number] - piece.place))
        if in_train == len(piece.text):
            return [("train", piece)]
        rest = piece._replace(text=piece.text[in_train:], start=piece.start + in_train)
        if not in_train:
            return [("val", rest)]
        begun = piece._replace(text=piece.text[:in_train], last=True)
        return [("train", begun), ("val", rest)]

    def extra_meta(self, splits: dict[str, Counter], first_text: str) -> dict:
        """Return the entries of meta.json that only documents have."""
        return {
            "skipped_lines": sum(counted["skipped_lines"] for counted in splits.values())
        }

    def summary(self, meta: dict) -> dict[str, str]:
        """Return the lines of the summary that only documents have."""
        lines = {}
        if self.chosen_for:
            another = f"for another: --tokenizer={', '.join(TOKENIZERS)}"
            lines["tokenizer=auto"] = f"chosen for {self.chosen_for}; {another}"
        if self.cuts and self.separated:
            last = f"the last {self.config.val_fraction:.4g} of each file"
            lines["validation"] = f"{last}, as the documents are too few or too unequal"
        if self.skipped:
            counts = (f"{count:,} {reason}" for reason, count in self.skipped.items())
            lines["skipped files"] = ", ".join(counts)
        if count := meta["skipped_lines"]:
            lines["skipped lines"] = f"{count:,}, which have no text"
        return lines


def encode_documents(
    tokenizer: Tokenizer, split: str, pieces: list[Piece]
) -> tuple[list[np.ndarray], Counter]:
    """Return (token ids, counts) of the pieces, which are of one split."""
    ids = []
    counted = Counter()
    for piece in pieces:
        if piece.text and piece.start == 0:
            if tokenizer.bos is not None:
                ids.append([tokenizer.bos])
            ids.append(tokenizer.encode(piece.text))
        elif piece.text:
            ids.append(tokenizer.encode_rest(piece.text))
        if piece.last and tokenizer.eot is not None:
            ids.append([tokenizer.eot])
        counted["documents"] += piece.start == 0 and piece.text != ""
        counted["characters"] += len(piece.text)
        counted["bytes"] += len(piece.text.encode())
        counted["skipped_lines"] += piece.skipped
    return ids, counted


# --------------------------------------------------------------------------------------
# Documents or pairs, in order


def read_from(
    corpus, what: str, start: Position = START
) -> Iterator[tuple[Position, NamedTuple]]:
    """Read (position after it, piece or pair) for all after the position start, with a progress bar that says what."""
    offsets = list(accumulate(corpus.sizes, initial=0))
    bar = tqdm(
        desc=what,
        total=offsets[-1],
        unit="B",
        unit_scale=True,
        mininterval=0.1 if sys.stderr.isatty() else 30,  # seconds
        delay=2,
        initial=start.read,
    )
    with bar:
        for number in range(start.file, len(corpus.sizes)):
            first = start.item if number == start.file else 0
            items = islice(corpus.read(number), first, None)
            for count, item in enumerate(items, start=first + 1):
                read = offsets[number] + item.read
                bar.update(read - bar.n)
                yield Position(number, count, read), item


def units(corpus, what: str, start: Position = START) -> Iterator[Unit]:
    """Read (pieces or pairs of each split, position after them), about UNIT characters at a time."""
    entries = defaultdict(list)
    length = 0
    for position, item in read_from(corpus, what, start):
        for split, entry in corpus.assign(item, position.file):
            entries[split].append(entry)
            length += sum(map(len, entry.texts))
        if length >= UNIT:
            yield entries, position
            entries = defaultdict(list)
            length = 0
    if entries:
        yield entries, Position(len(corpus.sizes), 0, sum(corpus.sizes))


def vocabulary_texts(corpus, everything: bool) -> Iterator[str]:
    """Read texts to train a tokenizer on: everything, or the training split, evenly sampled."""
    fraction = min(1.0, VOCABULARY_BYTES / corpus.text_size)
    any_text = False
    for entries, _ in units(corpus, "training the tokenizer"):
        items = chain(*entries.values()) if everything else entries["train"]
        for item in items:
            sampled = everything or draw(item.texts[0], "vocabulary") < fraction
            if item.texts[0] and sampled:
                any_text = True
                yield from item.texts
    if not any_text:
        raise UserError(
            f"no text of {corpus.source} is in the training split; add text or change --val_fraction"
        )


def identity(config, files: list, *other: object) -> str:
    """Hash what data is made from: files, other things, and the settings but for those that change no byte."""
    settings = asdict(config) | dict.fromkeys(CHANGES_NOTHING)
    for key in COMMANDS:
        del settings[key]
    return hashlib.sha256(json.dumps([files, settings, *other]).encode()).hexdigest()


def draw(text: str, salt: str = "split") -> float:
    """Return a pseudorandom number in [0, 1) from a hash of the first HASHED characters."""
    start = f"{salt}\n{text[:HASHED]}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(start, digest_size=6).digest(), "little") / 2**48
