"""Read token files of sentence pairs, and batch pairs of similar lengths."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from humptygpt.cli import UserError
from humptygpt.data.dataset import BLOCKS, Batch, Dataset, how_to, next_tokens, permute
from humptygpt.machine import random_key


class PairDataset(Dataset):
    """Sentence pairs, stored as `source eot target eot ...`. Each batch holds as many pairs of similar length as fit.

    A batch has at most batch_size * block_size tokens, including padding; with an encoder, this limit applies to the
    sources and to the targets separately. Raises UserError if a pair is longer than block_size.

    with_encoder: True: an encoder reads the source, and a decoder the target. False: each pair is one text for a
    decoder, and only the tokens of the target are predicted.
    """

    task = "translation"

    def set_up(self) -> None:
        self.pairs = {split: self.find_pairs(split) for split in self.splits}
        longest = max(int(self.lengths(pairs).max()) for pairs in self.pairs.values())
        if longest > self.block_size:
            raise UserError(
                f"{self.folder} has a pair that needs {longest} tokens, more than block_size={self.block_size};"
                f" use --block_size={longest}"
            )

    def find_pairs(self, split: str) -> np.ndarray:
        """Find the start of each pair, and the lengths of its source and target including eot. Returns (pairs, 3)."""
        eots = [start + np.flatnonzero(ids == self.tokenizer.eot) for start, ids in self.chunks(split)]
        ends = np.concatenate([[-1], *eots])
        lengths = np.diff(ends)
        if len(lengths) % 2 or lengths.sum() != len(self.splits[split]):
            raise UserError(f"{self.folder / split}.bin does not consist of complete pairs; {how_to(self.folder)}")
        return np.stack([ends[:-1:2] + 1, lengths[::2], lengths[1::2]], axis=1)

    def lengths(self, pairs: np.ndarray) -> np.ndarray:
        """Return the length of each pair, which must not exceed block_size: (pairs,)."""
        _, source, target = pairs.T
        return np.maximum(source, target) if self.with_encoder else source + target - 1

    def batch(self, index: int, batch_size: int) -> Batch:
        """Read training batch `index`. An epoch contains each pair once.

        In each epoch, pairs of equal lengths are shuffled, all are cut into batches, and the batches are shuffled.
        Returns idx and targets, (B, T). With an encoder there is also source, (B, S), padded with -1; without one, idx
        starts with the source. All are int64.
        """
        count = self.batches_per_epoch(batch_size)
        epoch, position = divmod(index, count)
        key = random_key(self.seed, epoch)
        (number,) = permute(np.array([position]), count, key)
        return self.pairs_batch("train", batches(self, "train", batch_size, key)[number])

    def pairs_batch(self, split: str, numbers: np.ndarray) -> Batch:
        """Read the pairs with these indices as a batch. Returns the same as batch()."""
        start, source, target = self.pairs[split][numbers].T
        # with an encoder, the decoder's text starts with the eot that ends the source; without one, it starts with the
        # whole source, whose other tokens are context and are not predicted
        context = np.zeros_like(source) if self.with_encoder else source - 1
        length = context + target
        ids = self.read(split, start + source - 1 - context, int(length.max()) + 1)
        position = np.arange(ids.shape[1] - 1)
        within = (position >= context[:, None]) & (position < length[:, None])
        batch = next_tokens(ids, ignored=~within)
        if self.with_encoder:
            ids = self.read(split, start, int(source.max()))
            ids[np.arange(ids.shape[1]) >= source[:, None]] = -1
            batch["source"] = torch.from_numpy(ids)
        return batch

    def val_batches(self, batch_size: int, eval_iters: int | None) -> Iterator[Batch]:
        """Yield the fixed evaluation set: batches that cover all lengths. eval_iters: number of batches; None: all.

        The standard error of the loss is computed from blocks of batches, so each block covers all lengths as well.
        """
        found = batches(self, "val", batch_size)
        count = min(eval_iters or len(found), len(found))
        for i in sorted(range(count), key=lambda i: i % BLOCKS):
            yield self.pairs_batch("val", found[int((i + 0.5) * len(found) / count)])

    def texts(self, split: str, step: int = 1) -> Iterator[tuple[np.ndarray, str]]:
        """Read every step-th pair. Yields its source as tokens with eot, int64 (S,), and its target as text."""
        for start, source, target in self.pairs[split][::step].tolist():
            (ids,) = self.read(split, np.array([start]), source + target)
            yield ids[:source], self.tokenizer.decode(ids[source:-1])

    def summary(self, batch_size: int, eval_iters: int | None) -> tuple[str, str]:
        """Describe a batch and the evaluation set, for the start of a run."""
        train = self.pairs["train"]
        count = self.batches_per_epoch(batch_size)
        tokens, pairs = train[:, 2].sum() / count, len(train) / count
        val_batches = self.val_batches(batch_size, eval_iters)
        evaluated = sum(len(batch["idx"]) for batch in val_batches)
        batch = f"about {tokens:,.0f} target tokens ({pairs:,.0f} pairs of similar lengths)"
        return batch, f"{evaluated:,} of {len(self.pairs['val']):,} pairs"

    def batches_per_epoch(self, batch_size: int) -> int:
        return len(batches(self, "train", batch_size))

    def all_val_batches(self, batch_size: int) -> int:
        """Count the batches of the whole validation split."""
        return len(batches(self, "val", batch_size))


@lru_cache(3)  # for the training split, unshuffled and shuffled, and the validation split
def batches(dataset: PairDataset, split: str, batch_size: int, key: int | None = None) -> list[np.ndarray]:
    """Sort the pairs by length, and cut them into batches. Returns the indices of the pairs in each batch.

    key: seed for shuffling pairs of equal lengths, which does not change the lengths in a batch; None: do not shuffle.
    """
    pairs = dataset.pairs[split]
    _, source, target = pairs.T
    rank = np.arange(len(pairs))
    if key is not None:
        rank = permute(rank, len(pairs), key)
    if dataset.with_encoder:
        # alternate ascending and descending source length from one target length to the next, so that neighbours
        # always have similar lengths
        source = np.where(target % 2, source, -source)
        order = np.lexsort((rank, source, target))
    else:
        order = np.lexsort((rank, source + target))
    longest = 0
    starts = [0]
    for number, length in enumerate(dataset.lengths(pairs[order]).tolist()):
        longest = max(longest, length)
        if (number + 1 - starts[-1]) * longest > batch_size * dataset.block_size:
            starts.append(number)
            longest = length
    return np.split(order, starts[1:])
