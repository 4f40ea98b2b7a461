"""Every block of a transformer, the GPT and the encoder-decoder Transformer built from them.

Shapes: B batch, T target length, S source length (tokens attended to), C n_embd, H heads, D head size (C / H unless
head_size says otherwise), V vocabulary.

The GPT, with its default blocks (block=pre_norm):

    idx (B, T)
     |
     embedding + positional encoding
     |
     |--- norm -- attention -- dropout --+     each token attends to the tokens before it
     +<----------------------------------|
     |--- norm -- feed-forward -- dropout --+  each token by itself
     +<-------------------------------------|  ... both n_layer times
     |
     norm -- head
     |
    logits (B, T, V)                           softmax makes them the probabilities of the next token

The original transformer, which translates, is two such stacks. In the encoder each token of the source attends to all
of them; the decoder is the picture above with a third branch between its two, cross-attention, in which each token of
the target attends to the encoder's output.

A variant is one class or function and one line in a dictionary (NORMS, POSITIONS, ...); the config names it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from humptygpt.config import check, setting
from humptygpt.finetune import lora
from humptygpt.layers import (
    ACTIVATIONS,
    NO_MASK,
    CausalConv,
    DecoderState,
    Dropout,
    LayerState,
    Linear,
    Mask,
    PositionIds,
    attend,
    attention_mask,
    distances,
    with_loss,
)
from humptygpt.window_mlp.network import EMBEDDINGS, WindowMLP

# --------------------------------------------------------------------------------------
# Norms: keep activations at a scale at which a deep network trains well.


class LayerNorm(nn.LayerNorm):
    """(x - mean) / standard deviation over the last dimension, times a trained scale and, with bias, plus a bias.

    Source: Ba et al. 2016, arXiv:1607.06450.
    """

    def __init__(self, config: "ModelConfig"):
        super().__init__(config.n_embd, eps=config.norm_eps, bias=config.bias)


class RMSNorm(nn.RMSNorm):
    """x / root mean square over the last dimension, times a trained scale; no mean is subtracted.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(self, config: "ModelConfig"):
        super().__init__(config.n_embd, eps=config.norm_eps)


class NoNorm(nn.Identity):
    """x as it is."""


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm, "none": NoNorm}


# --------------------------------------------------------------------------------------
# Positional encodings: attention alone cannot tell the order of its tokens. A scheme can act in three places.


class PositionalEncoding(nn.Module):
    """No positional encoding: three hooks that change nothing. Each scheme overrides one of them."""

    def __init__(self, config: "ModelConfig"):
        super().__init__()

    def embed(self, x: Tensor, at: PositionIds) -> Tensor:
        """x: (B, T, C), the token embeddings. Returns (B, T, C)."""
        return x

    def rotary(self, at: PositionIds) -> tuple[Tensor, Tensor] | None:
        """(cos, sin) for rotate(), each (T, D) or (B, 1, T, D)."""
        return None

    def score_bias(self, T: int, S: int) -> Tensor | None:
        """(1, H, T, S), added to the scores before softmax; the queries are the last T of the S positions."""
        return None


class LearnedPosition(PositionalEncoding):
    """One trained vector per position of the context, added to the token's embedding, as in GPT-2."""

    def __init__(self, config: "ModelConfig"):
        super().__init__(config)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)

    def embed(self, x: Tensor, at: PositionIds) -> Tensor:
        return x + self.wpe.weight[at]


class SinusoidalPosition(PositionalEncoding):
    """Fixed sinusoids of geometrically spaced wavelengths, added to the embedding.

    Features 2i and 2i + 1 are sin and cos of p / 10000^(2i/C) at position p. The embedding is multiplied by sqrt(C)
    first, or the sinusoids would dominate it. Source: Vaswani et al. 2017, arXiv:1706.03762, sections 3.4 and 3.5.
    """

    def __init__(self, config: "ModelConfig"):
        super().__init__(config)
        i = torch.arange(config.n_embd)
        frequency = 10000.0 ** (-(i - i % 2) / config.n_embd)
        position = torch.arange(config.block_size, dtype=torch.float32)
        angle = position[:, None] * frequency  # (block_size, C)
        sinusoids = torch.where(i % 2 == 0, angle.sin(), angle.cos())
        self.register_buffer("sinusoids", sinusoids, persistent=False)

    def embed(self, x: Tensor, at: PositionIds) -> Tensor:
        return x * math.sqrt(x.shape[-1]) + self.sinusoids[at]


