"""Running prepare_data.py, and reading the data folders that it writes."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from humptygpt.data import corpus, documents, encoding
from humptygpt.data.dataset import TokenDataset


def prepare(command: str) -> None:
    """Run prepare_data.py with these arguments."""
    prepare_data.main(shlex.split(command))


def write_own(text: str) -> None:
    """Write own.txt."""
    Path("own.txt").write_text(text, encoding="utf-8")


def write_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode and write 500 characters at a time."""
    monkeypatch.setattr(documents, "PIECE", 500)
    monkeypatch.setattr(corpus, "UNIT", 500)
    monkeypatch.setattr(encoding, "UNITS_AT_ONCE", 1)


def meta(name: str) -> dict:
    return json.loads(Path("data", name, "meta.json").read_text())


def tokenizer_of(name: str) -> str:
    return meta(name)["tokenizer"]["tokenizer"]


def contents(name: str) -> dict[str, bytes]:
    files = filter(Path.is_file, Path("data", name).iterdir())
    return {path.name: path.read_bytes() for path in files}


def texts_of(name: str) -> tuple[str, str]:
    """The text of both splits of a data set, from its tokens."""
    data = TokenDataset(Path("data", name), 8, seed=1)
    parts = [part.read(np.array([0]), len(part))[0] for part in (data.train, data.val)]
    return tuple(map(data.tokenizer.decode, parts))
