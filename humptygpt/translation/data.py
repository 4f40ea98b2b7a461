"""Token files of sentence pairs -> batches of pairs of similar length."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from humptygpt.config import UserError
from humptygpt.data import Dataset, next_tokens, permute, random_key
from humptygpt.token_files import how_to


class PairDataset(Dataset):
    """Sentence pairs, stored as `source eot target eot ...`. Each batch holds as many pairs of similar length as fit.

    with_encoder: an encoder reads the source, and a decoder the target. Otherwise each pair is one text for a decoder,
    and only the tokens of the target are predicted. A batch has at most batch_size * block_size tokens, including
    padding; with an encoder, this limit applies to each side. Raises UserError if a pair is longer than block_size.
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
        self.starts = {}  # {(split, batch_size): the result of batch_starts()}
        self.epoch = (-1, None)  # the latest epoch: its number and the order of its pairs

    def find_pairs(self, split: str) -> np.ndarray:
        """Find the start of each pair and the lengths of its source and target in tokens, with eot: (pairs, 3)."""
        eots = [
            start + np.flatnonzero(ids == self.tokenizer.eot)
            for start, ids in self.chunks(split)
        ]
        ends = np.concatenate([[-1], *eots])
        if len(ends) < 3 or len(ends) % 2 == 0 or ends[-1] != len(self.splits[split]) - 1:
            raise UserError(
                f"{self.folder / split}.bin does not consist of complete pairs; {how_to(self.folder)}"
            )
        lengths = np.diff(ends)
        return np.stack([ends[:-1:2] + 1, lengths[::2], lengths[1::2]], axis=1)

    def lengths(self, pairs: np.ndarray) -> np.ndarray:
        """Number of tokens of each pair that count towards block_size."""
        _, source, target = pairs.T
        return np.maximum(source, target) if self.with_encoder else source + target - 1

    def order(self, split: str, *tie_breaker: np.ndarray) -> np.ndarray:
        """Return the indices of the pairs, sorted from short to long, and by tie_breaker for equal lengths."""
        _, source, target = self.pairs[split].T
        if not self.with_encoder:
            return np.lexsort((*tie_breaker, source + target))
        # from one target length to the next, sources are sorted by increasing and decreasing length in turn, so that
        # neighbours always have similar lengths
        return np.lexsort((*tie_breaker, np.where(target % 2, source, -source), target))

    def batch_starts(self, split: str, batch_size: int) -> np.ndarray:
        """Cut the pairs, sorted by length, into batches. Returns the start of each batch, and the end of the last.

        The cuts are the same in all epochs.
        """
        if (split, batch_size) not in self.starts:
            lengths = self.lengths(self.pairs[split][self.order(split)])
            longest = 0
            starts = [0]
            for number, length in enumerate(lengths.tolist()):
                longest = max(longest, length)
                if (number + 1 - starts[-1]) * longest > batch_size * self.block_size:
                    starts.append(number)
                    longest = length
            self.starts[split, batch_size] = np.array([*starts, len(lengths)])
        return self.starts[split, batch_size]

    def batch(self, index: int, batch_size: int) -> dict[str, Tensor]:
        """Read training batch `index`: source (B, S), padded with -1; idx and targets, (B, T); all int64.

        Without an encoder, idx starts with the source instead. An epoch contains each pair once: pairs of equal lengths
        are shuffled, then the pairs are cut into batches, and the batches are shuffled.
        """
        starts = self.batch_starts("train", batch_size)
        epoch, position = divmod(index, len(starts) - 1)
        key = random_key(self.seed, epoch)
        if self.epoch[0] != epoch:
            pairs = len(self.pairs["train"])
            self.epoch = epoch, self.order("train", permute(np.arange(pairs), pairs, key))
        number = int(permute(np.array([position]), len(starts) - 1, key)[0])
        return self.pairs_batch("train", self.epoch[1][starts[number] : starts[number + 1]])

    def pairs_batch(self, split: str, numbers: np.ndarray) -> dict[str, Tensor]:
        """Read the pairs with these indices as a batch."""
        start, source, target = self.pairs[split][numbers].T
        # with an encoder, the decoder's text starts with the eot that ends the source; without one, it starts with the
        # whole source, whose other tokens are context and are not predicted
        context = np.zeros_like(source) if self.with_encoder else source - 1
        length = context + target
        ids = self.read(split, start + source - 1 - context, int(length.max()) + 1)
        position = np.arange(ids.shape[1] - 1)
        padding = position >= length[:, None]
        batch = next_tokens(ids, ignored=padding | (position < context[:, None]))
        batch["idx"][padding] = self.tokenizer.eot
        if self.with_encoder:
            ids = self.read(split, start, int(source.max()))
            ids[np.arange(ids.shape[1]) >= source[:, None]] = -1
            batch["source"] = torch.from_numpy(ids)
        return batch

    def val_batches(
        self, batch_size: int, eval_iters: int | None
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the fixed evaluation set: eval_iters batches that cover all lengths; None: the whole split."""
        for numbers in self.val_pairs(batch_size, eval_iters):
            yield self.pairs_batch("val", numbers)

    def val_pairs(self, batch_size: int, eval_iters: int | None) -> list[np.ndarray]:
        """List the indices of the pairs in each batch of the evaluation set."""
        batches = np.split(self.order("val"), self.batch_starts("val", batch_size)[1:-1])
        count = min(eval_iters or len(batches), len(batches))
        return [batches[int((i + 0.5) * len(batches) / count)] for i in range(count)]

    def texts(self, split: str, count: int | None = None) -> list[tuple[np.ndarray, str]]:
        """Read `count` evenly spaced pairs, or all: each source with its eot, int64 (S,), and its target as text."""
        pairs = self.pairs[split]
        count = min(count or len(pairs), len(pairs))
        numbers = np.linspace(0, len(pairs) - 1, count).astype(int)
        texts = []
        for start, source, target in pairs[numbers].tolist():
            ids = self.read(split, np.array([start]), source + target)[0]
            texts.append((ids[:source], self.tokenizer.decode(ids[source:-1])))
        return texts

    def summary(self, batch_size: int, eval_iters: int | None) -> tuple[str, str]:
        """Describe a batch and the evaluation set."""
        train = self.pairs["train"]
        batches = self.batches_per_epoch(batch_size)
        tokens, pairs = train[:, 2].sum() / batches, len(train) / batches
        evaluated = sum(map(len, self.val_pairs(batch_size, eval_iters)))
        batch = f"about {tokens:,.0f} target tokens ({pairs:,.0f} pairs of similar lengths)"
        return batch, f"{evaluated:,} of {len(self.pairs['val']):,} pairs"

    def batches_per_epoch(self, batch_size: int) -> float:
        return len(self.batch_starts("train", batch_size)) - 1

    def all_val_batches(self, batch_size: int) -> int:
        """Count the batches of the whole validation split."""
        return len(self.batch_starts("val", batch_size)) - 1

    def val_bytes_per_token(self) -> float:
        """Average number of UTF-8 bytes per target token of the validation split."""
        entry = self.meta["splits"]["val"]
        return entry["target_bytes"] / entry["target_tokens"]