class RotaryPosition(PositionalEncoding):
    """Rotate pairs of features of queries and keys by angles proportional to position: q.k depends on distance alone.

    Pair i of the D / 2 pairs turns by rope_base^(-2i/D) radians per position, computed in float32.
    Source: Su et al. 2021, arXiv:2104.09864, eq. 34; pairs are (i, i + D/2), the layout of Llama's weights.

    rope_factor extends the context of a trained model: frequencies with fewer than rope_low_freq_factor turns in
    rope_original_context are divided by it, so that no new angle occurs; those with more than rope_high_freq_factor
    turns, which tell neighbours apart, stay; between the two it is interpolated.
    Source: Grattafiori et al. 2024 (Llama 3), arXiv:2407.21783, and the code of Llama 3.1.
    """

    def __init__(self, config: "ModelConfig"):
        super().__init__(config)
        head_size = config.head_size or config.n_embd // config.n_head
        exponent = -torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
        frequency = config.rope_base**exponent  # (D / 2), in radians per position
        if config.rope_factor != 1:
            frequency = frequency * frequency_scale(
                frequency,
                config.rope_factor,
                config.rope_low_freq_factor,
                config.rope_high_freq_factor,
                config.rope_original_context,
            )
        position = torch.arange(config.block_size, dtype=torch.float32)
        angle = position[:, None] * frequency  # (block_size, D / 2)
        # (block_size, D)
        self.register_buffer("cos", angle.cos().repeat(1, 2), persistent=False)
        self.register_buffer(
            "sin", torch.cat([-angle.sin(), angle.sin()], dim=1), persistent=False
        )

    def rotary(self, at: PositionIds) -> tuple[Tensor, Tensor]:
        if isinstance(at, slice):
            return self.cos[at], self.sin[at]
        return self.cos[at][:, None], self.sin[at][:, None]


