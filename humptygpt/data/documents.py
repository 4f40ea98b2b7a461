"""Files -> documents: text, JSON lines and Parquet, optionally compressed, streamed in pieces of bounded size.

A file is what the ending of its name says, in upper or lower case; any other ending, and none, means text.
"""

import codecs
import glob
import gzip
import hashlib
import io
import json
import re
import shlex
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

from backports import zstd  # in the standard library from Python 3.14 on

from humptygpt.core.download import file_sha256
from humptygpt.core.errors import UserError
from humptygpt.core.settings import nearest_path

PIECE = 1 << 18  # characters of a document that are in memory at once
KINDS = (".txt", ".jsonl", ".parquet", ".tsv")
PACKED = (".gz", ".zst")
HEAD = 8000  # bytes at the start of a file that decide whether it is text
CONTROL = re.compile(rb"[\x00-\x06\x0e-\x1a\x1c-\x1f\x7f]")  # that text hardly ever has
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
STREAM = "standard_input.txt"  # the copy of a stream, which is read more than once
MARKS = {
    ".lock",
    "command.txt",
    "progress.json",
    "metrics.jsonl",
}  # one of them is in every data folder and run
OURS = {
    ".lock",
    "meta.json",
    "command.txt",
    "progress.json",
    "config.json",
    "metrics.jsonl",
}  # files in them that are no texts
NAMED = 5  # files that a note names
SURROGATES = re.compile("[\ud800-\udfff]")  # JSON can spell them, UTF-8 cannot encode them
WAY_OUT = "set --encoding_errors=replace or ignore"
SKIP = "leave such lines out with --skip_bad_lines=True"


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    start: int  # characters of the document before it
    last: bool  # ends its document
    read: int  # bytes of the file read so far


@dataclass
class Found:
    """What the reader of a file met beside its documents; complete when the file has been read to its end."""

    carriage_returns: bool = False  # that were replaced by line breaks
    bad_lines: int = 0  # that were skipped
    first_bad: int = 0  # the number of the first of them


def find_files(where: str) -> list[Path]:
    """Sorted files of a path: a file, a folder's, or a glob pattern's matches.

    Hidden files of a folder, and of a folder or pattern binary files and what our scripts write, are skipped and named.
    Raises UserError where nothing is left, or a file cannot be read.
    """
    if re.match("https?://", where):
        raise UserError(
            f"input={where} is an address; download it first: wget {shlex.quote(where)}"
        )
    path, hidden, one = Path(where), set(), False
    with read_errors(path):
        if path.is_dir():
            files = {file for file in path.rglob("*") if file.is_file()}
            hidden = {
                file
                for file in files
                if any(part.startswith(".") for part in file.relative_to(path).parts)
            }
        elif not path.exists() and glob.has_magic(where):
            files = {
                file
                for match in glob.glob(where, recursive=True)  # noqa: PTH207, since it may be absolute
                if (file := Path(match)).is_file()
            }
            if not files:
                raise UserError(f"no file matches {where}")
        else:
            files, one = {path}, True
    ours = set() if one else {file for file in files if is_ours(file)}
    shown = sorted(files - hidden - ours, key=Path.as_posix)
    binary, json_lines = look_into(shown)  # now rather than hours later
    skipped = [] if one else binary  # whoever names a file wants it, and hears why it is no text
    groups = {"binary": skipped, "hidden": hidden - ours, "of data folders and runs": ours}
    listed = "; ".join(
        f"{len(group):,} {why}: {names(sorted(group, key=Path.as_posix))}"
        for why, group in groups.items()
        if group
    )
    files = [file for file in shown if file not in set(skipped)]
    if not files:
        raise UserError(f"{where} has no text files" + (f"; skipped: {listed}" if listed else ""))
    if listed:
        print(f"note: skipped files: {listed}", file=sys.stderr)
    if json_lines:
        found = names(json_lines)
        print(
            f"note: taken for text, but it looks like JSON lines, which end in .jsonl: {found}",
            file=sys.stderr,
        )
    return files


def is_ours(file: Path) -> bool:
    """Whether one of our scripts has written this beside tokens or checkpoints: the input may be the folder "."."""
    return file.name in OURS and any(file.with_name(mark).exists() for mark in MARKS)


def look_into(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """(those that are binary, those that look like JSON lines) of the files that are taken for text.

    Raises UserError for any file that cannot be read.
    """
    binary, json_lines = [], []
    for file in files:
        if kind_of(file) != ".txt":
            check_readable(file)
            continue
        start = head(file)
        first, _, second = start.partition(b"\n")
        if is_binary(start):
            binary.append(file)
        elif re.fullmatch(rb"\{.*\}\s*", first) and second.startswith(b"{"):
            json_lines.append(file)
    return binary, json_lines


def names(files: list[Path]) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(files) - NAMED:,} more" if len(files) > NAMED else ""
    return ", ".join(map(str, files[:NAMED])) + more


