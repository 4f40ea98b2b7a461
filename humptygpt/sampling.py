"""Continue a text with a model: compute logits, convert them to probabilities, draw a token, and repeat.

Shapes: B texts, T tokens, V vocabulary.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from humptygpt.config import UserError
from humptygpt.device import free_memory
from humptygpt.machine import check_fits

AT_ONCE = 128  # texts to continue in one batch

# --------------------------------------------------------------------------------------
# Logits -> probabilities -> token


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Penalize tokens that were seen: divide their positive logits by the penalty, and multiply negative ones by it.

    logits: (B, V); seen: (B, V), bool. Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1, as implemented by
    Hugging Face.
    """
    return torch.where(
        seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits
    )


def keep_top_p(probs: Tensor, p: float) -> Tensor:
    """Keep the most probable tokens that together have probability p and set all others to 0; probs: (B, V).

    Tokens as probable as the last one kept are also kept. The result is not rescaled. Source: Holtzman et al. 2019,
    arXiv:1904.09751, section 3.1 (nucleus sampling).
    """
    ranked = probs.sort(dim=-1, descending=True).values
    before = ranked.cumsum(dim=-1) - ranked  # sum of all more probable tokens
    least = ranked.masked_fill(before >= p, torch.inf).amin(dim=-1, keepdim=True)
    return probs.masked_fill(probs < least, 0.0)


def keep_min_p(probs: Tensor, p: float) -> Tensor:
    """Set tokens less probable than p times the most probable one to 0; probs: (B, V). The result is not rescaled.

    Source: Nguyen et al. 2024, arXiv:2407.01082.
    """
    return probs.masked_fill(probs < p * probs.amax(dim=-1, keepdim=True), 0.0)


def probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Return the probabilities (B, V) of the next token; logits: (B, V)."""
    probs = (logits / max(temperature, 1e-30)).softmax(dim=-1)  # 1e-30 does not overflow
    if top_p is not None and top_p < 1:
        probs = keep_top_p(probs, top_p)
    if min_p is not None:
        probs = keep_min_p(probs, min_p)
    return probs / probs.sum(dim=-1, keepdim=True) if top_p or min_p else probs


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw tokens, (B, 1), from these probabilities, (B, V), with uniform random numbers in [0, 1), (B, 1).

    The token is the first, in order of ids, at which the cumulative probability exceeds the number. So a text needs one
    number per token, however large the vocabulary is, and rounding hardly ever changes a token. If a probability is
    nan, the token is V.
    """
    cumulative = probs.cumsum(dim=-1, dtype=uniform.dtype)
    total = cumulative.narrow(-1, -1, 1)
    return torch.searchsorted(cumulative, uniform * total, right=True)


def sample_tokens(
    logits: Tensor, uniform: Tensor, top_k: int | None = None, **filters
) -> Tensor:
    """Draw tokens, (B, 1), from only the top_k most probable; filters: keyword arguments of probabilities()."""
    vocab_size = logits.shape[-1]
    if top_k is None or top_k >= vocab_size:
        return draw(probabilities(logits, **filters), uniform)
    ids = logits.topk(top_k).indices.sort(dim=-1).values
    choice = draw(probabilities(logits.gather(1, ids), **filters), uniform)
    return F.pad(ids, (0, 1), value=vocab_size).gather(1, choice)


def greedy_tokens(logits: Tensor) -> Tensor:
    """Return the most probable tokens, (B, 1); V if a logit is not finite."""
    largest = logits.max(dim=-1, keepdim=True)
    return largest.indices.where(largest.values.isfinite(), logits.shape[-1])


