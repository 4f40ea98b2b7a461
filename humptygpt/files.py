"""Atomic file writes, and locks that let only one process at a time write to a folder."""

import errno
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from humptygpt.config import UserError, note, one_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

# Windows lets no other process read the locked byte, so it is far beyond the end of the text
FAR = 1 << 30


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path` for a new file or folder, and move it to `path` at the end.

    If the process crashes or is killed, or the disk is full, the earlier file stays unchanged. The temporary name is
    random, so if two processes write the same file at once, one of them wins. Raises UserError if writing fails.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_file():
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
        if path.is_dir():  # an empty folder, which Windows would not replace
            path.rmdir()
        temporary.replace(path)
    except OSError as error:
        kept = "; the previous file is unchanged" if path.is_file() else ""
        raise cannot_write(path, error, kept) from error
    finally:
        with suppress(OSError):
            remove(temporary)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call write(file) to fill a new file, and move it to `path` as whole() does. Raises UserError if that fails."""
    # a device or a pipe, such as /dev/null or /dev/stdout, must not be replaced
    if path.exists() and (not path.is_file() or path.absolute().parent == Path("/dev")):
        raise UserError(f"cannot write {path}: it is not a regular file; choose another")
    with whole(path) as temporary:
        try:
            with temporary.open("xb") as file:
                write(file)
        except RuntimeError as error:  # torch.save hides the system's error behind it
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def cannot_write(path: Path | str, error: Exception, advice: str = "") -> UserError:
    """Describe a failed write in one line. If the disk is full, name its mount point and its free space."""
    # numpy and torch report no reason
    reason = getattr(error, "strerror", None) or "the disk may be full"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        folders = Path(path).resolve().parents  # a link may lead to another disk
        mounted = next(folder for folder in folders if folder.is_mount())
        usage = shutil.disk_usage(mounted)
        megabytes = f"{usage.free / 1e6:,.1f} of {usage.total / 1e6:,.1f} MB"
        reason += f" (the disk {mounted} has {megabytes} free)"
    return UserError(f"cannot write {path}: {reason}{advice}")


def remove_unfinished(folder: Path, names: list[str]) -> None:
    """Remove the temporary files of whole() that a killed process left behind. No other process may write there."""
    for name in names:
        for path in folder.glob(f"{name}.????????.tmp"):
            path.unlink()


def remove(path: Path) -> None:
    """Remove a file, or a folder with everything in it, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def append(path: Path, line: str) -> None:
    """Add a line to a file. Raises UserError if it cannot be written."""
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error


# --------------------------------------------------------------------------------------
# Locks
#
# A lock is the operating system's own, on an open file. It is released when the process ends, for whatever reason, so
# no lock is ever left behind. If several machines share a disk, the file server manages the lock for all of them. We do
# not use the filelock package, because it cannot tell who holds a lock and never removes its files.


class Lock:
    """A lock that this process holds from the constructor to the end of the `with` block, or until the process ends.

    The lock file names its holder. A killed process leaves the file behind, unlocked, and the next one reuses it.
    """

    def __init__(self, path: Path, what: str, advice: str):
        """path: the lock file. Its folder is created if necessary, and in that case removed at the end if it is empty.

        what, advice: for the message, the thing that is locked and what to do instead. Raises UserError if another
        process holds the lock, and OSError if the file cannot be written.
        """
        self.path = path
        self.created = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            locked = try_lock(self.file, what)
            os.lseek(self.file, 0, os.SEEK_SET)
            if not locked:
                who = one_line(os.read(self.file, 1000).decode(errors="replace"))
                os.close(self.file)
                raise UserError(f"{what} is in use by {who or 'another process'}; {advice}")
            if not fcntl or is_at(self.file, path):
                break
            os.close(self.file)  # its holder has just removed it: try again
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        who = f"process {os.getpid()} on {socket.gethostname()} since {since}"
        with suppress(OSError):  # on a full disk, the lock names no holder
            os.ftruncate(self.file, 0)
            os.write(self.file, who.encode())

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        if not fcntl:  # Windows cannot remove an open file
            os.close(self.file)
        # the folder may not be empty, and on Windows another process may have the file open
        with suppress(OSError):
            self.path.unlink()
            for folder in self.created:
                folder.rmdir()
        if fcntl:  # locked until now, so as not to remove another process's file
            os.close(self.file)


def try_lock(file: int, what: str) -> bool:
    """Lock an open file, or return False if another process holds the lock. If the disk has no locks, returns True."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(file, FAR, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:  # some network disks have no locks
        problem = f"{what} cannot be locked on this disk ({error.strerror})"
        note(f"{problem}; make sure that no other process writes there")
    return True


def is_at(file: int, path: Path) -> bool:
    """True if the open file is still the one at `path`: its last holder may have removed it."""
    return path.exists() and os.path.samestat(os.fstat(file), path.stat())