def frequency_scale(
    frequency: Tensor, factor: float, low: float, high: float, context: int
) -> Tensor:
    """Return what Llama 3.1 multiplies each rotary frequency by: see RotaryPosition."""
    turns = context * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # the fraction that is not divided
    return kept + (1 - kept) / factor


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) for all pairs at once. x: (B, H, T, D). Returns its shape and dtype."""
    cos, sin = rotary
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


class AlibiPosition(PositionalEncoding):
    """Scores decrease linearly with distance, at a different rate in each head.

    Source: Press et al. 2021, arXiv:2108.12409.
    """

    def __init__(self, config: "ModelConfig"):
        super().__init__(config)
        slopes = torch.tensor(alibi_slopes(config.n_head)).view(1, -1, 1, 1)
        self.register_buffer("slopes", slopes, persistent=False)

    def score_bias(self, T: int, S: int) -> Tensor:
        return -self.slopes * distances(T, S, self.slopes.device).abs()


def alibi_slopes(n_head: int) -> list[float]:
    """2^(-8/n), 2^(-16/n), ... 2^-8 for n heads, a power of two; more heads take every other slope of 2n heads."""
    n = 1 << (n_head.bit_length() - 1)  # the largest power of two that is not above n_head
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    between = [2 ** (-4 * i / n) for i in range(1, 2 * n, 2)]
    return slopes + between[: n_head - n]


POSITIONS = {
    "none": PositionalEncoding,
    "learned": LearnedPosition,
    "sinusoidal": SinusoidalPosition,
    "rotary": RotaryPosition,
    "alibi": AlibiPosition,
}


# --------------------------------------------------------------------------------------
# Attention


class BlockInputs(NamedTuple):
    """What is the same for all blocks of a stack in one forward pass.

    cached: where these tokens end in the state's buffers, and how many tokens the buffers hold.
    masks: of self-attention, {window: mask}. context_mask: of cross-attention.
    rotary: as from PositionalEncoding.rotary.
    context: (B, S, C), what cross-attention looks at; None where a state has its keys and values.
    padding: (B, T) bool, True where x is no token; None: nowhere.
    """

    cached: tuple[int, int] | None
    masks: dict[int, Mask]
    rotary: tuple[Tensor, Tensor] | None
    context: Tensor | None
    context_mask: Mask
    padding: Tensor | None


class Attention(nn.Module):
    """Several heads of attention side by side, their results concatenated and mixed.

    With n_kv_head below n_head, groups of query heads share one head of keys and values, which makes the decoder's
    state smaller. Source: Shazeer 2019, arXiv:1911.02150 (one for all); Ainslie et al. 2023, arXiv:2305.13245 (groups).
    """

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head or config.n_head
        self.head_size = config.head_size or C // config.n_head
        self.qk_norm = config.qk_norm
        self.dropout = Dropout(config.dropout)
        bias = config.bias if config.attn_bias is None else config.attn_bias
        self.q_proj = Linear(C, self.n_head * self.head_size, bias)
        self.k_proj = Linear(C, self.n_kv_head * self.head_size, bias)
        self.v_proj = Linear(C, self.n_kv_head * self.head_size, bias)
        self.o_proj = Linear(self.n_head * self.head_size, C, bias, ends_branch=True)

    def queries(self, x: Tensor) -> Tensor:
        """x: (B, T, C). Returns (B, H, T, D)."""
        return self.split_heads(self.q_proj(x), self.qk_norm)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, S, C). Returns twice (B, H or fewer, S, D)."""
        return self.split_heads(self.k_proj(x), self.qk_norm), self.split_heads(
            self.v_proj(x)
        )

    def split_heads(self, x: Tensor, norm: bool = False) -> Tensor:
        """x: (B, T, H D). norm: of each vector, which bounds the scores. Returns (B, H, T, D).

        Source of the norm: Henry et al. 2020, arXiv:2010.04245.
        """
        x = x.unflatten(-1, (-1, self.head_size))  # (B, T, H, D)
        if norm:
            x = F.rms_norm(x, x.shape[-1:])
        return x.transpose(1, 2)

    def attend_and_project(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """softmax(q k^T / sqrt(D) + mask) v in each head, and mix the heads. q, k, v, mask: as attend() takes them.

        Returns (B, T, C).
        """
        y = attend(q, k, v, mask, self.dropout)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    """Queries, keys and values from one text. window: tokens that a query sees, itself included; 0: all."""

    def __init__(self, config: "ModelConfig", window: int = 0):
        super().__init__(config)
        self.window = window

    def forward(
        self, x: Tensor, inputs: BlockInputs, state: LayerState | None = None
    ) -> Tensor:
        """x: (B, T, C), which follow the tokens in the state. Returns (B, T, C)."""
        q = self.queries(x)
        k, v = self.keys_and_values(x)
        if inputs.rotary:
            q = rotate(q, inputs.rotary)
            k = rotate(k, inputs.rotary)
        if state:
            k, v = state.append(k, v, *inputs.cached)
        return self.attend_and_project(q, k, v, inputs.masks[self.window])


class CrossAttention(Attention):
    """Queries from one text, keys and values from another, whose positions are unrelated."""

    def forward(
        self, x: Tensor, inputs: BlockInputs, state: LayerState | None = None
    ) -> Tensor:
        """x: (B, T, C). Returns (B, T, C)."""
        k, v = state.cross if state else self.keys_and_values(inputs.context)
        return self.attend_and_project(self.queries(x), k, v, inputs.context_mask)


# --------------------------------------------------------------------------------------
# Feed-forward networks: the article's first network, applied to every token by itself.


class MLP(nn.Module):
    """Two linear layers with an activation between them; n_hidden neurons, by default 4 C.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.3.
    """

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        n_hidden = config.n_hidden or 4 * config.n_embd
        bias = config.bias if config.mlp_bias is None else config.mlp_bias
        self.activation = ACTIVATIONS[config.activation]
        self.up_proj = Linear(config.n_embd, n_hidden, bias)
        self.down_proj = Linear(n_hidden, config.n_embd, bias, ends_branch=True)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C). Returns (B, T, C)."""
        return self.down_proj(self.activation(self.up_proj(x)))


class GatedMLP(nn.Module):
    """Each hidden neuron is multiplied by a gate, which went through the activation. With silu: SwiGLU.

    By default 8/3 C neurons, so that three matrices cost what the two of MLP do, rounded up to a multiple of 8, since
    GPUs multiply matrices in tiles of 8. Source: Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        n_hidden = config.n_hidden or 8 * math.ceil(config.n_embd / 3)
        bias = config.bias if config.mlp_bias is None else config.mlp_bias
        self.activation = ACTIVATIONS[config.activation]
        self.gate_proj = Linear(config.n_embd, n_hidden, bias)
        self.up_proj = Linear(config.n_embd, n_hidden, bias)
        self.down_proj = Linear(n_hidden, config.n_embd, bias, ends_branch=True)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C). Returns (B, T, C)."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


