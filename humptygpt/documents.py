"""Files -> documents: text, JSON lines and Parquet, also compressed, streamed and never whole in memory."""

import codecs
import glob
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from backports import zstd  # in Python's own library from 3.14 on

from humptygpt.configurator import UserError

PIECE = 1 << 18  # characters of a document that are in memory at once
KINDS = (".txt", ".jsonl", ".parquet")
COMPRESSED = ("", ".gz", ".zst")
SURROGATES = re.compile("[\ud800-\udfff]")  # halves of characters, which UTF-8 has no bytes for


class Piece(NamedTuple):
    """A document, or a part of one that is long."""

    text: str
    first: bool  # it opens the document
    last: bool  # it ends the document
    read: int  # bytes of the file read up to here


def find_files(where: str) -> list[Path]:
    """The files behind a path: a file, every file of a known kind in a folder, or what a pattern matches; sorted.

    Raises UserError where there is none, or one that cannot be read.
    """
    path = Path(where)
    if path.is_dir():
        endings = tuple(kind + packed for kind in KINDS for packed in COMPRESSED)
        files = [file for file in path.rglob("*") if file.name.endswith(endings) and file.is_file()]
        if not files:
            raise UserError(f"{path} has no files that end in {', '.join(KINDS)}, or in these and .gz or .zst")
    elif not path.exists() and glob.has_magic(where):
        files = [file for match in glob.glob(where, recursive=True) if (file := Path(match)).is_file()]  # noqa: PTH207
        if not files:
            raise UserError(f"no file matches {where}")
    else:
        files = [path]
    for file in files:  # now, and not hours later
        check_readable(file)
    return sorted(files, key=lambda file: file.as_posix())


def check_readable(file: Path) -> None:
    with one_line_errors(file):
        file.open("rb").close()


def kind_of(path: Path) -> str:
    """.txt, .jsonl, .parquet or .tsv. A file of another name that the user gave is taken for text."""
    return next((kind for kind in (*KINDS, ".tsv") if unpacked_name(path).endswith(kind)), ".txt")


def unpacked_name(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".zst")


@contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Turns what can go wrong when a file is read into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (EOFError, zlib.error, zstd.ZstdError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def read_documents(path: Path, text_key: str, errors: str) -> Iterator[Piece]:
    """All documents of a file in pieces of at most PIECE characters, the same ones at every reading.

    A text file is one document, and so is a line of JSON or a row of Parquet, under text_key. errors: what becomes of
    bytes that are not UTF-8: strict, replace or ignore, as in bytes.decode. Raises UserError, which names the place.
    """
    with one_line_errors(path):
        if kind_of(path) == ".parquet":
            yield from read_parquet(path, text_key, errors)
            return
        with path.open("rb") as file:
            if kind_of(path) == ".jsonl":
                yield from read_json_lines(path, file, text_key, errors)
            else:
                yield from read_text(path, file, errors)


def read_lines(path: Path, errors: str) -> Iterator[tuple[str, int]]:
    """(each line of a text file with its end, bytes of the file read up to there). errors as in read_documents."""
    with one_line_errors(path), path.open("rb") as file:
        for number, line in enumerate(decompressed(path, file), start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number:,} is not UTF-8; take --encoding_errors=replace or ignore"
                ) from error
            yield text, file.tell()


def decompressed(path: Path, file: BinaryIO) -> BinaryIO:
    """What the file holds, as its ending says it is packed."""
    if path.suffix == ".gz":
        return gzip.open(file)
    if path.suffix == ".zst":
        return zstd.ZstdFile(file)
    return file


def read_text(path: Path, file: BinaryIO, errors: str) -> Iterator[Piece]:
    def characters() -> Iterator[str]:
        stream = decompressed(path, file)
        decoder = codecs.getincrementaldecoder("utf-8-sig")(errors)
        decoded = 0
        while data := stream.read(PIECE):
            yield decode(decoder, data, decoded, path)
            decoded += len(data)
        yield decode(decoder, b"", decoded, path)

    return pieces(characters(), file.tell)


def decode(decoder: codecs.IncrementalDecoder, data: bytes, decoded: int, path: Path) -> str:
    """The next characters; decoded: bytes given to the decoder before these. Raises UserError with file and offset."""
    waiting = len(decoder.getstate()[0])  # the first bytes of a character that was cut
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        offset = decoded - waiting + error.start
        raise UserError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset:,};"
            f" convert it, for example: iconv -f latin1 -t utf-8 {path}; or take --encoding_errors=replace or ignore"
        ) from error


def read_json_lines(path: Path, file: BinaryIO, text_key: str, errors: str) -> Iterator[Piece]:
    for number, line in enumerate(decompressed(path, file), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number:,}"
        try:
            record = json.loads(line.decode("utf-8", errors))
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8; take --encoding_errors=replace or ignore") from error
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON: {error.msg}") from error
        fields = record if isinstance(record, dict) else {}
        text = fields.get(text_key)
        if not isinstance(text, str):
            keys = ", ".join(fields) if fields is record else "none, as it is no object"
            found = f", but {json.dumps(text)[:60]}" if text_key in fields else ""
            raise UserError(
                f"{where} has no text under {text_key!r}{found}; name the key with --text_key; its keys: {keys}"
            )
        yield from pieces([mend(text, errors, where)], file.tell)


def read_parquet(path: Path, text_key: str, errors: str) -> Iterator[Piece]:
    import pyarrow  # here, since few have such files and it takes its time
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if text_key not in names:
                raise UserError(f"{path} has no column {text_key!r}; name one with --text_key: {', '.join(names)}")
            size, rows = path.stat().st_size, max(1, table.metadata.num_rows)
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[text_key], use_threads=False):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if not isinstance(text, str):
                        raise UserError(f"{path}, row {number:,} has no text under {text_key!r}, but {text!r}")
                    text = mend(text, errors, f"{path}, row {number:,}")
                    yield from pieces([text], lambda number=number: size * number // rows)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def mend(text: str, errors: str, where: str) -> str:
    """The text without halves of characters, which JSON can spell and UTF-8 cannot."""
    if not SURROGATES.search(text):
        return text
    if errors == "strict":
        raise UserError(f"{where} holds half a character; take --encoding_errors=replace or ignore")
    return SURROGATES.sub("\N{REPLACEMENT CHARACTER}" if errors == "replace" else "", text)


def pieces(texts: Iterable[str], read: Callable[[], int]) -> Iterator[Piece]:
    """One document, which comes as texts one behind another, in pieces; none where it is empty.

    read: tells the bytes of the file read so far.
    """
    text, first = "", True
    for more in texts:
        text += more
        while len(text) > PIECE:
            end = place_to_cut(text)
            yield Piece(text[:end], first, False, read())
            text, first = text[end:], False
    if text:
        yield Piece(text, first, True, read())


def place_to_cut(text: str) -> int:
    """The last place in the first PIECE characters where cutting changes no token: before a space and a word.

    All tokenizers here begin a token at a single space or line break before a word, so that encoding the pieces gives
    the tokens of the whole. Where there is no such place, the cut is at PIECE; the text stays the same anyway.
    """
    end = PIECE
    while (end := max(text.rfind(" ", 1, end), text.rfind("\n", 1, end))) > 0:
        if text[end + 1].isalnum():
            return end
    return PIECE
