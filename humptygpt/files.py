"""Files that are written whole or not at all, and locks: one writer at a time."""

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

ATTEMPTS = 100
# on Windows nobody else can read the locked byte, so that it is far after the text
FAR = 1 << 30


@contextmanager
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
        with suppress(OSError):
            remove(temporary)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let write(file) fill a file that is put in path's place, as by whole(). Raises UserError where writing fails."""
    # a device or a pipe, such as /dev/null or /dev/stdout, must not be replaced
    if path.exists() and (not path.is_file() or path.absolute().parent == Path("/dev")):
        raise UserError(f"cannot write {path}: it is not a regular file; name another")
    with whole(path) as temporary:
        try:
            with temporary.open("xb") as file:
                write(file)
        except RuntimeError as error:  # torch.save's, which hides the system's
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def cannot_write(path: Path | str, error: Exception, advice: str = "") -> UserError:
    """Return an error in one line; of a full disk it names the disk, which is not always the one that one thinks of."""
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
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error


# --------------------------------------------------------------------------------------
# One writer at a time: what a process writes is locked, and a second process is refused with the name of the first
#
# The lock is the operating system's own, on an open file: it ends with the process, however that ends, so nothing is
# ever left locked. On a disk that several machines share, the file server keeps it for all of them. The package
# filelock cannot say who holds a lock, and never removes its files.


class Lock:
    """Held from the constructor to the end of the `with` block or of the process. The file names the holder.

    The file of a process that was killed is not locked any more, and the next process takes it over.
    """

    def __init__(self, path: Path, what: str, advice: str):
        """path: of the lock file; its folder is made, and removed at the end if nothing else is in it by then.

        what is locked and what to do instead are for the message. Raises UserError where another process holds the
        lock, and OSError where the file cannot be written.
        """
        self.path = path
        self.what = what
        self.made = [folder for folder in path.parents if not folder.exists()]
        who = ""
        for attempt in range(ATTEMPTS):
            try:
                if self.acquire():
                    return
                who = one_line(path.read_text(errors="replace"))
            except FileNotFoundError:
                # its holder has just removed it, perhaps with its folder
                if attempt == ATTEMPTS - 1:
                    raise
            if who:
                break
            time.sleep(0.01)  # its holder is about to write its name
        raise UserError(f"{what} is in use by {who or 'another process'}; {advice}")

    def acquire(self) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        if not self.try_lock() or (fcntl and not is_at(self.file, self.path)):
            os.close(self.file)
            return False
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        who = f"process {os.getpid()} on {socket.gethostname()} since {since}"
        try:
            os.ftruncate(self.file, 0)
            os.lseek(self.file, 0, os.SEEK_SET)
            os.write(self.file, who.encode())
        except OSError:  # a full disk
            self.__exit__()
            raise
        return True

    def try_lock(self) -> bool:
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                os.lseek(self.file, FAR, os.SEEK_SET)
                msvcrt.locking(self.file, msvcrt.LK_NBLCK, 1)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:  # some network disks have no locks
            problem = f"{self.what} cannot be locked on this disk ({error.strerror})"
            note(f"{problem}; let no second process write there")
        return True

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        # Windows removes no open file, nor one that somebody else has opened by now
        if not fcntl:
            os.close(self.file)
        with suppress(OSError):
            self.path.unlink()
        if fcntl:  # it is locked until here, so that nobody else's file is removed
            os.close(self.file)
        with suppress(OSError):  # not empty
            for folder in self.made:
                folder.rmdir()


def is_at(file: int, path: Path) -> bool:
    """Whether the open file is still the one at path: its last holder removes it."""
    return path.exists() and os.path.samestat(os.fstat(file), path.stat())
