"""Read documents from files, assign each to a split, and iterate over a corpus of documents or sentence pairs.

A corpus has files, splits and items. The items of Documents, below, are pieces of documents; translation/pairs.py has a
corpus of sentence pairs, and chat/conversations.py one of conversations.
"""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from humptygpt.cli import UserError, note
from humptygpt.prepare.documents import BadFile, Piece, file_format, read_documents
from humptygpt.tokenizers import Tokenizer

UNIT = 1 << 19  # characters that a thread encodes at once
# the first HASHED characters of a document determine its split; must be less than PIECE
HASHED = 4096


class Corpus:
    """The interface of all corpora, and what most of them share.

    Each also has read(), assign(), encode(), extra_meta() and summary(): see Documents.
    """

    task: str
    counts: tuple[str, ...]  # what meta.json counts in each split, the items first
    splits = ("train", "val")
    separated = True  # each item ends with the end-of-text token
    missing: str  # what an input without items lacks
    text_size = None  # bytes of UTF-8; set by survey()

    def __init__(self, config, files: list, source: str):
        """config: a resolved prepare_data.PrepareConfig. source: description of the files for meta.json."""
        self.config = config
        self.files = self.paths = files
        self.source = source

    def survey(self) -> None:
        """Read everything once, to check it and to find the size of the text. Raises UserError if there is none."""
        items = read_all(self, f"checking the {self.counts[0]}")
        self.text_size = sum(len("".join(item.texts).encode()) for _, item in items)
        if not self.text_size:
            raise UserError(f"{self.source} has no {self.missing}")

    def wrap(self, tokenizer: Tokenizer) -> Tokenizer:
        """Return the tokenizer that encodes the corpus, given the one of its text."""
        return tokenizer


