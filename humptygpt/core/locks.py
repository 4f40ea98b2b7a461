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
FAR = 1 << 30  # on Windows nobody else can read the locked byte, so that it is far after the text


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
        self.path = path
        self.what = what
        self.made = [folder for folder in path.parents if not folder.exists()]
        who = None
        for attempt in range(ATTEMPTS):
            try:
                if self.acquire():
                    return
            except FileNotFoundError:  # its holder has just removed the folder that it had made
                if attempt == ATTEMPTS - 1:
                    raise
            if who := holder(path):
                break
            time.sleep(0.01)  # it has just been released, or its holder is about to write its name
        raise InUse(f"{what} is in use by {who or 'another process'}; {advice}")

    def acquire(self) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        if not self.try_lock() or (fcntl and not is_at(self.file, self.path)):
            os.close(self.file)
            return False
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        name = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        try:
            os.ftruncate(self.file, 0)
            os.lseek(self.file, 0, os.SEEK_SET)
            os.write(self.file, json.dumps(name).encode())
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
            print(f"note: {problem}; let no second process write there", file=sys.stderr)
        return True

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        if not fcntl:  # Windows removes no open file, nor one that somebody else has opened by now
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


def holder(path: Path) -> str | None:
    """Return who holds the lock, as its file says; None where it says nothing."""
    try:
        name = parse_json(path.read_bytes(), {"host": str, "pid": int, "since": str})
    except (OSError, ValueError):
        return None
    text = f"process {name['pid']} on {name['host']} since {name['since']}"
    return text if text.isprintable() else None
