"""Token files -> batches. The order of the data is a pure function of (seed, step), so there is no state to save."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import tokenizer as tokenizers
from configurator import UserError
from token_files import TokenFiles, how_to, read_meta


class TokenDataset:
    """One prepared folder, data/<name>: two memory-mapped token files, a tokenizer, and what is known of the text.

    Raises UserError where the folder is missing, broken or too small for block_size.
    """

    task = "language modelling"

    def __init__(self, folder: Path, block_size: int, seed: int):
        self.folder, self.block_size, self.seed = folder, block_size, seed
        self.meta = read_meta(folder)
        self.tokenizer = tokenizers.from_state(self.meta["tokenizer"])
        self.train, self.val = (TokenFiles(folder, split, self.meta) for split in ("train", "val"))
        for split, tokens, least in (("train", self.train, block_size + 1), ("val", self.val, 2)):
            if len(tokens) < least:
                raise UserError(
                    f"{folder / split}.bin has {len(tokens):,} tokens but needs at least {least:,}"
                    f" with block_size={block_size}; take more text or a smaller --block_size"
                )
            self.beginning(split, 50_000)  # most that can be wrong shows there; each batch is checked when it is read

    def beginning(self, split: str, length: int) -> np.ndarray:
        tokens = getattr(self, split)
        ids = tokens.read(np.array([0]), min(len(tokens), length))
        self.check_ids(ids, split)
        return ids

    def check_ids(self, ids: np.ndarray, split: str) -> None:
        if (largest := int(ids.max())) >= self.tokenizer.vocab_size:
            raise UserError(
                f"{self.folder / split}.bin holds token {largest}, but its tokenizer knows only"
                f" {self.tokenizer.vocab_size}; {how_to(self.folder)}"
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
        tokens, T = getattr(self, split), self.block_size
        ids = tokens.read(starts, T + 1)
        self.check_ids(ids, split)
        idx, targets = torch.from_numpy(ids[:, :-1]), torch.from_numpy(ids[:, 1:].copy())
        for row in (starts + T >= len(tokens)).nonzero()[0]:
            targets[row, len(tokens) - 1 - starts[row] :] = -1
        if last is not None:
            targets[last - first :] = -1
        return {"idx": idx, "targets": targets}

    def identity(self) -> dict:
        """What tells this data from other data with the same tokenizer, wherever it came from."""
        checksums = [split["checksums"] for split in self.meta.get("splits", {}).values()]  # long where the data is
        return {
            "train_tokens": len(self.train),
            "val_tokens": len(self.val),
            "first_million_sha256": hashlib.sha256(self.beginning("train", 1_000_000).tobytes()).hexdigest(),
            "checksums_sha256": hashlib.sha256(repr(checksums).encode()).hexdigest(),
        }

    def val_bytes_per_token(self) -> float:
        """UTF-8 bytes of text that a validation token stands for, on average."""
        if split := self.meta.get("splits", {}).get("val"):
            return split["bytes"] / split["tokens"]
        lengths, total, some = self.tokenizer.token_bytes(), 0, 1_000_000
        for start in range(0, len(self.val), some):
            total += int(lengths[self.val.read(np.array([start]), min(some, len(self.val) - start))].sum())
        return total / len(self.val)


class ReadAhead:
    """A data set's batches, the next one read on a thread of its own while this one is trained on.

    Of use where the step leaves the CPU idle, as on a GPU, and reading waits for a disk.
    """

    def __init__(self, dataset: TokenDataset):
        self.dataset = dataset
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self.next = None  # ((index, batch_size), the batch to be)

    def batch(self, index: int, batch_size: int) -> dict[str, Tensor]:
        asked, coming = self.next or (None, None)
        if asked != (index, batch_size):
            coming = self.thread.submit(self.dataset.batch, index, batch_size)
        after = (index + 1, batch_size)
        self.next = (after, self.thread.submit(self.dataset.batch, *after))
        return coming.result()


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