def head(path: Path) -> bytes:
    """The beginning of a file, unpacked."""
    with read_errors(path), path.open("rb") as file:
        return decompressed(path, file).read(HEAD)


def is_binary(start: bytes) -> bool:
    """Whether a file that starts like this is no text, in whatever encoding: null bytes, or many control characters."""
    if start.startswith(UTF_16):
        return False
    return (
        b"\0" in start
        or start.startswith(b"%PDF-")
        or len(CONTROL.findall(start)) > len(start) / 100
    )


def check_readable(file: Path) -> None:
    with read_errors(file):
        file.open("rb").close()


def save_stream(stream: BinaryIO, path: Path) -> None:
    """Copy a stream to a file, part by part. A file with these bytes stays as it is, so that a stopped preparation
    resumes on it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new, digest = path.with_name(path.name + ".new"), hashlib.sha256()
    try:
        with new.open("wb") as file:
            for data in iter(lambda: stream.read(PIECE), b""):
                digest.update(data)
                file.write(data)
    except BaseException:  # a half is of no use
        new.unlink()
        raise
    if path.exists() and file_sha256(path) == digest.hexdigest():
        new.unlink()
    else:
        new.replace(path)


def kind_of(path: Path) -> str:
    """.txt, .jsonl, .parquet or .tsv; any other name is taken for text."""
    return next((kind for kind in KINDS if unpacked_name(path).lower().endswith(kind)), ".txt")


def unpacked_name(path: Path) -> str:
    """The name without .gz or .zst."""
    return path.stem if path.suffix.lower() in PACKED else path.name


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file into UserErrors."""
    try:
        yield
    except OSError as error:
        near = nearest_path(str(path)) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"cannot read {path}: {error.strerror or error}{near}") from error
    except (EOFError, zlib.error, zstd.ZstdError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def read_documents(
    path: Path, text_key: str, errors: str, skip_bad_lines: bool = False, found: Found | None = None
) -> Iterator[Piece]:
    """All documents of a file in pieces of at most PIECE characters, cut at the same positions every time.

    A text file is one document; so are a line of JSON and a row of Parquet, under text_key. errors: strict, replace or
    ignore, as in bytes.decode. Carriage returns, alone or before a line break, become line breaks. skip_bad_lines:
    continue after a line or row that has no text. Raises UserError that names the line, row or offset.
    """
    found = found or Found()
    with read_errors(path):
        if kind_of(path) == ".txt":
            yield from pieces(read_text(path, errors, found))
            return
        reader = read_parquet if kind_of(path) == ".parquet" else read_json_lines
        for number, (text, read) in enumerate(reader(path, text_key, errors), start=1):
            if isinstance(text, UserError):
                if not skip_bad_lines:
                    raise text
                found.bad_lines += 1
                found.first_bad = found.first_bad or number
                continue
            if "\r" in text:
                found.carriage_returns = True
                text = text.replace("\r\n", "\n").replace("\r", "\n")
            yield from pieces([(text, read)])


def read_lines(path: Path, errors: str) -> Iterator[tuple[str, int]]:
    """(line, bytes of the file read so far) for each line of a text file. errors as in read_documents."""
    for number, (line, read) in enumerate(undecoded_lines(path), start=1):
        yield decode_line(line, f"{path}, line {number:,}", errors, first=number == 1), read


def undecoded_lines(path: Path) -> Iterator[tuple[bytes, int]]:
    with read_errors(path), path.open("rb") as file:
        for line in decompressed(path, file):
            yield line, file.tell()


def decode_line(line: bytes, where: str, errors: str, first: bool) -> str:
    """first: of its file, which may begin with a byte order mark. Raises UserError."""
    try:
        return line.decode("utf-8-sig" if first else "utf-8", errors)
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8; {WAY_OUT}") from error


def decompressed(path: Path, file: BinaryIO) -> BinaryIO:
    packed = path.suffix.lower()
    return gzip.open(file) if packed == ".gz" else zstd.ZstdFile(file) if packed == ".zst" else file


def read_text(path: Path, errors: str, found: Found) -> Iterator[tuple[str, int]]:
    """(characters, bytes of the file read so far) of a text file, part by part. errors as in read_documents."""
    encoding = "utf-16" if head(path).startswith(UTF_16) else "utf-8-sig"
    decoder, decoded = codecs.getincrementaldecoder(encoding)(errors), 0
    line_breaks = io.IncrementalNewlineDecoder(
        None, translate=True
    )  # of two parts, too, that cut \r\n in two
    with path.open("rb") as file:
        stream = decompressed(path, file)
        for data in chain(iter(lambda: stream.read(PIECE), b""), [b""]):
            start = decoded - len(
                decoder.getstate()[0]
            )  # the decoder keeps the first bytes of a split character
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                wrong = f"byte 0x{error.object[error.start]:02x} at offset {start + error.start:,}"
                raise not_utf8(path, wrong) from error
            decoded += len(data)
            text = line_breaks.decode(text, final=not data)
            found.carriage_returns |= line_breaks.newlines not in (None, "\n")
            yield text, file.tell()


def not_utf8(path: Path, wrong: str) -> UserError:
    """wrong: the first byte and where it is."""
    start, shown = head(path), "standard input" if path.name == STREAM else path
    if is_binary(start):
        return UserError(
            f"{shown} is a binary file, not text: {wrong} is not UTF-8; save it as plain text"
        )
    if start.startswith(UTF_16):
        return UserError(f"{shown} begins as UTF-16, but is damaged: {wrong}; {WAY_OUT}")
    convert = "iconv -f latin1 -t utf-8" + (f" {shlex.quote(str(path))}" if shown is path else "")
    return UserError(
        f"{shown} is not UTF-8: {wrong}; convert it, for example: {convert}; or {WAY_OUT}"
    )


def read_json_lines(
    path: Path, text_key: str, errors: str
) -> Iterator[tuple[str | UserError, int]]:
    """(the text of a line, or what is wrong with it; bytes of the file read so far); an empty line has the text ""."""
    for number, (line, read) in enumerate(undecoded_lines(path), start=1):
        try:
            yield (
                text_of_line(line, f"{path}, line {number:,}", text_key, errors, number == 1),
                read,
            )
        except UserError as error:
            yield error, read


def text_of_line(line: bytes, where: str, text_key: str, errors: str, first: bool) -> str:
    """The text under text_key; first: of its file. Raises UserError."""
    line = decode_line(line, where, errors, first)
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{where} is not JSON: {reason}; {SKIP}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object with a text under {text_key!r}; {SKIP}")
    text = record.get(text_key)
    if not isinstance(text, str):
        wrong = f", but {json.dumps(text)[:60]}" if text_key in record else ""
        keys = [
            key for key, value in record.items() if isinstance(value, str) and key.isprintable()
        ][:10]
        other = f"set --text_key to one of: {', '.join(keys)}; or " if keys else ""
        raise UserError(f"{where} has no text under {text_key!r}{wrong}; {other}{SKIP}")
    return replace_surrogates(text, errors, where)


def read_parquet(path: Path, text_key: str, errors: str) -> Iterator[tuple[str | UserError, int]]:
    """(the text of a row, or what is wrong with it; bytes of the file read so far)."""
    import pyarrow  # slow to import and rarely needed
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if text_key not in names:
                raise UserError(
                    f"{path} has no column {text_key!r}; set --text_key to one of: {', '.join(names)}"
                )
            size, rows, number = path.stat().st_size, max(1, table.metadata.num_rows), 0
            for batch in table.iter_batches(batch_size=256, columns=[text_key], use_threads=False):
                for text in batch.column(0).to_pylist():
                    number += 1
                    where = f"{path}, row {number:,}"
                    try:
                        if not isinstance(text, str):
                            shown = repr(text)[:60]
                            raise UserError(
                                f"{where} has no text under {text_key!r}, but {shown}; {SKIP}"
                            )
                        text = replace_surrogates(text, errors, where)
                    except UserError as error:
                        text = error
                    yield text, size * number // rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def replace_surrogates(text: str, errors: str, where: str) -> str:
    if not SURROGATES.search(text):
        return text
    if errors == "strict":
        raise UserError(f"{where} has an unpaired surrogate, which UTF-8 cannot encode; {WAY_OUT}")
    return SURROGATES.sub("\N{REPLACEMENT CHARACTER}" if errors == "replace" else "", text)


def pieces(parts: Iterable[tuple[str, int]]) -> Iterator[Piece]:
    """The pieces of one document, none where it is empty. parts: (text, bytes of the file read so far)."""
    text, start, read = "", 0, 0
    for part, read in parts:
        text += part
        while len(text) > PIECE:
            end = cut_position(text)
            yield Piece(text[:end], start, False, read)
            text, start = text[end:], start + end
    if text:
        yield Piece(text, start, True, read)


def cut_position(text: str) -> int:
    """The last position in the first PIECE characters where a cut changes no token: before a space and a word.

    All tokenizers start a token at a single space before a word, and those that are trained here at a line break, too,
    so the tokens of the pieces are the tokens of the document. Where there is no such position the cut is at PIECE,
    which changes tokens but no text.
    """
    end = PIECE
    while (end := text.rfind(" ", PIECE // 2, end)) > 0:
        if text[end + 1].isalnum() and not text[end - 1].isspace():
            return end
    end = PIECE
    while (end := max(text.rfind(" ", 1, end), text.rfind("\n", 1, end))) > 0:
        if text[end + 1].isalnum():
            return end
    return PIECE
