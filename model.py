"""Every block of a transformer, the GPT and the encoder-decoder built from them, and a network from before attention.

Shapes are written with these letters:
    B batch, T tokens read now, S tokens attended to, C n_embd, H heads, D head size (C / n_head), V vocab_size

The GPT, with the blocks that it has unless told otherwise (block=pre_norm):

    idx (B, T)
     |
     embedding + position                      numbers for each token and for its place
     |
     |--- norm -- attention -- dropout --+     every token looks at the tokens before it
     +<----------------------------------|
     |--- norm -- feed-forward -- dropout --+  every token thinks for itself
     +<-------------------------------------|  ... both n_layer times
     |
     norm -- head
     |
    logits (B, T, V)                           softmax makes them the chances of the next token

The first transformer, which translates, is two such stacks. In the encoder each token of the source sees all of them;
the decoder is the picture above with one more branch between its two, cross-attention, where every token of the
translation looks at what the encoder made of the source.

A variant is one class or function and one line in a dictionary (NORMS, POSITIONS, ...); the configuration names it.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from humptygpt.configurator import check, setting

# --------------------------------------------------------------------------------------
# Norms: keep the numbers that flow through a deep network at a size that trains well.


class LayerNorm(nn.LayerNorm):
    """(x - mean) / standard deviation over the last dimension, then scaled and, with `bias`, shifted by learnt numbers.

    Source: Ba et al. 2016, arXiv:1607.06450.
    """

    def __init__(self, config: "ModelConfig"):
        super().__init__(config.n_embd, eps=1e-5, bias=config.bias)


class RMSNorm(nn.RMSNorm):
    """x / root mean square over the last dimension, then scaled by learnt numbers; no mean is taken off.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(self, config: "ModelConfig"):
        super().__init__(config.n_embd, eps=1e-5)


class NoNorm(nn.Identity):
    """x as it is."""


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm, "none": NoNorm}


# --------------------------------------------------------------------------------------
# Dropout: what may be missing at any time cannot be relied on alone, so that less is learnt by heart.


class Dropout(nn.Module):
    """In training, a share p of the numbers becomes 0 and the others grow to make up for it.

    Source: Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting".
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p) if self.training else x


def drop(x: Tensor, p: float) -> Tensor:
    """The numbers of x, but for a share p, each drawn by itself.

    On a CPU drawing takes longest, so there each 64 random bits decide on four numbers.
    """
    if not p or x.device.type != "cpu":
        return F.dropout(x, p)
    bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= min(round(2**16 * p), 2**16 - 1) - 2**15
    return x * (kept.to(x.dtype) * (1 / (1 - p)))


# --------------------------------------------------------------------------------------
# Runs of tokens: what has often stood in a row is worth a vector of its own.


class NgramEmbedding(nn.Module):
    """A trained vector for the newest 2 tokens together, for the newest 3, ..., n, of those runs that are frequent.

    Their sum is added to the newest token's own vector. What a run is followed by is most of what a small model learns
    at first, and looking it up costs nothing beside a matrix. torch.compile leaves this out: it cannot trace the hash.
    Source: Pagnoni et al. 2024, arXiv:2412.09871, section 3.2.1, where all runs share the vectors by a hash; with those
    alone that are frequent: Yu et al. 2025, arXiv:2502.01637.
    """

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        assert config.ngram_rows is not None, "the data set gives ngram_rows before the model is built"
        self.n, self.dropout = config.ngrams, config.ngram_dropout
        self.register_buffer("keys", torch.arange(config.ngram_rows))  # of the frequent runs, sorted: see ngram_keys
        self.table = nn.EmbeddingBag(
            config.ngram_rows + 1, config.n_embd, mode="sum", sparse=True, padding_idx=config.ngram_rows
        )

    def forward(self, idx: Tensor, before: Tensor) -> Tensor:
        """idx: (B, T) token ids; before: (B, any number), those that come before. Returns (B, T, C).

        In training a share of the places, dropout, gets nothing, so that the rest of the model learns to do without.
        """
        T = idx.shape[1]
        text = torch.cat([before, idx], dim=1)
        keys = torch.stack([key[:, -T:] for key in ngram_keys(text, self.n)], dim=-1)  # (B, T, n - 1)
        rows = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        rows = rows.where(self.keys[rows] == keys, len(self.keys))  # the row behind the last is left out of the sum
        x = self.table(rows.flatten(0, 1)).unflatten(0, idx.shape)
        if self.training and self.dropout:
            x = x * drop(torch.ones_like(x[..., :1]), self.dropout)
        return x


def ngram_keys(text: Tensor, n: int) -> Iterator[Tensor]:
    """A number for the run of 2 tokens that ends at each place of the text, (B, T) ids, then for that of 3, ..., of n.

    Hardly ever have two runs the same one. What reaches back before the text is like no other run.
    The hash is multiply-shift, which multiplies beyond 64 bits on purpose: Thorup 2015, arXiv:1504.06804, section 3.
    """
    B, T = text.shape
    text = F.pad(text + 1, (n - 1, 0))  # 0: no token
    key = torch.zeros(B, T, dtype=torch.int64, device=text.device)
    for back in range(n):
        key = key + text[:, n - 1 - back : n - 1 - back + T] * random_int64(f"token {back}")
        if back:
            yield key + random_int64(f"length {back}")


def random_int64(name: str) -> int:
    """A number that depends on the name alone, alike on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def frequent_ngrams(text: Tensor, n: int, min_count: int) -> Tensor:
    """Keys of the runs of 2 to n tokens that occur min_count times in text, (T,) ids. Returns int64 (any number,)."""
    found = (key[0].unique(return_counts=True) for key in ngram_keys(text[None], n))
    return torch.cat([keys[counts >= min_count] for keys, counts in found]).sort().values