MLPS = {"plain": MLP, "gated": GatedMLP, "none": None}


# --------------------------------------------------------------------------------------
# Blocks: how attention, feed-forward and norms are joined. A stack repeats one.


class Block(nn.Module):
    """What all kinds of block are made of; each kind's forward joins the parts.

    layer: its number in the stack, from 0. cross: cross-attention comes between self-attention and the feed-forward
    network. mlp=none: there is no such network.
    """

    residual = True  # is each branch added to its input?
    one_norm = False  # do all branches read the same normalised input?
    ends_with_norm = False  # if so, the stack needs no last norm

    def __init__(self, config: "ModelConfig", layer: int = 0, cross: bool = False):
        super().__init__()
        norm = NORMS[config.norm]
        mlp = MLPS[config.mlp]
        self.layer = layer
        self.attn_norm = norm(config)
        self.attn = SelfAttention(config, config.window)
        if cross and not self.one_norm:
            self.cross_norm = norm(config)
        self.cross_attn = CrossAttention(config) if cross else None
        if mlp and not self.one_norm:
            self.mlp_norm = norm(config)
        self.conv = (
            CausalConv(config.mlp_conv, config.n_embd) if config.mlp_conv and mlp else None
        )
        self.mlp = mlp(config) if mlp else None
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x: Tensor, inputs: BlockInputs, state: LayerState | None = None
    ) -> Tensor:
        """x: (B, T, C), which follow the tokens in the state. Returns (B, T, C)."""
        raise NotImplementedError

    def feed_forward(
        self, x: Tensor, inputs: BlockInputs, state: LayerState | None
    ) -> Tensor:
        """The convolution, where there is one, and the feed-forward network. x: (B, T, C). Returns (B, T, C)."""
        if self.conv:
            if inputs.padding is not None:
                x = x.masked_fill(inputs.padding[..., None], 0)
            x = self.conv(x, state)
        return self.mlp(x)


class PreNormBlock(Block):
    """The norm is on the branch: the residual stream runs through untouched.

    Source: Radford et al. 2019 (GPT-2); Xiong et al. 2020, arXiv:2002.04745.
    """

    def forward(
        self, x: Tensor, inputs: BlockInputs, state: LayerState | None = None
    ) -> Tensor:
        x = x + self.dropout(self.attn(self.attn_norm(x), inputs, state))
        if self.cross_attn:
            x = x + self.dropout(self.cross_attn(self.cross_norm(x), inputs, state))
        if self.mlp:
            x = x + self.dropout(self.feed_forward(self.mlp_norm(x), inputs, state))
        return x


class PostNormBlock(Block):
    """The norm is on the residual stream, as in the original transformer. It needs more warmup.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.1.
    """

    ends_with_norm = True

    def forward(
        self, x: Tensor, inputs: BlockInputs, state: LayerState | None = None
    ) -> Tensor:
        x = self.attn_norm(x + self.dropout(self.attn(x, inputs, state)))
        if self.cross_attn:
            x = self.cross_norm(x + self.dropout(self.cross_attn(x, inputs, state)))
        if self.mlp:
            x = self.mlp_norm(x + self.dropout(self.feed_forward(x, inputs, state)))
        return x


class PlainBlock(Block):
    """No residual connections, to see what they are good for.

    Source of residual connections: He et al. 2015, arXiv:1512.03385.
    """

    residual = False

    def forward(
        self, x: Tensor, inputs: BlockInputs, state: LayerState | None = None
    ) -> Tensor:
        x = self.dropout(self.attn(self.attn_norm(x), inputs, state))
        if self.cross_attn:
            x = self.dropout(self.cross_attn(self.cross_norm(x), inputs, state))
        if self.mlp:
            x = self.dropout(self.feed_forward(self.mlp_norm(x), inputs, state))
        return x


