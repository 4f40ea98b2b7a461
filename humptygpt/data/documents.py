"""Read documents from files of text, JSON lines, Parquet or CSV, which may be compressed, in pieces of bounded size.

The extension of a file, in upper or lower case, determines its format. A file with any other extension, or none, is
text.
"""

import csv
import glob
import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Self

from humptygpt.cli import UserError, one_line

try:
    from compression import zstd
except ImportError:  # before Python 3.14
    from backports import zstd

Record = dict | None  # {}: the line or row is no valid record; None: it is blank
PIECE = 1 << 18  # maximum number of characters in a piece of a document
LEFT_OUT = "records left out"  # what the note counts
NAMED = 5  # of the files that are skipped, the first that are named
HEAD = 8000  # bytes read from the start of a file to determine whether it is text
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks
# files that mark a folder as ours: the first is in every data folder, the second in every run's folder
MARKS = ("command.txt", "metrics.jsonl")
UNPACK = {".gz": gzip.open, ".zst": zstd.open}
BETWEEN = re.compile(r"[\s,]*")  # what separates the entries of a JSON array
# position before a single space and a word, where cutting a text does not change its tokens
BEFORE_WORD = re.compile(r"(?<=\S) (?=[^\W_])")


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    first: bool  # True: the document begins with this piece
    last: bool  # True: the document ends with this piece

    @property
    def texts(self) -> tuple[str]:
        return (self.text,)

    def cut(self, at: int) -> tuple[Self, Self]:
        """Cut off the first `at` characters, where the document ends. Returns them and the rest, which may be empty."""
        begun = self._replace(text=self.text[:at], last=self.last or at <= len(self.text))
        rest = self._replace(text=self.text[at:], first=self.first and at == 0)
        return begun, rest


class Flaws(Counter):
    """Counts the bad bytes and the records without text in files, and says where the first is."""

    first = ""

    def add(self, what: str, where: str, count: int = 1) -> None:
        self[what] += count
        self.first = self.first or where

    def __str__(self):
        counts = ", ".join(f"{what}: {count:,}" for what, count in self.items())
        return f"{counts}; the first: {self.first}"


# --------------------------------------------------------------------------------------
# Files


def find_files(where: str) -> tuple[list[Path], list[str]]:
    """Find the files to read. Returns them, sorted, and why others are skipped.

    Hidden files and files written by our scripts are skipped. Raises UserError if no file is left.
    where: path of a file or a folder, or a glob pattern.
    """
    path = Path(where)
    files = []
    skipped = []
    with read_errors(path):
        if path.is_dir():
            found = files_below(path, skipped)
        elif path.is_file():
            return [path], []
        else:
            found = map(Path, glob.glob(where, recursive=True))  # noqa: PTH207, since the pattern may be absolute
        found = sorted(filter(Path.is_file, found), key=Path.as_posix)
    for file in found:
        if any(part.startswith(".") for part in file.parts[len(path.parts) :]):
            skipped.append(f"{file} is hidden")
        elif any((at / mark).exists() for at in file.parents[:2] for mark in MARKS):
            skipped.append(f"{file} is part of a data folder or of a run")
        else:
            files.append(file)
    if not files:
        raise UserError("; ".join([f"no text files found at {where}", *skipped[:NAMED]]))
    return files, skipped


def files_below(folder: Path, skipped: list[str]) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders. skipped: receives the folders that are not read, and why."""

    def skip(error: OSError) -> None:
        skipped.append(f"cannot read {error.filename}: {error.strerror}")

    for at, folders, names in os.walk(folder, onerror=skip):
        for name in folders:
            if (link := Path(at, name)).is_symlink():
                skipped.append(f"{link} is a link to a folder, which --input='{folder}/**' follows")
        yield from (Path(at, name) for name in names)


def file_suffix(path: Path) -> str:
    """Return the extension of a file, in lower case and without that of its compression; .jsonl for all JSON lines."""
    suffix = Path(path.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix
    return ".jsonl" if suffix in (".ndjson", ".jsonlines") else suffix


def file_format(path: Path) -> str:
    """Determine the format of a file from its name: .jsonl, .parquet, .csv or .tsv; .txt for any other name."""
    suffix = file_suffix(path)
    return suffix if suffix in READERS and suffix != ".json" else ".txt"


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn any error in reading a file into a UserError. path: the file, for the message."""
    try:
        yield
    except (UserError, MemoryError, ImportError):  # a missing package is no damage
        raise
    except Exception as error:  # damage raises many kinds, in each format other ones
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"cannot read {path}: {reason}") from error


# --------------------------------------------------------------------------------------
# Documents


def read_documents(path: Path, text_key: str, flaws: Flaws, by_line: bool = False) -> Iterator[Piece]:
    """Read all documents of a file in pieces of at most PIECE characters, cut at the same positions every time.

    A text file is one document, and so is the text under text_key in each line of JSON or row of Parquet or CSV.
    \\r\\n and \\r become \\n. flaws: counts bad bytes, and lines and rows without text.
    by_line: each line of a text file is a document, without its line break. Blank lines are left out.
    """
    if file_format(path) == ".txt":
        if by_line:
            for line in read_text(path, flaws):
                yield from pieces([line.rstrip("\n")] if line.strip() else [])
        else:
            yield from pieces(read_text(path, flaws, size=PIECE))
        return
    for where, record in read_records(path, [text_key], flaws):
        text = record.get(text_key)
        if text and isinstance(text, str):
            yield from pieces([re.sub("\r\n?", "\n", text)])
        else:
            why = f"no text under text_key={text_key}"
            if record and text_key not in record:
                why += f"; its keys: {', '.join(record)}; a question and its answer: --text_key=prompt,completion"
            flaws.add(LEFT_OUT, f"{where}: {why}")


