"""Files -> documents: text, JSON lines, Parquet and CSV, optionally compressed, streamed in pieces of bounded size.

The extension, in upper or lower case, determines the format of a file; any other extension, or none, means text.
"""

import codecs
import csv
import filecmp
import glob
import gzip
import io
import json
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from humptygpt.config import UserError, nearest_path, note
from humptygpt.files import whole

try:
    from compression import zstd
except ImportError:  # before Python 3.14
    from backports import zstd

PIECE = 1 << 18  # characters of a document held in memory at once
FORMATS = (".jsonl", ".parquet", ".csv", ".tsv")
BINARY = {  # first bytes of files that are not text, and what to do with them
    b"%PDF-": "a PDF: convert it to text, for example with pdftotext",
    b"PK\3\4": "a zip file or an office document: unpack it, or save it as text",
}
HEAD = 8000  # bytes read from the start of a file to determine whether it is text
BYTE_ORDER_MARKS = {  # UTF-32 comes first, because its mark begins with that of UTF-16
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
# every data folder and run has one of these
MARKS = {".lock", "command.txt", "progress.json", "metrics.jsonl"}
# files that our scripts write next to one of those, or in a subfolder
OURS = MARKS | {"meta.json", "config.json", "plan.py", "explain.html", "wandb_id"}
OURS |= {"adapter_config.json"}
# Do not start tqdm's monitor thread: if there is no memory to start it, tqdm waits for it forever.
tqdm.monitor_interval = 0
UNPACK = {".gz": gzip.open, ".zst": zstd.ZstdFile}
DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error, zstd.ZstdError, csv.Error)
# A cut before a match of the first pattern does not change the tokens, whatever the tokenizer. For the second pattern,
# this holds for the tokenizers trained here.
BEFORE_WORD = re.compile(r"(?<=\S) (?=[^\W_])")
ANY_BEFORE_WORD = re.compile(r"[ \n](?=[^\W_])")
ENCODING_HINT = "set --encoding_errors=replace or ignore"
SKIP_HINT = "leave such lines out with --skip_bad_lines=True"


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    start: int  # characters of the document that precede it
    last: bool  # the document ends with it
    read: int  # bytes of the file read so far
    skipped: bool = False  # True: stands for a line or row without text
    draw: float = 0.0  # the document's pseudorandom number, see corpus.draw()
    place: int = 0  # characters of the file that precede it

    @property
    def texts(self) -> tuple[str]:
        return (self.text,)


