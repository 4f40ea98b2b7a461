"""Public files: downloads, resumed and verified; archives of Python packages, opened but not installed."""

import errno
import hashlib
import http.client
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from humptygpt.core.errors import UserError
from humptygpt.core.files import cannot_write

ATTEMPTS = 3  # in a row that bring no new byte
NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


def download(url: str, path: Path, sha256: str | None = None, timeout: float = 5) -> None:
    """Download url to path, completely or not at all; a partial download beside path is resumed.

    timeout: seconds to wait for an answer. Raises UserError when the last attempt fails, and when the content does not
    have the expected hash.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    attempt = 0
    while True:
        before = size_of(part)
        try:
            fetch(url, part, timeout)
            break
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
                raise cannot_write(part, error) from error
            attempt = 1 if size_of(part) > before else attempt + 1
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if attempt == ATTEMPTS or refused:
                reason = getattr(error, "reason", error)
                raise UserError(f"{url} cannot be reached: {reason}") from error
            time.sleep(attempt)
    if sha256 and (actual := file_sha256(part)) != sha256:
        size = size_of(part)
        part.unlink()
        raise UserError(
            f"{url} returned {size:,} bytes with sha256 {actual[:12]}..., but {sha256[:12]}... was expected"
        )
    part.replace(path)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def fetch(url: str, part: Path, timeout: float) -> None:
    """Append the missing bytes to part. Raises OSError or HTTPException where the connection fails or ends early."""
    offset = size_of(part)
    request = urllib.request.Request(
        url, headers={"Range": f"bytes={offset}-"} if offset else {}
    )
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{offset}":
            return  # the file is complete: the last attempt was stopped just before the rename
        raise
    with response:
        if response.status != 206:  # the server sends the whole file again
            offset = 0
        remaining = response.headers.get("Content-Length")
        total = offset + int(remaining) if remaining else None
        bar = tqdm(
            total=total, initial=offset, unit="B", unit_scale=True, desc=Path(url).name
        )
        with part.open("ab" if offset else "wb") as file, bar:
            while chunk := response.read(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and size_of(part) < total:
        raise http.client.IncompleteRead(b"", total - size_of(part))


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def package(requirement: str, sha256: str, *options: str) -> Iterator[Path]:
    """Yield the archive of a Python package; pip downloads it and verifies its hash. Raises UserError."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        archives = Path(folder, "archives")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", *options]
        done = subprocess.run(
            [*pip, "--requirement", str(requirements), "--dest", str(archives)],
            env=os.environ | {"LC_ALL": "C", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode:
            lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
            reason = next((line for line in lines if line.startswith("ERROR:")), lines[0])
            raise UserError(f"pip: {reason.removeprefix('ERROR:').strip()}")
        (archive,) = archives.iterdir()
        yield archive
