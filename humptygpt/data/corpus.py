"""Documents -> units of text, each text in the training or the validation split, and the tokens of a unit.

Corpus here and Pairs in pairs.py give prepare_data.py the same: files, splits, texts in units of bounded size, and an
encoder of a unit.
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

from humptygpt.core.download import file_sha256
from humptygpt.core.errors import UserError
from humptygpt.data.documents import Found, Piece, head, is_binary, kind_of, read_documents
from humptygpt.data.sources import TINY_SHAKESPEARE_SHA256
from humptygpt.data.token_files import token_dtype
from humptygpt.tokenizer.tokenizers import Tokenizer

UNIT = 1 << 19  # characters that are encoded at once
HASHED = 4096  # characters at the start of a document that decide its split; fewer than its first piece has
VOCABULARY_BYTES = 100_000_000  # a tokenizer is trained on an even sample of a longer corpus

# (tokenizer, the entries of a unit) -> {split: (token ids, counts)}; pickled for the worker processes
Encoder = Callable[[Tokenizer, list[tuple]], dict[str, tuple[np.ndarray, dict]]]


class Unit(NamedTuple):
    """Some text, and the position in the files after it."""

    entries: list[
        tuple
    ]  # split; text, or source and target; of text also: whether it ends, and starts, its document
    split: str  # of the open document; unused by pairs
    file: int  # number of the open file
    piece: int  # pieces or pairs read from that file
    read: int  # bytes read of all files


@dataclass
class Progress:
    """How far the encoding is. Saved regularly, so that a stopped preparation can be resumed."""

    made_from: str = ""  # identifies the files and settings
    command: str = ""  # the one that resumes
    tokenizer: dict = field(default_factory=dict)  # its state
    splits: dict[str, dict[str, int]] = field(default_factory=dict)  # counts of each
    file: int = 0  # as in Unit
    piece: int = 0
    read: int = 0
    split: str = "train"
    counts: list[int] = field(default_factory=list)  # occurrences of each token
    found: dict[str, list] = field(default_factory=dict)  # as Corpus.found, in plain data


class Corpus:
    """Files of documents, and the split of each document."""

    task = "language modelling"
    splits = ("train", "val")
    counts = ("documents", "characters", "bytes", "tokens")  # of each split, in meta.json
    other_counts = ()

    def __init__(self, config, files: list[Path], source: str):
        """config: a resolved prepare_data.PrepareConfig. source: what the files are called in meta.json."""
        self.config, self.files, self.source = config, files, source
        self.encoder = encode_documents
        self.found: dict[
            int, Found
        ] = {}  # by the number of the file; of those that were read to their end
        self.sizes = [file.stat().st_size for file in files]
        self.only_text = all(kind_of(file) == ".txt" for file in files)
        self.binary = (
            len(files) == 1 and self.only_text and is_binary(head(files[0]))
        )  # of several, it is skipped
        self.separated = (
            len(files) > 1 or not self.only_text
        )  # documents end in the end-of-text token
        if not any(True for number in range(len(files)) for _ in self.read(number)):
            skipped = "".join(f"; {note}" for note in self.notes())
            raise UserError(f"{source} has no text; there is nothing to learn from{skipped}")
        for key, default in (("text_key", "text"), ("skip_bad_lines", False)):
            if getattr(config, key) != default and self.only_text:
                print(
                    f"note: {key}={getattr(config, key)} has no effect on text files",
                    file=sys.stderr,
                )
        if len(files) > 1:
            self.source = f"{len(files):,} files: {source}"
        elif (
            source == str(files[0])
            and self.only_text
            and file_sha256(files[0]) == TINY_SHAKESPEARE_SHA256
        ):
            self.source = "tiny Shakespeare"
        # A single text is cut; of several documents, those with a low draw are for validation, at least the lowest one.
        if self.separated:
            self.val_up_to = max(config.val_fraction, self.lowest_draw())
        else:
            self.cut = int(
                sum(len(piece.text) for piece in self.read(0)) * (1 - config.val_fraction)
            )

    def fingerprint(self) -> list:
        return [file_fingerprint(file) for file in self.files]

    def read(self, number: int) -> Iterator[Piece]:
        """The documents of file number, in pieces."""
        config, found = self.config, Found()
        yield from read_documents(
            self.files[number],
            config.text_key,
            config.encoding_errors,
            config.skip_bad_lines,
            found,
        )
        if found != Found():
            self.found[number] = found

    def lowest_draw(self) -> float:
        """The lowest draw of all documents; 0 for a large corpus, where val_fraction alone is enough."""
        if sum(self.sizes) > 64_000_000 and (not self.only_text or len(self.files) >= 1000):
            return 0.0
        first_pieces = (
            piece.text
            for number in range(len(self.files))
            for piece in islice(self.read(number), 1 if self.only_text else None)
            if piece.start == 0
        )
        return min(map(draw, first_pieces), default=0.0)

    def assign(self, piece: Piece, number: int, split: str) -> list[tuple]:
        """The entries of a piece of file number, as in Unit; split: of the piece before it."""
        if not self.separated:
            in_train = max(0, self.cut - piece.start)
            first, start = ("train", (piece.text[:in_train],), False), piece.start == 0
            return [
                (*first, start),
                ("val", (piece.text[in_train:],), piece.last, in_train == 0 and start),
            ]
        if piece.start == 0:
            split = "val" if draw(piece.text) <= self.val_up_to else "train"
        return [(split, (piece.text,), piece.last, piece.start == 0)]

    def why_short(self, splits: dict[str, dict[str, int]]) -> str:
        """Why a split may have too few tokens, and the way out."""
        documents = sum(counted["documents"] for counted in splits.values())
        single = (
            "; a single document is cut in two only if it is a .txt file" if self.separated else ""
        )
        fraction = f"val_fraction={self.config.val_fraction}, documents: {documents:,}"
        return f"{fraction}; change --val_fraction or add text{single}" + "".join(
            f"; {note}" for note in self.notes()
        )

    def extra_meta(self, splits: dict[str, dict[str, int]], first_text: str) -> dict:
        """The entries of meta.json that only this kind of data has. first_text: the start of the training split."""
        return {
            "skipped_lines": sum(found.bad_lines for found in self.found.values()),
            "carriage_return_files": sum(found.carriage_returns for found in self.found.values()),
        }

    def notes(self) -> list[str]:
        """What the user should know of the files, once all are read."""
        notes, found = [], sorted(self.found.items())
        if self.binary:
            notes.append(f"{self.source} looks like a binary file, which is no text")
        if bad := [(number, entry) for number, entry in found if entry.bad_lines]:
            count, (number, first) = sum(entry.bad_lines for _, entry in bad), bad[0]
            where = f"the first: {self.files[number]}, line {first.first_bad:,}"
            notes.append(f"skipped lines without a text: {count:,} ({where})")
        if returns := [number for number, entry in found if entry.carriage_returns]:
            more = f" and {len(returns) - 1:,} more files" if returns[1:] else ""
            notes.append(f"carriage returns of {self.files[returns[0]]}{more} are now line breaks")
        return notes

    def summary(self, meta: dict) -> dict[str, str]:
        """The lines of the summary that only this kind of data has."""
        percent = f"{100 * self.config.val_fraction:g}%"
        if self.separated:
            fraction = meta["splits"]["val"]["characters"] / meta["characters"]
            if fraction < 3 * self.config.val_fraction:
                return {}
            return {
                "split": f"few documents: {fraction:.0%} of the text are for validation; in one .txt file, {percent}"
            }
        return {"split": f"one document; the last {percent} of its characters are for validation"}


def read_from(corpus, file: int, skip: int) -> Iterator[tuple[int, int, NamedTuple, int]]:
    """(file number, count in that file, piece or pair, bytes read of all files) after the first skip ones of file."""
    for number in range(file, len(corpus.sizes)):
        before = sum(corpus.sizes[:number])
        for count, item in islice(
            enumerate(corpus.read(number), start=1), skip if number == file else 0, None
        ):
            yield number, count, item, before + item.read


def units(corpus, progress: Progress) -> Iterator[Unit]:
    """The entries of a Corpus or Pairs, about UNIT characters at a time, from the position of progress on."""
    split, entries, length = progress.split, [], 0
    for number, count, item, read in read_from(corpus, progress.file, progress.piece):
        for entry in corpus.assign(item, number, split):
            split = entry[0]
            entries.append(entry)
            length += sum(map(len, entry[1]))
        if length >= UNIT:
            yield Unit(entries, split, number, count, read)
            entries, length = [], 0
    if entries:
        yield Unit(entries, split, len(corpus.sizes), 0, sum(corpus.sizes))


def vocabulary_texts(corpus, everything: bool) -> Iterator[str]:
    """Texts to train a tokenizer on: everything, or the training split of a Corpus or Pairs, evenly sampled."""
    fraction = min(1.0, VOCABULARY_BYTES / sum(corpus.sizes))
    any_text = False
    with progress_bar(sum(corpus.sizes), "training the tokenizer") as bar:
        for unit in units(corpus, Progress()):
            bar.update(unit.read - bar.n)
            for split, texts, *_ in unit.entries:
                if everything or (split == "train" and draw(texts[0], "vocabulary") < fraction):
                    any_text = True
                    yield from texts
    if not any_text:
        raise UserError(
            f"no text of {corpus.source} is in the training split; add text or change --val_fraction"
        )


def file_fingerprint(path: Path) -> list:
    return [path.as_posix(), path.stat().st_mtime_ns, path.stat().st_size]


def draw(text: str, salt: str = "split") -> float:
    """A pseudorandom number in [0, 1) from a hash of the first HASHED characters."""
    start = f"{salt}\n{text[:HASHED]}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(start, digest_size=6).digest(), "little") / 2**48


def progress_bar(total: int, what: str, start: int = 0) -> tqdm:
    """Bytes of the files, with MB/s and remaining time; shown only after two seconds."""
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds
    return tqdm(
        desc=what,
        total=total,
        initial=start,
        unit="B",
        unit_scale=True,
        mininterval=interval,
        delay=2,
    )


def encode_documents(
    tokenizer: Tokenizer, entries: list[tuple]
) -> dict[str, tuple[np.ndarray, dict]]:
    """{split: (token ids, counts)} of the entries of a unit."""
    encoded = {}
    for split in Corpus.splits:
        ids, counted = [np.empty(0, np.int64)], dict.fromkeys(Corpus.counts, 0)
        for _, (text,), ends, starts in (entry for entry in entries if entry[0] == split):
            if starts and tokenizer.bos is not None:
                ids.append(np.array([tokenizer.bos]))
            ids.append(tokenizer.encode(text) if starts else tokenizer.encode_rest(text))
            if ends and tokenizer.eot is not None:
                ids.append(np.array([tokenizer.eot]))
            counted["documents"] += ends
            counted["characters"] += len(text)
            counted["bytes"] += len(text.encode())
        tokens = np.concatenate(ids).astype(token_dtype(tokenizer))
        encoded[split] = tokens, counted | {"tokens": len(tokens)}
    return encoded