class ParallelBlock(Block):
    """All branches read the same input, so that a GPU can compute them at once.

    Source: Wang and Komatsuzaki 2021 (GPT-J); Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, section 2.
    """

    one_norm = True

    def forward(
        self, x: Tensor, inputs: BlockInputs, state: LayerState | None = None
    ) -> Tensor:
        y = self.attn_norm(x)
        x = x + self.dropout(self.attn(y, inputs, state))
        if self.cross_attn:
            x = x + self.dropout(self.cross_attn(y, inputs, state))
        return x + self.dropout(self.feed_forward(y, inputs, state))


BLOCKS = {
    "pre_norm": PreNormBlock,
    "post_norm": PostNormBlock,
    "plain": PlainBlock,
    "parallel": ParallelBlock,
}


class Stack(nn.Module):
    """All between the embedding and the head: positional encoding, n_layer blocks, and a last norm if they need one.

    causal: no token attends to a later one. cross: each token attends to another text, too. With
    checkpoint_activations, training keeps the input of each block alone and computes the rest again in the backward
    pass, with the same dropout masks. Source: Chen et al. 2016, arXiv:1604.06174.
    """

    def __init__(self, config: "ModelConfig", causal: bool, cross: bool = False):
        super().__init__()
        block = BLOCKS[config.block]
        self.block_size = config.block_size
        self.causal = causal
        self.checkpoint_activations = False
        self.position = POSITIONS[config.position](config)
        self.embed_norm = NORMS[config.norm if config.embed_norm else "none"](config)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(block(config, i, cross) for i in range(config.n_layer))
        self.norm = NORMS["none" if block.ends_with_norm else config.norm](config)
        self.windows = {block.attn.window for block in self.blocks}

    def forward(self, x: Tensor, state: DecoderState | None = None, **texts) -> Tensor:
        """x: (B, T, C), embedded tokens, which follow those in the state. texts: of enter(). Returns (B, T, C)."""
        x, inputs = self.enter(x, state, **texts)
        layers = state.layers if state else [None] * len(self.blocks)
        for block, layer in zip(self.blocks, layers, strict=True):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, inputs, layer, use_reentrant=False)
            else:
                x = block(x, inputs, layer)
        if state:
            state.length += x.shape[1]
        return self.norm(x)

    def enter(
        self,
        x: Tensor,
        state: DecoderState | None = None,
        padding: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Mask = NO_MASK,
    ) -> tuple[Tensor, BlockInputs]:
        """Return what enters the first block, and what all blocks need beside it.

        padding: (B, T), True where x is no token. context: (B, S, C), for cross-attention, and its mask.
        """
        T = S = x.shape[1]
        start = state.length if state else 0
        end = start + T
        assert end <= self.block_size, f"{end} tokens, but block_size is {self.block_size}"
        at = slice(start, end)
        cached = None
        if state:
            S = state.make_room(T)
            at = state.positions(T)
            padding = state.padding_mask(T, S)
            cached = (S, state.size)
        bias = self.position.score_bias(T, S)
        masks = {
            window: attention_mask(
                T,
                S,
                x.device,
                causal=self.causal,
                window=window,
                bias=bias,
                padding=padding,
            )
            for window in self.windows
        }
        new_padding = None if padding is None else padding[:, S - T :]
        rotary = self.position.rotary(at)
        inputs = BlockInputs(cached, masks, rotary, context, context_mask, new_padding)
        return self.dropout(self.embed_norm(self.position.embed(x, at))), inputs


# --------------------------------------------------------------------------------------
# Models


class GPT(nn.Module):
    """A stack of causal blocks that reads tokens and predicts the next one at each position.

    Source: Radford et al. 2018 (GPT), "Improving language understanding by generative pre-training".
    """

    tasks = ("language modelling", "translation")
    has_encoder = (
        False  # a source to translate is the beginning of the text that it continues
    )
    has_state = True  # can it keep what it has computed for the tokens read so far?

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.stack = Stack(config, causal=True)
        self.lm_head = make_head(config, self.wte)
        init_weights(self)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        state: DecoderState | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """idx: (B, T) token ids, which follow the tokens in the state. targets: (B, T), -1 where no loss is counted.

        last_only: predict only the token after the last one. Returns logits (B, T or 1, V) and the mean cross-entropy
        in nats, None without targets.
        """
        x = self.stack(self.wte(idx), state)
        return with_loss(self, self.lm_head(x[:, -1:] if last_only else x), targets)

    def next_logits(self, idx: Tensor, state: DecoderState | None = None) -> Tensor:
        """Logits of the token after the last one: (B, V)."""
        return self.forward(idx, state=state, last_only=True)[0][:, -1]

    def make_state(self, size: int | None = None) -> DecoderState:
        """An empty state; size: as DecoderState has it; None: block_size."""
        block_size = self.config.block_size
        size = min(size or block_size, block_size)
        return DecoderState(self.config.n_layer, size, self.stack.windows)


