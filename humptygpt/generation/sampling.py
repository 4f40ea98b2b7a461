"""A model and a prompt -> new tokens: logits -> probabilities -> token, again and again."""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from humptygpt.core.errors import UserError

# --------------------------------------------------------------------------------------
# Logits -> probabilities -> token


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits: (B, V); of the tokens seen, (B, V) bool, positive ones are divided by the penalty, negative multiplied.

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1, in the form that Hugging Face gave it.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """logits: (B, V). All but the k largest, and those equal to the smallest of these, become -inf."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)


def keep_top_p(probs: Tensor, p: float) -> Tensor:
    """probs: (B, V). All but the most probable tokens that together have probability p become 0; the first one stays.

    Tokens as probable as the last that stays, stay. The rest is not rescaled. Source: Holtzman et al. 2019,
    arXiv:1904.09751, section 3.1 (nucleus sampling).
    """
    k, total = 64, probs.sum(dim=-1, keepdim=True)
    while True:  # a few tokens mostly have it, so the whole vocabulary need not be sorted
        ranked = probs.topk(min(k, probs.shape[-1])).values
        before = ranked.cumsum(dim=-1) - ranked  # of all more probable tokens; 0 for the first
        if k >= probs.shape[-1] or bool((before[:, -1:] >= p * total).all()):
            break
        k *= 8
    least = ranked.masked_fill(before >= p * total, torch.inf).amin(dim=-1, keepdim=True)
    return probs.masked_fill(probs < least, 0.0)


def keep_min_p(probs: Tensor, p: float) -> Tensor:
    """probs: (B, V). Tokens less probable than p times the most probable one become 0; the rest is not rescaled.

    Source: Nguyen et al. 2024, arXiv:2407.01082.
    """
    return probs.masked_fill(probs < p * probs.amax(dim=-1, keepdim=True), 0.0)


def probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The probabilities (B, V) that the next token is sampled from; logits: (B, V).

    temperature: 0 is greedy. top_k, top_p, min_p: what stays, each of what the one before it leaves.
    """
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    logits = logits / max(temperature, 1e-30)  # which is as good as greedy, and does not overflow
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    probs = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        probs = keep_top_p(probs, top_p)
    if min_p is not None:
        probs = keep_min_p(probs, min_p)
    return probs / probs.sum(dim=-1, keepdim=True) if top_p or min_p else probs


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Tokens (B,) with these probabilities, (B, V); uniform: (B, 1) numbers from [0, 1), one for each text.

    The token is where the sum of the probabilities, in the order of ids, first exceeds the number: one number for each
    text, whatever the vocabulary, and rounding hardly ever changes a token. It is V where a probability is nan.
    """
    cumulative = probs.cumsum(dim=-1, dtype=uniform.dtype)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).flatten()


def uniform_numbers(seed: int, samples: list[int], n: int) -> Tensor:
    """(n, B, 1) float64, in [0, 1): the i-th of each of B samples depends on seed, its number and i alone.

    So a text comes out the same whatever texts are sampled beside it. By numpy's Philox, a generator that encrypts a
    counter; the key is seed and sample. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    streams = [
        np.random.Generator(np.random.Philox(key=[seed, sample])).random(n) for sample in samples
    ]
    # at most 1 - 2^-40, so that its product with a sum stays below the sum, rounding included
    return torch.from_numpy(np.stack(streams, axis=1)[..., None].clip(max=1 - 2**-40))


# --------------------------------------------------------------------------------------
# Token after token