def read_text(path: Path, flaws: Flaws, newline: str | None = None, size: int | None = None) -> Iterator[str]:
    """Read a text file in parts of `size` characters; None: in lines. Bad bytes become U+FFFD, which flaws counts.

    newline: as in open(). Raises UserError if the file is binary.
    """
    unpack = UNPACK.get(path.suffix.lower(), open)
    with read_errors(path):
        with unpack(path, "rb") as file:
            start = file.read(HEAD)
        encoding = "utf-16" if start.startswith(UTF_16) else "utf-8-sig"
        # as in git, a file with null bytes is binary; a PDF may have none at its start, so it is recognised by its mark
        if start.startswith(b"%PDF-") or (encoding == "utf-8-sig" and b"\0" in start):
            raise UserError(f"{path} is not a text file")
        with unpack(path, "rt", encoding=encoding, errors="replace", newline=newline) as text:
            for part in iter(partial(text.read, size) if size else text.readline, ""):
                if bad := part.count("\ufffd"):
                    flaws.add("bad bytes replaced", f"{path} is not UTF-8", bad)
                yield part


def read_records(path: Path, columns: list[str], flaws: Flaws) -> Iterator[tuple[str, Record]]:
    """Yield the records of a file of JSON, Parquet or CSV, each with its file and place. Blank lines are left out.

    columns: the keys to read; []: all. flaws: as in read_documents.
    """
    suffix = file_suffix(path)
    unit = "line" if suffix == ".jsonl" else "row"
    number = 0
    with read_errors(path):
        try:
            for number, record in enumerate(READERS[suffix](path, columns, flaws), start=1):
                if record is not None:
                    yield f"{path}, {unit} {number:,}", record
        except csv.Error as error:
            raise UserError(
                f"cannot read {path}, row {number + 1:,}: {error}; a quote in a quoted cell is written twice"
            ) from error


def read_json(path: Path, columns: list[str], flaws: Flaws) -> Iterator[Record]:
    """Read the lines of a JSON file, or the entries of the array in a .json file."""
    lines = read_text(path, flaws)
    if file_suffix(path) == ".json":
        lines = entries("".join(lines).strip())
    for line in lines:
        yield parse_record(line) if line.strip() else None


def entries(text: str) -> Iterator[str]:
    """Cut JSON into the entries of its array, one at a time, because parsed they take far more memory than the text.

    Without an array, each value is an entry. Raises ValueError at the first one that is not valid.
    """
    decoder = json.JSONDecoder()
    start = BETWEEN.match(text, text.startswith("[")).end()
    while start < len(text) and text[start] != "]":
        _, end = decoder.raw_decode(text, start)
        yield text[start:end]
        start = BETWEEN.match(text, end).end()


def parse_record(line: str) -> Record:
    """Parse the JSON of a record. Returns {} if it is not valid."""
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        # this fails if an escape stands for half a character
        json.dumps(record, ensure_ascii=False).encode()
        if isinstance(record, dict):
            return record
    return {}


def read_parquet(path: Path, columns: list[str], flaws: Flaws) -> Iterator[Record]:
    import pyarrow.parquet  # slow to import and rarely needed

    with pyarrow.parquet.ParquetFile(path) as table:
        check_columns(path, columns, table.schema_arrow.names)
        for batch in table.iter_batches(256, columns=columns or None, use_threads=False):
            yield from batch.to_pylist()


def read_table(path: Path, columns: list[str], flaws: Flaws) -> Iterator[Record]:
    """Read the rows of a CSV or TSV file.

    The first line names the columns. The separator is whichever of comma, semicolon and tab is most frequent there.
    Between tabs, quotes are part of the text.
    """
    csv.field_size_limit(2**31 - 1)
    lines = read_text(path, flaws, newline="")
    header = next(lines, "")
    if header.startswith("sep="):  # a line that only Excel reads
        header = next(lines, "")
    separator = max(",;\t", key=header.count)
    quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    # strict: without it, a cell with a stray quote would contain all that follows
    table = csv.DictReader(
        chain([header], lines),
        delimiter=separator,
        quoting=quoting,
        skipinitialspace=f"{separator} " in header,
        strict=True,
    )
    table.fieldnames = [name.strip() for name in table.fieldnames]
    check_columns(path, columns, table.fieldnames)
    for row in table:
        # the csv module stores surplus cells under None; in such a row, the text probably contains the separator
        yield {} if None in row else row


READERS = {  # {extension: reads the records}
    ".jsonl": read_json,
    ".json": read_json,  # only of conversations; other files of this kind are text
    ".parquet": read_parquet,
    ".csv": read_table,
    ".tsv": read_table,
}


def check_columns(path: Path, columns: list[str], found: list[str]) -> None:
    for column in columns:
        if column not in found:
            raise UserError(f"{path} has no column {column!r}; set --text_key to one of: {', '.join(found)}")


def pieces(parts: Iterable[str]) -> Iterator[Piece]:
    """Cut one document into pieces. parts: its text, in parts of any length. An empty document yields no piece."""
    text = ""
    first = True
    for part in parts:
        text += part
        while len(text) > PIECE:
            end = cut_position(text)
            yield Piece(text[:end], first, last=False)
            text = text[end:]
            first = False
    if text:
        yield Piece(text, first, last=True)


def cut_position(text: str) -> int:
    """Find the last position in the first PIECE characters where a cut changes no tokens: before a space and a word.

    All tokenizers start a token there. If the second half of these characters has no such position, the cut is at
    PIECE, which may change a token, but not the text.
    """
    places = BEFORE_WORD.finditer(text, PIECE // 2, PIECE + 1)
    return max((place.start() for place in places), default=PIECE)