# --------------------------------------------------------------------------------------
# Positions: attention alone cannot tell the order of its tokens. A scheme can act in three places.


class Position(nn.Module):
    """No positions: three hooks that change nothing. Each scheme overrides one of them."""

    def __init__(self, config: "ModelConfig"):
        super().__init__()

    def embed(self, x: Tensor, start: int) -> Tensor:
        """x: (B, T, C), the token embeddings; start: position of the first of them. Returns (B, T, C)."""
        return x

    def rotate(self, q: Tensor, k: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """q, k: (B, H, T, D); start: position of the first token. Returns the same shapes."""
        return q, k

    def bias(self, q_len: int, k_len: int) -> Tensor | None:
        """What is added to the (q_len, k_len) scores before softmax; the last query sits at the last key."""
        return None


class LearnedPosition(Position):
    """One trained vector for each place in the window, added to the token's embedding, as in GPT-2."""

    def __init__(self, config: "ModelConfig"):
        super().__init__(config)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)

    def embed(self, x: Tensor, start: int) -> Tensor:
        return x + self.wpe.weight[start : start + x.shape[1]]


class SinusoidalPosition(Position):
    """Waves of many lengths, sine and cosine in turn, added to the embedding: a place is where each of them stands.

    Numbers 2i and 2i + 1 are sin and cos of p / 10000^(2i/C) at place p: all between -1 and 1, and none is trained.
    The embedding is multiplied by sqrt(C) first, or the waves would drown it.
    Source: Vaswani et al. 2017, arXiv:1706.03762, sections 3.4 and 3.5.
    """

    def __init__(self, config: "ModelConfig"):
        super().__init__(config)
        i = torch.arange(config.n_embd)
        frequency = 10000.0 ** (-(i - i % 2) / config.n_embd)
        angle = torch.arange(config.block_size, dtype=torch.float32)[:, None] * frequency  # (block_size, C)
        self.register_buffer("waves", torch.where(i % 2 == 0, angle.sin(), angle.cos()), persistent=False)

    def embed(self, x: Tensor, start: int) -> Tensor:
        return x * math.sqrt(x.shape[-1]) + self.waves[start : start + x.shape[1]]


class RotaryPosition(Position):
    """Rotate query and key pairs by angles proportional to their positions, so that q.k depends on distance alone.

    Pair i of the D / 2 pairs turns by rope_base^(-2i/D) a position. Angles in float32.
    Source: Su et al. 2021, arXiv:2104.09864, eq. 34; pairs are (i, i + D/2), the layout of Llama's weights.

    rope_factor stretches a model to texts so many times longer: pairs that turn less than rope_low_freq_factor times
    in rope_original_context turn so many times slower, so that they see no new angle; those that turn more than
    rope_high_freq_factor times, which tell neighbours apart, stay; between the two it goes over smoothly.
    Source: Grattafiori et al. 2024 (Llama 3), arXiv:2407.21783, and the code of Llama 3.1.
    """

    def __init__(self, config: "ModelConfig"):
        super().__init__(config)
        head_size = config.n_embd // config.n_head
        frequency = config.rope_base ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
        if config.rope_factor != 1:
            low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
            turns = config.rope_original_context * frequency / (2 * math.pi)
            kept = ((turns - low) / (high - low)).clamp(0, 1)  # share of a pair's frequency that is not slowed down
            frequency = frequency * (kept + (1 - kept) / config.rope_factor)
        angle = torch.arange(config.block_size, dtype=torch.float32)[:, None] * frequency  # (block_size, D / 2)
        self.register_buffer("cos", angle.cos().repeat(1, 2), persistent=False)  # (block_size, D)
        self.register_buffer("sin", torch.cat([-angle.sin(), angle.sin()], dim=1), persistent=False)

    def rotate(self, q: Tensor, k: Tensor, start: int) -> tuple[Tensor, Tensor]:
        cos, sin = self.cos[start : start + q.shape[2]], self.sin[start : start + q.shape[2]]

        def turn(x: Tensor) -> Tensor:  # (a, b) -> (a cos - b sin, b cos + a sin), for all pairs at once
            return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)

        return turn(q), turn(k)


class AlibiPosition(Position):
    """Scores fall with distance, in each head at another rate, so that heads look near or far.

    Source: Press et al. 2021, arXiv:2108.12409.
    """

    def __init__(self, config: "ModelConfig"):
        super().__init__(config)
        self.register_buffer("slopes", torch.tensor(alibi_slopes(config.n_head)), persistent=False)

    def bias(self, q_len: int, k_len: int) -> Tensor:
        key = torch.arange(k_len, device=self.slopes.device)
        distance = (key[k_len - q_len :, None] - key).abs()  # (T, S)
        return -self.slopes[:, None, None] * distance  # (H, T, S)


