"""Download small public files and Python packages, and verify their hashes. Packages are not installed."""

import hashlib
import http.client
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from humptygpt.cli import UserError
from humptygpt.files import write_bytes

TIMEOUT = 20  # seconds to wait for a response


def download(url: str, path: Path, sha256: str) -> Path:
    """Download a file of at most a few MB to path, completely or not at all, unless it is there. Returns path.

    sha256: the expected hash. Raises UserError if the download fails, or its hash differs.
    """
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url} cannot be reached: {error}; if you have this file, save it as {path}") from error
    actual = hashlib.sha256(content).hexdigest()
    if actual != sha256:
        raise UserError(f"{url} is not the expected file: its sha256 is {actual}")
    write_bytes(path, content)
    return path


@contextmanager
def package(requirement: str, sha256: str, *options: str) -> Iterator[Path]:
    """Download a Python package with pip, which verifies its hash. Yields the path of the archive."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        archives = Path(folder, "archives")
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-input",
            "--quiet",
        ]
        pip += ["--requirement", requirements, "--dest", archives, *options]
        done = subprocess.run(pip, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise UserError(f"pip cannot download {requirement}: {done.stderr.strip()}")
        (archive,) = archives.iterdir()
        yield archive
