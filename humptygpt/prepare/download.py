"""Download small public files and Python packages, and verify their hashes. Packages are not installed."""

import hashlib
import http.client
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from humptygpt.cli import UserError
from humptygpt.files import write_whole

ATTEMPTS = 3
TIMEOUT = 5  # seconds to wait for a response


def download(url: str, path: Path, sha256: str | None = None) -> None:
    """Download a file of at most a few MB to path, completely or not at all.

    sha256: the expected hash; None: do not check it. Raises UserError if the last attempt fails, or the hash differs.
    """
    # some servers reject urllib's default User-Agent
    request = urllib.request.Request(url, headers={"User-Agent": "HumptyGPT"})
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                content = response.read()
            break
        except (OSError, http.client.HTTPException) as error:
            if attempt == ATTEMPTS:
                raise UserError(f"{url} cannot be reached: {error}") from error
            time.sleep(attempt)
    actual = hashlib.sha256(content).hexdigest()
    if sha256 not in (actual, None):
        raise UserError(f"{url} is not the expected file: its sha256 is {actual}")
    write_whole(path, lambda file: file.write(content))


@contextmanager
def package(requirement: str, sha256: str, *options: str) -> Iterator[Path]:
    """Download a Python package with pip, which verifies its hash. Yields the path of the archive."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        archives = Path(folder, "archives")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        pip += ["--no-input", "--disable-pip-version-check", *options]
        pip += ["--requirement", requirements, "--dest", archives]
        done = subprocess.run(pip, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise UserError(f"pip cannot download {requirement}: {done.stderr.strip()}")
        (archive,) = archives.iterdir()
        yield archive