class Transformer(nn.Module):
    """An encoder that reads the source, and a decoder that writes the target, attending to the source at every token.

    Both share one vocabulary and its embedding. Source: Vaswani et al. 2017, arXiv:1706.03762.
    """

    tasks = ("translation",)
    has_encoder = True
    has_state = True

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.encoder = Stack(config, causal=False)
        self.decoder = Stack(config, causal=True, cross=True)
        self.lm_head = make_head(config, self.wte)
        init_weights(self)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        state: DecoderState | None = None,
        source: Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """source: (B, S) token ids, -1 after the end of the shorter ones; not needed with a state, which holds it.

        idx: (B, T) token ids of the target so far, which follow those in the state; the first is end-of-text. targets:
        (B, T), -1 where no loss is counted. last_only, and what it returns: as GPT.forward.
        """
        context, mask = (None, NO_MASK) if state else self.encode(source)
        x = self.decoder(self.wte(idx), state, context=context, context_mask=mask)
        return with_loss(self, self.lm_head(x[:, -1:] if last_only else x), targets)

    def next_logits(self, idx: Tensor, state: DecoderState) -> Tensor:
        """Logits of the token after the last one: (B, V)."""
        return self.forward(idx, state=state, last_only=True)[0][:, -1]

    def encode(self, source: Tensor) -> tuple[Tensor, Mask]:
        """source: (B, S), as in forward. Returns the encoder's output, (B, S, C), and the mask of its padding."""
        padding = source < 0
        mask = attention_mask(1, source.shape[1], source.device, padding=padding)
        return self.encoder(self.wte(source.clamp(min=0)), padding=padding), mask

    def make_state(self, source: Tensor) -> DecoderState:
        """A state with room for block_size tokens of the target, and the sources read, (B, S), all equally long."""
        context, _ = self.encode(source)
        assert (source >= 0).all(), "sources must be equally long"
        config = self.config
        state = DecoderState(config.n_layer, config.block_size, self.decoder.windows)
        for block, layer in zip(self.decoder.blocks, state.layers, strict=True):
            layer.cross = block.cross_attn.keys_and_values(context)
        return state


def make_head(config: "ModelConfig", wte: nn.Embedding) -> nn.Linear:
    """The output head, which shares the embedding's matrix where weights are tied."""
    head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
    if config.tie_weights:  # Source: Press and Wolf 2016, arXiv:1608.05859
        head.weight = wte.weight
    return head


def init_weights(model: GPT | Transformer) -> None:
    """All weights, as the config's init says:

                                   gpt2                             zero
    embeddings                     normal, 0.02                     normal, 1; tied 1 / sqrt(n_embd)
    linear layers                  normal, 0.02                     normal, 1 / sqrt(inputs)
    last layer of each branch      normal, 0.02 / sqrt(branches)    0, so that a new block is the identity
    an untied head                 normal, 0.02                     0, so that all tokens are equally likely
    biases, norms                  0, 1                             0, 1

    GPT-2 divides by the square root of the number of residual branches in a stack, 2 n_layer with attention and
    feed-forward, to keep the variance of the residual stream that of its input. Without residual connections
    (block=plain) the linear layers of the blocks alone carry the signal: all are 1 / sqrt(inputs), which keeps it.
    """
    config = model.config
    branches = {}  # {last layer of a residual branch: how many its stack has}
    for stack in model.children():
        linears = [module for module in stack.modules() if isinstance(module, Linear)]
        ends = [linear for linear in linears if linear.ends_branch]
        branches |= dict.fromkeys(ends, len(ends))

    def std(module: nn.Linear | nn.Embedding) -> float:
        if config.init == "zero":
            if isinstance(module, nn.Embedding):
                return config.n_embd**-0.5 if config.tie_weights else 1.0
            zero = module in branches or (
                module is model.lm_head and not config.tie_weights
            )
            return 0.0 if zero else module.in_features**-0.5
        if isinstance(module, Linear) and not BLOCKS[config.block].residual:
            return module.in_features**-0.5
        return 0.02 / math.sqrt(branches.get(module, 1))

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std(module))
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