def alibi_slopes(n_head: int) -> list[float]:
    """2^-8/n, 2^-16/n, ... 2^-8 for n heads, a power of two; more heads take every other one of those for 2n heads."""
    n = 1 << (n_head.bit_length() - 1)  # the largest power of two that is not above n_head
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    between = [2 ** (-4 * i / n) for i in range(1, 2 * n, 2)]
    return slopes + between[: n_head - n]


POSITIONS = {
    "none": Position,
    "learned": LearnedPosition,
    "sinusoidal": SinusoidalPosition,
    "rotary": RotaryPosition,
    "alibi": AlibiPosition,
}


# --------------------------------------------------------------------------------------
# Attention


class KVCache:
    """Keys and values that one block has computed, so that generating a token reads only that token."""

    def __init__(self, size: int):
        self.size = size  # tokens there is room for
        self.length = 0  # tokens held
        self.k = self.v = None  # (B, H, size, D), made when the first token shows shape, dtype and device
        self.context_k = self.context_v = None  # (B, H, S, D), of the text that cross-attention looks at
        self.newest = None  # (B, some), token ids, in the first block's cache of a model with ngrams

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: (B, H, T, D) of the newest tokens. Returns those of all tokens held: (B, H, S, D)."""
        if self.k is None:
            B, H, _, D = k.shape
            self.k, self.v = k.new_empty(B, H, self.size, D), v.new_empty(B, H, self.size, D)
        end = self.length + k.shape[2]
        assert end <= self.size, f"{end} tokens do not fit into a cache of {self.size}"
        self.k[:, :, self.length : end], self.v[:, :, self.length : end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def clear(self) -> None:
        self.length, self.newest = 0, None

    def select(self, rows: Tensor) -> None:
        """The batch becomes these of its rows, int64 (any number,), in this order; a row may come several times."""

        def held(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            picked = x.new_empty(len(rows), *x.shape[1:])
            picked[:, :, : self.length] = x[rows, :, : self.length]
            return picked

        self.k, self.v = held(self.k), held(self.v)
        if self.context_k is not None:
            self.context_k, self.context_v = self.context_k[rows], self.context_v[rows]
        if self.newest is not None:
            self.newest = self.newest[rows]


WRITTEN_OUT = 2**25  # scores of a batch up to which attend keeps them all for the backward pass: 64 MB a block


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int = 0,
    bias: Tensor | None = None,
    padding: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v: the mean of the values, weighted by how well each key answers the query.

    q: (B, H, T, D); k, v: (B, H or fewer, S, D), neighbouring queries sharing one where they are fewer; bias:
    broadcasts to (B, H, T, S); padding: (B, S), True where a key is no token. Returns (B, H, T, D).
    The last query is the last key's token, where causal or window ask: with causal no query sees a later key, with
    window none that is window or more tokens away.
    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
    """
    T, S = q.shape[2], k.shape[2]
    shared = q.shape[1] != k.shape[1]
    narrow = 0 < window < S
    # On a CPU the backward pass of SDPA takes three times as long in bfloat16; but it does not keep all the scores.
    written_out = q.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    written_out = written_out and q.shape[0] * q.shape[1] * T * S <= WRITTEN_OUT
    # SDPA's own causal mask starts at the top left, wrong where a cache makes S > T, and refuses a mask beside it.
    is_causal = causal and T == S and not (narrow or written_out) and bias is None and padding is None
    seen = None  # broadcasts to (B, H, T, S), True where a query may see a key; None: it may see all
    if narrow or (causal and T > 1 and not is_causal):
        key = torch.arange(S, device=q.device)
        distance = key[S - T :, None] - key  # (T, S); negative where the key is later
        seen = distance.abs() < (window or S)
        if causal:
            seen &= distance >= 0
    if padding is not None:
        tokens = ~padding[:, None, None, :]
        # in a window of padding alone there would be nothing to take a mean of: each place sees at least itself
        seen = tokens if seen is None else seen & tokens | (distance == 0)
    mask = seen if bias is None else bias.to(q.dtype)
    if bias is not None and seen is not None:
        mask = mask.masked_fill(~seen, -torch.inf)
    if written_out:
        return attend_written_out(q, k, v, mask, dropout)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, enable_gqa=shared
    )


def attend_written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """The formula as it stands, the scores in bfloat16.

    mask: broadcasts to (B, H, T, S), True where a query sees a key, or what is added to the scores.
    """
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, T, S)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -torch.inf)
        scores += mask
    return drop(scores.softmax(dim=-1), dropout) @ v