class Context:
    """Texts that a model continues together: their tokens, and what the decoder keeps of them.

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
        text will have; None: any number. cached=False computes the same without the decoder's state, as a model that
        has none always does.
        """
        self.model, self.size = model, size
        self.exact, self.cached = exact or not model.has_state, cached and model.has_state
        self.chunks, self.length = (
            [idx],
            idx.shape[1],
        )  # of all tokens, (B, T) and then (B, 1) for each step
        block_size = model.config.block_size
        # of each text, where its context begins
        self.first = [
            max(padding, self.length - block_size) for padding in (idx < 0).sum(dim=1).tolist()
        ]
        self.state = None
        self.restart()

    def append(self, tokens: Tensor) -> None:
        """tokens: (B, T), the next of each text."""
        self.chunks.append(tokens)
        self.length += tokens.shape[1]

    def tokens(self) -> Tensor:
        """(B, length)."""
        self.chunks = [torch.cat(self.chunks, dim=1)]
        return self.chunks[0]

    def next_logits(self) -> Tensor:
        """(B, V), of the next token of each text."""
        block_size = self.model.config.block_size
        if self.length - min(self.first) > block_size:
            kept = block_size if self.exact else max(1, block_size // 2)
            self.first = [
                first if self.length - first <= block_size else self.length - kept
                for first in self.first
            ]
            self.restart()
        if self.cached:
            last = self.chunks[-1]
            new = (
                last if self.length - last.shape[1] == self.read else self.tokens()[:, self.read :]
            )
            if (
                self.state.padding is not None and not self.state.length
            ):  # a token before the context is none
                columns = torch.arange(new.shape[1], device=new.device)
                new = new.masked_fill(columns < self.state.padding[:, None], -1)
            self.read = self.length
            return self.model.next_logits(new, self.state)
        if len(set(self.first)) == 1:
            return self.model.next_logits(self.tokens()[:, self.first[0] :])
        tokens = self.tokens()
        return torch.cat(
            [
                self.model.next_logits(tokens[i : i + 1, first:])
                for i, first in enumerate(self.first)
            ]
        )

    def restart(self) -> None:
        """Forget what has been computed."""
        self.read = min(self.first)  # tokens up to here are in the state
        if not self.cached:
            return
        if self.state is None:
            self.state = self.model.make_state(size=self.size)
        self.state.clear()
        if len(set(self.first)) > 1:
            self.state.padding = torch.tensor(self.first, device=self.chunks[0].device) - self.read

    def select(self, rows: list[int]) -> None:
        """Keep these of the texts alone."""
        index = torch.tensor(rows, device=self.chunks[0].device)
        self.chunks = [self.tokens()[index]]
        self.first = [self.first[row] for row in rows]
        if self.state:
            self.state.select(index)


class Sampler:
    """Draws the next token of each of B texts."""

    def __init__(
        self,
        samples: list[int],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 1337,
    ):
        """samples: a number for each text, which chooses its random numbers. The rest: see probabilities()."""
        self.filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        self.penalty, self.seen = repetition_penalty, None  # (B, V) bool: tokens in the text so far
        self.uniforms = uniform_numbers(seed, samples, max_new_tokens) if temperature else None
        self.step = 0

    def read(self, idx: Tensor, vocab_size: int) -> None:
        """Tokens of each text that were not drawn here; idx: (B, T), -1 where there is none."""
        if self.penalty != 1:
            self.seen = torch.zeros(len(idx), vocab_size + 1, dtype=torch.bool, device=idx.device)
            self.seen.scatter_(1, idx.where(idx >= 0, vocab_size), True)
            self.seen = self.seen[:, :-1]

    def draw(self, logits: Tensor) -> Tensor:
        """logits: (B, V). Returns (B,) token ids; V where the logits are not finite."""
        if self.penalty != 1:
            logits = penalize_repetition(logits, self.seen, self.penalty)
        if self.uniforms is None:
            largest = logits.max(dim=-1)
            tokens = largest.indices.where(largest.values.isfinite(), logits.shape[-1])
        else:
            if self.step == 0:  # float64, but for Apple's GPUs, which have none
                self.uniforms = self.uniforms.to(
                    logits.device, torch.float32 if logits.is_mps else torch.float64
                )
            tokens = self.draw_filtered(logits, self.uniforms[self.step])
        self.step += 1
        if self.penalty != 1:
            self.seen.scatter_(1, tokens.clamp(max=logits.shape[-1] - 1)[:, None], True)
        return tokens

    def draw_filtered(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """draw(probabilities(...)), which of a large vocabulary looks at the k most probable tokens alone."""
        k, vocab_size = self.filters["top_k"], logits.shape[-1]
        if k is None or k >= vocab_size:
            return draw(probabilities(logits, **self.filters), uniform)
        ids = logits.topk(k).indices.sort(dim=-1).values
        found = draw(
            probabilities(logits.gather(1, ids), **self.filters | {"top_k": None}), uniform
        )
        return F.pad(ids, (0, 1), value=vocab_size).gather(1, found[:, None]).flatten()

    def select(self, rows: list[int]) -> None:
        """Keep these of the texts alone."""
        if self.uniforms is not None:
            self.uniforms = self.uniforms[:, rows]
        if self.seen is not None:
            self.seen = self.seen[rows]


def bytes_per_text(config, size: int) -> int:
    """What continuing one text of `size` tokens takes: keys, values, logits, tokens, random numbers.

    config: a ModelConfig.
    """
    kept = min(size, config.block_size, 2 * config.window or config.block_size)
    head_size = config.head_size or config.n_embd // config.n_head
    cache = 2 * config.n_layer * (config.n_kv_head or config.n_head) * head_size * kept
    return 4 * (cache + 8 * config.vocab_size) + 16 * size


class Step(NamedTuple):
    """One more token of each text that has not ended."""

    rows: list[int]  # of these texts, in the batch as it was given
    tokens: Tensor  # (len(rows),), their new tokens
    ids: list[int]  # the same as numbers
    logits: Tensor  # (len(rows), V), float32, as the model gave them


def generate(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    tokenizer_vocab_size: int | None = None,
    *,
    eot: int | None = None,
    exact: bool = False,
    cached: bool = True,
    **sampling,
) -> Iterator[Tensor]:
    """Continue idx, (B, T) token ids with T >= 1, by max_new_tokens; yields each new token as (B,).

    idx: -1 before the first token of the shorter texts. tokenizer_vocab_size: ids from here on pad the model's
    vocabulary and are never sampled. eot: ends a text, which is then continued by -1; None: nothing does. exact,
    cached: of Context. sampling: of Sampler.
    """
    context = Context(model, idx, idx.shape[1] + max_new_tokens, exact=exact, cached=cached)
    sampler = Sampler(list(range(len(idx))), max_new_tokens, **sampling)
    for step in continue_texts(context, sampler, max_new_tokens, tokenizer_vocab_size, eot=eot):
        if len(step.rows) == len(idx):
            yield step.tokens
        else:
            tokens = idx.new_full((len(idx),), -1)
            tokens[step.rows] = step.tokens
            yield tokens


@torch.inference_mode()
def continue_texts(
    context: Context,
    sampler: Sampler,
    max_new_tokens: int,
    tokenizer_vocab_size: int | None = None,
    *,
    eot: int | None = None,
    stopped: Collection[int] = (),
) -> Iterator[Step]:
    """Sample token after token. A text ends after eot, and where the caller puts its row into stopped meanwhile.

    Raises UserError where the model's logits are not finite.
    """
    vocab_size = tokenizer_vocab_size or context.model.config.vocab_size
    sampler.read(context.tokens(), vocab_size)
    rows = list(range(len(context.first)))
    for _ in range(max_new_tokens):
        logits = context.next_logits()[:, :vocab_size].float()
        tokens = sampler.draw(logits)
        context.append(tokens[:, None])
        ids = tokens.tolist()
        if max(ids) >= vocab_size:
            raise UserError("the model's logits are not finite: has its training diverged?")
        yield Step(rows, tokens, ids, logits)
        if stopped or eot in ids:
            left = [i for i, row in enumerate(rows) if ids[i] != eot and row not in stopped]
            if not left:
                return
            if len(left) < len(rows):
                rows = [rows[i] for i in left]
                context.select(left)
                sampler.select(left)