MODELS = {"window_mlp": WindowMLP, "gpt": GPT, "transformer": Transformer}


# --------------------------------------------------------------------------------------
# The config

ATTENTION = {"not_with": {"model": "window_mlp"}}
ROTARY = {"only_with": {"position": "rotary"}}
SCALED = ROTARY | {"not_with": {"rope_factor": 1.0}}
MLP_ONLY = {"not_with": {"model": "window_mlp", "mlp": "none"}}
NORM = {"not_with": {"model": "window_mlp", "norm": "none"}}
LORA = {"not_with": {"lora_rank": 0}}
PROBABILITY = {"at_least": 0, "below": 1}


@dataclass(frozen=True)
class ModelConfig:
    """What a model is made of: all that a checkpoint needs to build it again."""

    model: str = setting(
        "gpt",
        "transformer: encoder-decoder; window_mlp: no attention",
        "model",
        choices=MODELS,
    )
    n_layer: int = setting(
        4,
        "blocks; of a transformer, in each stack; of window_mlp, hidden layers",
        at_least=1,
    )
    n_head: int = setting(2, "attention heads in a block", at_least=1, **ATTENTION)
    n_kv_head: int | None = setting(
        None, "key-value heads (GQA); None: n_head; 1: MQA", at_least=1, **ATTENTION
    )
    n_embd: int = setting(128, "embedding dimension: the width of the model", at_least=1)
    head_size: int | None = setting(
        None,
        "features of an attention head; None: n_embd/n_head",
        at_least=1,
        at_most=2**16,
        **ATTENTION,
    )
    n_hidden: int | None = setting(
        None,
        "hidden neurons; None: 4 n_embd, gated 8/3 n_embd, window_mlp window n_embd",
        at_least=1,
        not_with={"mlp": "none"},
    )
    block_size: int = setting(
        256,
        "context length in tokens; transformer: of source and of target",
        at_least=1,
        at_most=2**20,
    )
    window: int = setting(
        0,
        "sliding window of attention in tokens, 0: all; window_mlp: tokens read",
        at_least=0,
    )
    vocab_size: int | None = setting(
        None, "rows of the embedding; None: the tokenizer's; more are padding", at_least=1
    )
    dropout: float = setting(
        0.0, "probability that an activation is zeroed in training", **PROBABILITY
    )
    label_smoothing: float = setting(
        0.0, "fraction of a target spread over the vocabulary in training", **PROBABILITY
    )
    bias: bool = setting(False, "bias terms in linear layers and layer norms, as in GPT-2")
    attn_bias: bool | None = setting(
        None, "bias terms in attention's linear layers; None: bias", **ATTENTION
    )
    mlp_bias: bool | None = setting(
        None, "and in those of the feed-forward network; None: bias", **MLP_ONLY
    )
    embedding: str = setting(
        "table",
        "number: a token is its own number",
        choices=EMBEDDINGS,
        only_with={"model": "window_mlp"},
    )
    tie_weights: bool = setting(
        False, "embedding and output head share their weights", **ATTENTION
    )
    position: str = setting("rotary", "positional encoding", choices=POSITIONS, **ATTENTION)
    rope_base: float = setting(
        10000.0, "base of the rotary frequencies (rope_theta)", above=1, **ROTARY
    )
    rope_factor: float = setting(
        1.0, "divides the low frequencies, as in Llama 3.1; 1: off", at_least=1, **ROTARY
    )
    rope_low_freq_factor: float = setting(
        1.0, "frequencies with fewer turns in the context are low", above=0, **SCALED
    )
    rope_high_freq_factor: float = setting(
        4.0, "and stays as it is with more turns than this", above=0, **SCALED
    )
    rope_original_context: int = setting(
        8192, "context length before the extension", at_least=1, **SCALED
    )
    norm: str = setting("layernorm", "norm of the activations", choices=NORMS, **ATTENTION)
    norm_eps: float = setting(
        1e-5, "added to a norm's variance or mean square", above=0, **NORM
    )
    block: str = setting("pre_norm", "norms and residuals", choices=BLOCKS, **ATTENTION)
    mlp: str = setting(
        "plain", "feed-forward network; gated with silu: SwiGLU", choices=MLPS, **ATTENTION
    )
    mlp_conv: int = setting(
        3,
        "tokens that a causal convolution before the feed-forward network looks back; 0: off",
        at_least=0,
        **MLP_ONLY,
    )
    activation: str = setting(
        "relu_squared",
        "nonlinearity of the feed-forward network",
        choices=ACTIVATIONS,
        not_with={"mlp": "none"},
    )
    qk_norm: bool = setting(
        True, "RMS norm of queries and keys, which bounds the scores", **ATTENTION
    )
    embed_norm: bool = setting(False, "a norm after the embedding", **NORM)
    logit_soft_cap: float = setting(
        0.0, "keeps logits between -cap and cap by tanh; 0: no cap", at_least=0, at_most=1e6
    )
    init: str = setting(
        "zero",
        "zero: each block starts as the identity",
        choices=("gpt2", "zero"),
        **ATTENTION,
    )
    lora_rank: int = setting(
        0, "LoRA: rank of the matrices that train beside a model's; 0: off", at_least=0
    )
    lora_alpha: float = setting(
        16.0, "LoRA: what they add is scaled by lora_alpha / lora_rank", above=0, **LORA
    )
    lora_targets: str = setting(
        "q_proj,v_proj", "LoRA: layers that have it, by the ends of their names", **LORA
    )

    def __post_init__(self):
        check(self)
        if self.window > self.block_size:
            raise ValueError(
                f"window={self.window} must be at most block_size={self.block_size}: no text is longer"
            )
        if self.model == "window_mlp":
            self.check_window_mlp()
        else:
            self.check_transformer()

    def check_window_mlp(self) -> None:
        if self.window < 1:
            raise ValueError(
                f"window={self.window} must be at least 1: model=window_mlp reads that many tokens"
            )
        if self.embedding == "number" and self.n_embd != 1:
            raise ValueError(
                f"n_embd={self.n_embd} must be 1: embedding=number gives each token a single number"
            )

    def check_transformer(self) -> None:
        n_kv_head = self.n_kv_head or self.n_head
        if self.n_embd % self.n_head and not self.head_size:
            raise ValueError(
                f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}, or set head_size"
            )
        if self.n_head % n_kv_head:
            raise ValueError(
                f"n_head={self.n_head} must be a multiple of n_kv_head={n_kv_head}: heads share evenly"
            )
        head_size = self.head_size or self.n_embd // self.n_head
        if self.position == "rotary" and head_size % 2:
            raise ValueError(
                f"position=rotary turns pairs: head_size={head_size}, or n_embd/n_head, must be even"
            )
        if self.init == "zero" and not BLOCKS[self.block].residual:
            raise ValueError(
                f"init=zero must not meet block={self.block}: no block would ever give anything but 0; take init=gpt2"
            )
        if self.mlp == "none" and self.block == "parallel":
            raise ValueError(
                f"block=parallel needs a feed-forward network beside attention, not mlp={self.mlp}"
            )


