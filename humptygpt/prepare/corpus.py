"""Files of documents, the split of each document, and iteration over a corpus of documents or sentence pairs.

Documents here and Pairs in translation/pairs.py share one interface: files, splits, text items (pieces of documents, or
pairs), and an encoder for items.
"""

import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from humptygpt.config import UserError
from humptygpt.prepare.documents import Piece, file_format, file_size, read_documents
from humptygpt.tokenizers import TOKENIZERS, Tokenizer

UNIT = 1 << 19  # characters encoded at once
HASHED = 4096  # leading characters of a document that determine its split; below PIECE
MANY = 64_000_000  # above this many bytes of text, lines or rows count as many documents

# ({split: its pieces or pairs}, position after them)
Unit = tuple[dict[str, list[NamedTuple]], "Position"]


class Position(NamedTuple):
    """How far the files of a corpus have been read."""

    file: int = 0  # index of the open file
    item: int = 0  # pieces or pairs read from it
    read: int = 0  # bytes read so far, over all files


START = Position()


class Documents:
    """Files of documents, and the split of each document."""

    task = "language modelling"
    splits = ("train", "val")
    # entries for each split in meta.json
    counts = ("documents", "characters", "bytes", "tokens")
    chosen_for = ""  # with tokenizer=auto: the text statistics behind the choice

    def __init__(self, config, files: list[Path], skipped: Counter, source: str):
        """config: a resolved prepare_data.PrepareConfig. source: what meta.json calls the files.

        files, skipped: from find_files.
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
        """Decide how to split the text. Returns the number of characters before the cut in each file; None: no cuts.

        Documents whose draw is at most val_fraction are for validation. If their share of the text is less than half or
        more than one and a half times that fraction, every file is cut instead; a single text is always cut. Raises
        UserError if there is no text. Also sets text_size, in bytes of UTF-8. For more than MANY bytes of lines or rows
        it is an estimate.
        """
        fraction = self.config.val_fraction
        lengths = [0] * len(self.files)
        held_out = self.text_size = 0
        for number in range(len(self.files)):
            for piece in self.read(number):
                lengths[number] += len(piece.text)
                held_out += len(piece.text) * (piece.draw <= fraction)
                self.text_size += len(piece.text.encode())
                # with many documents, the validation split is close to val_fraction
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
        """Read the documents of a file in pieces, each with its place in the file and the draw of its document."""
        config = self.config
        settings = (config.text_key, config.encoding_errors, config.skip_bad_lines)
        place = 0
        for piece in read_documents(self.files[number], *settings):
            if piece.start == 0:
                drawn = draw(piece.text)
            yield piece._replace(draw=drawn, place=place)
            place += len(piece.text)

    def assign(self, piece: Piece, number: int) -> list[tuple[str, Piece]]:
        """Return [(split, piece)] for a piece of a file, with two entries if the file is cut within the piece."""
        if self.cuts is None:
            return [("val" if piece.draw <= self.config.val_fraction else "train", piece)]
        cut = self.cuts[number] - piece.place
        if cut > len(piece.text):
            return [("train", piece)]
        if cut <= 0:
            return [("val", piece)]
        begun = piece._replace(text=piece.text[:cut], last=True)
        if cut == len(piece.text):
            return [("train", begun)]
        rest = piece._replace(text=piece.text[cut:], start=piece.start + cut)
        return [("train", begun), ("val", rest)]

    def extra_meta(self, splits: dict[str, Counter], first_text: str) -> dict:
        """Entries of meta.json for documents only."""
        return {"skipped_lines": sum(splits.values(), Counter())["skipped_lines"]}

    def summary(self, meta: dict) -> dict[str, str]:
        """Lines of the summary for documents only."""
        lines = {}
        if self.chosen_for:
            another = f"alternatives: --tokenizer={', '.join(TOKENIZERS)}"
            lines["tokenizer=auto"] = f"chosen for {self.chosen_for}; {another}"
        if self.cuts and self.separated:
            last = f"the last {self.config.val_fraction:.4g} of each file"
            lines["validation"] = (
                f"{last}, because there are too few documents or their lengths differ too much"
            )
        if self.skipped:
            counts = (f"{count:,} {reason}" for reason, count in self.skipped.items())
            lines["skipped files"] = ", ".join(counts)
        if count := meta["skipped_lines"]:
            lines["skipped lines"] = f"{count:,} without text"
        return lines


def encode_documents(
    tokenizer: Tokenizer, split: str, pieces: list[Piece]
) -> tuple[list[np.ndarray], Counter]:
    """Encode pieces of one split. Returns their token ids and counts."""
    ids = []
    counted = Counter()
    for piece in pieces:
        if piece.skipped:
            counted["skipped_lines"] += 1
            continue
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


# --------------------------------------------------------------------------------------
# Documents or pairs, in order


def read_from(
    corpus, what: str, start: Position = START
) -> Iterator[tuple[Position, NamedTuple]]:
    """Yield (position after the item, piece or pair) from start on, with a progress bar. what: title of the bar."""
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
    """Read units of about UNIT characters."""
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


def draw(text: str, salt: str = "split") -> float:
    """Pseudorandom number in [0, 1) from a hash of the first HASHED characters."""
    start = f"{salt}\n{text[:HASHED]}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(start, digest_size=6).digest(), "little") / 2**48