def uniform_numbers(
    seed: int, samples: Collection[int], n: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return random numbers in [0, 1), (n, B, 1).

    The i-th number of a sample depends only on seed, the sample's number and i, so a text does not depend on the others
    in its batch. The generator is numpy's Philox, which encrypts a counter with the key (seed, sample).
    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    keys = [[seed, sample] for sample in samples]
    streams = [np.random.Generator(np.random.Philox(key=key)).random(n) for key in keys]
    numbers = torch.from_numpy(np.stack(streams, axis=1)[..., None]).to(dtype)
    # below 1 even after rounding, so that draw() finds a token with nonzero probability
    return numbers.clamp(max=1 - torch.finfo(dtype).eps)


# --------------------------------------------------------------------------------------
# Token by token


class Context:
    """A batch of texts that a model continues: the tokens that it can still see, and its cache for them.

    The model sees block_size tokens. When a text grows longer, the newest half of a block is recomputed once, and the
    text continues from there. With exact=True, the newest block_size tokens are recomputed for every new token. Each
    text in a batch restarts when its own tokens fill the context, so it continues as it would by itself.
    """

    def __init__(
        self, model: nn.Module, idx: Tensor, size: int | None = None, *, exact: bool = False
    ):
        """idx: (B, T) token ids, T >= 1, with -1 before the first token of a shorter text. size: maximum length of
        a text; None: unlimited.
        """
        self.model = model
        self.block_size = model.config.block_size
        self.tokens = idx  # (B, T)
        self.padding = (idx < 0).sum(dim=1).tolist()  # columns before each text
        self.cache = model.make_cache(size=size) if model.has_cache else None
        if self.cache and not exact:
            self.kept = max(1, self.block_size // 2)
        else:
            self.kept = self.block_size
        self.restart(self.block_size)

    def append(self, tokens: Tensor) -> None:
        """Add the next tokens of each text, (B, T)."""
        self.tokens = torch.cat([self.tokens, tokens], dim=1)

    def next_logits(self) -> Tensor:
        """Return the logits (B, V) of the next token of each text."""
        if self.tokens.shape[1] > self.block_size:
            self.restart(self.kept)
        if self.cache:
            new = self.tokens[:, self.cache.length :]
            if self.cache.padding is not None:
                new = new.clamp(min=0)  # no token attends to the padding
            return self.model.next_logits(new, self.cache)
        if not any(self.padding):
            return self.model.next_logits(self.tokens)
        texts = zip(self.tokens.split(1), self.padding, strict=True)
        return torch.cat([self.model.next_logits(text[:, first:]) for text, first in texts])

    def restart(self, kept: int) -> None:
        """Keep the `kept` newest tokens of each text that has more than block_size, and empty the cache."""
        T = self.tokens.shape[1]
        padding = [
            T - kept if T - first > self.block_size else first for first in self.padding
        ]
        dropped = min(padding)
        self.padding = [first - dropped for first in padding]
        tokens = self.tokens = self.tokens[:, dropped:].clone()
        for text, first in zip(tokens, self.padding, strict=True):
            text[:first] = -1
        if self.cache:
            self.cache.clear()
            if any(self.padding):
                self.cache.padding = torch.tensor(self.padding, device=tokens.device)

    def select(self, rows: list[int]) -> Tensor:
        """Keep only these texts. Returns their rows, int64, on the device."""
        index = torch.tensor(rows, device=self.tokens.device)
        self.tokens = self.tokens[index]
        self.padding = [self.padding[row] for row in rows]
        if self.cache:
            self.cache.select(index)
        return index


class Sampler:
    """Chooses the next token of each of B texts."""

    def __init__(
        self,
        idx: Tensor,
        vocab_size: int,
        samples: Collection[int],
        max_new_tokens: int,
        *,
        repetition_penalty: float = 1.0,
        seed: int = 1337,
        **filters,
    ):
        """idx: (B, T), the texts so far, padded with -1. samples: a number for each text, which determines its random
        numbers. filters: keyword arguments of sample_tokens(); temperature=0 is greedy.
        """
        self.filters = filters
        self.uniforms = None
        if filters.get("temperature") != 0:
            dtype = torch.float32 if idx.is_mps else torch.float64  # Apple lacks float64
            numbers = uniform_numbers(seed, samples, max_new_tokens, dtype)
            self.uniforms = numbers.to(idx.device)
        self.penalty = repetition_penalty
        self.seen = None
        if repetition_penalty != 1:
            # (B, V + 1): the tokens in each text; the last column is for padding
            self.seen = idx.new_zeros(len(idx), vocab_size + 1, dtype=torch.bool)
            self.seen.scatter_(1, idx.where(idx >= 0, vocab_size), True)
        self.step = 0

    def next_tokens(self, logits: Tensor) -> Tensor:
        """logits: (B, V). Returns (B, 1) token ids; V if the logits are not finite."""
        if self.seen is not None:
            logits = penalize_repetition(logits, self.seen[:, :-1], self.penalty)
        if self.uniforms is None:
            tokens = greedy_tokens(logits)
        else:
            tokens = sample_tokens(logits, self.uniforms[self.step], **self.filters)
        self.step += 1
        if self.seen is not None:
            self.seen.scatter_(1, tokens, True)
        return tokens

    def select(self, rows: Tensor) -> None:
        """Keep only these texts; rows: int64, on the device."""
        if self.uniforms is not None:
            self.uniforms = self.uniforms[:, rows]
        if self.seen is not None:
            self.seen = self.seen[rows]


class Step(NamedTuple):
    """One new token for each text that has not ended."""

    rows: list[int]  # the numbers of these texts in the batch
    ids: list[int]  # their new tokens
    logits: Tensor  # (len(rows), V), float32, as the model returned them


@torch.inference_mode()
def continue_texts(
    context: Context,
    max_new_tokens: int,
    tokenizer_vocab_size: int | None = None,
    *,
    samples: Collection[int] | None = None,
    eot: int | None = None,
    stopped: Collection[int] = (),
    **sampling,
) -> Iterator[Step]:
    """Sample token by token. A text ends after eot, or when the caller adds its row to `stopped`.

    tokenizer_vocab_size: ids from this number on pad the model's vocabulary and are never sampled. samples, sampling:
    arguments for Sampler; samples defaults to the row numbers. Raises UserError if the logits are not finite.
    """
    vocab_size = tokenizer_vocab_size or context.model.config.vocab_size
    rows = list(range(len(context.tokens)))
    sampler = Sampler(
        context.tokens, vocab_size, samples or rows, max_new_tokens, **sampling
    )
    for _ in range(max_new_tokens):
        logits = context.next_logits().float()[:, :vocab_size]
        tokens = sampler.next_tokens(logits)
        context.append(tokens)
        ids = [token for (token,) in tokens.tolist()]
        if max(ids) >= vocab_size:
            raise UserError("the model's logits are not finite: did training diverge?")
        yield Step(rows, ids, logits)
        going = [i for i, row in enumerate(rows) if ids[i] != eot and row not in stopped]
        if not going:
            return
        if len(going) < len(rows):
            rows = [rows[i] for i in going]
            sampler.select(context.select(going))


def generate(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    tokenizer_vocab_size: int | None = None,
    *,
    exact: bool = False,
    **options,
) -> Iterator[Tensor]:
    """Continue idx by max_new_tokens. Yields each new token as (B,), -1 for a text that has ended.

    idx, exact: as for Context. options: keyword arguments of continue_texts().
    """
    context = Context(model, idx, idx.shape[1] + max_new_tokens, exact=exact)
    for step in continue_texts(context, max_new_tokens, tokenizer_vocab_size, **options):
        ids = dict(zip(step.rows, step.ids, strict=True))
        yield idx.new_tensor([ids.get(row, -1) for row in range(len(idx))])


def texts_at_once(model: nn.Module, device: torch.device, size: int) -> int:
    """Choose how many texts of `size` tokens to continue in one batch: AT_ONCE, or fewer if memory is short.

    Raises UserError if not even one fits.
    """
    needed = bytes_per_text(model, size)
    free = int(0.9 * free_memory(device))
    advice = "try a smaller --max_new_tokens"
    check_fits(f"a text of {size:,} tokens takes", needed, free, advice)
    return min(AT_ONCE, free // needed)


def bytes_per_text(model: nn.Module, size: int) -> int:
    """Estimate the memory of one text of `size` tokens: keys, values, logits, tokens, random numbers."""
    config = model.config
    kept = min(size, config.block_size) if model.has_cache else 0
    cache = 2 * config.n_layer * config.kv_heads * config.features * kept
    return 4 * (cache + 8 * config.vocab_size) + 16 * size