class BadFile(UserError):
    """A file cannot be read as text. If it is in a folder, it is skipped, and the reason is reported."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


# --------------------------------------------------------------------------------------
# Files


def find_files(
    where: str, errors: str = "strict", text_key: str = "text"
) -> tuple[list[Path], Counter]:
    """Find the files at a path: a file, a folder, or a glob pattern. Returns them, sorted, and {reason: files skipped}.

    In a folder, hidden files are skipped. In a folder, or if the path is a pattern, so are text files that are empty,
    damaged or not validly encoded (errors: as in read_documents), and CSV files without the column text_key. Binary
    files and files written by our scripts are always skipped. A note names the skipped files.
    Raises UserError if no file is left, or a file cannot be read.
    """
    path = Path(where)
    with read_errors(path):
        if path.is_dir():
            found = path.rglob("*")
        elif glob.has_magic(where) and not path.exists():
            found = map(Path, glob.glob(where, recursive=True))  # noqa: PTH207, since the pattern may be absolute
        else:
            found = [path]
        files = sorted(
            (file for file in found if file == path or file.is_file()), key=Path.as_posix
        )
        bar = tqdm(files, "checking the files", unit="file", mininterval=2, delay=2)
        reasons = {file: why_skipped(file, path, errors, text_key) for file in bar}
    texts = [file for file, reason in reasons.items() if not reason]
    skipped = [f"{file} ({reason})" for file, reason in reasons.items() if reason]
    report = f"skipped files: {len(skipped):,}, including {', '.join(skipped[:5])}"
    if not texts:
        raise UserError(f"{where} has no text files" + (f"; {report}" if skipped else ""))
    if skipped:
        note(report)
    return texts, Counter(filter(None, reasons.values()))


def why_skipped(file: Path, where: Path, errors: str, text_key: str) -> str:
    """Explain why a file found at `where` is skipped, or return "". Errors thus appear now, not hours later."""
    if any(part.startswith(".") for part in file.parts[len(where.parts) :]):
        return "hidden"
    folders = file.parents[:2]
    if file.name in OURS and any((at / mark).exists() for at in folders for mark in MARKS):
        return "part of a data folder or run"
    try:
        if file_format(file) not in (".txt", ".csv"):
            return ""
        if reason := why_no_text(head(file)):
            return reason
        # read the whole file now, so that every later pass uses the same files
        text = read_documents(file, text_key, errors, skip_bad_lines=True)
        return "" if file == where or sum(len(piece.text) for piece in text) else "empty"
    except BadFile as error:
        if file == where:
            raise
        return error.reason


def head(path: Path) -> bytes:
    """Read the first HEAD bytes of a file, decompressed."""
    with read_errors(path), path.open("rb") as file:
        return unpacked(path, file).read(HEAD)


def encoding_of(start: bytes) -> str:
    """Name the encoding of a text that starts with these bytes: by its byte order mark or, without one, UTF-8."""
    found = (name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark))
    return next(found, "utf-8-sig")


def why_no_text(start: bytes) -> str:
    """Explain why a file that starts with these bytes is not text, or return "". As in git, null bytes mean binary."""
    for mark, reason in BINARY.items():
        if start.startswith(mark):
            return reason
    if start[257:262] == b"ustar":
        return "a tar archive: unpack it"
    has_null = encoding_of(start) == "utf-8-sig" and b"\0" in start
    return "binary" if has_null else ""


def file_size(path: Path) -> int:
    with read_errors(path):
        return path.stat().st_size


def file_format(path: Path) -> str:
    """Format of a file, by its name: .jsonl, .parquet, .csv or .tsv; .txt for any other name."""
    packed = path.suffix.lower() in UNPACK
    suffix = Path(path.stem if packed else path.name).suffix.lower()
    return suffix if suffix in FORMATS else ".txt"


def unpacked(path: Path, file: BinaryIO) -> BinaryIO:
    unpack = UNPACK.get(path.suffix.lower())
    return unpack(file) if unpack else file


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn errors in reading a file into UserErrors."""
    try:
        yield
    except DAMAGE as error:
        raise BadFile(f"{path} is damaged: {error}", "damaged") from error
    except OSError as error:
        near = nearest_path(str(path)) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"cannot read {path}: {error.strerror or error}{near}") from error


def write_if_changed(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file with write(file). Unchanged content keeps its modification time, so that preparations can resume."""
    with whole(path) as new:
        with new.open("xb") as file:
            write(file)
        if path.exists() and filecmp.cmp(new, path, shallow=False):
            shutil.copystat(path, new)


# --------------------------------------------------------------------------------------
# Documents


def read_documents(
    path: Path, text_key: str, errors: str, skip_bad_lines: bool = False
) -> Iterator[Piece]:
    """Read all documents of a file in pieces of at most PIECE characters, cut at the same positions every time.

    A text file is one document. So is the text under text_key in a line of JSON or a row of Parquet or CSV. errors:
    strict, replace or ignore, as in bytes.decode. A carriage return, with or without a line break after it, becomes a
    line break. skip_bad_lines: skip lines and rows without text. Otherwise a UserError names the first.
    """
    form = file_format(path)
    with read_errors(path):
        if form == ".txt":
            yield from pieces(read_text(path, errors))
            return
        if form == ".jsonl":
            records = read_lines(path)
        elif form == ".parquet":
            records = read_parquet(path, text_key)
        else:
            records = read_table(path, text_key, errors)
        for number, (record, read) in enumerate(records, start=1):
            try:
                text = text_of(record, text_key, errors)
            except (ValueError, RecursionError) as error:
                if not skip_bad_lines:
                    where = f"{path}, {'line' if form == '.jsonl' else 'row'} {number:,}"
                    raise UserError(f"{where} has no text: {error}; {SKIP_HINT}") from error
                yield Piece("", 0, False, read, skipped=True)
            else:
                yield from pieces([(text, read)])


def text_of(record: object, text_key: str, errors: str) -> str:
    """Text of a row, or of a line of JSON given as bytes. Raises ValueError or RecursionError if there is none."""
    if isinstance(record, bytes):
        record = parse_line(record, text_key, errors)
    if not isinstance(record, str):
        content = f"{repr(record)[:60]}, not a single text"
        raise ValueError(f"{text_key!r} is {content}")
    # JSON can contain an unpaired surrogate, which UTF-8 cannot encode
    text = record.encode("utf-16", "surrogatepass").decode("utf-16", errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")


@contextmanager
def open_text(
    path: Path, errors: str, newline: str | None = None
) -> Iterator[tuple[io.TextIOWrapper, BinaryIO]]:
    """Open a text file, decompressed. Yields it and the stored file, whose position is the number of bytes read."""
    with path.open("rb") as file:
        encoding = encoding_of(head(path))
        try:
            yield io.TextIOWrapper(unpacked(path, file), encoding, errors, newline), file
        except UnicodeDecodeError as error:
            wrong = f"byte 0x{error.object[error.start]:02x} is not valid {error.encoding}"
            raise BadFile(
                f"{path}: {wrong}; convert the file with iconv, or {ENCODING_HINT}",
                f"not {error.encoding}",
            ) from error


def read_text(path: Path, errors: str) -> Iterator[tuple[str, int]]:
    """Read a text file as (characters, bytes of the file so far)."""
    with open_text(path, errors) as (text, file):
        while part := text.read(PIECE):
            yield part, file.tell()


def read_lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Read each line of a file as (line, bytes of the file so far), without a byte order mark."""
    with read_errors(path), path.open("rb") as file:
        for number, line in enumerate(unpacked(path, file)):
            yield line if number else line.removeprefix(codecs.BOM_UTF8), file.tell()


def read_text_lines(path: Path, errors: str) -> Iterator[tuple[str, int]]:
    """Read each line of a text file as (line, bytes of the file so far). errors: as in read_documents."""
    for number, (line, read) in enumerate(read_lines(path), start=1):
        try:
            yield line.decode("utf-8", errors), read
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, line {number:,} is not UTF-8; {ENCODING_HINT}"
            ) from error


