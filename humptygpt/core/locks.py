"""One writer at a time: what a process writes is locked, and a second process is refused with the name of the first.

The lock is the operating system's own, on an open file: it ends with the process, however that ends, so nothing is ever
left locked. On a disk that several machines share, the file server keeps it for all of them. The package filelock
cannot say who holds a lock, and never removes its files.
"""

import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from humptygpt.core.errors import UserError
from humptygpt.core.schema import parse_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

ATTEMPTS = 100
FAR = (
    1 << 30
)  # Windows lets nobody else read a locked byte: the one that is locked is far after the text


class InUse(UserError):
    """Another process has the lock."""


class Lock:
    """Held from the constructor to the end of the `with` block or of the process. The file names the holder.

    The file of a process that was killed is not locked any more, and the next process takes it over.
    """

    def __init__(self, path: Path, what: str, advice: str):
        """path: of the lock file; its folder is made, and removed at the end if nothing else is in it by then.

        what is locked and what to do instead are for the message. Raises InUse where another process holds the lock,
        and OSError where the file cannot be written.
        """
        self.path, self.what, self.file, self.missing, who = path, what, None, None, None
        self.made = [folder for folder in path.parents if not folder.exists()]
        for _ in range(ATTEMPTS):
            if self.acquire():
                return
            if who := holder(path):
                break
            time.sleep(0.01)  # it has just been released, or its holder is about to write its name
        if self.missing:  # every time: no folder can be made there
            raise self.missing
        raise InUse(f"{what} is in use by {who or 'another process'}; {advice}")

    def acquire(self) -> bool:
        self.missing = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            if self.try_lock() and (not fcntl or is_at(self.file, self.path)):
                name = {"host": socket.gethostname(), "pid": os.getpid()}
                name["since"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
                os.ftruncate(self.file, 0)
                os.lseek(self.file, 0, os.SEEK_SET)
                os.write(self.file, json.dumps(name).encode())
                return True
        except (
            FileNotFoundError
        ) as error:  # the other process has just removed the folder that it had made
            self.missing = error
            return False
        except OSError:
            self.__exit__()
            raise
        os.close(self.file)
        self.file = None
        return False

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
            print(f"note: {problem}; let no second process write there", file=sys.stderr)
        return True

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            if (
                fcntl and self.file is not None
            ):  # while it is locked, so that nobody else's file is removed
                self.path.unlink()
        if self.file is not None:
            os.close(self.file)
        with suppress(OSError):
            if (
                not fcntl
            ):  # Windows removes no open file, nor one that somebody else has opened by now
                self.path.unlink()
        with suppress(OSError):  # not empty
            for folder in self.made:
                folder.rmdir()


def is_at(file: int, path: Path) -> bool:
    """Whether the open file is still the one at path: its last holder removes it."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def holder(path: Path) -> str | None:
    """Who holds the lock, as its file says; None where it says nothing."""
    try:
        name = parse_json(path.read_bytes(), {"host": str, "pid": int, "since": str})
    except (OSError, ValueError):
        return None
    text = f"process {name['pid']} on {name['host']} since {name['since']}"
    return text if text.isprintable() else None
