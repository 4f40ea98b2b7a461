"""Continue prompts with a model: text -> token ids -> logits -> probabilities -> a token -> characters, and repeat.

Shapes: B texts, T tokens, V vocabulary.
"""

import codecs
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from humptygpt.cli import UserError, as_user_error, check_above_0, check_least, note
from humptygpt.device import free_memory
from humptygpt.machine import check_fits
from humptygpt.tokenizers.basic import END_OF_TEXT, Tokenizer

AT_ONCE = 128  # texts to continue in one batch, if memory allows
CPU = torch.device("cpu")

# --------------------------------------------------------------------------------------
# Prompts -> token ids


class Prompt(NamedTuple):
    text: str  # without a leading end-of-text token
    ids: list[int]


def read_prompts(start: str | None, prompts: str | None, tokenizer: Tokenizer, block_size: int) -> list[Prompt]:
    """Read the prompts given by --start or --prompts. Raises UserError if they cannot be read or encoded."""
    if prompts is not None:
        texts = read_text(prompts).removesuffix("\n").split("\n")
    elif start is not None:
        texts = [read_start(start)]
    else:
        ids = tokenizer.start().tolist()
        return [Prompt("" if tokenizer.eot is not None else tokenizer.decode(ids), ids)]
    found = []
    for number, text in enumerate(texts):
        with as_user_error(f"prompt {number + 1:,}: "):
            ids = encode_prompt(text, tokenizer)
        if len(ids) > block_size:
            note(f"prompt {number + 1:,} has {len(ids):,} tokens; only the last {block_size:,} are used")
        found.append(Prompt(text.removeprefix(END_OF_TEXT), ids))
    return found


def encode_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of a prompt. Raises UserError if it is empty or contains unknown characters."""
    if not text:
        raise UserError("the prompt is empty; give at least one character, or leave out --start")
    # as in nanoGPT, a prompt may begin with end-of-text, unless the model has another token for that
    eot = tokenizer.eot
    named = eot is not None and tokenizer.pieces[eot] == END_OF_TEXT.encode()
    separated = named and text.startswith(END_OF_TEXT)
    if separated:
        text = text.removeprefix(END_OF_TEXT)
    before = tokenizer.start()[: int(separated or tokenizer.bos is not None)]
    return [*before.tolist(), *tokenizer.encode(text).tolist()]


def read_start(start: str) -> str:
    """Return the text of --start, or the content of the file that it names."""
    if start.startswith("FILE:"):
        return read_text(start.removeprefix("FILE:"))
    return read_text(start) if start == "-" else start


def read_text(path: str) -> str:
    """Read a text file, or standard input if path is "-"."""
    try:
        if path == "-":
            return sys.stdin.read()
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is not valid UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


# --------------------------------------------------------------------------------------
# Logits -> probabilities -> token


def check_sampling(settings: object) -> None:
    """Raise ValueError unless each of the settings of next_tokens() is None or in its range."""
    check_least(settings, 1, "top_k")
    check_least(settings, 0, "temperature", "min_p")
    check_above_0(settings, "top_p", "repetition_penalty")
    for name in ("top_p", "min_p"):
        value = getattr(settings, name)
        if value is not None and value > 1:
            raise ValueError(f"{name}={value} must be at most 1")


def penalize_repetition(logits: Tensor, texts: list[list[int]], penalty: float) -> Tensor:
    """Penalize the tokens of each text: divide their positive logits by the penalty, and multiply negative ones by it.

    logits: (B, V). Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1, as implemented by Hugging Face.
    """
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, ids in zip(seen, texts, strict=True):
        row[torch.tensor(ids, device=logits.device)] = True
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def keep_top_p(probs: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most probable tokens with total probability p; set the others to 0. probs: (B, V).

    Tokens as probable as the last one kept are also kept. The result is not rescaled. Source: Holtzman et al. 2019,
    arXiv:1904.09751, section 3.1 (nucleus sampling).
    """
    ranked = probs.sort(dim=-1, descending=True).values
    before = ranked.cumsum(dim=-1) - ranked  # total probability of all more probable tokens
    least = ranked.masked_fill(before >= p, torch.inf).amin(dim=-1, keepdim=True)
    return probs.masked_fill(probs < least, 0.0)


def probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Return the probabilities of the next token, (B, V), after temperature and filters. logits: (B, V)."""
    # a division by 0 would overflow
    probs = (logits / max(temperature, 1e-30)).softmax(dim=-1)
    if top_p and top_p < 1:
        probs = keep_top_p(probs, top_p)
    if min_p is not None:  # Nguyen et al. 2024, arXiv:2407.01082
        highest = probs.amax(dim=-1, keepdim=True)
        probs = probs.masked_fill(probs < min_p * highest, 0.0)
    return probs / probs.sum(dim=-1, keepdim=True) if top_p or min_p else probs


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw tokens, (B, 1), from probs, (B, V), using uniform random numbers in [0, 1), (B, 1).

    The token is the first, in order of ids, at which the cumulative probability exceeds the number. So a text needs one
    number per token, however large the vocabulary is, and rounding hardly ever changes a token. If any probability is
    nan, the result is V.
    """
    cumulative = probs.cumsum(dim=-1, dtype=uniform.dtype)
    total = cumulative.narrow(-1, -1, 1)
    return torch.searchsorted(cumulative, uniform * total, right=True)


def next_tokens(
    logits: Tensor,
    uniform: Tensor,
    texts: list[list[int]],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    repetition_penalty: float = 1.0,
    **filters,
) -> Tensor:
    """Choose the next token of each text, (B, 1), from the top_k most probable tokens. temperature=0 is greedy.

    logits: (B, V). uniform: random numbers, (B, 1). filters: keyword arguments of probabilities(). If the logits are
    not finite, the result is V.
    """
    V = logits.shape[-1]
    if repetition_penalty != 1:
        logits = penalize_repetition(logits, texts, repetition_penalty)
    if temperature == 0:
        largest = logits.max(dim=-1, keepdim=True)
        return largest.indices.where(largest.values.isfinite(), V)
    if top_k is None or top_k >= V:
        return draw(probabilities(logits, temperature, **filters), uniform)
    ids = logits.topk(top_k).indices.sort(dim=-1).values
    choice = draw(probabilities(logits.gather(1, ids), temperature, **filters), uniform)
    return F.pad(ids, (0, 1), value=V).gather(1, choice)


