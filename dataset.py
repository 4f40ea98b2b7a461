"""Token files -> batches. The order of the data is a pure function of (seed, step), so there is no state to save."""

import hashlib
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import tokenizer
from configurator import UserError

META_FORMAT = "tokens 1"  # a change of what a data folder holds gets a new number


class TokenDataset:
    """One prepared folder, data/<name>: two memory-mapped token files, a tokenizer, and what is known of the text.

    Raises UserError where the folder is missing, broken or too small for block_size.
    """

    task = "language modelling"

    def __init__(self, folder: Path, block_size: int, seed: int):
        self.folder, self.block_size, self.seed = folder, block_size, seed
        self.meta = read_meta(folder)
        self.tokenizer = tokenizer.from_state(self.meta["tokenizer"])
        self.train = self.map_tokens("train", at_least=block_size + 1)
        self.val = self.map_tokens("val", at_least=2)

    def map_tokens(self, split: str, at_least: int) -> np.memmap:
        path = self.folder / f"{split}.bin"
        dtype = np.dtype(self.meta["dtype"])
        try:
            size = path.stat().st_size
            if size % dtype.itemsize:
                raise UserError(f"{path} is truncated: {size} bytes are no whole number of {dtype} tokens")
            if size // dtype.itemsize < at_least:
                raise UserError(
                    f"{path} has {size // dtype.itemsize} tokens but needs at least {at_least}"
                    f" with block_size={self.block_size}; take more text or a smaller --block_size"
                )
            tokens = np.memmap(path, dtype, mode="r")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; prepare it again: {how_to(self.folder)}") from error
        said = self.meta.get("splits", {}).get(split, {}).get("tokens", len(tokens))
        if said != len(tokens):
            raise UserError(
                f"{path} has {len(tokens)} tokens, but meta.json says {said}; prepare it again: {how_to(self.folder)}"
            )
        self.check_ids(tokens[:100_000_000], split)  # a glance at the start; each batch is checked when it is read
        return tokens

    def check_ids(self, ids: np.ndarray, split: str) -> None:
        if (largest := int(ids.max())) >= self.tokenizer.vocab_size:
            raise UserError(
                f"{self.folder / split}.bin holds token {largest}, but its tokenizer knows only"
                f" {self.tokenizer.vocab_size}; prepare it again: {how_to(self.folder)}"
            )

    def batch(self, index: int, batch_size: int) -> dict[str, Tensor]:
        """Training batch number index: idx and targets, both int64 (batch_size, block_size).

        An epoch starts at a random offset, cuts the text into blocks and visits each once, in a random order. Two
        batches of n are, block for block, one batch of 2 n.
        """
        T = self.block_size
        last = len(self.train) - 1 - T  # the last place that a block can start at
        blocks = max(1, last // T)
        offsets = last - (blocks - 1) * T + 1  # as many as leave room for all the blocks: between T and 2 T
        epoch, place = np.divmod(np.arange(index * batch_size, (index + 1) * batch_size), blocks)
        starts = np.empty(batch_size, dtype=np.int64)
        for e in np.unique(epoch):  # nearly always a single one
            key = random_key(self.seed, int(e))
            starts[epoch == e] = key % offsets + T * permute(place[epoch == e], blocks, key)
        return self.read("train", starts)

    def val_batches(self, batch_size: int, eval_iters: int | None) -> Iterator[dict[str, Tensor]]:
        """The evaluation set, always the same: eval_iters batches of blocks spread evenly over the validation split.

        With None, or where that many would cover it, the whole split: every token but the first is predicted once.
        Batches as from batch(); where the text ends before a batch does, targets are -1.
        """
        starts = self.val_starts(batch_size, eval_iters)
        for first in range(0, len(starts), batch_size):
            yield self.read("val", np.resize(starts[first : first + batch_size], batch_size), first, len(starts))

    def val_starts(self, batch_size: int, eval_iters: int | None) -> np.ndarray:
        """Where the blocks of the evaluation set begin; the last one of the whole split may be cut short."""
        starts = np.arange(0, len(self.val) - 1, self.block_size)
        if eval_iters is not None and eval_iters * batch_size < len(starts):
            starts = starts[np.linspace(0, len(starts) - 2, eval_iters * batch_size).astype(np.int64)]
        return starts

    def read(self, split: str, starts: np.ndarray, first: int = 0, last: int | None = None) -> dict[str, Tensor]:
        """Blocks that begin at starts, (B,); of these, only the ones before number last count."""
        tokens = getattr(self, split)
        places = starts[:, None] + np.arange(self.block_size + 1)
        ids = tokens[places.clip(max=len(tokens) - 1)].astype(np.int64)
        self.check_ids(ids, split)
        idx, targets = torch.from_numpy(ids[:, :-1]), torch.from_numpy(ids[:, 1:].copy())
        targets[torch.from_numpy(places[:, 1:] >= len(tokens))] = -1
        if last is not None:
            targets[last - first :] = -1
        return {"idx": idx, "targets": targets}

    def identity(self) -> dict:
        """What tells this data from other data with the same tokenizer, wherever it came from."""
        digest = hashlib.sha256(self.train[:1_000_000].tobytes()).hexdigest()
        return {
            "text_sha256": self.meta.get("text_sha256"),
            "train_tokens": len(self.train),
            "val_tokens": len(self.val),
            "first_million_sha256": digest,
        }

    def val_bytes_per_token(self) -> float:
        """UTF-8 bytes of text that a validation token stands for, on average."""
        split = self.meta.get("splits", {}).get("val")
        if split:
            return split["bytes"] / split["tokens"]
        return float(self.tokenizer.token_bytes()[self.val].mean())


def how_to(folder: Path) -> str:
    return f"python prepare_data.py {folder.name}"


# --------------------------------------------------------------------------------------
# The order of the data


def random_key(*numbers: int) -> int:
    """63 random bits that depend on the numbers alone, alike on every machine."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where the elements numbered index, int64 each in [0, n), go in the permutation of range(n) that key names.

    Four rounds of a Feistel network permute the next even power of two; what falls outside range(n) is sent round again
    until it is inside. No table is kept, so an epoch of 10^11 tokens costs no more memory than one of ten.
    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", cycle walking.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [np.uint64(random_key(key, r)) for r in range(4)]
    x = index.astype(np.uint64)
    outside = np.ones(len(x), dtype=bool)
    while outside.any():
        y = x[outside]
        left, right = y >> half, y & mask
        for round_key in keys:
            mixed = (right ^ round_key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        x[outside] = (left << half) | right
        outside = x >= np.uint64(n)
    return x.astype(np.int64)


# --------------------------------------------------------------------------------------
# What a folder says about itself


def read_meta(folder: Path) -> dict:
    """The folder's meta.json; or the same made from nanoGPT's meta.pkl. Raises UserError."""
    try:
        if (folder / "meta.json").exists():
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            if not isinstance(meta, dict) or meta.get("format") != META_FORMAT:
                raise UserError(
                    f"{folder}/meta.json is not of this version, {META_FORMAT!r}; prepare it again: {how_to(folder)}"
                )
            return meta
        if (folder / "meta.pkl").exists():
            return read_nanogpt_meta(folder / "meta.pkl")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read {folder}/meta.json: {error}; prepare it again: {how_to(folder)}") from error
    raise UserError(f"{folder} has no meta.json (nor nanoGPT's meta.pkl), which tells the tokenizer; {how_to(folder)}")


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
    return {
        "format": META_FORMAT,
        "task": "language modelling",
        "source": f"nanoGPT's {path.parent.name}",
        "dtype": "uint16",
        "tokenizer": {"tokenizer": "char", "alphabet": alphabet},
    }
