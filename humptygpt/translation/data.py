"""Token files of sentence pairs -> batches of pairs of similar lengths."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from humptygpt.config import UserError
from humptygpt.data import Dataset, next_tokens, permute, random_key
from humptygpt.token_files import how_to


class PairDataset(Dataset):
    """Sentence pairs, a stream of `source eot target eot ...`. A batch has pairs of similar lengths, as many as fit.

    with_encoder: source and target apart, for a model whose encoder reads the source; else each pair is one text for a
    decoder alone, and only the target's tokens are predicted. A batch takes at most batch_size * block_size tokens,
    padding included; with_encoder, counted on the side that takes more.
    Raises UserError where a pair is longer than block_size.
    """

    task = "translation"

    def set_up(self) -> None:
        self.pairs = {split: self.find_pairs(split) for split in self.splits}
        longest = max(int(self.lengths(pairs).max()) for pairs in self.pairs.values())
        if longest > self.block_size:
            raise UserError(
                f"{self.folder} has a pair that takes {longest} tokens, more than block_size={self.block_size};"
                f" take --block_size={longest}"
            )
        self.starts = {}  # {(split, batch_size): what batch_starts gives}
        self.epoch = (-1, None)  # (number, order of its pairs) of the newest

    def find_pairs(self, split: str) -> np.ndarray:
        """Return (pairs, 3): where each starts, the tokens of its source and those of its target, eot included."""
        eots = [
            start + np.flatnonzero(ids == self.tokenizer.eot)
            for start, ids in self.chunks(split)
        ]
        ends = np.concatenate([[-1], *eots])
        if len(ends) < 3 or len(ends) % 2 == 0 or ends[-1] != len(self.splits[split]) - 1:
            raise UserError(
                f"{self.folder / split}.bin has no whole pairs; {how_to(self.folder)}"
            )
        lengths = np.diff(ends)
        return np.stack([ends[:-1:2] + 1, lengths[::2], lengths[1::2]], axis=1)

    def lengths(self, pairs: np.ndarray) -> np.ndarray:
        """Return how many tokens of block_size each pair takes."""
        _, source, target = pairs.T
        return np.maximum(source, target) if self.with_encoder else source + target - 1

    def order(self, split: str, *tie_breaker: np.ndarray) -> np.ndarray:
        """Return the numbers of the pairs from short to long, equally long ones by tie_breaker."""
        _, source, target = self.pairs[split].T
        if not self.with_encoder:
            return np.lexsort((*tie_breaker, source + target))
        # sources get longer for one length of target and shorter for the next, so that neighbours are always alike
        return np.lexsort((*tie_breaker, np.where(target % 2, source, -source), target))

    def batch_starts(self, split: str, batch_size: int) -> np.ndarray:
        """Return where batches start among the pairs in order of length, and the end of the last, for all epochs."""
        if (split, batch_size) not in self.starts:
            pairs = self.pairs[split]
            lengths = self.lengths(pairs[self.order(split)])
            longest = 0
            starts = [0]
            for number, length in enumerate(lengths.tolist()):
                longest = max(longest, length)
                if (number + 1 - starts[-1]) * longest > batch_size * self.block_size:
                    starts.append(number)
                    longest = length
            self.starts[split, batch_size] = np.array([*starts, len(pairs)])
        return self.starts[split, batch_size]

    def batch(self, index: int, batch_size: int) -> dict[str, Tensor]:
        """Return training batch number index: source (B, S), padded with -1; idx and targets, (B, T); all int64.

        Without an encoder there is no source: idx starts with it.
        An epoch has each pair once. Those of equal lengths are shuffled before they are cut into batches, and then the
        batches are.
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
        """Return a batch of the pairs with these numbers."""
        start, source, target = self.pairs[split][numbers].T
        # with an encoder, the decoder's text starts with the eot that ends the source; else it has the whole source,
        # whose tokens are context and no targets
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
        """Yield the evaluation set, always the same: eval_iters batches over all lengths; None: the whole split."""
        for numbers in self.val_pairs(batch_size, eval_iters):
            yield self.pairs_batch("val", numbers)

    def val_pairs(self, batch_size: int, eval_iters: int | None) -> list[np.ndarray]:
        """Return the numbers of the pairs in each batch of the evaluation set."""
        batches = np.split(self.order("val"), self.batch_starts("val", batch_size)[1:-1])
        count = min(eval_iters or len(batches), len(batches))
        return [batches[int((i + 0.5) * len(batches) / count)] for i in range(count)]

    def texts(self, split: str, count: int | None = None) -> list[tuple[np.ndarray, str]]:
        """Return (source with its eot, int64 (S,), the target as text) of count pairs, evenly spaced; None: of all."""
        pairs = self.pairs[split]
        if count is not None:
            pairs = pairs[
                np.linspace(0, len(pairs) - 1, min(count, len(pairs))).astype(int)
            ]
        texts = []
        for start, source, target in pairs.tolist():
            ids = self.read(split, np.array([start]), source + target)[0]
            texts.append((ids[:source], self.tokenizer.decode(ids[source:-1])))
        return texts

    def summary(self, batch_size: int, eval_iters: int | None) -> tuple[str, str]:
        """Return (a batch, the evaluation set) in words."""
        train = self.pairs["train"]
        batches = self.batches_per_epoch(batch_size)
        tokens = train[:, 2].sum() / batches
        pairs = len(train) / batches
        evaluated = sum(map(len, self.val_pairs(batch_size, eval_iters)))
        batch = f"about {tokens:,.0f} target tokens ({pairs:,.0f} pairs of similar lengths)"
        return batch, f"{evaluated:,} of {len(self.pairs['val']):,} pairs"

    def batches_per_epoch(self, batch_size: int) -> float:
        return len(self.batch_starts("train", batch_size)) - 1

    def all_val_batches(self, batch_size: int) -> int:
        """Return how many batches the whole validation split is."""
        return len(self.batch_starts("val", batch_size)) - 1

    def val_bytes_per_token(self) -> float:
        """Return the UTF-8 bytes of target per target token of the validation split."""
        entry = self.meta["splits"]["val"]
        return entry["target_bytes"] / entry["target_tokens"]