def uniform_numbers(seed: int, samples: Collection[int], n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return n random numbers in [0, 1) for each of B samples, (n, B, 1).

    The i-th number of a sample depends only on seed, the sample's number and i, so a text does not depend on the others
    in its batch. The generator is numpy's Philox, which encrypts a counter with the key (seed, sample).
    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    streams = [np.random.Generator(np.random.Philox(key=[seed, sample])).random(n) for sample in samples]
    numbers = torch.from_numpy(np.stack(streams, axis=1)[..., None]).to(dtype)
    # below 1 even after rounding, so that draw() finds a token with nonzero probability
    return numbers.clamp(max=1 - torch.finfo(dtype).eps)


# --------------------------------------------------------------------------------------
# Token by token


class Context:
    """A batch of texts that a model continues, and a cache of the tokens that are still in the context.

    The model sees at most block_size tokens. When a text grows longer, its newest block_size / 2 tokens are recomputed
    once, and the text continues from there. A model without a cache reads the newest block_size tokens for every new
    token. Each text in a batch restarts when its own tokens fill the context, so it continues as it would on its own.
    """

    def __init__(
        self,
        model: nn.Module,
        texts: list[list[int]],
        size: int | None = None,
        *,
        device: torch.device = CPU,
    ):
        """texts: the token ids of each text, at least one. size: maximum length of a text; None: unlimited."""
        self.model = model
        self.device = device
        self.block_size = model.config.block_size
        self.texts = [list(ids) for ids in texts]
        self.size = size
        self.kept = max(1, self.block_size // 2) if model.has_cache else self.block_size
        self.restart(self.block_size)

    def append(self, new: list[list[int]]) -> None:
        """Append new tokens to each text, the same number to every text."""
        for text, ids in zip(self.texts, new, strict=True):
            text += ids
        self.width += len(new[0])

    def next_logits(self) -> Tensor:
        """Return the logits (B, V) of the next token of each text."""
        if self.width > self.block_size:
            self.restart(self.kept)
        if self.cache:
            T = self.width - self.cache.length
            # no token attends to the padding
            new = [[0] * (T - len(text)) + text[-T:] for text in self.texts]
            return self.model.next_logits(torch.tensor(new, device=self.device), self.cache)
        texts = [torch.tensor([text], device=self.device) for text in self.texts]
        return torch.cat([self.model.next_logits(idx) for idx in texts])

    def restart(self, kept: int) -> None:
        """Cut each text of more than block_size tokens down to the `kept` newest ones, and begin a new cache.

        In the cache, all texts end in the same column, and padding precedes the shorter ones.
        """
        full = self.block_size
        self.texts = [text[-kept:] if len(text) > full else text for text in self.texts]
        self.width = max(map(len, self.texts))  # columns in use
        self.cache = self.model.make_cache(size=self.size) if self.model.has_cache else None
        if self.cache:
            padding = [self.width - len(text) for text in self.texts]
            if any(padding):
                self.cache.n_padding = torch.tensor(padding, device=self.device)


@torch.inference_mode()
def continue_texts(
    context: Context,
    samples: Collection[int],
    vocab_size: int,
    *,
    max_new_tokens: int,
    seed: int = 1337,
    **sampling,
) -> Iterator[tuple[list[int], Tensor]]:
    """Sample token by token. Yields one token per text, and the logits, (B, V) float32, that they were drawn from.

    samples: one number per text, which determines its random numbers. vocab_size: ids of this value and above only pad
    the vocabulary and are never sampled. sampling: keyword arguments of next_tokens(). Raises UserError if the
    logits are not finite.
    """
    # Apple's GPUs lack float64
    dtype = torch.float32 if context.device.type == "mps" else torch.float64
    uniforms = uniform_numbers(seed, samples, max_new_tokens, dtype).to(context.device)
    seen = [list(text) for text in context.texts]  # the context itself drops old tokens
    for uniform in uniforms:
        logits = context.next_logits().float()[:, :vocab_size]
        new = next_tokens(logits, uniform, seen, **sampling).tolist()
        if [vocab_size] in new:
            raise UserError("the model's logits are not finite: did training diverge?")
        context.append(new)
        for text, ids in zip(seen, new, strict=True):
            text += ids
        yield [token for (token,) in new], logits


def texts_at_once(model: nn.Module, device: torch.device, size: int) -> int:
    """Choose how many texts of `size` tokens to continue in one batch: AT_ONCE, or fewer if memory is short.

    Raises UserError if not even one fits.
    """
    config = model.config
    # bytes for keys and values in float32, for logits and their copies, for tokens and random numbers
    cached = 2 * config.n_members * config.n_layer * config.kv_heads * config.features
    cached *= min(size, config.block_size)
    needed = 4 * (cached + 8 * config.vocab_size) + 16 * size
    free = int(0.9 * free_memory(device))
    check_fits(f"a text of {size:,} tokens takes", needed, free, "try a smaller --max_new_tokens")
    return min(AT_ONCE, free // needed)


# --------------------------------------------------------------------------------------
# Token -> characters


class TextStream:
    """Turn the tokens of one sample into text. feed() takes one token and returns the characters that it completes.

    A character is shown once its last byte has arrived; an incomplete one is never shown. The text ends before the
    first stop text. Text that may be the beginning of a stop text is held back until later tokens show whether it is.
    before: the tokens before the text, which may begin its first character.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = (), before: Iterable[int] = ()):
        self.tokenizer = tokenizer
        self.stop = stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.decoder.decode(b"".join(tokenizer.pieces[token] for token in before))
        self.held = ""
        self.ended = False

    def feed(self, token: int) -> str:
        """Return the characters that can be shown now."""
        if token == self.tokenizer.eot:
            self.ended = True
            return self.close()
        self.held += self.decoder.decode(self.tokenizer.pieces[token])
        ends = [self.held.index(text) for text in self.stop if text in self.held]
        if ends:
            self.ended = True
            return self.close()[: min(ends)]
        for n in range(len(self.held)):
            if any(text.startswith(self.held[n:]) for text in self.stop):
                shown, self.held = self.held[:n], self.held[n:]
                return shown
        return self.close()

    def close(self) -> str:
        """Return all characters that were held back."""
        shown, self.held = self.held, ""
        return shown


class Piece(NamedTuple):
    """Text that one new token made printable or, at the end of a text, the text that was held back."""

    row: int  # index of the text in the batch
    text: str
    token: int | None = None  # None at the end of a text
    logits: Tensor | None = None  # (V,), from which the token was drawn
    end: str | None = None  # at the end of a text, why it ends: stop or length


def stream_texts(
    context: Context,
    tokenizer: Tokenizer,
    samples: Collection[int],
    stop: Iterable[str] = (),
    **sampling,
) -> Iterator[Piece]:
    """Continue the texts of the context. stop: as for TextStream. sampling: arguments of continue_texts()."""
    streams = [TextStream(tokenizer, stop, text) for text in context.texts]
    for ids, logits in continue_texts(context, samples, tokenizer.vocab_size, **sampling):
        for row, (stream, token) in enumerate(zip(streams, ids, strict=True)):
            if not stream.ended:
                yield Piece(row, stream.feed(token), token, logits[row])
        if all(stream.ended for stream in streams):
            break
    for row, stream in enumerate(streams):
        yield Piece(row, stream.close(), end="stop" if stream.ended else "length")


# --------------------------------------------------------------------------------------
# Log-probabilities


def with_likeliest(piece: Piece, k: int) -> list[tuple[int, float]]:
    """Return a piece's token and the k likeliest tokens at its position, each with its log-probability."""
    logprobs = piece.logits.log_softmax(dim=-1)
    likeliest = logprobs.topk(min(k, len(logprobs))).indices.tolist()
    return [(i, float(logprobs[i])) for i in (piece.token, *likeliest)]