def read_parquet(path: Path, text_key: str) -> Iterator[tuple[object, int]]:
    """Read each row as (value under text_key, bytes of the file so far)."""
    import pyarrow.parquet  # slow to import and rarely needed

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            columns = table.schema_arrow.names
            check_column(path, text_key, columns)
            batches = table.iter_batches(
                batch_size=256, columns=[text_key], use_threads=False
            )
            size = path.stat().st_size
            values = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            for row, value in enumerate(values, start=1):
                yield value, size * row // table.metadata.num_rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def read_table(path: Path, text_key: str, errors: str) -> Iterator[tuple[object, int]]:
    """Read each row of a CSV file as (value under text_key, bytes of the file so far).

    The first line names the columns. The separator is a comma, semicolon or tab, whichever that line has most often.
    """
    csv.field_size_limit(2**31 - 1)
    with open_text(path, errors, newline="") as (text, file):
        header = text.readline()
        separator = max(",;\t", key=header.count)
        table = csv.DictReader(chain([header], text), delimiter=separator)
        check_column(path, text_key, table.fieldnames or [])
        for row in table:
            # csv stores surplus cells under None; the text of such a row probably contains the separator
            yield row.get(None, row[text_key]), file.tell()


def check_column(path: Path, text_key: str, columns: list[str]) -> None:
    if text_key not in columns:
        raise BadFile(
            f"{path} has no column {text_key!r}; set --text_key to one of: {', '.join(columns)}",
            f"no column {text_key}",
        )


def parse_line(line: bytes, text_key: str, errors: str) -> object:
    """Value under text_key in a line of JSON, "" for an empty line. Raises ValueError or RecursionError."""
    text = line.decode("utf-8", errors)
    if not text.strip():
        return ""
    record = json.loads(text)
    if not isinstance(record, dict) or text_key not in record:
        raise ValueError(
            f"there is no key {text_key!r} in {text[:100]!r}; set --text_key to the key of the text;"
            " a chat must be a single text"
        )
    return record[text_key]


def pieces(parts: Iterable[tuple[str, int]]) -> Iterator[Piece]:
    """Cut one document into pieces; an empty document has none. parts: as from read_text()."""
    text = ""
    start = 0
    read = 0
    for part, read in parts:
        text += part
        while len(text) > PIECE:
            end = cut_position(text)
            yield Piece(text[:end], start, False, read)
            text = text[end:]
            start += end
    if text:
        yield Piece(text, start, True, read)


def cut_position(text: str) -> int:
    """Last position in the first PIECE characters at which a cut changes no tokens: before a space and a word.

    All tokenizers start a token at a single space before a word, and the ones trained here also at a line break, so the
    tokens of the pieces are the tokens of the document. If there is no such position, the cut is at PIECE. That may
    change the tokens, but not the text.
    """
    for pattern, first in ((BEFORE_WORD, PIECE // 2), (ANY_BEFORE_WORD, 1)):
        ends = [match.start() for match in pattern.finditer(text, first, PIECE + 1)]
        if ends:
            return ends[-1]
    return PIECE