class Attention(nn.Module):
    """Several heads of attention side by side, their results concatenated and mixed.

    In self-attention queries, keys and values all come from one text; in cross-attention keys and values come from
    another, the context. Two texts have no common places, so positions have no say there, nor has window.

    With n_kv_head below n_head, neighbouring query heads share one head of keys and values, which makes the cache
    smaller. Source: Shazeer 2019, arXiv:1911.02150 (one for all); Ainslie et al. 2023, arXiv:2305.13245 (groups).
    With window, a token sees itself and the window - 1 tokens before it. Source: Beltagy et al. 2020, arXiv:2004.05150.
    """

    def __init__(self, config: "ModelConfig", causal: bool, cross: bool = False):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.causal, self.cross, self.dropout = causal, cross, config.dropout
        self.window = 0 if cross else config.window
        kv_width = config.n_embd // self.n_head * self.n_kv_head
        self.query = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.key = nn.Linear(config.n_embd, kv_width, bias=config.bias)
        self.value = nn.Linear(config.n_embd, kv_width, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.qk_norm = config.qk_norm

    def forward(
        self,
        x: Tensor,
        position: Position,
        cache: KVCache | None = None,
        context: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """x: (B, T, C), the newest T tokens, which follow those in the cache. Returns (B, T, C).

        context: (B, S, C), in cross-attention, and not needed where the cache holds its keys and values already.
        padding: (B, S), True where a key is no token. Causal attention needs none, as what stands behind the end of a
        text is later than all of it; in a decoder, padding is of the context.
        """
        padding = None if self.causal else padding
        q = self.queries(x)  # (B, H, T, D)
        bias = None
        if not self.cross:
            k, v = self.keys_and_values(x)
            q, k = position.rotate(q, k, start=cache.length if cache else 0)
            if cache:
                k, v = cache.append(k, v)
            bias = position.bias(q.shape[2], k.shape[2])
        elif cache and cache.context_k is not None:
            k, v = cache.context_k, cache.context_v
        else:
            k, v = self.keys_and_values(context)
        y = attend(q, k, v, self.causal, self.window, bias, padding, self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(x.shape))

    def queries(self, x: Tensor) -> Tensor:
        """x: (B, T, C). Returns (B, H, T, D)."""
        q = self.query(x).unflatten(-1, (self.n_head, -1))  # (B, T, H, D)
        if self.qk_norm:  # scores cannot grow without bound. Source: Henry et al. 2020, arXiv:2010.04245
            q = F.rms_norm(q, q.shape[-1:])
        return q.transpose(1, 2)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, S, C). Returns twice (B, H or fewer, S, D)."""
        k = self.key(x).unflatten(-1, (self.n_kv_head, -1))
        v = self.value(x).unflatten(-1, (self.n_kv_head, -1))
        if self.qk_norm:
            k = F.rms_norm(k, k.shape[-1:])
        return k.transpose(1, 2), v.transpose(1, 2)


# --------------------------------------------------------------------------------------
# Feed-forward networks: the article's first network, applied to every token by itself.


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2. Source: So et al. 2021, arXiv:2109.08668."""
    return F.relu(x).square()


ACTIVATIONS = {
    "relu": F.relu,  # max(x, 0): the article's
    "gelu": F.gelu,  # x times the chance that a normal number is below x. Source: arXiv:1606.08415
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # the same but for 0.001: GPT-2's
    "silu": F.silu,  # x / (1 + e^-x). Source: arXiv:1702.03118
    "relu_squared": relu_squared,
}


class MLP(nn.Module):
    """Two layers of neurons with an activation between them; the middle one has n_hidden, or else 4 C neurons.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.3.
    """

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        n_hidden = config.n_hidden or 4 * config.n_embd
        self.activation = ACTIVATIONS[config.activation]
        self.fc = nn.Linear(config.n_embd, n_hidden, bias=config.bias)
        self.proj = nn.Linear(n_hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C). Returns (B, T, C)."""
        return self.proj(self.activation(self.fc(x)))


class GatedMLP(nn.Module):
    """The middle layer times a second one, which went through the activation: each neuron has a gate. silu: SwiGLU.

    Unless n_hidden is set, it has 8/3 C neurons, so that three matrices cost what the plain network's two do, rounded
    up to a multiple of 8, since GPUs multiply matrices in tiles of 8. Source: Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        n_hidden = config.n_hidden or 8 * math.ceil(config.n_embd / 3)
        self.activation = ACTIVATIONS[config.activation]
        self.gate = nn.Linear(config.n_embd, n_hidden, bias=config.bias)
        self.fc = nn.Linear(config.n_embd, n_hidden, bias=config.bias)
        self.proj = nn.Linear(n_hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C). Returns (B, T, C)."""
        return self.proj(self.activation(self.gate(x)) * self.fc(x))


MLPS = {"plain": MLP, "gated": GatedMLP, "none": None}


# --------------------------------------------------------------------------------------
# Blocks: how attention and feed-forward are joined. A stack repeats one.


class Block(nn.Module):
    """Attention, then feed-forward (mlp=none: attention alone), each with its norm joined to what is there already.

    cross: attention to another text, the context, comes between the two.
    """

    residual = True  # is what comes in added to what goes out?
    ends_with_norm = False  # if so, the stack has no last norm of its own

    def __init__(self, config: "ModelConfig", causal: bool, cross: bool = False):
        super().__init__()
        self.attn_norm = NORMS[config.norm](config)
        self.attn = Attention(config, causal)
        self.cross_attn = self.mlp = None
        if cross:
            self.cross_norm = NORMS[config.norm](config)
            self.cross_attn = Attention(config, causal=False, cross=True)
        if MLPS[config.mlp]:
            self.mlp_norm = NORMS[config.norm](config)
            self.mlp = MLPS[config.mlp](config)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        position: Position,
        cache: KVCache | None = None,
        context: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """x: (B, T, C); context: (B, S, C); padding: (B, S), of the context or, in a block without one, of x itself.

        Returns (B, T, C).
        """
        x = self.join(x, self.attn_norm, lambda x: self.attn(x, position, cache, padding=padding))
        if self.cross_attn:
            x = self.join(x, self.cross_norm, lambda x: self.cross_attn(x, position, cache, context, padding))
        return self.join(x, self.mlp_norm, self.mlp) if self.mlp else x

    def join(self, x: Tensor, norm: nn.Module, f: Callable[[Tensor], Tensor]) -> Tensor:
        """x: (B, T, C); f: attention or feed-forward. Returns (B, T, C)."""
        raise NotImplementedError


class PreNormBlock(Block):
    """x + f(norm(x)): the norm sits on the branch, so that the residual path runs through untouched.

    Source: Radford et al. 2019 (GPT-2); Xiong et al. 2020, arXiv:2002.04745.
    """

    def join(self, x: Tensor, norm: nn.Module, f: Callable[[Tensor], Tensor]) -> Tensor:
        return x + self.dropout(f(norm(x)))


class PostNormBlock(Block):
    """norm(x + f(x)): the norm sits on the residual path, as in the first transformer. It needs more warmup.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.1.
    """

    ends_with_norm = True

    def join(self, x: Tensor, norm: nn.Module, f: Callable[[Tensor], Tensor]) -> Tensor:
        return norm(x + self.dropout(f(x)))


class PlainBlock(Block):
    """f(norm(x)): no residual path, to see what that is good for.

    Source, of the path: He et al. 2015, arXiv:1512.03385.
    """

    residual = False

    def join(self, x: Tensor, norm: nn.Module, f: Callable[[Tensor], Tensor]) -> Tensor:
        return self.dropout(f(norm(x)))


class ParallelBlock(Block):
    """x + attention(norm(x)) + feed-forward(norm(x)): all read the same numbers, so a GPU can do them at once.

    Source: Wang and Komatsuzaki 2021 (GPT-J); Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, section 2.
    """

    def __init__(self, config: "ModelConfig", causal: bool, cross: bool = False):
        super().__init__(config, causal, cross)
        del self.mlp_norm  # one norm serves all
        if cross:
            del self.cross_norm

    def forward(
        self,
        x: Tensor,
        position: Position,
        cache: KVCache | None = None,
        context: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        y = self.attn_norm(x)
        x = x + self.dropout(self.attn(y, position, cache, padding=padding))
        if self.cross_attn:
            x = x + self.dropout(self.cross_attn(y, position, cache, context, padding))
        return x + self.dropout(self.mlp(y))


BLOCKS = {"pre_norm": PreNormBlock, "post_norm": PostNormBlock, "plain": PlainBlock, "parallel": ParallelBlock}


class Stack(nn.Module):
    """All between the embedding and the head: positions, n_layer blocks, a last norm where these do not end with one.

    causal: no token sees a later one; cross: every token sees another text, the context.
    """

    def __init__(self, config: "ModelConfig", causal: bool, cross: bool = False):
        super().__init__()
        block = BLOCKS[config.block]
        self.block_size = config.block_size
        self.position = POSITIONS[config.position](config)
        self.embed_norm = NORMS[config.norm if config.embed_norm else "none"](config)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(block(config, causal, cross) for _ in range(config.n_layer))
        self.norm = NORMS["none" if block.ends_with_norm else config.norm](config)

    def forward(
        self,
        x: Tensor,
        caches: list[KVCache] | None = None,
        context: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """x: (B, T, C), embedded tokens, which follow those in the caches; caches: one a block. Returns (B, T, C).

        context: (B, S, C); padding: (B, S), of the context or, in a stack without one, of x itself.
        """
        start = caches[0].length if caches else 0
        end = start + x.shape[1]
        assert end <= self.block_size, f"{end} tokens, but block_size is {self.block_size}"
        x = self.dropout(self.embed_norm(self.position.embed(x, start)))
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, self.position, cache, context, padding)
        return self.norm(x)


# --------------------------------------------------------------------------------------
# Models


class GPT(nn.Module):
    """A stack of causal blocks that reads tokens and predicts, at each place, the next one.

    Source: Radford et al. 2018 (GPT), "Improving language understanding by generative pre-training".
    """

    tasks = ("language modelling", "translation")
    has_encoder = False  # a source to translate from is the beginning of the text that it goes on with
    has_cache = True  # can it keep what it has computed for the tokens read so far?

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        assert config.vocab_size is not None, "the data set gives vocab_size before the model is built"
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.ngrams = NgramEmbedding(config) if config.ngrams else None
        self.stack = Stack(config, causal=True)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:  # one table to read and to write tokens. Source: Press and Wolf 2016, arXiv:1608.05859
            self.lm_head.weight = self.wte.weight
        init_weights(self)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, caches: list[KVCache] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """idx: (B, T) token ids, which follow the tokens in the caches. targets: (B, T), -1 where no loss is counted.

        Returns logits (B, T, V) and the mean cross-entropy in nats, None without targets.
        """
        return finish(self, self.lm_head(self.stack(embed(self, idx, caches), caches)), targets)

    def make_caches(self) -> list[KVCache]:
        """Empty caches for one batch of texts, with room for block_size tokens."""
        return [KVCache(self.config.block_size) for _ in self.stack.blocks]


class Transformer(nn.Module):
    """An encoder that reads the source, and a decoder that writes the target, looking at the source for every token.

    Both read the same vocabulary, by one table. Source: Vaswani et al. 2017, arXiv:1706.03762.
    """

    tasks = ("translation",)
    has_encoder = True
    has_cache = True

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        assert config.vocab_size is not None, "the data set gives vocab_size before the model is built"
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.ngrams = NgramEmbedding(config) if config.ngrams else None
        self.encoder = Stack(config, causal=False)
        self.decoder = Stack(config, causal=True, cross=True)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        init_weights(self)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        caches: list[KVCache] | None = None,
        source: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """source: (B, S) token ids, -1 behind the end of the shorter ones; not needed with caches, which hold it.

        idx: (B, T) token ids of the translation so far, which follow those in the caches; its first token is the one
        that ends a text. targets: (B, T), -1 where no loss is counted. Returns as GPT does.
        """
        context, padding = (None, None) if caches else self.encode(source)
        x = self.decoder(embed(self, idx, caches), caches, context, padding)
        return finish(self, self.lm_head(x), targets)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """source: (B, S), as in forward. Returns what the decoder looks at, (B, S, C), and where it is no token."""
        padding = source < 0
        return self.encoder(embed(self, source.clamp(min=0)), padding=padding), padding

    def make_caches(self, source: Tensor) -> list[KVCache]:
        """Caches with room for block_size tokens of the translations, and the source, (B, S) without padding, read."""
        context, padding = self.encode(source)
        assert not padding.any(), "caches do not remember padding"
        caches = [KVCache(self.config.block_size) for _ in self.decoder.blocks]
        for block, cache in zip(self.decoder.blocks, caches, strict=True):
            cache.context_k, cache.context_v = block.cross_attn.keys_and_values(context)
        return caches


def embed(model: GPT | Transformer, idx: Tensor, caches: list[KVCache] | None = None) -> Tensor:
    """idx: (B, T) token ids, which follow those in the caches. Returns (B, T, C)."""
    x = model.wte(idx)
    if model.ngrams:
        before = caches[0].newest if caches else None
        if before is None:
            before = idx[:, :0]
        x = x + model.ngrams(idx, before)
        if caches:
            caches[0].newest = torch.cat([before, idx], dim=1)[:, 1 - model.ngrams.n :]
    return x


@torch.no_grad()
def init_weights(model: GPT | Transformer) -> None:
    """All weights, as the configuration's init says:

                                   gpt2                             zero
    embeddings                     normal, 0.02                     normal, 1; tied 1 / sqrt(n_embd)
    frequent runs of tokens        0                                0
    matrices                       normal, 0.02                     normal, 1 / sqrt(inputs)
    last matrix of each branch     normal, 0.02 / sqrt(branches)    0, so that a new block changes nothing
    an untied head                 normal, 0.02                     0, so that all tokens have the same chance
    biases, norms                  0, 1                             0, 1

    GPT-2 divides by the square root of the number of branches in a stack, 2 n_layer with attention and feed-forward, to
    keep the residual path as large as its input. Without that path (block=plain) nothing but the matrices of the blocks
    carries the numbers on: all of these are 1 / sqrt(inputs), which keeps the numbers' size.
    """
    zero, residual = model.config.init == "zero", BLOCKS[model.config.block].residual
    branches = Counter(name.partition(".")[0] for name, _ in model.named_modules() if name.endswith(".proj"))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            last, head = name.endswith(".proj"), name == "lm_head"
            if zero and (last or (head and not model.config.tie_weights)):
                std = 0.0
            elif zero and isinstance(module, nn.Embedding):
                std = 1.0
            elif zero or (not residual and ".blocks." in name):
                std = module.in_features**-0.5
            else:
                std = 0.02 / math.sqrt(branches[name.partition(".")[0]]) if last else 0.02
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.EmbeddingBag):
            nn.init.zeros_(module.weight)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class NumberEmbedding(nn.Module):
    """Each token is one number, its own, and nothing of it is trained: the first 1, the second 2, ...

    All are divided by how many there are, so that none is above 1. No token is 0: that stands for no token.
    """

    def __init__(self, vocab_size: int, n_embd: int):
        super().__init__()
        assert n_embd == 1, n_embd
        self.vocab_size = vocab_size

    def forward(self, idx: Tensor) -> Tensor:
        """idx: (B, T). Returns (B, T, 1)."""
        return ((idx + 1) / self.vocab_size)[..., None]


EMBEDDINGS = {"table": nn.Embedding, "number": NumberEmbedding}


class WindowMLP(nn.Module):
    """A feed-forward network that reads the newest window tokens side by side and predicts the next one.

    At every place of a text it does so for the window that ends there. Where that reaches back before the first token
    that was given, there are zeros, in training as in use; so block_size should be some times the window.
    n_layer hidden layers of n_hidden neurons, or else as many as there are inputs.
    Source: Bengio et al. 2003, "A neural probabilistic language model".
    """

    tasks = ("language modelling",)
    has_encoder = False
    has_cache = False  # all that two neighbouring windows share is their embeddings

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        assert config.vocab_size is not None, "the data set gives vocab_size before the model is built"
        self.config = config
        inputs = config.window * config.n_embd
        n_hidden = config.n_hidden or inputs
        self.wte = EMBEDDINGS[config.embedding](config.vocab_size, config.n_embd)
        self.stack = nn.ModuleList(
            nn.Linear(n_hidden if i else inputs, n_hidden, bias=config.bias) for i in range(config.n_layer)
        )
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = Dropout(config.dropout)
        self.lm_head = nn.Linear(n_hidden, config.vocab_size, bias=config.bias)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices normal, 1 / sqrt(inputs), to keep the numbers' size; head 0, so that all tokens have one chance."""
        for layer in self.stack:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(self.lm_head.weight)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, idx: Tensor, targets: Tensor | None = None, caches: None = None) -> tuple[Tensor, Tensor | None]:
        """idx: (B, T) token ids. targets: (B, T), -1 where no loss is counted. There are no caches.

        Returns logits (B, T, V) and the mean cross-entropy in nats, None without targets.
        """
        window = self.config.window
        x = F.pad(self.wte(idx), (0, 0, window - 1, 0))  # (B, window - 1 + T, C)
        x = x.unfold(1, window, 1).mT.flatten(2)  # (B, T, window C), the oldest token first
        for layer in self.stack:
            x = self.dropout(self.activation(layer(x)))
        return finish(self, self.lm_head(x), targets)


