"""Token files: ids one after another without a header, as nanoGPT writes them, and a meta.json that describes them.

meta.json has a checksum of each file. Small files are checked when they are opened, files of any size by
`prepare_data.py NAME --verify=True`. A folder that nanoGPT or an earlier version prepared has no such checksums.
"""

import hashlib
import io
import os
import pickle
import re
import shlex
import sys
from bisect import bisect_right
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np

from humptygpt import tokenizers
from humptygpt.config import UserError, as_written_here, note
from humptygpt.schema import check_schema, parse_json

META_FORMAT = "tokens 2"  # a change of what a data folder holds gets a new number
CHECKED = (
    1 << 28
)  # bytes of a split that are checked when it is opened, in less than a second
COMMAND = "command.txt"  # in every folder that we prepared: the command that made it
GPT2_TOKENS = 50_257  # in its vocabulary

COUNT = range(2**53)  # what a float64 holds exactly
POSITIVE = range(1, 2**53)
SPLIT = {
    "tokens": POSITIVE,
    "bytes": POSITIVE,
    "files": [{"name": str, "tokens": COUNT}],
    "sha256?": {str: str},
}
SPLITS = {  # by task
    "language modelling": {str: SPLIT},
    "translation": {str: SPLIT | {"target_bytes": POSITIVE, "target_tokens": POSITIVE}},
}
META = {  # what training reads; data/README.md has the rest
    "format": {META_FORMAT},
    "task": set(SPLITS),
    "source": str,
    "dtype": {"uint16", "uint32"},
    "vocab_size?": COUNT,
    "command?": str,
    "splits": {"train": dict, "val": dict},  # SPLITS has the rest
    "tokenizer": dict,  # its class has the rest
}


def token_dtype(tokenizer: tokenizers.Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> int:
    """Check all files of a folder, whatever their size. Returns how many have a checksum. Raises UserError."""
    meta = read_meta(folder)
    return sum(TokenFiles(folder, split, meta).verify() for split in meta["splits"])


def is_whole(folder: Path) -> bool:
    """Whether the files of a folder with a meta.json are as it says, all of them read."""
    try:
        return verify(folder) >= 0
    except (OSError, UserError):
        return False


class TokenFiles:
    """The token files of one split, memory-mapped and read as one.

    meta: as from read_meta. Raises UserError if a file is missing or is not as meta says.
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
        except (OSError, ValueError) as error:  # ValueError: of a truncated file
            raise self.error(f"cannot read {folder / split}.bin: {error}") from error
        self.starts = list(accumulate(map(len, self.arrays), initial=0))
        tokens = entry.get("tokens", len(self))  # nanoGPT's folders do not say
        if len(self) != tokens:
            raise self.error(
                f"{folder / split}.bin has {len(self):,} tokens, which are not the {tokens:,} of meta.json"
            )
        if sum(ids.nbytes for ids in self.arrays) <= CHECKED:
            self.verify()

    def error(self, problem: str) -> UserError:
        return UserError(f"{problem}; {how_to(self.folder)}")

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return the tokens from each start on, int64 (len(starts), length); zeros after the last token."""
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
        """Compare the files with their checksums. Returns how many have one. Raises UserError."""
        checked = [path for path in self.paths if path.name in self.sums]
        for path in checked:
            if sha256(path) != self.sums[path.name]:
                problem = "its checksum is not the one in meta.json"
                raise self.error(f"{path} was altered or damaged: {problem}")
        return len(checked)


def append_tokens(
    folder: Path, split: str, ids: np.ndarray, shard_tokens: int | None, tokens: int
) -> None:
    """Write token ids of a split from token number `tokens` on; what its files hold after that is dropped."""
    limit = shard_tokens or sys.maxsize
    while True:
        number, start = divmod(tokens, limit)
        path = folder / (f"{split}_{number:04d}.bin" if shard_tokens else f"{split}.bin")
        some = ids[: limit - start]
        with path.open("ab") as file:
            if file.tell() < start * ids.itemsize:
                problem = f"{path} is shorter than it was"
                raise UserError(f"{problem}; remove {folder} and try again")
            file.truncate(start * ids.itemsize)
            file.write(some.tobytes())
            file.flush()
            os.fsync(file.fileno())
        tokens += len(some)
        ids = ids[len(some) :]
        if not len(ids):
            return


# --------------------------------------------------------------------------------------
# What describes a folder


def read_meta(folder: Path) -> dict:
    """Read the folder's meta.json, checked, or make one for a folder that nanoGPT prepared. Raises UserError."""
    if os.path.exists(folder / "meta.json"):
        try:
            meta = parse_json((folder / "meta.json").read_bytes(), META)
            check_splits(meta)
            return meta
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot read {folder}/meta.json: {error}; {how_to(folder)}"
            ) from error
    if os.path.exists(folder / "meta.pkl"):
        return read_nanogpt_meta(folder / "meta.pkl")
    ours = any(os.path.exists(folder / name) for name in ("preparing", COMMAND))
    if ours or not os.path.exists(folder / "train.bin"):
        problem = f"{folder} has no meta.json, which a preparation writes last"
        raise UserError(f"{problem}; {how_to(folder)}")
    note(f"{folder} has no meta.json or meta.pkl; it is taken for GPT-2's tokens")
    tokenizer = tokenizers.GPT2Tokenizer.train(separated=True)
    val = folder / "val.bin"
    # a single text has no end-of-text; a model would begin its samples with a token that it has never seen
    if val.exists() and tokenizer.eot not in np.fromfile(val, "<u2"):
        tokenizer.eot = None
    return nanogpt_meta(folder, tokenizer)


