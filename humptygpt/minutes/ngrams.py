"""Targets that are partly what n-grams predict: what has followed the same few tokens elsewhere in the text.

A model that reads a text many times learns each place by heart. The tokens that follow the same context at all other
places say what else could have been written there.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from humptygpt.cli import UserError
from humptygpt.data import TokenDataset

LONGEST = 5  # tokens of context
MOST_TOKENS = 20_000_000  # counting n-grams takes some 270 bytes for each token of the text


class Counts(NamedTuple):
    """How often each token follows each context of one length. A gram is a context and the token that follows it."""

    # the number of each context's first gram, and at the end the number of all grams
    first: np.ndarray
    token: np.ndarray  # the token of each gram
    kept: np.ndarray  # the discounted count of each gram
    # for each position of the text, (N,)
    context: np.ndarray
    gram: np.ndarray
    own: np.ndarray  # the discounted count of its gram without this position
    total: np.ndarray  # the sum of the counts of its context without this position


class NGrams:
    """Predicts each token of a text from the tokens before it, by the counts at all other positions.

    Only the frequencies of single tokens and the discounts include the position itself.
    Every count is discounted. The probability that this leaves over goes to the prediction from a context that is one
    token shorter. A shorter context's count of a token is the number of different tokens seen before the two.
    Source: modified Kneser-Ney smoothing, Chen and Goodman 1999, doi:10.1006/csla.1999.0128.
    """

    def __init__(self, ids: np.ndarray, vocab_size: int):
        """ids: the text, (N,)."""
        self.vocab_size = vocab_size
        found, context = [], np.zeros(len(ids), dtype=np.int64)
        for _ in range(LONGEST + 1):
            pairs = context * vocab_size + ids
            grams, place, gram = np.unique(pairs, return_index=True, return_inverse=True)
            found.append((context, grams, place, gram))
            # the tokens of a gram are the context of the next token
            context = np.roll(gram, 1)
            context[0] = len(grams)  # the first token has no token before it
        self.counts = []  # for each length of context, the longest first
        # lost: by how much the count of a position's gram falls if the position is left out. The count of a shorter
        # gram is one of different longer grams, so it falls only if the longer gram occurs nowhere else
        counted, lost = slice(None), 1
        for context, grams, place, gram in reversed(found):
            count = np.bincount(gram[counted])
            discounts = find_discounts(count)
            first = np.searchsorted(grams // vocab_size, np.arange(context.max() + 2))
            # a context without any gram, which the end of the text can be, is never looked up
            total = np.add.reduceat(count, first[:-1])
            own = count[gram] - lost
            self.counts.append(
                Counts(
                    first=first,
                    token=(grams % vocab_size).astype(np.int32),
                    kept=(count - discounts[np.minimum(count, 3)]).astype(np.float32),
                    context=context.astype(np.int32),
                    gram=gram.astype(np.int32),
                    own=(own - discounts[np.minimum(own, 3)]).astype(np.float32),
                    total=np.maximum(total[context] - lost, 1).astype(np.float32),
                )
            )
            counted, lost = place, (np.bincount(gram) == 1)[gram]
        unigrams = self.counts.pop()  # from these, no position is left out
        share = unigrams.kept / count.sum()
        self.frequency = np.full(vocab_size, (1 - share.sum()) / vocab_size, np.float32)
        self.frequency[unigrams.token] += share

    def predict(self, positions: np.ndarray) -> np.ndarray:
        """Predict the tokens at these positions, (n,). Returns probabilities, float32 (n, vocab_size)."""
        rows = np.arange(len(positions))
        predicted = np.zeros((len(rows), self.vocab_size), dtype=np.float32)
        flat = predicted.reshape(-1)
        left = np.ones(len(rows), dtype=np.float32)  # probability for shorter contexts
        for counts in self.counts:
            context, total = counts.context[positions], counts.total[positions]
            first = counts.first[context]
            sizes = counts.first[context + 1] - first
            start = sizes.cumsum() - sizes
            # all grams of the first position's context, then those of the second's, and so on
            grams = np.arange(sizes.sum()) + np.repeat(first - start, sizes)
            kept = counts.kept[grams]
            kept[start + counts.gram[positions] - first] = counts.own[positions]
            flat[np.repeat(rows * self.vocab_size, sizes) + counts.token[grams]] += (
                np.repeat(left / total, sizes) * kept
            )
            left *= 1 - np.add.reduceat(kept, start) / total
        return predicted + left[:, None] * self.frequency


def find_discounts(count: np.ndarray) -> np.ndarray:
    """Compute the discounts of counts of 0, 1, 2, and 3 or more, from how many counts are 1, 2, 3 and 4."""
    n = np.bincount(count, minlength=5)
    ratio = n[1] / max(1, n[1] + 2 * n[2])
    c = np.arange(4)
    return (c - (c + 1) * ratio * n[1:5] / np.maximum(n[:4], 1)).clip(0, c)


class SoftTargets:
    """The training batches of a text, with targets that are distributions, (B, T, V).

    share: part of each target that n-grams predict; the rest is the token that follows. Raises UserError if the dataset
    is not text, or too long.
    """

    def __init__(self, dataset: TokenDataset, share: float, vocab_size: int):
        if dataset.task != "language modelling" or len(dataset.train) > MOST_TOKENS:
            raise UserError(
                f"ngram_targets={share:g} works only for texts of up to {MOST_TOKENS:,} tokens,"
                f" but {dataset.folder} has {len(dataset.train):,} tokens for {dataset.task}"
            )
        self.dataset = dataset
        self.share = share
        ids = np.concatenate([ids for _, ids in dataset.chunks("train")])
        self.ngrams = NGrams(ids, vocab_size)

    def batch(self, index: int, batch_size: int) -> dict[str, Tensor]:
        """Make training batch number `index`."""
        starts = self.dataset.train_starts(index, batch_size)
        batch = self.dataset.blocks("train", starts)
        positions = starts[:, None] + np.arange(1, self.dataset.block_size + 1)
        targets = torch.from_numpy(self.ngrams.predict(positions.ravel()))
        targets *= self.share
        targets[torch.arange(len(targets)), batch["targets"].flatten()] += 1 - self.share
        return batch | {"targets": targets.unflatten(0, positions.shape)}
