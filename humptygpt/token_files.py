"""Token files: numbers one behind another, as nanoGPT has them, and a meta.json that says what they are.

The files have no header, so that np.memmap opens them anywhere. meta.json has the checksums of their parts; a part is
checked when it is first read, so that opening a file of any size takes no time and nothing unchecked is ever used.
"""

import base64
import io
import json
import os
import pickle
import sys
import zlib
from bisect import bisect_right
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np

from humptygpt import tokenizer as tokenizers
from humptygpt.configurator import UserError

META_FORMAT = "tokens 2"  # a change of what a data folder holds gets a new number
CHECKED = 1 << 18  # bytes that have one checksum


def token_dtype(tokenizer: tokenizers.Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def checksums(path: Path) -> str:
    """What meta.json has of a file: the CRC-32 of every CHECKED bytes, little-endian uint32, in base64."""
    with path.open("rb") as file:
        sums = [zlib.crc32(block) for block in iter(lambda: file.read(CHECKED), b"")]
    return base64.b64encode(np.array(sums, "<u4").tobytes()).decode()


class TokenFiles:
    """The token files of one split, read as one.

    Raises UserError where one is missing, or has not the tokens or checksums that meta.json says.
    """

    def __init__(self, folder: Path, split: str, meta: dict):
        self.folder, self.how_to = folder, how_to(folder)
        if meta["dtype"] not in ("uint16", "uint32"):
            raise UserError(f"{folder}/meta.json says dtype={meta['dtype']}, not uint16 or uint32; {self.how_to}")
        dtype = np.dtype(meta["dtype"])
        said = meta.get("splits", {}).get(split)
        names = [file["name"] for file in said["files"]] if said else [f"{split}.bin"]
        self.paths = [folder / name for name in names]
        self.arrays = [self.open(path, dtype) for path in self.paths]
        self.ends = list(accumulate(map(len, self.arrays)))
        self.sums = self.unchecked = None
        if said:
            for file, tokens in zip(said["files"], self.arrays, strict=True):
                if len(tokens) != file["tokens"]:
                    raise UserError(
                        f"{folder / file['name']} has {len(tokens):,} tokens, but meta.json says {file['tokens']:,};"
                        f" {self.how_to}"
                    )
            self.sums = [np.frombuffer(base64.b64decode(said["checksums"][name]), "<u4") for name in names]
            self.unchecked = [np.ones(len(sums), dtype=bool) for sums in self.sums]

    def open(self, path: Path, dtype: np.dtype) -> np.ndarray:
        """Mapped, not read: the system brings in what is used, and takes it away when memory is short."""
        try:
            size = path.stat().st_size
            if size % dtype.itemsize:
                raise UserError(
                    f"{path} is truncated: {size:,} bytes are no whole number of {dtype} tokens; {self.how_to}"
                )
            return np.asarray(np.memmap(path, dtype, mode="r")) if size else np.empty(0, dtype)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; {self.how_to}") from error

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The tokens from each of the starts on, int64 (len(starts), length); zeros where there are no more."""
        rows = np.zeros((len(starts), length), dtype=np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            number = bisect_right(self.ends, start)
            at = start - (self.ends[number - 1] if number else 0)
            while len(row) and number < len(self.arrays):  # a row may go on in the next file
                tokens = self.arrays[number][at : at + len(row)]
                if self.unchecked is not None:
                    self.check(number, at, at + len(tokens))
                row[: len(tokens)] = tokens
                row, number, at = row[len(tokens) :], number + 1, 0
        return rows

    def check(self, number: int, start: int, end: int) -> None:
        """The checksums of the parts that tokens [start, end) of a file lie in, of those that were never read."""
        array, unchecked = self.arrays[number], self.unchecked[number]
        size = CHECKED // array.itemsize
        for part in range(start // size, (end - 1) // size + 1):
            if unchecked[part]:
                if zlib.crc32(array[part * size : (part + 1) * size]) != self.sums[number][part]:
                    raise UserError(
                        f"{self.paths[number]} was altered or damaged: from byte {part * CHECKED:,} on its checksum is"
                        f" not the one in meta.json; {self.how_to}"
                    )
                unchecked[part] = False


class TokenWriter:
    """Writes the token files of one split, going on behind the first `tokens` tokens of what is there."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int | None, tokens: int):
        self.folder, self.split, self.itemsize = folder, split, dtype.itemsize
        self.shard_tokens, self.tokens = shard_tokens, tokens
        self.open()

    def open(self) -> None:
        number, tokens = divmod(self.tokens, self.shard_tokens or sys.maxsize)
        name = f"{self.split}_{number:04d}.bin" if self.shard_tokens else f"{self.split}.bin"
        self.file = (self.folder / name).open("ab")
        if self.file.tell() < tokens * self.itemsize:
            raise UserError(f"{self.folder / name} is shorter than it was; remove {self.folder} and prepare anew")
        self.file.truncate(tokens * self.itemsize)

    def write(self, ids: np.ndarray) -> None:
        while len(ids):
            room = self.shard_tokens - self.tokens % self.shard_tokens if self.shard_tokens else len(ids)
            self.file.write(ids[:room].tobytes())
            self.tokens += len(ids[:room])
            ids = ids[room:]
            if self.shard_tokens and self.tokens % self.shard_tokens == 0:
                self.flush()
                self.close()
                self.open()

    def flush(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


# --------------------------------------------------------------------------------------
# What a folder says about itself


def read_meta(folder: Path) -> dict:
    """The folder's meta.json, or the same of a folder that nanoGPT prepared. Raises UserError."""
    try:
        if (folder / "meta.json").exists():
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            if not isinstance(meta, dict) or meta.get("format") != META_FORMAT:
                raise UserError(f"{folder}/meta.json is not of this version, {META_FORMAT!r}; {how_to(folder)}")
            if missing := {"task", "source", "dtype", "splits", "tokenizer"} - meta.keys():
                raise UserError(f"{folder}/meta.json lacks {', '.join(sorted(missing))}; {how_to(folder)}")
            return meta
        if (folder / "meta.pkl").exists():
            return read_nanogpt_meta(folder / "meta.pkl")
        if (folder / "preparing").exists():
            raise UserError(f"the preparation of {folder} was stopped before its end; {how_to(folder)}")
        if (folder / "train.bin").exists():
            print(f"note: {folder} has no meta.json or meta.pkl; it is taken for GPT-2's tokens", file=sys.stderr)
            return nanogpt_meta(folder, tokenizers.BytePairTokenizer.gpt2())
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read {folder}/meta.json: {error}; {how_to(folder)}") from error
    raise UserError(f"{folder} has no meta.json; {how_to(folder)}")


def how_to(folder: Path) -> str:
    """The way out where a folder is broken: the command that made it, if it is known where the text was."""
    command = f"python prepare_data.py {folder.name}"
    for path in (folder / "meta.json", folder / "preparing" / "progress.json"):
        with suppress(OSError, ValueError, AttributeError):
            command = json.loads(path.read_text(encoding="utf-8")).get("command", command)
            break
    return f"prepare it again: {command}"


def nanogpt_meta(folder: Path, tokenizer: tokenizers.Tokenizer) -> dict:
    return {
        "format": META_FORMAT,
        "task": "language modelling",
        "source": f"nanoGPT's {folder.name}",
        "dtype": "uint16",
        "tokenizer": tokenizer.state(),
    }


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, tuples, sets, strings and numbers, which need no class, and refuses all else."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_nanogpt_meta(path: Path) -> dict:
    """nanoGPT's {vocab_size, itos, stoi} -> ours: its token files are uint16 and its characters one token each."""
    try:
        old = PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        alphabet = "".join(old["itos"][i] for i in range(old["vocab_size"]))
        if len(alphabet) != old["vocab_size"]:
            raise ValueError("its tokens are not single characters")
    except OSError:
        raise
    except Exception as error:  # a foreign pickle can fail in any way; none of them runs code
        raise UserError(f"{path} is not a plain {{vocab_size, itos, stoi}}: {error}") from error
    return nanogpt_meta(path.parent, tokenizers.CharTokenizer(alphabet))
