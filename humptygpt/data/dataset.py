"""Token files -> batches. The order of the data is a pure function of (seed, step), so there is no state to save.

Token files hold consecutive ids without a header, as nanoGPT writes them, and a meta.json describes them. It has a
checksum of each file. Small files are verified when they are opened, and files of any size when they are prepared again
by the same command.
"""

import hashlib
import json
import math
import os
import shlex
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from humptygpt.cli import UserError
from humptygpt.files import refuse_damaged
from humptygpt.machine import random_key
from humptygpt.tokenizers.saved import from_state

if TYPE_CHECKING:  # torch takes seconds to load, and preparing data does not need it
    from torch import Tensor

BLOCKS = 8  # blocks of batches whose means give the standard error of a loss

Batch = dict[str, "Tensor"]  # the arguments of a model: idx, targets and perhaps source

CHUNK = 1_000_000  # tokens to read at once
META_FORMAT = "tokens 3"  # the number increases when the layout of data folders changes
CHECKED = 1 << 28  # a split of up to this many bytes is checked whenever it is opened
COMMAND = "command.txt"  # this file in a data folder holds the command that made it

TASKS = ("language modelling", "translation", "chat")


# --------------------------------------------------------------------------------------
# Batches


class Dataset:
    """A prepared folder, data/<name>: memory-mapped token files, their tokenizer and their meta.json.

    Raises UserError if the folder is missing or damaged.
    """

    task: str

    def __init__(
        self,
        folder: Path,
        block_size: int,
        seed: int,
        with_encoder: bool = False,
        meta: dict | None = None,
    ):
        """meta: the result of read_meta(folder), if already known."""
        self.folder = folder
        self.block_size = block_size
        self.seed = seed
        self.with_encoder = with_encoder
        self.meta = meta or read_meta(folder)
        # the validation split is a part of the training split, so no loss on it says which model is the best
        self.trains_on_all = bool(self.meta.get("trains_on_all"))
        self.tokenizer = from_state(self.meta["tokenizer"])
        self.splits = {split: TokenFile(folder, split, self.meta) for split in self.meta["splits"]}
        self.train, self.val = self.splits["train"], self.splits["val"]
        self.set_up()

    def set_up(self) -> None:
        """Check the lengths of the splits and prepare the batches."""
        raise NotImplementedError

    def read(self, split: str, starts: np.ndarray, length: int) -> np.ndarray:
        """Read `length` tokens of a split from each start. Returns int64 (len(starts), length).

        Raises UserError if a token is not in the tokenizer's vocabulary.
        """
        ids = self.splits[split].read(starts, length)
        if (largest := int(ids.max())) >= self.tokenizer.vocab_size:
            raise UserError(
                f"{self.folder / split}.bin holds token {largest}, but its tokenizer has only"
                f" {self.tokenizer.vocab_size} tokens; {how_to(self.folder)}"
            )
        return ids

    def chunks(self, split: str) -> Iterator[tuple[int, np.ndarray]]:
        """Read a whole split in order, a million tokens at a time. Yields (position of the first token, token ids)."""
        tokens = len(self.splits[split])
        for start in range(0, tokens, CHUNK):
            yield start, self.read(split, np.array([start]), min(CHUNK, tokens - start))[0]

    @cached_property
    def identity(self) -> dict:
        """Fingerprint that distinguishes datasets with the same tokenizer. It does not depend on the path."""
        _, first_million = next(self.chunks("train"))
        sums = [split.sum for split in self.splits.values()]
        return {
            "train_tokens": len(self.train),
            "val_tokens": len(self.val),
            "first_million_sha256": hashlib.sha256(first_million).hexdigest(),
            "files_sha256": hashlib.sha256(repr(sums).encode()).hexdigest(),
        }

    def val_bytes_per_token(self) -> float:
        """UTF-8 bytes of text per predicted token in the validation split."""
        if self.val.bytes:
            return self.val.bytes / self.val.targets
        lengths = self.tokenizer.token_bytes()
        return sum(int(lengths[ids].sum()) for _, ids in self.chunks("val")) / len(self.val)


