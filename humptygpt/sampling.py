"""A model and a prompt -> new tokens: logits -> probabilities -> token -> characters, again and again.

Shapes: B texts, T tokens, V vocabulary.
"""

import codecs
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from humptygpt.config import UserError
from humptygpt.tokenizers import Tokenizer

# --------------------------------------------------------------------------------------
# Logits -> probabilities -> token


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide the logits of tokens seen by the penalty where positive, else multiply. Both (B, V); seen: bool.

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1, in the form that Hugging Face gave it.
    """
    return torch.where(
        seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits
    )


def keep_top_p(probs: Tensor, p: float) -> Tensor:
    """Set all to 0 but the most probable tokens that together have probability p; probs: (B, V).

    Tokens as probable as the last that stays, stay. The rest is not rescaled. Source: Holtzman et al. 2019,
    arXiv:1904.09751, section 3.1 (nucleus sampling).
    """
    ranked = probs.sort(dim=-1, descending=True).values
    before = ranked.cumsum(dim=-1) - ranked  # of all more probable tokens; 0 for the first
    least = ranked.masked_fill(before >= p, torch.inf).amin(dim=-1, keepdim=True)
    return probs.masked_fill(probs < least, 0.0)


def keep_min_p(probs: Tensor, p: float) -> Tensor:
    """Set to 0 what is less probable than p times the most probable token; probs: (B, V). It is not rescaled.

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
    """Draw tokens (B, 1) with these probabilities, (B, V), by numbers from [0, 1), (B, 1).

    The token is where the sum of the probabilities, in the order of ids, first exceeds the number: one number for each
    text, whatever the vocabulary, and rounding hardly ever changes a token. It is V where a probability is nan.
    """
    cumulative = probs.cumsum(dim=-1, dtype=uniform.dtype)
    total = cumulative.narrow(-1, -1, 1)
    return torch.searchsorted(cumulative, uniform * total, right=True)


def sample_tokens(
    logits: Tensor, uniform: Tensor, top_k: int | None = None, **filters
) -> Tensor:
    """Draw tokens (B, 1), of the top_k most probable alone; filters: of probabilities()."""
    vocab_size = logits.shape[-1]
    if top_k is None or top_k >= vocab_size:
        return draw(probabilities(logits, **filters), uniform)
    ids = logits.topk(top_k).indices.sort(dim=-1).values
    choice = draw(probabilities(logits.gather(1, ids), **filters), uniform)
    return F.pad(ids, (0, 1), value=vocab_size).gather(1, choice)


def greedy_tokens(logits: Tensor) -> Tensor:
    """Return the most probable tokens, (B, 1); V where a logit is not finite."""
    largest = logits.max(dim=-1, keepdim=True)
    return largest.indices.where(largest.values.isfinite(), logits.shape[-1])


