"""Embeddings of frequent n-grams, added to those of single tokens: an option beside the GPT."""

import hashlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from humptygpt.nn.layers import drop


class NgramTable(nn.EmbeddingBag):
    """One row per frequent n-gram. Its gradients are sparse, so that rows that a batch does not touch cost nothing."""

    optimizer_group = "sparse"


class NgramEmbedding(nn.Module):
    """An embedding of the last 2 tokens together, of the last 3, ..., of the last n, where these n-grams are frequent.

    Their sum is added to the last token's own embedding. What follows an n-gram is most of what a small model learns at
    first, and a lookup costs nothing beside a matrix product. Source: Pagnoni et al. 2024, arXiv:2412.09871, section
    3.2.1, where all n-grams share rows by a hash; with frequent ones alone: Yu et al. 2025, arXiv:2502.01637.

    torch.compile traces it in one graph, but not its sparse backward pass where shapes are dynamic, as with sentence
    pairs: there the graph breaks, and the results are the same.
    """

    def __init__(self, n: int, rows: int, n_embd: int, dropout: float):
        super().__init__()
        self.n, self.dropout = n, dropout
        self.constants = hash_constants(n)  # made here, since torch.compile cannot trace hashlib
        self.register_buffer(
            "keys", torch.arange(rows)
        )  # of the frequent n-grams, sorted: see ngram_keys
        self.table = NgramTable(rows + 1, n_embd, mode="sum", sparse=True, padding_idx=rows)

    def forward(self, idx: Tensor, before: Tensor) -> Tensor:
        """idx: (B, T) token ids; before: (B, any length), those that come before; -1: no token. Returns (B, T, C).

        In training each position gets nothing with probability dropout, so that the model also learns to do without.
        """
        T = idx.shape[1]
        text = torch.cat([before, idx], dim=1)
        keys = torch.stack(
            [key[:, -T:] for key in ngram_keys(text, self.constants)], dim=-1
        )  # (B, T, n - 1)
        rows = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        rows = rows.where(
            self.keys[rows] == keys, len(self.keys)
        )  # the last row is left out of the sum
        x = self.table(rows.flatten(0, 1)).unflatten(0, idx.shape)
        if self.training and self.dropout:
            x = x * drop(torch.ones_like(x[..., :1]), self.dropout)
        return x


def ngram_keys(text: Tensor, constants: list[tuple[int, int]]) -> Iterator[Tensor]:
    """A hash of the 2-gram that ends at each position of the text, (B, T) ids, then of the 3-gram, ..., of the n-gram.

    constants: as from hash_constants(n). Two n-grams hardly ever have the same hash. Before the text, and where an id
    is -1, there is no token. The hash is multiply-shift, whose products overflow 64 bits on purpose: Thorup 2015,
    arXiv:1504.06804, section 3.
    """
    (B, T), n = text.shape, len(constants)
    text = F.pad(text + 1, (n - 1, 0))  # 0: no token
    key = torch.zeros(B, T, dtype=torch.int64, device=text.device)
    for back, (factor, offset) in enumerate(constants):
        key = key + text[:, n - 1 - back : n - 1 - back + T] * factor
        if back:
            yield key + offset


def hash_constants(n: int) -> list[tuple[int, int]]:
    """Of the 1-gram, the 2-gram, ..., the n-gram: (factor of its first token, offset that tells lengths apart)."""
    return [(random_int64(f"token {back}"), random_int64(f"length {back}")) for back in range(n)]


def random_int64(name: str) -> int:
    """A number that depends on the name alone, the same on every machine."""
    return int.from_bytes(
        hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True
    )


def frequent_ngrams(text: Tensor, n: int, min_count: int) -> Tensor:
    """Keys of the 2- to n-grams that occur min_count times in text, (T,) ids. Returns int64 (any number,), sorted."""
    found = (key[0].unique(return_counts=True) for key in ngram_keys(text[None], hash_constants(n)))
    return torch.cat([keys[counts >= min_count] for keys, counts in found]).sort().values