class TokenDataset(Dataset):
    """Text as one stream of tokens, cut into blocks of block_size. Raises UserError if a split is too short."""

    task = "language modelling"
    target_fraction = 1.0  # fraction of the tokens of a training batch that are targets

    def resize(self, block_size: int) -> None:
        """Cut the text into blocks of another size."""
        if block_size != self.block_size:
            self.block_size = block_size
            self.set_up()

    def contexts(self, sizes: Collection[int]) -> list[int]:
        """Return those of the sizes that suit the text as block_size."""
        return [size for size in sizes if size < len(self.train)]

    def set_up(self) -> None:
        for split, least in (("train", self.block_size + 1), ("val", 2)):
            if len(self.splits[split]) < least:
                raise UserError(
                    f"{self.folder / split}.bin has {len(self.splits[split]):,} tokens but needs at least {least:,}"
                    f" with block_size={self.block_size}; use more text or a smaller --block_size"
                )

    def summary(self, batch_size: int, eval_iters: int | None) -> tuple[str, str]:
        """Describe a batch and the evaluation set in words."""
        targets = len(self.val) - 1
        evaluated = min(targets, len(self.val_starts(batch_size, eval_iters)) * self.block_size)
        sequences = f"{batch_size} sequence{'s' * (batch_size > 1)} of {self.block_size:,}"
        batch = f"{batch_size * self.block_size:,} tokens ({sequences})"
        return batch, f"{evaluated:,} of {targets:,} tokens"

    def batches_per_epoch(self, batch_size: int) -> float:
        return len(self.train) / (batch_size * self.block_size)

    def all_val_batches(self, batch_size: int) -> int:
        """Number of batches in the whole validation split."""
        return math.ceil(len(self.val_starts(batch_size, None)) / batch_size)

    def batch(self, index: int, batch_size: int) -> Batch:
        """Make training batch number `index`: idx and targets, both int64 (batch_size, block_size).

        An epoch starts at a random offset, cuts the text into blocks and visits each block once, in a random order.
        Batches 2i and 2i + 1 of size n together hold the same blocks as batch i of size 2n.
        """
        T = self.block_size
        last = len(self.train) - 1 - T  # the last position at which a block can start
        blocks = max(1, last // T)
        # number of offsets at which all blocks still fit into the text; it is between T and 2T
        offsets = last - (blocks - 1) * T + 1
        epochs, numbers = np.divmod(index * batch_size + np.arange(batch_size), blocks)
        starts = np.empty(batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):  # nearly always a single epoch
            key = random_key(self.seed, int(epoch))
            order = permute(numbers[epochs == epoch], blocks, key)
            starts[epochs == epoch] = key % offsets + T * order
        return self.blocks("train", starts)

    def val_batches(self, batch_size: int, eval_iters: int | None) -> Iterator[Batch]:
        """Yield the evaluation set, which is always the same: eval_iters batches of blocks spread over the split.

        With eval_iters=None, or enough batches to cover the split, every token but the first is predicted once. Batches
        have the same shape as those from batch(). The last is padded with rows whose targets are -1.
        """
        starts = self.val_starts(batch_size, eval_iters)
        for first in range(0, len(starts), batch_size):
            rows = starts[first : first + batch_size]
            batch = self.blocks("val", np.resize(rows, batch_size))
            batch["targets"][len(rows) :] = -1
            yield batch

    def val_starts(self, batch_size: int, eval_iters: int | None) -> np.ndarray:
        """Start positions of the blocks in the evaluation set. If it is the whole split, the last may be shorter."""
        starts = np.arange(0, len(self.val) - 1, self.block_size)
        if eval_iters is None or eval_iters * batch_size >= len(starts):
            return starts
        return starts[np.linspace(0, len(starts) - 2, eval_iters * batch_size).astype(np.int64)]

    def blocks(self, split: str, starts: np.ndarray) -> Batch:
        """Make a batch of the blocks that start at these positions, (B,). Targets after the end of the split are -1."""
        ids = self.read(split, starts, self.block_size + 1)
        after = starts[:, None] + np.arange(1, ids.shape[1]) >= len(self.splits[split])
        return next_tokens(ids, ignored=after)


def count_targets(batch: Batch) -> int:
    """Count the targets that are not ignored."""
    return int((batch["targets"] >= 0).sum())


def next_tokens(ids: np.ndarray, ignored: np.ndarray) -> Batch:
    """Make a batch: idx and targets, both (B, T). Targets are one token ahead of idx, and -1 if ignored.

    ids: (B, T + 1). ignored: (B, T), True for targets to ignore.
    """
    import torch

    targets = ids[:, 1:].copy()
    targets[ignored] = -1
    return {"idx": torch.from_numpy(ids[:, :-1]), "targets": torch.from_numpy(targets)}


# --------------------------------------------------------------------------------------
# The order of the data


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Apply a pseudorandom permutation of range(n), chosen by key, to each index. Returns int64, each in [0, n).

    Four rounds of a Feistel network permute the range up to the next power of four. Indices that land outside range(n)
    go through the rounds again. There is no table, so an epoch of 10^11 tokens takes no more memory than one of ten.
    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains": the cycle-walking cipher.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = [random_key(key, r) for r in range(4)]
    # everything computed from x is uint64 as well, so products wrap around
    x = index.astype(np.uint64)
    outside = np.ones(len(x), dtype=bool)
    while outside.any():
        y = x[outside]
        left, right = y >> half, y & mask
        for round_key in keys:
            mixed = (right ^ round_key) * 0x9E3779B97F4A7C15
            mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9
            left, right = right, left ^ ((mixed >> 32) & mask)
        x[outside] = (left << half) | right
        outside = x >= n
    return x.astype(np.int64)


# --------------------------------------------------------------------------------------
# Token files


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenFile:
    """The token file of one split, memory-mapped.

    meta: from read_meta. Raises UserError if the file is missing or does not match meta.
    targets, bytes: the tokens on which the loss is measured, and the size of their text; None: unknown.
    """

    def __init__(self, folder: Path, split: str, meta: dict):
        with refuse_damaged(folder, advice=f"; {how_to(folder)}"):
            entry = meta["splits"][split]
            self.path = folder / f"{split}.bin"
            self.sum = entry["sha256"]
            self.ids = np.asarray(np.memmap(self.path, meta["dtype"], mode="r"))
            if len(self) != entry["tokens"]:
                raise ValueError(f"{split}.bin has {len(self):,} tokens, but meta.json says {entry['tokens']:,}")
            # of translations or replies, or of a text
            self.targets = entry.get("target_tokens", len(self))
            self.bytes = entry.get("target_bytes", entry.get("bytes"))
            if self.bytes is not None and not 0 < self.bytes / self.targets < math.inf:
                raise ValueError(f"meta.json has {self.bytes} bytes for {split}")
            if self.ids.nbytes <= CHECKED:
                self.verify()

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return `length` tokens from each start, int64 (len(starts), length), with zeros after the last token."""
        rows = np.zeros((len(starts), length), dtype=np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            ids = self.ids[start : start + length]
            row[: len(ids)] = ids
        return rows

    def verify(self) -> None:
        """Compare the file with its checksum. Raises ValueError if it differs."""
        if sha256(self.path) != self.sum:
            raise ValueError(f"the checksum of {self.path.name} does not match meta.json")


# --------------------------------------------------------------------------------------
# The description of a folder


def read_meta(folder: Path) -> dict:
    """Read and check the folder's meta.json. Raises UserError if it is missing or damaged."""
    if os.path.exists(folder / "meta.json"):
        with refuse_damaged(folder, advice=f"; {how_to(folder)}"):
            meta = json.loads((folder / "meta.json").read_bytes())
            known = (
                meta["format"] == META_FORMAT
                and meta["task"] in TASKS
                and meta["dtype"] in ("uint16", "uint32")
                and {"train", "val"} <= meta["splits"].keys()
                and isinstance(meta["tokenizer"], dict)
            )
            # raises TypeError unless they are texts
            "".join([meta["source"], *meta.get("questions", ())])
            if not known:
                raise ValueError("meta.json is of another version")
            return meta
    raise UserError(f"{folder} has no meta.json, so it was not prepared completely, or not here; {how_to(folder)}")


def how_to(folder: Path) -> str:
    """Say how to repair a folder."""
    if (folder / COMMAND).exists():
        return f"prepare it again with the command in {folder / COMMAND}"
    return f"prepare it: python prepare_data.py {shlex.quote(folder.name)} --input=FILE_OR_FOLDER"
