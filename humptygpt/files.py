"""Files that are written whole or not at all, and earlier ones that are moved aside."""

import contextlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from humptygpt.configurator import UserError


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let write(file) fill a temporary file beside path, then put it in path's place in one step.

    A crash, a kill or a full disk at any moment leaves the old file as it was. Raises UserError where writing fails.
    """
    if os.path.isdir(path):
        raise UserError(f"cannot write {path}: it is a folder; name a file in it")
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save turns the file's OSError into a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        kept = "; the one before it is as it was" if os.path.exists(path) else ""
        raise UserError(f"cannot write {path}: {reason}{kept}") from error


def append(path: Path, line: str) -> None:
    """Add a line to a file. Raises UserError if it cannot be written."""
    try:
        with path.open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def move_aside(folder: Path, names: list[str]) -> Path:
    """Move these files of a folder into a new one in it, previous-1 or the next number, which is returned.

    Where it is killed in between, being_moved is true, and the next call moves the rest to the same folder.
    """
    moving = folder / "previous.new"
    moving.mkdir(exist_ok=True)
    for name in names:
        (folder / name).replace(moving / name)
    kept = next(path for n in itertools.count(1) if not (path := folder / f"previous-{n}").exists())
    moving.rename(kept)
    return kept


def being_moved(folder: Path) -> bool:
    return (folder / "previous.new").exists()
