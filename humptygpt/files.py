"""Files: written whole or not at all, folders with one writer, and JSON whose content is checked."""

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from humptygpt.cli import UserError, one_line
from humptygpt.machine import is_out_of_memory


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path` for a new file or folder, and move it to `path` at the end.

    If the process crashes or is killed, or the disk is full, the earlier file stays unchanged. The temporary name is
    random, so if two processes write the same file at once, one of them wins. Raises UserError if writing fails.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    kept = "; the previous file is unchanged" if path.is_file() else ""
    try:
        with refuse_unwritable(path, kept):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if temporary.is_file():
                with temporary.open("r+b") as file:
                    os.fsync(file.fileno())
            if path.is_dir():  # it must be empty; Windows cannot replace a folder
                path.rmdir()
            move(temporary, path)
    finally:
        with suppress(OSError):
            remove(temporary)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call write(file) to fill a new file, and move it to `path` as whole() does. Raises UserError if that fails."""
    # a device or a pipe, such as /dev/null or /dev/stdout, must not be replaced
    if path.exists() and (not path.is_file() or path.absolute().parent == Path("/dev")):
        raise UserError(f"cannot write {path}: it is not a regular file; choose another path")
    with whole(path) as temporary:
        try:
            with temporary.open("xb") as file:
                write(file)
        except RuntimeError as error:  # torch.save raises it in place of an OSError
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def write_bytes(path: Path, content: bytes) -> None:
    write_whole(path, lambda file: file.write(content))


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


@contextmanager
def refuse_unwritable(path: Path, advice: str = "") -> Iterator[None]:
    """Raise UserError if the block cannot write to a file or folder. advice: end of the message."""
    try:
        yield
    except OSError as error:
        # errors from numpy and torch do not give the reason
        reason = error.strerror or "the disk may be full"
        raise UserError(f"cannot write {path}: {reason}{advice}") from error


def move(path: Path, to: Path) -> None:
    """Move a file or a folder. A file at `to` is replaced.

    Windows refuses this while a program, such as a virus scanner or sample.py, has one of them open: try for ten
    seconds.
    """
    for left in reversed(range(100)):
        try:
            path.replace(to)
            break
        except PermissionError as error:
            if not left or not hasattr(error, "winerror"):
                raise
            time.sleep(0.1)


def remove_unfinished(folder: Path, names: list[str]) -> None:
    """Remove what a process killed in whole() left behind. No other process may be writing there."""
    for name in names:
        for path in folder.glob(f"{name}.????????.tmp"):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with everything in it, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def append(path: Path, line: str) -> None:
    """Add a line to a file. Raises UserError if it cannot be written."""
    with (
        refuse_unwritable(path),
        path.open("a", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.write(line + "\n")


@contextmanager
def locked(folder: Path, what: str, advice: str) -> Iterator[None]:
    """Let no other process write to a folder until the block ends or the process dies.

    If the folder does not exist, it is created, and removed again at the end if it is empty.
    what, advice: parts of the error message: what is locked, and what to do instead. Raises UserError if another
    process holds the lock, or the folder cannot be written to.
    """
    from filelock import FileLock, Timeout  # late import: most scripts take no lock

    target = folder.resolve()
    path = target.with_name(f".{target.name}.lock")  # the folder itself may be renamed
    lock = FileLock(path, timeout=0)
    with refuse_unwritable(folder, "; choose another folder"):
        created = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(f"{what} is in use by another process; {advice}") from error
    try:
        yield
    finally:
        # this fails if a folder is not empty, and on Windows, which cannot remove an open file
        with suppress(OSError):
            path.unlink()
            for each in created:
                each.rmdir()
        lock.release()


# --------------------------------------------------------------------------------------
# What a file must contain. It may be damaged, malicious or from another program.


@contextmanager
def refuse_damaged(what: object, problem: str = "", advice: str = "") -> Iterator[None]:
    """Turn any error in the block, which uses the content of a file, into a UserError.

    A wrong content can raise any kind of error. No model may be built here, so that an error in an edited model.py
    keeps its traceback. what: the file. problem: what the message says; "": the error. advice: end of the message.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = problem or one_line(error).removeprefix("cannot read ")
        if not problem and not isinstance(error, UserError | ValueError | OSError):
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"cannot read {what}: {reason}{advice}") from error


def parse_json(text: str | bytes, schema: object) -> dict:
    """Parse a JSON file's text. Raises ValueError, with a one-line message, unless the content fits the schema."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    check_schema(content, schema)
    return content


def check_schema(value: object, schema: object, name: str = "") -> None:
    """Raise ValueError, naming the offending entry, unless value fits the schema. name: value's path, for messages.

    A schema is
        a type               a value of exactly this type (a bool is not an int); a 64-bit int also counts as a float
        None                 None
        {"a", "b"}           one of these strings
        range(1, 10)         an integer in the range
        [schema]             a list of any length
        {"a": schema, ...}   a dictionary with at least these keys; one written "a?" may be missing
        (schema, ...)        any one of these schemas, which must be of different types
    """
    what = name or "the content"
    options = schema if isinstance(schema, tuple) else (schema,)
    fitting = [option for option in options if is_kind(value, option)]
    if not fitting:
        raise ValueError(f"{what} must be {' or '.join(map(describe, options))}")
    form = fitting[0]
    if isinstance(form, list):
        for number, item in enumerate(value):
            check_schema(item, form[0], f"{name}[{number}]")
    if not isinstance(form, dict):
        return
    for declared, rule in form.items():
        key = declared.removesuffix("?")
        path = f"{name}.{key}" if name else key
        if key in value:
            check_schema(value[key], rule, path)
        elif key == declared:
            raise ValueError(f"{path} is missing")


def is_kind(value: object, schema: object) -> bool:
    """True if value fits the schema at its outermost level; the items of lists and dictionaries are not checked."""
    if isinstance(schema, set):
        return type(value) is str and value in schema
    if isinstance(schema, range):
        return type(value) is int and value in schema  # a text would be compared with each number
    if schema is float and type(value) is int:
        return abs(value) < 2**63
    return type(value) is kind_of(schema)


def describe(schema: object) -> str:
    if isinstance(schema, set):
        return " or ".join(sorted(schema))
    if isinstance(schema, range):
        return f"an int from {schema.start:,} to {schema.stop - 1:,}"
    return "None" if schema is None else kind_of(schema).__name__


def kind_of(schema: object) -> type:
    return schema if isinstance(schema, type) else type(schema)
