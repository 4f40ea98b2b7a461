"""Files that are written whole or not at all, and earlier ones that are moved aside."""

import contextlib
import errno
import io
import itertools
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from humptygpt.core.errors import UserError


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside this one, for a new file or folder, which is put in its place at the end.

    A crash, a kill or a full disk at any moment leaves what was there. The temporary name is one that nobody else uses:
    of two processes that write a file at once, one wins. Raises UserError where writing fails.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_file():
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
        if path.is_dir():  # an empty one, which Windows would not replace
            path.rmdir()
        temporary.replace(path)
    except OSError as error:
        kept = "; the one before it is as it was" if path.is_file() else ""
        raise cannot_write(path, error, kept) from error
    finally:
        with contextlib.suppress(OSError):
            remove(temporary)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let write(file) fill a file that is put in path's place, as by whole(). Raises UserError where writing fails."""
    if os.path.isdir(path):
        raise UserError(f"cannot write {path}: it is a folder; name a file in it")
    if is_device(path):
        try:
            with path.open("wb") as file:
                write(file)
        except OSError as error:
            raise cannot_write(path, error) from error
        return
    with whole(path) as temporary:
        raw = RawFile(temporary, "xb")
        try:
            with io.BufferedWriter(raw) as file:
                write(file)
        except (OSError, RuntimeError) as error:
            raise raw.error or error from error


def is_device(path: Path) -> bool:
    """Whether it is a device or a pipe, such as /dev/stdout, which is written to and must not be replaced by a file."""
    return path.exists() and (not path.is_file() or path.absolute().parent == Path("/dev"))


class RawFile(io.FileIO):
    """A file that remembers why it could not be written: torch.save may report what follows from that instead."""

    error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def cannot_write(path: Path | str, error: Exception, advice: str = "") -> UserError:
    """Return an error in one line; of a full disk it names the disk, which is not always the one that one thinks of."""
    # numpy and torch report no reason
    reason = getattr(error, "strerror", None) or "the disk may be full"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        path_on_disk = Path(path).resolve()  # a link may lead to another disk
        folder = next(f for f in (path_on_disk, *path_on_disk.parents) if f.is_dir())
        mounted = next(f for f in (folder, *folder.parents) if f.is_mount())
        usage = shutil.disk_usage(folder)
        megabytes = f"{usage.free / 1e6:,.1f} of {usage.total / 1e6:,.1f} MB"
        reason += f" (the disk {mounted} has {megabytes} free)"
    return UserError(f"cannot write {path}: {reason}{advice}")


def remove_unfinished(folder: Path, names: list[str]) -> None:
    """Remove what a kill has left of write_whole. Only for a folder that nobody else writes meanwhile."""
    for name in names:
        for path in folder.glob(f"{name}.????????.tmp"):
            path.unlink()


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def append(path: Path, line: str) -> None:
    """Add a line to a file. Raises UserError if it cannot be written."""
    try:
        with path.open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def move_aside(folder: Path, names: list[str]) -> Path:
    """Move these files of a folder into a new one in it, previous-1 or the next number, which is returned.

    Where it is killed in between, being_moved is true, and the next call moves the rest to the same folder.
    """
    moving = folder / "previous.new"
    moving.mkdir(exist_ok=True)
    for name in names:
        (folder / name).replace(moving / name)
    numbered = (folder / f"previous-{number}" for number in itertools.count(1))
    kept = next(path for path in numbered if not path.exists())
    moving.rename(kept)
    return kept


def being_moved(folder: Path) -> bool:
    return (folder / "previous.new").exists()
