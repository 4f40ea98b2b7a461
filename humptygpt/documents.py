"""Files -> documents: text, JSON lines and Parquet, optionally compressed, streamed in pieces of bounded size."""

import codecs
import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

from backports import zstd  # in the standard library from Python 3.14 on

from humptygpt.configurator import UserError

PIECE = 1 << 18  # characters of a document that are in memory at once
KINDS = (".txt", ".jsonl", ".parquet")
ENDINGS = tuple(kind + packed for kind in KINDS for packed in ("", ".gz", ".zst"))
SURROGATES = re.compile("[\ud800-\udfff]")  # JSON can spell them, UTF-8 cannot encode them
WAY_OUT = "set --encoding_errors=replace or ignore"


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    start: int  # characters of the document before it
    last: bool  # ends its document
    read: int  # bytes of the file read so far


def find_files(where: str) -> list[Path]:
    """Sorted files of a path: a file, a folder's files of known kinds, or a glob pattern's matches.

    Raises UserError where there are none, or one that cannot be read.
    """
    path = Path(where)
    with read_errors(path):
        if path.is_dir():
            files = [file for file in path.rglob("*") if file.name.endswith(ENDINGS) and file.is_file()]
            if not files:
                raise UserError(f"{path} has no files that end in {', '.join(KINDS)}, optionally with .gz or .zst")
        elif not path.exists() and glob.has_magic(where):
            files = [file for match in glob.glob(where, recursive=True) if (file := Path(match)).is_file()]  # noqa: PTH207
            if not files:
                raise UserError(f"no file matches {where}")
        else:
            files = [path]
    for file in files:  # now rather than hours later
        check_readable(file)
    return sorted(files, key=Path.as_posix)


def check_readable(file: Path) -> None:
    with read_errors(file):
        file.open("rb").close()


def kind_of(path: Path) -> str:
    """.txt, .jsonl, .parquet or .tsv; any other name is taken for text."""
    return next((kind for kind in (*KINDS, ".tsv") if unpacked_name(path).endswith(kind)), ".txt")


def unpacked_name(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".zst")


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file into UserErrors."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (EOFError, zlib.error, zstd.ZstdError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def read_documents(path: Path, text_key: str, errors: str) -> Iterator[Piece]:
    """All documents of a file in pieces of at most PIECE characters, cut at the same positions every time.

    A text file is one document; so are a line of JSON and a row of Parquet, under text_key. errors: strict, replace or
    ignore, as in bytes.decode. Raises UserError that names the line, row or offset.
    """
    with read_errors(path):
        if kind_of(path) == ".parquet":
            yield from read_parquet(path, text_key, errors)
        elif kind_of(path) == ".jsonl":
            yield from read_json_lines(path, text_key, errors)
        else:
            yield from pieces(read_text(path, errors))


def read_lines(path: Path, errors: str) -> Iterator[tuple[str, int]]:
    """(line, bytes of the file read so far) for each line of a text file. errors as in read_documents."""
    with read_errors(path), path.open("rb") as file:
        for number, line in enumerate(decompressed(path, file), start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number:,} is not UTF-8; {WAY_OUT}") from error
            yield text, file.tell()


def decompressed(path: Path, file: BinaryIO) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(file)
    return zstd.ZstdFile(file) if path.suffix == ".zst" else file


def read_text(path: Path, errors: str) -> Iterator[tuple[str, int]]:
    """(characters, bytes of the file read so far) of a text file, part by part. errors as in read_documents."""
    decoder, decoded = codecs.getincrementaldecoder("utf-8-sig")(errors), 0
    with path.open("rb") as file:
        stream = decompressed(path, file)
        for data in chain(iter(lambda: stream.read(PIECE), b""), [b""]):
            start = decoded - len(decoder.getstate()[0])  # the decoder keeps the first bytes of a split character
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {start + error.start:,};"
                    f" convert it, for example: iconv -f latin1 -t utf-8 {path}; or {WAY_OUT}"
                ) from error
            decoded += len(data)
            yield text, file.tell()


def read_json_lines(path: Path, text_key: str, errors: str) -> Iterator[Piece]:
    for number, (line, read) in enumerate(read_lines(path, errors), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number:,}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON: {error.msg}") from error
        if not isinstance(record, dict):
            raise UserError(f"{where} is not a JSON object with a text under {text_key!r}")
        text = record.get(text_key)
        if not isinstance(text, str):
            found = f", but {json.dumps(text)[:60]}" if text_key in record else ""
            keys = ", ".join(record)
            raise UserError(f"{where} has no text under {text_key!r}{found}; set --text_key to one of: {keys}")
        yield from pieces([(replace_surrogates(text, errors, where), read)])


def read_parquet(path: Path, text_key: str, errors: str) -> Iterator[Piece]:
    import pyarrow  # slow to import and rarely needed
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if text_key not in names:
                raise UserError(f"{path} has no column {text_key!r}; set --text_key to one of: {', '.join(names)}")
            size, rows, number = path.stat().st_size, max(1, table.metadata.num_rows), 0
            for batch in table.iter_batches(batch_size=256, columns=[text_key], use_threads=False):
                for text in batch.column(0).to_pylist():
                    number += 1
                    where = f"{path}, row {number:,}"
                    if not isinstance(text, str):
                        raise UserError(f"{where} has no text under {text_key!r}, but {text!r}")
                    read = size * number // rows
                    yield from pieces([(replace_surrogates(text, errors, where), read)])
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

    All tokenizers here start a token at a single space or line break before a word, so the tokens of the pieces are
    the tokens of the document. Where there is no such position the cut is at PIECE, which changes tokens but no text.
    """
    end = PIECE
    while (end := max(text.rfind(" ", 1, end), text.rfind("\n", 1, end))) > 0:
        if text[end + 1].isalnum():
            return end
    return PIECE