def build(config: ModelConfig) -> nn.Module:
    """A new model with random weights, on the CPU."""
    model = MODELS[config.model](config)
    return lora.add(model) if config.lora_rank else model


def build_on_meta(config: ModelConfig) -> nn.Module:
    """Build a model without memory for its weights."""
    with torch.device("meta"), WithoutValues():
        return build(config)


class WithoutValues(TorchFunctionMode):
    """Weights on the meta device are not initialized, and tables of positions are on the CPU.

    Either would make torch load its compiler, for more than a second.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        if func in (torch.arange, torch.tensor):
            kwargs = kwargs | {"device": "cpu"}
        return func(*args, **kwargs)


def count_parameters(model: nn.Module) -> int:
    """Trained parameters; a matrix that is used twice counts once."""
    return sum(p.numel() for p in model.parameters())


def flops_per_token(model: nn.Module) -> int:
    """Floating-point operations to train on one token: forward, and twice as many backward.

    Each weight of a matrix multiplies and adds once (2), and attention takes 2 H D of both for each token attended to,
    also where heads share keys and values. Of sentence pairs it is the work on one token of the target and, in an
    encoder, one of the source, in texts of block_size tokens. Source: Chowdhery et al. 2022, arXiv:2204.02311, app. B.
    """
    config = model.config
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    attended = 0
    for module in model.modules():
        if isinstance(module, Attention):
            tokens = getattr(module, "window", 0) or config.block_size
            attended += tokens * module.n_head * module.head_size
    return 6 * matrices + 12 * attended