def uniform_numbers(
    seed: int, samples: list[int], n: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return (n, B, 1) random numbers in [0, 1): the i-th of a sample depends on seed, its number and i alone.

    So a text comes out the same whatever texts are sampled beside it. By numpy's Philox, a generator that encrypts a
    counter; the key is seed and sample. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    keys = [[seed, sample] for sample in samples]
    streams = [np.random.Generator(np.random.Philox(key=key)).random(n) for key in keys]
    numbers = torch.from_numpy(np.stack(streams, axis=1)[..., None]).to(dtype)
    # so that in draw() the product with a sum stays below the sum, rounding included
    return numbers.clamp(max=1 - torch.finfo(dtype).eps)


# --------------------------------------------------------------------------------------
# Token after token


class Context:
    """The tokens of texts that a model continues together, as far as it can still see them, and its cache.

    When the context of block_size tokens is full: exact recomputes the newest block_size tokens for every new one;
    otherwise the newest half is recomputed once and continued from there. Each text of a batch does so when its own
    tokens fill the context, so that it is continued as it would be alone.
    """

    def __init__(
        self,
        model: nn.Module,
        idx: Tensor,
        size: int | None = None,
        *,
        exact: bool = False,
        cached: bool = True,
    ):
        """idx: (B, T) token ids, T >= 1; -1 before the first token of the shorter texts. size: the most tokens that a
        text will have; None: any number. cached=False computes the same without a cache, as a model that
        has none always does.
        """
        self.model = model
        self.exact = exact or not model.has_cache
        # of the context's tokens, (B, any number), one after another; together (B, length)
        self.chunks = [idx]
        self.length = idx.shape[1]
        # of each text, columns before its context
        self.padding = (idx < 0).sum(dim=1).tolist()
        self.cached = cached and model.has_cache
        self.cache = model.make_cache(size=size) if self.cached else None
        self.restart(model.config.block_size)

    def append(self, tokens: Tensor) -> None:
        """tokens: (B, T), the next of each text."""
        self.chunks.append(tokens)
        self.length += tokens.shape[1]

    def tokens(self) -> Tensor:
        """Return the tokens of the context, (B, length)."""
        self.chunks = [torch.cat(self.chunks, dim=1)]
        return self.chunks[0]

    def next_logits(self) -> Tensor:
        """Return the logits (B, V) of the next token of each text."""
        block_size = self.model.config.block_size
        if self.length > block_size:
            self.restart(block_size if self.exact else max(1, block_size // 2))
        if self.cache:
            new = self.chunks[-1]
            if self.cache.length + new.shape[1] != self.length:
                new = self.tokens()[:, self.cache.length :]
            if self.cache.padding is not None:
                new = new.clamp(min=0)  # no token attends to the padding
            return self.model.next_logits(new, self.cache)
        if not any(self.padding):
            return self.model.next_logits(self.tokens())
        texts = zip(self.tokens().split(1), self.padding, strict=True)
        return torch.cat([self.model.next_logits(text[:, first:]) for text, first in texts])

    def restart(self, kept: int) -> None:
        """Keep the newest tokens of each text that has more than block_size, and forget what has been computed."""
        T = self.length
        block_size = self.model.config.block_size
        padding = [T - kept if T - first > block_size else first for first in self.padding]
        dropped = min(padding)
        tokens = self.tokens()[:, dropped:]
        self.chunks = [tokens]
        self.length = T - dropped
        self.padding = [first - dropped for first in padding]
        for text, first in zip(tokens, self.padding, strict=True):
            text[:first] = -1
        if self.cache:
            self.cache.clear()
            if any(self.padding):
                self.cache.padding = torch.tensor(self.padding, device=tokens.device)

    def select(self, rows: list[int]) -> Tensor:
        """Keep these of the texts alone. Returns their rows, int64, on the device."""
        index = torch.tensor(rows, device=self.chunks[0].device)
        self.chunks = [self.tokens()[index]]
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
        samples: list[int],
        max_new_tokens: int,
        *,
        repetition_penalty: float = 1.0,
        seed: int = 1337,
        **filters,
    ):
        """idx: (B, T), the texts so far, -1 where there is no token. samples: a number for each text, which chooses its
        random numbers. filters: of sample_tokens(); temperature=0 is greedy.
        """
        self.filters = filters
        self.uniforms = None
        if filters.get("temperature") != 0:
            dtype = torch.float32 if idx.is_mps else torch.float64  # Apple's GPUs lack it
            numbers = uniform_numbers(seed, samples, max_new_tokens, dtype)
            self.uniforms = numbers.to(idx.device)
        self.penalty = repetition_penalty
        self.seen = (
            None  # (B, V + 1) bool: tokens in the text, and in the last column what is none
        )
        if repetition_penalty != 1:
            self.seen = idx.new_zeros(len(idx), vocab_size + 1, dtype=torch.bool)
            self.seen.scatter_(1, idx.where(idx >= 0, vocab_size), True)
        self.step = 0

    def next_tokens(self, logits: Tensor) -> Tensor:
        """logits: (B, V). Returns (B, 1) token ids; V where the logits are not finite."""
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
        """Keep these of the texts alone; int64, on the device."""
        if self.uniforms is not None:
            self.uniforms = self.uniforms[:, rows]
        if self.seen is not None:
            self.seen = self.seen[rows]


class Step(NamedTuple):
    """One more token of each text that has not ended."""

    rows: list[int]  # of these texts, in the batch as it was given
    ids: list[int]  # their new tokens
    logits: Tensor  # (len(rows), V), float32, as the model gave them


@torch.inference_mode()
def continue_texts(
    context: Context,
    max_new_tokens: int,
    tokenizer_vocab_size: int | None = None,
    *,
    samples: list[int] | None = None,
    eot: int | None = None,
    stopped: Collection[int] = (),
    **sampling,
) -> Iterator[Step]:
    """Sample token after token. A text ends after eot, and where the caller puts its row into stopped meanwhile.

    tokenizer_vocab_size: ids from here on pad the model's vocabulary and are never sampled. samples, sampling: of
    Sampler; without samples, the texts are numbered. Raises UserError where the model's logits are not finite.
    """
    vocab_size = tokenizer_vocab_size or context.model.config.vocab_size
    tokens = context.tokens()
    rows = list(range(len(tokens)))
    sampler = Sampler(tokens, vocab_size, samples or rows, max_new_tokens, **sampling)
    for _ in range(max_new_tokens):
        logits = context.next_logits().float()[:, :vocab_size]
        tokens = sampler.next_tokens(logits)
        context.append(tokens)
        ids = tokens.flatten().tolist()
        if max(ids) >= vocab_size:
            raise UserError("the model's logits are not finite: has its training diverged?")
        yield Step(rows, ids, logits)
        if not stopped and eot not in ids:
            continue
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
    cached: bool = True,
    **options,
) -> Iterator[Tensor]:
    """Continue idx by max_new_tokens; yields each new token as (B,), -1 where a text has ended.

    idx, exact, cached: of Context. options: of continue_texts.
    """
    context = Context(model, idx, idx.shape[1] + max_new_tokens, exact=exact, cached=cached)
    for step in continue_texts(context, max_new_tokens, tokenizer_vocab_size, **options):
        tokens = [-1] * len(idx)
        for row, token in zip(step.rows, step.ids, strict=True):
            tokens[row] = token
        yield idx.new_tensor(tokens)


def bytes_per_text(model: nn.Module, size: int) -> int:
    """Estimate what continuing one text of `size` tokens takes: keys, values, logits, tokens, random numbers."""
    config = model.config
    kept = min(size, config.block_size) if model.has_cache else 0
    cache = 2 * config.n_layer * config.kv_heads * config.features * kept
    return 4 * (cache + 8 * config.vocab_size) + 16 * size


# --------------------------------------------------------------------------------------
# Token -> characters


class TextStream:
    """The text of one sample: feed() its tokens and show what comes back.

    A character comes when the last of its bytes is there; one that is never completed does not come. The text ends
    before the first of the stop texts, and what may be the beginning of one is held back until that is known.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self.pieces = tokenizer.pieces
        self.eot = tokenizer.eot
        self.stop = stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""
        self.ended = False

    def feed(self, token: int) -> str:
        """Return the characters that can be shown now."""
        if token == self.eot:
            self.ended = True
            return self.close()
        self.held += self.decoder.decode(self.pieces[token])
        ends = [self.held.index(text) for text in self.stop if text in self.held]
        if ends:
            self.ended = True
            return self.release(min(ends))
        for end in range(len(self.held)):
            if any(text.startswith(self.held[end:]) for text in self.stop):
                return self.release(end)
        return self.close()

    def close(self) -> str:
        """Return what was held back: there is no next token."""
        return self.release(len(self.held))

    def release(self, n: int) -> str:
        shown = self.held[:n]
        self.held = "" if self.ended else self.held[n:]
        return shown