def finish(model: nn.Module, logits: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """logits: (B, T, V), capped if the model says so; and the mean cross-entropy of the targets, (B, T), if any.

    In training the targets are smoothed: a share of label_smoothing of each is spread over all tokens, so that the
    model learns not to be too sure. Source: Szegedy et al. 2015, arXiv:1512.00567, section 7.
    """
    if soft_cap := model.config.logit_soft_cap:  # Source: Gemma 2, arXiv:2408.00118, section 2
        logits = soft_cap * torch.tanh(logits / soft_cap)
    if targets is None:
        return logits, None
    smoothing = model.config.label_smoothing if model.training else 0.0
    scores = logits.flatten(0, 1).float()
    return logits, F.cross_entropy(scores, targets.flatten(), ignore_index=-1, label_smoothing=smoothing)


MODELS = {"window_mlp": WindowMLP, "gpt": GPT, "transformer": Transformer}


NOT_WINDOW = {"model": "window_mlp"}
NGRAMS = {"not_with": {"ngrams": 0}}
ROTARY = {"only_with": {"position": "rotary"}}
ROPE_SCALING = ROTARY | {"not_with": {"rope_factor": 1.0}}


@dataclass(frozen=True)
class ModelConfig:
    """What a model is made of: all that a checkpoint needs to build it again."""

    model: str = setting(
        "gpt",
        "gpt: decoder only; transformer: encoder and decoder; window_mlp: a network without attention",
        group="model",
        choices=MODELS,
    )
    n_layer: int = setting(4, "blocks; transformer: in each of its two stacks; window_mlp: hidden layers", at_least=1)
    n_head: int = setting(4, "attention heads in a block", at_least=1, not_with=NOT_WINDOW)
    n_kv_head: int | None = setting(
        None,
        "heads of keys and values, shared by groups of query heads; None: n_head; 1: multi-query attention",
        at_least=1,
        not_with=NOT_WINDOW,
    )
    n_embd: int = setting(128, "embedding dimension: the width of the model", at_least=1)
    n_hidden: int | None = setting(
        None, "hidden neurons of an MLP; None: 4 n_embd, gated 8/3 n_embd, window_mlp window n_embd", at_least=1
    )
    block_size: int = setting(64, "context length in tokens; transformer: of the source and of the target", at_least=1)
    window: int = setting(
        0,
        "sliding window: tokens that each one attends to, itself included; 0: all; window_mlp: tokens read",
        at_least=0,
    )
    vocab_size: int | None = setting(
        None, "rows of the embedding; None: as many as the tokenizer has tokens; more are padding", at_least=1
    )
    dropout: float = setting(
        0.0, "probability that an activation is zeroed in training; 0.1 to 0.3 on small data", at_least=0, below=1
    )
    label_smoothing: float = setting(
        0.0,
        "fraction of each target that is spread over the vocabulary in training; 0.1 to translate",
        at_least=0,
        below=1,
    )
    bias: bool = setting(False, "bias terms in linear layers and layer norms, as in GPT-2")
    embedding: str = setting(
        "table", "table: trained; number: window_mlp reads a token as its own number, with n_embd=1", choices=EMBEDDINGS
    )
    ngrams: int = setting(
        0, "frequent n-grams up to this length have embeddings, too; 6 for characters; 0: off", at_least=0
    )
    ngram_dropout: float = setting(
        0.0,
        "probability that a position gets no n-gram embedding in training; 0.45 on small data",
        at_least=0,
        below=1,
        **NGRAMS,
    )
    ngram_rows: int | None = setting(
        None, "frequent n-grams: found in the training text, not chosen", at_least=1, **NGRAMS
    )
    tie_weights: bool = setting(True, "token embedding and output head share their weights", not_with=NOT_WINDOW)
    position: str = setting(
        "learned",
        "positional encoding: none, learned, sinusoidal, rotary or alibi",
        choices=POSITIONS,
        not_with=NOT_WINDOW,
    )
    rope_base: float = setting(10000.0, "base of the rotary frequencies (rope_theta)", above=1, **ROTARY)
    rope_factor: float = setting(
        1.0, "low frequencies are divided by this, as in Llama 3.1; 1: off", at_least=1, **ROTARY
    )
    rope_low_freq_factor: float = setting(
        1.0, "low are frequencies with fewer turns than this in rope_original_context", above=0, **ROPE_SCALING
    )
    rope_high_freq_factor: float = setting(
        4.0, "those with more turns than this stay as they are", above=0, **ROPE_SCALING
    )
    rope_original_context: int = setting(8192, "context length before the extension", at_least=1, **ROPE_SCALING)
    norm: str = setting("layernorm", "layernorm, rmsnorm or none", choices=NORMS, not_with=NOT_WINDOW)
    block: str = setting(
        "pre_norm",
        "norms and residuals: pre_norm, post_norm, plain (no residual) or parallel",
        choices=BLOCKS,
        not_with=NOT_WINDOW,
    )
    mlp: str = setting(
        "plain",
        "feed-forward network: plain, gated (with activation=silu: SwiGLU) or none",
        choices=MLPS,
        not_with=NOT_WINDOW,
    )
    activation: str = setting(
        "gelu", "relu, gelu, gelu_tanh, silu or relu_squared", choices=ACTIVATIONS, not_with={"mlp": "none"}
    )
    qk_norm: bool = setting(
        False, "RMS norm on queries and keys, which bounds the attention scores", not_with=NOT_WINDOW
    )
    embed_norm: bool = setting(
        False, "a norm right after the embedding", not_with={"model": "window_mlp", "norm": "none"}
    )
    logit_soft_cap: float = setting(0.0, "logits are kept between -cap and cap by tanh; 0: no cap", at_least=0)
    init: str = setting(
        "gpt2",
        "initial weights: gpt2, or zero (each block starts as the identity)",
        choices=("gpt2", "zero"),
        not_with=NOT_WINDOW,
    )

    def __post_init__(self):
        check(self)
        if self.window > self.block_size:
            raise ValueError(f"window={self.window} must be at most block_size={self.block_size}: no text is longer")
        if self.model == "window_mlp":
            self.check_window_mlp()
        else:
            self.check_transformer()

    def check_window_mlp(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1: model=window_mlp reads that many tokens")
        if self.ngrams:
            raise ValueError(f"ngrams={self.ngrams} must be 0: model=window_mlp reads its tokens side by side anyway")
        if self.embedding == "number" and self.n_embd != 1:
            raise ValueError(f"n_embd={self.n_embd} must be 1: embedding=number gives each token a single number")

    def check_transformer(self) -> None:
        if self.ngrams and self.ngrams < 2:
            raise ValueError(f"ngrams={self.ngrams} must be 0, or at least 2: single tokens have their vectors anyway")
        n_kv_head = self.n_kv_head or self.n_head
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if self.n_head % n_kv_head:
            raise ValueError(f"n_head={self.n_head} must be a multiple of n_kv_head={n_kv_head}: heads share evenly")
        if self.position == "rotary" and self.n_embd // self.n_head % 2:
            raise ValueError(f"position=rotary turns pairs: n_embd/n_head={self.n_embd}/{self.n_head} must be even")
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        if low >= high:
            raise ValueError(f"rope_low_freq_factor={low} must be below rope_high_freq_factor={high}")
        if self.embedding != "table":
            raise ValueError(f"embedding={self.embedding} is for model=window_mlp; model={self.model} trains a table")
        if self.init == "zero" and not BLOCKS[self.block].residual:
            raise ValueError(
                f"init=zero must not meet block={self.block}: no block would ever give anything but 0; take init=gpt2"
            )
        if not MLPS[self.mlp]:
            if self.n_hidden is not None:
                raise ValueError(f"n_hidden={self.n_hidden} is the width of a network that mlp={self.mlp} leaves out")
            if self.block == "parallel":
                raise ValueError(f"block=parallel needs a feed-forward network beside attention, not mlp={self.mlp}")


def build(config: ModelConfig) -> nn.Module:
    """A new model with freshly drawn weights, on the CPU."""
    return MODELS[config.model](config)


def count_parameters(model: nn.Module) -> int:
    """Numbers that training sets; a table that is used twice counts once."""
    return sum(p.numel() for p in model.parameters())


def flops_per_token(model: nn.Module) -> int:
    """Floating-point operations to train on one token: forward, and twice as many backward.

    Each weight of a matrix multiplies and adds once (2), and attention takes 2 C of both for each token it looks at;
    heads that share keys and values do as much of that as heads that do not. Of pairs it is the work on one token of
    the target and, in an encoder, one of the source, in texts of block_size tokens.
    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    config = model.config
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    attentions = sum(isinstance(m, Attention) for m in model.modules())
    return 6 * matrices + 12 * attentions * config.n_embd * (config.window or config.block_size)
