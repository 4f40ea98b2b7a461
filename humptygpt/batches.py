"""Token files -> batches. The order of the data is a pure function of (seed, step), so there is no state to save."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from humptygpt import tokenizer as tokenizers
from humptygpt.configurator import UserError
from humptygpt.token_files import TokenFiles, how_to, read_meta


class Dataset:
    """One prepared folder, data/<name>: memory-mapped token files, a tokenizer, and what is known of the text.

    Raises UserError where the folder is missing or broken.
    """

    task: str

    def __init__(self, folder: Path, block_size: int, seed: int, meta: dict | None = None):
        """meta: what read_meta gives, where it has been read already."""
        self.folder, self.block_size, self.seed = folder, block_size, seed
        self.meta = meta or read_meta(folder)
        if self.meta["task"] != self.task:
            raise UserError(f"{folder} is for {self.meta['task']}, not for {self.task}")
        self.tokenizer = tokenizers.from_state(self.meta["tokenizer"])
        self.train, self.val = (TokenFiles(folder, split, self.meta) for split in ("train", "val"))

    def read(self, split: str, starts: np.ndarray, length: int) -> np.ndarray:
        """The tokens of a split from each of the starts on, checked; int64 (len(starts), length)."""
        ids = getattr(self, split).read(starts, length)
        if (largest := int(ids.max())) >= self.tokenizer.vocab_size:
            raise UserError(
                f"{self.folder / split}.bin holds token {largest}, but its tokenizer knows only"
                f" {self.tokenizer.vocab_size}; {how_to(self.folder)}"
            )
        return ids

    def beginning(self, split: str, length: int) -> np.ndarray:
        return self.read(split, np.array([0]), min(len(getattr(self, split)), length))

    def identity(self) -> dict:
        """What tells this data from other data with the same tokenizer, wherever it came from."""
        checksums = [split["checksums"] for split in self.meta.get("splits", {}).values()]  # long where the data is
        return {
            "train_tokens": len(self.train),
            "val_tokens": len(self.val),
            "first_million_sha256": hashlib.sha256(self.beginning("train", 1_000_000).tobytes()).hexdigest(),
            "checksums_sha256": hashlib.sha256(repr(checksums).encode()).hexdigest(),
        }


class TokenDataset(Dataset):
    """A text in one stream, read in blocks of block_size tokens. Raises UserError where it is too short for one."""

    task = "language modelling"

    def __init__(self, folder: Path, block_size: int, seed: int, meta: dict | None = None):
        super().__init__(folder, block_size, seed, meta)
        for split, tokens, least in (("train", self.train, block_size + 1), ("val", self.val, 2)):
            if len(tokens) < least:
                raise UserError(
                    f"{folder / split}.bin has {len(tokens):,} tokens but needs at least {least:,}"
                    f" with block_size={block_size}; take more text or a smaller --block_size"
                )
            self.beginning(split, 50_000)  # most that can be wrong shows there; each batch is checked when it is read

    def describe(self, batch_size: int, eval_iters: int | None) -> tuple[str, str]:
        """(a batch, the evaluation set) in words."""
        blocks = len(self.val_starts(batch_size, eval_iters))
        read = min(len(self.val) - 1, blocks * self.block_size)
        batch = f"{batch_size * self.block_size:,} tokens ({batch_size} sequences of {self.block_size})"
        return batch, f"{read:,} of {len(self.val) - 1:,} tokens"

    def batches_per_epoch(self, batch_size: int) -> float:
        return len(self.train) / (batch_size * self.block_size)

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
        return self.blocks("train", starts)

    def val_batches(self, batch_size: int, eval_iters: int | None) -> Iterator[dict[str, Tensor]]:
        """The evaluation set, always the same: eval_iters batches of blocks spread evenly over the validation split.

        With None, or where that many would cover it, the whole split: every token but the first is predicted once.
        Batches as from batch(); where the text ends before a batch does, targets are -1.
        """
        starts = self.val_starts(batch_size, eval_iters)
        for first in range(0, len(starts), batch_size):
            yield self.blocks("val", np.resize(starts[first : first + batch_size], batch_size), first, len(starts))

    def val_starts(self, batch_size: int, eval_iters: int | None) -> np.ndarray:
        """Where the blocks of the evaluation set begin; the last one of the whole split may be cut short."""
        starts = np.arange(0, len(self.val) - 1, self.block_size)
        if eval_iters is not None and eval_iters * batch_size < len(starts):
            starts = starts[np.linspace(0, len(starts) - 2, eval_iters * batch_size).astype(np.int64)]
        return starts

    def blocks(self, split: str, starts: np.ndarray, first: int = 0, last: int | None = None) -> dict[str, Tensor]:
        """Blocks that begin at starts, (B,); of these, only the ones before number last count."""
        tokens, T = getattr(self, split), self.block_size
        ids = self.read(split, starts, T + 1)
        idx, targets = torch.from_numpy(ids[:, :-1]), torch.from_numpy(ids[:, 1:].copy())
        for row in (starts + T >= len(tokens)).nonzero()[0]:
            targets[row, len(tokens) - 1 - starts[row] :] = -1
        if last is not None:
            targets[last - first :] = -1
        return {"idx": idx, "targets": targets}

    def val_bytes_per_token(self) -> float:
        """UTF-8 bytes of text that a validation token stands for, on average."""
        if split := self.meta.get("splits", {}).get("val"):
            return split["bytes"] / split["tokens"]
        lengths, total, some = self.tokenizer.token_bytes(), 0, 1_000_000
        for start in range(0, len(self.val), some):
            total += int(lengths[self.val.read(np.array([start]), min(some, len(self.val) - start))].sum())
        return total / len(self.val)


class PairDataset(Dataset):
    """Sentence pairs, a stream of `source eot target eot ...`. A batch has pairs of similar lengths, as many as fit.

    with_encoder: source and target apart, for a model that has an encoder to read the source; else each pair is one
    text that a decoder alone goes on with, and only the target's tokens count. Either way a batch takes at most
    batch_size * block_size tokens, padding included; those of the longer side, where the two are apart.
    Raises UserError where a pair is longer than block_size.
    """

    task = "translation"

    def __init__(self, folder: Path, block_size: int, seed: int, with_encoder: bool, meta: dict | None = None):
        super().__init__(folder, block_size, seed, meta)
        self.with_encoder = with_encoder
        if "test" in self.meta["splits"]:
            self.test = TokenFiles(folder, "test", self.meta)
        self.pairs = {split: self.find_pairs(split) for split in self.meta["splits"]}
        longest = max(int(self.lengths(pairs).max()) for pairs in self.pairs.values())
        if longest > block_size:
            raise UserError(
                f"{folder} has a pair that needs room for {longest} tokens, more than block_size={block_size};"
                f" take --block_size={longest}"
            )
        self.cuts = {}  # (split, batch_size): where the batches begin among the pairs in order of length
        self.epoch = (-1, None)  # (number, its order) of the newest

    def find_pairs(self, split: str) -> np.ndarray:
        """(pairs, 3): where each begins, the tokens of its source and those of its target, eot included."""
        ends, some = [np.array([-1])], 1_000_000
        length = len(getattr(self, split))
        for start in range(0, length, some):
            ids = self.read(split, np.array([start]), min(some, length - start))[0]
            ends.append(start + np.flatnonzero(ids == self.tokenizer.eot))
        ends = np.concatenate(ends)
        if len(ends) < 3 or len(ends) % 2 == 0 or ends[-1] != length - 1:
            raise UserError(f"{self.folder / split}.bin has no whole pairs; {how_to(self.folder)}")
        lengths = np.diff(ends)
        return np.stack([ends[:-1:2] + 1, lengths[::2], lengths[1::2]], axis=1)

    def lengths(self, pairs: np.ndarray) -> np.ndarray:
        """The tokens that each pair needs in block_size."""
        _, source, target = pairs.T
        return np.maximum(source, target) if self.with_encoder else source + target - 1

    def order(self, split: str, tie: np.ndarray) -> np.ndarray:
        """The pairs from short to long; tie decides between those of equal lengths."""
        _, source, target = self.pairs[split].T
        if not self.with_encoder:
            return np.lexsort((tie, source + target))
        # sources get longer for one length of target and shorter for the next, so that neighbours are always alike
        return np.lexsort((tie, np.where(target % 2, source, -source), target))

    def batch_starts(self, split: str, batch_size: int) -> np.ndarray:
        """Where batches begin among the pairs in order of length, and the end of the last one; alike in all epochs."""
        if (split, batch_size) not in self.cuts:
            pairs = self.pairs[split]
            room, longest, starts = batch_size * self.block_size, 0, [0]
            for place, length in enumerate(self.lengths(pairs[self.order(split, np.arange(len(pairs)))]).tolist()):
                longest = max(longest, length)
                if (place + 1 - starts[-1]) * longest > room:
                    starts.append(place)
                    longest = length
            self.cuts[split, batch_size] = np.array([*starts, len(pairs)])
        return self.cuts[split, batch_size]

    def batch(self, index: int, batch_size: int) -> dict[str, Tensor]:
        """Training batch number index: source (B, S), -1 behind its end; idx and targets, (B, T); all int64.

        Without an encoder there is no source, which stands at the beginning of idx.
        An epoch has each pair once. Those of equal lengths are shuffled before they are cut into batches, and then the
        batches are.
        """
        starts = self.batch_starts("train", batch_size)
        epoch, place = divmod(index, len(starts) - 1)
        key = random_key(self.seed, epoch)
        if self.epoch[0] != epoch:
            pairs = len(self.pairs["train"])
            self.epoch = epoch, self.order("train", permute(np.arange(pairs), pairs, key))
        number = int(permute(np.array([place]), len(starts) - 1, key)[0])
        return self.some_pairs("train", self.epoch[1][starts[number] : starts[number + 1]])

    def some_pairs(self, split: str, rows: np.ndarray) -> dict[str, Tensor]:
        """The pairs with these numbers as a batch."""
        start, source, target = self.pairs[split][rows].T
        if self.with_encoder:  # the decoder begins with the eot that ends the source
            first, before = source - 1, np.zeros_like(source)
        else:  # with the source itself, whose tokens but the last do not count
            first, before = np.zeros_like(source), source - 1
        length = before + target
        ids = self.read(split, start + first, int(length.max()) + 1)
        place = np.arange(ids.shape[1] - 1)
        idx, targets = ids[:, :-1].copy(), ids[:, 1:].copy()
        idx[place >= length[:, None]] = self.tokenizer.eot
        targets[(place < before[:, None]) | (place >= length[:, None])] = -1
        batch = {"idx": torch.from_numpy(idx), "targets": torch.from_numpy(targets)}
        if self.with_encoder:
            ids = self.read(split, start, int(source.max()))
            ids[np.arange(ids.shape[1]) >= source[:, None]] = -1
            batch["source"] = torch.from_numpy(ids)
        return batch

    def val_batches(self, batch_size: int, eval_iters: int | None) -> Iterator[dict[str, Tensor]]:
        """The evaluation set, always the same: eval_iters batches spread over all lengths; None: the whole split."""
        starts = self.batch_starts("val", batch_size)
        order = self.order("val", np.arange(len(self.pairs["val"])))
        for number in self.val_numbers(batch_size, eval_iters):
            yield self.some_pairs("val", order[starts[number] : starts[number + 1]])

    def val_numbers(self, batch_size: int, eval_iters: int | None) -> list[int]:
        batches = len(self.batch_starts("val", batch_size)) - 1
        count = min(eval_iters or batches, batches)
        return ((np.arange(count) + 0.5) * batches / count).astype(int).tolist()

    def texts(self, split: str, count: int | None = None) -> list[tuple[np.ndarray, str]]:
        """(source with its eot, int64 (S,), the target in words) of so many pairs, evenly drawn; None: of all."""
        pairs = self.pairs[split]
        if count is not None:
            pairs = pairs[np.linspace(0, len(pairs) - 1, min(count, len(pairs))).astype(int)]
        found = []
        for start, source, target in pairs.tolist():
            ids = self.read(split, np.array([start]), source + target)[0]
            found.append((ids[:source], self.tokenizer.decode(ids[source:-1])))
        return found

    def describe(self, batch_size: int, eval_iters: int | None) -> tuple[str, str]:
        """(a batch, the evaluation set) in words."""
        target = self.pairs["train"][:, 2].sum() / self.batches_per_epoch(batch_size)
        pairs = len(self.pairs["train"]) / self.batches_per_epoch(batch_size)
        starts, numbers = self.batch_starts("val", batch_size), self.val_numbers(batch_size, eval_iters)
        read = int(np.diff(starts)[numbers].sum())
        return (
            f"about {target:,.0f} target tokens ({pairs:,.0f} pairs of similar lengths)",
            f"{read:,} of {len(self.pairs['val']):,} pairs",
        )

    def batches_per_epoch(self, batch_size: int) -> float:
        return len(self.batch_starts("train", batch_size)) - 1

    def val_bytes_per_token(self) -> float:
        """UTF-8 bytes of target that a target token of the validation split stands for, on average."""
        split = self.meta["splits"]["val"]
        return split["target_bytes"] / split["target_tokens"]


class ReadAhead:
    """A data set's batches, the next one read on a thread of its own while this one is trained on.

    Of use where the step leaves the CPU idle, as on a GPU, and reading waits for a disk.
    """

    def __init__(self, dataset: Dataset):
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