def check_splits(meta: dict) -> None:
    """Raise ValueError where the splits lack an entry, or name a file that is not theirs."""
    check_schema(meta["splits"], SPLITS[meta["task"]], "splits")
    for split, entry in meta["splits"].items():
        for file in entry["files"]:
            name = file["name"]
            ours = re.fullmatch(r"(train|val|test)(_[0-9]+)?\.bin", name)  # no path
            if not ours or not name.startswith(split):
                raise ValueError(
                    f"splits.{split} has the file {name!r}, which is not its own"
                )


def how_to(folder: Path) -> str:
    """Return the fix where a folder is broken: the command that made it, if it can still be read."""
    command = made_by(folder) or f"python prepare_data.py {shlex.quote(folder.name)}"
    return f"prepare it again: {as_written_here(command)}"


def made_by(folder: Path) -> str | None:
    """Return the command that made a folder, or began to; None where there is none that can be read."""
    for path in (folder / COMMAND, folder / "preparing" / COMMAND):
        with suppress(OSError, ValueError), path.open(encoding="utf-8") as file:
            text = file.read(10_000).strip()
            if is_command(text):
                return text
    return None


def is_command(text: str) -> bool:
    """Whether this, which a file says, is one command of prepare_data.py, safe to be shown for pasting."""
    try:
        words = shlex.split(text)
    except ValueError:
        return False
    return (
        text.isprintable()
        and words[:2] == ["python", "prepare_data.py"]
        and shlex.join(words) == text
    )


def nanogpt_meta(folder: Path, tokenizer: tokenizers.Tokenizer) -> dict:
    return {
        "format": META_FORMAT,
        "task": "language modelling",
        "source": f"nanoGPT's {folder.name}",
        "dtype": "uint16",
        "splits": {
            split: {"files": [{"name": f"{split}.bin"}]} for split in ("train", "val")
        },
        "tokenizer": tokenizer.state(),
    }


class PlainUnpickler(pickle._Unpickler):
    """Reads dicts, lists, tuples, sets, strings and numbers, which need no class, and refuses all else.

    It is the unpickler in Python, since a damaged pickle can make the one in C allocate any amount of memory.
    """

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_nanogpt_meta(path: Path) -> dict:
    """nanoGPT's {vocab_size, itos, stoi} -> ours: its token files are uint16 and its characters one token each."""
    try:
        old = PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        characters = [old["itos"][i] for i in range(old["vocab_size"])]
        if any(type(char) is not str or len(char) != 1 for char in characters):
            raise ValueError("its tokens are not single characters")
        return nanogpt_meta(path.parent, tokenizers.CharTokenizer("".join(characters)))
    # a foreign pickle can fail in any way; none of them runs code
    except Exception as error:
        raise UserError(
            f"{path} is not a plain {{vocab_size, itos, stoi}}: {error!r}"
        ) from error
