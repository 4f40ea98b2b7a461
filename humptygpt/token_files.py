"""Token files: consecutive ids without a header, as nanoGPT writes them, and a meta.json that describes them.

meta.json has a checksum of each file. Small files are verified when they are opened, and files of any size when they
are prepared again by the same command. A folder that nanoGPT or an earlier version prepared has no such checksums.
"""

import hashlib
import os
import re
import shlex
from bisect import bisect_right
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np

from humptygpt.config import UserError, find
from humptygpt.schema import check_schema, parse_json

META_FORMAT = "tokens 2"  # the number increases when the layout of data folders changes
CHECKED = 1 << 28  # a split of up to this many bytes is checked whenever it is opened
COMMAND = "command.txt"  # this file in a data folder holds the command that made it
NANOGPT = "humptygpt.prepare.nanogpt:describe"  # builds the metadata of a nanoGPT folder

COUNT = range(2**53)  # a float64 holds these exactly
POSITIVE = range(1, 2**53)
SPLIT = {
    "tokens": POSITIVE,
    "bytes": POSITIVE,
    "files": [{"name": str, "tokens": COUNT}],
    "sha256?": {str: str},
}
SPLITS = {  # {task: schema of its splits}
    "language modelling": {str: SPLIT},
    "translation": {str: SPLIT | {"target_bytes": POSITIVE, "target_tokens": POSITIVE}},
}
SPLITS["chat"] = SPLITS["translation"]
META = {  # the entries that training reads; data/README.md describes all of them
    "format": {META_FORMAT},
    "task": set(SPLITS),
    "source": str,
    "dtype": {"uint16", "uint32"},
    "vocab_size?": COUNT,
    "command?": str,
    "splits": {"train": dict, "val": dict},  # details in SPLITS
    "tokenizer": dict,  # details in the tokenizer's class
}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenFiles:
    """The token files of one split, memory-mapped and read as one sequence.

    meta: from read_meta. Raises UserError if a file is missing or does not match meta.
    """

    def __init__(self, folder: Path, split: str, meta: dict):
        self.folder = folder
        entry = meta["splits"][split]
        self.paths = [folder / file["name"] for file in entry["files"]]
        self.sums = entry.get("sha256", {})
        try:
            self.arrays = [
                np.asarray(np.memmap(path, meta["dtype"], mode="r")) for path in self.paths
            ]
        except (OSError, ValueError) as error:  # ValueError: the file is truncated
            raise self.error(f"cannot read {folder / split}.bin: {error}") from error
        self.starts = list(accumulate(map(len, self.arrays), initial=0))
        tokens = entry.get("tokens", len(self))  # nanoGPT's folders do not record it
        if len(self) != tokens:
            raise self.error(
                f"{folder / split}.bin has {len(self):,} tokens, but meta.json says {tokens:,}"
            )
        if sum(ids.nbytes for ids in self.arrays) <= CHECKED:
            self.verify()

    def error(self, problem: str) -> UserError:
        return UserError(f"{problem}; {how_to(self.folder)}")

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return `length` tokens from each start, int64 (len(starts), length), with zeros after the last token."""
        rows = np.zeros((len(starts), length), dtype=np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            number = bisect_right(self.starts, start) - 1
            offset = start - self.starts[number]
            # a row may continue in the next file
            while len(row) and number < len(self.arrays):
                ids = self.arrays[number][offset : offset + len(row)]
                row[: len(ids)] = ids
                row = row[len(ids) :]
                number += 1
                offset = 0
        return rows

    def verify(self) -> int:
        """Compare the files with their checksums. Returns how many have one. Raises UserError if one differs."""
        checked = [path for path in self.paths if path.name in self.sums]
        for path in checked:
            if sha256(path) != self.sums[path.name]:
                raise self.error(
                    f"{path} was altered or damaged: its checksum does not match meta.json"
                )
        return len(checked)


# --------------------------------------------------------------------------------------
# The description of a folder


def read_meta(folder: Path) -> dict:
    """Read and check the folder's meta.json, or build one for a folder that nanoGPT prepared.

    Raises UserError if meta.json is missing or damaged.
    """
    if os.path.exists(folder / "meta.json"):
        try:
            meta = parse_json((folder / "meta.json").read_bytes(), META)
            check_splits(meta)
            return meta
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot read {folder}/meta.json: {error}; {how_to(folder)}"
            ) from error
    if is_nanogpts(folder):
        return find(NANOGPT)(folder)
    raise UserError(
        f"{folder} has no meta.json, so it was not prepared completely; {how_to(folder)}"
    )


def is_nanogpts(folder: Path) -> bool:
    """True if nanoGPT prepared the folder: it has a meta.pkl, or tokens but none of our own files."""
    names = {path.name for path in folder.glob("*")}
    ours = {"preparing", "meta.json", COMMAND} & names
    return "meta.pkl" in names or ("train.bin" in names and not ours)


def check_splits(meta: dict) -> None:
    """Raise ValueError if a split lacks an entry, or lists a file that does not belong to it."""
    check_schema(meta["splits"], SPLITS[meta["task"]], "splits")
    for split, entry in meta["splits"].items():
        for file in entry["files"]:
            if not re.fullmatch(rf"{re.escape(split)}(_[0-9]+)?\.bin", file["name"]):
                raise ValueError(
                    f"splits.{split} lists the file {file['name']!r}, which does not belong to it"
                )


def how_to(folder: Path) -> str:
    """Say how to repair a folder: with the command that made it, if that can still be read."""
    command = made_by(folder) or f"python prepare_data.py {shlex.quote(folder.name)}"
    return f"prepare it again: {command}"


def made_by(folder: Path) -> str | None:
    """Read the command that made a folder. Returns None if there is no command or it cannot be read."""
    with suppress(OSError, ValueError), (folder / COMMAND).open(encoding="utf-8") as file:
        text = file.read(10_000).strip()
        if is_command(text):
            return text
    return None


def is_command(text: str) -> bool:
    """True if a file's text is a single prepare_data.py command that is safe to paste into a shell."""
    try:
        words = shlex.split(text)
    except ValueError:
        return False
    return (
        text.isprintable()
        and words[:2] == ["python", "prepare_data.py"]
        and shlex.join(words) == text
    )