class Documents(Corpus):
    """A corpus of documents, which are read from files. Each document is assigned to a split."""

    task = "language modelling"
    counts = ("documents", "characters", "bytes", "tokens")
    missing = "text to learn from"
    # set by survey(): per file, characters in the training part; None: documents stay whole
    cuts = None

    def __init__(self, config, files: list[Path], skipped: list[str], source: str):
        """files, skipped: from find_files. The others as for Corpus."""
        super().__init__(config, files, source)
        self.skipped = skipped
        self.skipped_lines = 0

    @property
    def separated(self) -> bool:
        """True if each document ends with the end-of-text token. False if a single text is the whole corpus."""
        return len(self.files) > 1 or file_format(self.files[0]) != ".txt"

    def survey(self) -> None:
        """Read everything once, to skip the files that are not text and to decide how to split the rest.

        Documents whose draw() is at most val_fraction are for validation. If their share of the text is not between
        0.5 * val_fraction and 1.5 * val_fraction, the end of each file is used for validation instead. A single text
        file is always split this way. Raises UserError if there is no text, or if the only file cannot be read.
        """
        measured = {}
        with progress_bar("checking the files") as bar:
            for number, file in enumerate(self.files):
                try:
                    measured[file] = self.measure(number, bar)
                except BadFile as error:
                    if len(self.files) == 1:
                        raise
                    self.skipped.append(str(error))
        if self.skipped:
            note("; ".join([f"skipped files: {len(self.skipped):,}", *self.skipped[:5]]))
        if not measured:
            raise UserError(f"{self.source} has no {self.missing}")
        self.files = list(measured)
        if len(self.files) > 1:
            self.source = f"{len(self.files):,} files: {self.source}"
        lengths, held_out, sizes = zip(*measured.values(), strict=True)
        self.text_size = sum(sizes)
        fraction = self.config.val_fraction
        share = sum(held_out) / (fraction * sum(lengths))
        if not self.separated or not 0.5 <= share <= 1.5:
            self.cuts = [int(length * (1 - fraction)) for length in lengths]

    def measure(self, number: int, bar: tqdm) -> tuple[int, int, int]:
        """Count a file's characters, those drawn for validation, and its bytes of UTF-8. Raises BadFile if empty."""
        length = held_out = size = 0
        for piece in self.read(number):
            length += len(piece.text)
            held_out += len(piece.text) * (piece.draw <= self.config.val_fraction)
            self.skipped_lines += piece.skipped
            read = len(piece.text.encode())
            size += read
            bar.update(read)
        if not length:
            raise BadFile(f"{self.files[number]} has no {self.missing}")
        return length, held_out, size

    def read(self, number: int) -> Iterator[Piece]:
        """Read the documents of a file in pieces, each with its position in the file and the draw() of its document."""
        config = self.config
        settings = (config.text_key, config.encoding_errors, config.skip_bad_lines)
        place = 0
        for piece in read_documents(self.files[number], *settings):
            if piece.start == 0:
                drawn = draw(piece.text)
            yield piece._replace(draw=drawn, place=place)
            place += len(piece.text)

    def assign(self, piece: Piece, number: int) -> list[tuple[str, Piece]]:
        """Return [(split, piece)] for a piece of a file, or two pairs if it contains the boundary of the splits."""
        if piece.skipped:
            return []
        if self.cuts is None:
            return [("val" if piece.draw <= self.config.val_fraction else "train", piece)]
        cut = max(0, self.cuts[number] - piece.place)
        ends = piece.last or cut <= len(piece.text)
        begun = piece._replace(text=piece.text[:cut], last=ends)
        rest = piece._replace(text=piece.text[cut:], start=piece.start + cut)
        return [entry for entry in (("train", begun), ("val", rest)) if entry[1].text]

    def encode(
        self, tokenizer: Tokenizer, split: str, pieces: list[Piece]
    ) -> tuple[list[np.ndarray], Counter]:
        """Encode pieces of one split. Returns arrays of token ids, and the counts for meta.json."""
        ids = []
        counted = Counter()
        for piece in pieces:
            begins = piece.start == 0
            if begins and tokenizer.bos is not None:
                ids.append([tokenizer.bos])
            encode = tokenizer.encode if begins else tokenizer.encode_rest
            ids.append(encode(piece.text))
            if piece.last and tokenizer.eot is not None:
                ids.append([tokenizer.eot])
            counted["documents"] += begins
            counted["characters"] += len(piece.text)
            counted["bytes"] += len(piece.text.encode())
        return ids, counted

    def extra_meta(self, splits: dict[str, Counter], first_text: str) -> dict:
        """Return the entries of meta.json that are specific to documents."""
        return {"skipped_lines": self.skipped_lines}

    def summary(self, meta: dict) -> dict[str, str]:
        """Return the summary lines that are specific to documents, as {title: text}."""
        lines = {}
        if self.cuts and self.separated:
            last = f"the last {100 * self.config.val_fraction:.4g}% of each file"
            lines["validation"] = (
                f"{last}, because there are too few documents or their lengths differ too much"
            )
        if count := meta["skipped_lines"]:
            lines["skipped lines"] = f"{count:,} without text"
        return lines


# --------------------------------------------------------------------------------------
# The items of a corpus, in order


def progress_bar(what: str, total: int | None = None) -> tqdm:
    """Make a progress bar that counts bytes of text. what: its title. total: None if it is unknown."""
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, delay=2, disable=None)


def read_all(corpus, what: str) -> Iterator[tuple[int, NamedTuple]]:
    """Yield (index of the file, item) in order, with a progress bar. what: title of the bar."""
    with progress_bar(what, corpus.text_size) as bar:
        for number in range(len(corpus.files)):
            for item in corpus.read(number):
                bar.update(sum(len(text.encode()) for text in item.texts))
                yield number, item


def units(corpus) -> Iterator[dict[str, list[NamedTuple]]]:
    """Group pieces or pairs into units of about UNIT characters. Yields {split: items}."""
    entries = defaultdict(list)
    length = 0
    for number, item in read_all(corpus, "encoding"):
        for split, entry in corpus.assign(item, number):
            entries[split].append(entry)
            length += sum(map(len, entry.texts))
        if length >= UNIT:
            yield entries
            entries = defaultdict(list)
            length = 0
    if entries:
        yield entries


def draw(text: str, salt: str = "split", hashed: int | None = HASHED) -> float:
    """Derive a pseudorandom number in [0, 1) from a text: a hash of salt and of its first characters; None: of all."""
    start = f"{salt}\n{text[:hashed]}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(start, digest_size=6).digest(), "little") / 2**48


def normalised(text: str) -> str:
    """Reduce a text to its words, so that texts that differ only in case, punctuation or spaces become identical."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text.casefold())))
