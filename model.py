"""A GPT, and below it its variants. Requires only PyTorch.

    idx (B, T)                               the ids of T tokens, in each of B texts
     |
     embedding + position -- dropout         a vector of C features for each token
     |
     |--- norm -- attention -- dropout --+   a branch: each token looks at itself and the tokens before it. What it
     +<----------------------------------|   finds is added to the residual stream, the line on the left
     |--- norm -- MLP -- dropout --------+   another branch: each token by itself
     +<----------------------------------|   ... n_layer such blocks of two branches
     |
     norm -- head
     |
    logits (B, T, V)                         softmax turns them into probabilities of the next token

Shapes: B batch, T new tokens, S all tokens (those in the cache, then the new ones), C n_embd, H n_head (keys and values
may have fewer heads, n_kv_head), D features of a head, V vocabulary.

The first half is the whole GPT, in reading order: ModelConfig, LayerNorm, LearnedPosition, SelfAttention, attend, MLP,
Block, Stack, Cache, GPT, init_weights. You may stop there. The second half has what a config can select instead, by a
line in a dictionary (NORMS, BLOCKS, ...). The article's way to a GPT, number by number, is from_scratch.py.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build a GPT. A checkpoint stores it with the weights."""

    # model
    model: str = "gpt"  # transformer: encoder-decoder; window_mlp: no attention; number_mlp: no attention or embedding
    n_members: int = 1  # GPTs side by side, whose predictions are averaged
    n_layer: int = 4  # number of blocks; transformer: per stack; window_mlp: hidden layers
    n_head: int = 2  # attention heads in a block
    n_kv_head: int | None = None  # key and value heads (GQA); None: n_head; 1: MQA
    n_embd: int = 128  # embedding dimension: the width of the model
    n_hidden: int | None = None  # hidden neurons; None: 4 n_embd, or 8/3 n_embd if gated
    block_size: int = 256  # context length in tokens; transformer: source and target each
    window: int = 0  # tokens that a token attends to, including itself; 0: all; window_mlp: tokens read
    vocab_size: int | None = None  # embedding rows; None: train.py asks the tokenizer
    dropout: float = 0.0  # probability that an activation is zeroed in training
    label_smoothing: float = 0.0  # fraction of each target spread over the vocabulary
    bias: bool = False  # biases in norms and linear layers, not in the head; GPT-2 has them
    tie_weights: bool = True  # the embedding and the output head share one matrix
    position: str = "learned"  # positional encoding
    rope_base: float = 10000.0  # rotary: base of the frequencies (rope_theta)
    rope_factor: float = 1.0  # rotary: divisor of low frequencies, as in Llama 3.1; 1: off
    norm: str = "layernorm"  # kind of norm
    block: str = "pre_norm"  # arrangement of norms and residual connections in a block
    attention: str = "softmax"  # kind of attention
    mlp: str = "plain"  # feed-forward network; gated with silu is SwiGLU
    mlp_conv: int = 0  # earlier tokens seen by a causal convolution before the MLP; 0: off
    activation: str = "gelu"  # nonlinearity of the feed-forward network
    qk_norm: bool = False  # RMS norm of queries and keys, which bounds the scores
    embed_norm: bool = False  # a norm after the embedding and its positional encoding
    logit_soft_cap: float = 0.0  # limits logits to between -cap and cap with tanh; 0: off
    init: str = "gpt2"  # initial weights; zero: each branch of a block starts at 0
    # imported models
    head_size: int | None = None  # features per attention head; None: n_embd / n_head
    attn_bias: bool | None = None  # biases in attention's linear layers; None: same as bias
    mlp_bias: bool | None = None  # biases in the feed-forward network; None: same as bias
    norm_eps: float = 1e-5  # added to a norm's variance or mean square
    rope_low_freq_factor: float = 1.0  # below this many rotations, divide by rope_factor
    rope_high_freq_factor: float = 4.0  # above this many rotations, do not divide
    rope_original_context: int = 8192  # original context, in which rotations are counted

    @classmethod
    def choices(cls) -> dict:
        """Map each setting that names a variant to the available variants."""
        return CHOICES

    def validate(self) -> None:
        """Raise ValueError for the first invalid value or combination of values."""
        check_values(self)
        check_combinations(self)

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.n_kv_head or self.n_head

    @property
    def features(self) -> int:
        """Number of features per attention head."""
        return self.head_size or self.n_embd // self.n_head


class LayerNorm(nn.LayerNorm):
    """(x - mean) / standard deviation over the last dimension, times a trained scale, plus a trained bias if bias=True.

    It keeps activations at a scale at which a deep network trains well. Source: Ba et al. 2016, arXiv:1607.06450.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config.n_embd, eps=config.norm_eps, bias=config.bias)


class LearnedPosition(nn.Module):
    """One trained vector per position of the context, added to the token's embedding, as in GPT-2."""

    rotation = score_bias = None  # what other encodings do in attention: see Position

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.wpe = nn.Embedding(config.block_size, config.n_embd)

    def embed(self, x, at):  # (B, T, C) -> (B, T, C); at: as in Shared
        return x + self.wpe.weight[at]


# Added to the scores, broadcastable to (B, H, T, S); -inf hides a key. None: hide only later tokens (T = 1 or T = S)
Mask = Tensor | None


class Shared(NamedTuple):
    """What all blocks share in one forward pass. share(), in the second half, computes it."""

    idx: Tensor  # (B, T), ids of the new tokens, for variants
    # their positions; (B, T) int64 if the texts of a batch start at different ones
    at: slice | Tensor
    end: int  # number of tokens read, including the new ones
    rotation: tuple[Tensor, Tensor] | None  # of position=rotary: see rotate()
    masks: dict[int, Mask]  # {window: mask}, by default {0: None}
    padding: Tensor | None  # (B, S) bool, True if a token is padding; None: no padding
    kept: dict[str, Tensor]  # what a layer leaves for later ones, or the caller gives to all
    losses: dict[str, Tensor]  # terms that layers add to the loss: see add_loss()


class SelfAttention(nn.Module):
    """H parallel heads, each computing softmax(q k^T / sqrt(D) + mask) v. Their outputs are concatenated and projected.

    A token's query q says what it looks for, its key k what it offers, and its value v what it gives.
    With n_kv_head below n_head, groups of query heads share key and value heads, so that the cache is smaller.
    Sources: Vaswani et al. 2017, arXiv:1706.03762; n_kv_head arXiv:2305.13245; qk_norm arXiv:2010.04245.
    layer: index of the block in its stack, from 0. cache: a LayerCache.
    """

    def __init__(self, config: ModelConfig, layer: int = 0):
        super().__init__()
        C, D = config.n_embd, config.features
        bias = config.bias if config.attn_bias is None else config.attn_bias
        self.window = config.window  # a pattern of windows would depend on layer
        self.kernel = attend  # models/attention.py replaces it with a fused kernel
        self.n_head = config.n_head
        self.head_size = D
        self.qk_norm = nn.RMSNorm(D, elementwise_affine=False) if config.qk_norm else None
        self.q_proj = nn.Linear(C, config.n_head * D, bias)
        self.k_proj = nn.Linear(C, config.kv_heads * D, bias)
        self.v_proj = nn.Linear(C, config.kv_heads * D, bias)
        self.o_proj = nn.Linear(config.n_head * D, C, bias)

    def forward(self, x, shared, cache=None):  # (B, T, C) -> (B, T, C)
        q, k, v = self.qkv(x, shared)
        if cache:  # it knows the keys and values of earlier tokens
            k, v = cache.append(shared.end, k=k, v=v)  # (B, n_kv_head, S, D)
        y = self.kernel(q, k, v, shared.masks[self.window])  # (B, H, T, D)
        return self.output(y, x)

    def qkv(self, x, shared):  # (B, H, T, D) and twice (B, n_kv_head, T, D)
        q, k = self.heads(self.q_proj(x)), self.heads(self.k_proj(x))
        if self.qk_norm:
            q, k = self.qk_norm(q), self.qk_norm(k)
        if shared.rotation:
            q, k = rotate(q, shared.rotation), rotate(k, shared.rotation)
        return q, k, self.values(x, shared)

    def values(self, x, shared):
        return self.heads(self.v_proj(x))

    def heads(self, x):
        """Split the features into heads: (B, T, H D) -> (B, H, T, D), such as (2, 8, 128) -> (2, 2, 8, 64)."""
        return x.view(*x.shape[:2], -1, self.head_size).transpose(1, 2)

    def output(self, y, x):
        """Concatenate and project the heads' outputs, y: (B, H, T, D) -> (B, T, C). x: as in forward(), for a gate."""
        return self.o_proj(y.transpose(1, 2).flatten(2))


def attend(q, k, v, mask):
    """softmax(q k^T / sqrt(D) + mask) v: the mean of the values, weighted by how well each key matches the query.

    q: (B, H, T, D). k, v: (B, H, S, D), or fewer heads. Returns (B, H, T, D). The scores q k^T, sums of D
    products, grow with D; softmax of large ones would leave nearly all weight to one key, hardly a gradient to others.
    Unlike in GPT-2, the weights get no dropout: it made training slower and the model no better.
    """
    T = q.shape[2]
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast, qk_norm returns float32
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, T, S)
    if mask is not None:
        scores += mask
    elif T > 1:  # here S = T. A single token is the last one, and sees every key
        scores += scores.new_full((T, T), -torch.inf).triu(1)
    return scores.softmax(dim=-1) @ v


class MLP(nn.Module):
    """The feed-forward network, for each token by itself. Source: Vaswani et al. 2017, arXiv:1706.03762."""

    gated = False  # True: there is a third layer, gate_proj

    def __init__(self, config: ModelConfig, layer: int = 0):
        super().__init__()
        C = config.n_embd
        n_hidden = config.n_hidden or (8 * math.ceil(C / 3) if self.gated else 4 * C)
        bias = config.bias if config.mlp_bias is None else config.mlp_bias
        self.activation = ACTIVATIONS[config.activation]
        if self.gated:
            self.gate_proj = nn.Linear(C, n_hidden, bias)
        self.up_proj = nn.Linear(C, n_hidden, bias)
        self.down_proj = nn.Linear(n_hidden, C, bias)

    def forward(self, x, shared=None):  # (B, T, C) -> (B, T, C)
        return self.down_proj(self.activation(self.up_proj(x)))


class Block(nn.Module):
    """Two branches, attention and MLP. Each reads a norm of the residual stream x and adds to x (pre-norm).

    With mlp=none, there is no second branch, and self.mlp is None. Another kind of block has forward(), attn.window and
    these two facts. Sources: Radford et al. 2019 (GPT-2); Xiong et al. 2020, arXiv:2002.04745.
    """

    residual = True  # outputs are added to inputs
    ends_with_norm = False  # True: the stack needs no norm at its end

    def __init__(self, config: ModelConfig, layer: int = 0):
        super().__init__()
        mlp = MLPS[config.mlp]
        self.attn_norm = NORMS[config.norm](config)
        self.attn = ATTENTIONS[config.attention](config, layer)
        if mlp:
            self.mlp_norm = NORMS[config.norm](config)
        self.conv = CausalConv(config) if mlp and config.mlp_conv else None
        self.mlp = mlp(config, layer) if mlp else None
        self.attn_dropout = nn.Dropout(config.dropout)  # of what attention returns
        self.mlp_dropout = nn.Dropout(config.dropout)

    def forward(self, x, shared, cache=None):  # (B, T, C) -> (B, T, C)
        x = x + self.attn_dropout(self.attn(self.attn_norm(x), shared, cache))
        if self.mlp:
            x = x + self.mlp_dropout(self.feed_forward(self.mlp_norm(x), shared, cache))
        return x

    def feed_forward(self, x, shared, cache):
        if self.conv:
            x = self.conv(x, shared, cache)
        return self.mlp(x, shared)


class Stack(nn.Module):
    """Everything between embedding and head: positions, n_layer blocks and a norm, unless the blocks end with one.

    block: kind of block, by default the config's. causal: False in an encoder, whose tokens also see later ones.
    """

    def __init__(self, config: ModelConfig, block: type[Block] | None = None, causal=True):
        super().__init__()
        block = block or BLOCKS[config.block]
        self.causal = causal
        # True: keep only the input of each block, and recompute the rest in the backward pass: arXiv:1604.06174
        self.checkpoint_activations = False
        self.block_size = config.block_size
        self.position = POSITIONS[config.position](config)
        self.embed_norm = NORMS[config.norm if config.embed_norm else "none"](config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(block(config, i) for i in range(config.n_layer))
        self.norm = NORMS["none" if block.ends_with_norm else config.norm](config)

    def forward(self, x, idx, cache=None, **kept):
        """Read tokens that follow those in the cache. Returns (B, T, C), and terms of the loss: {name: term}.

        x: (B, T, C), their embeddings. idx: (B, T), their ids. kept: padding and others, for share().
        """
        shared = share(self, idx, cache, **kept)
        x = self.dropout(self.embed_norm(self.position.embed(x, shared.at)))
        layers = cache.layers if cache else [None] * len(self.blocks)
        for block, layer in zip(self.blocks, layers, strict=True):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, shared, layer, use_reentrant=False)
            else:
                x = block(x, shared, layer)
        if cache:
            cache.length = shared.end
        return self.norm(x), shared.losses


class LayerCache:
    """What one block remembers of the tokens that it has read."""

    def __init__(self, size: int):
        self.size = size
        self.buffers: dict[str, Tensor] = {}  # one row per token, (..., size, features)
        self.state: dict[str, Tensor] = {}  # what a layer replaces in each forward pass

    def append(self, end: int, **new: Tensor) -> list[Tensor]:
        """Write each (..., T, features) up to row `end` of its buffer. Returns all rows, (..., end, features)."""
        for name, x in new.items():
            if name not in self.buffers:
                self.buffers[name] = x.new_zeros(*x.shape[:-2], self.size, x.shape[-1])
            T = x.shape[-2]
            self.buffers[name].narrow(-2, end - T, T).copy_(x)
        return [self.buffers[name].narrow(-2, 0, end) for name in new]


class Cache:
    """Keys, values and other tensors of the tokens read, which the blocks keep so that no later pass computes them."""

    def __init__(self, n_layer: int, size: int):
        self.length = 0  # tokens read
        # (B,) int64, padding before each text, if a batch of prompts has different lengths
        self.n_padding: Tensor | None = None
        self.layers = [LayerCache(size) for _ in range(n_layer)]


class GPT(nn.Module):
    """A stack of causal blocks that predicts the next token at each position. Source: Radford et al. 2018 (GPT)."""

    has_cache = True  # False: generation reads the whole text for each new token

    def __init__(self, config: ModelConfig):
        super().__init__()
        config.validate()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.stack = Stack(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:  # Source: Press and Wolf 2016, arXiv:1608.05859
            self.lm_head.weight = self.wte.weight
        init_weights(self)

    def forward(self, idx, targets=None, cache=None):
        """Compute the logits (B, T, V) of the token after each token and, with targets, the mean cross-entropy in nats.

        idx: (B, T), ids of the tokens that follow those in the cache. targets: (B, T), the id after each of them; -1 is
        ignored. Without targets, the loss is None. With them, the logits have no gradient, and a third value, if there
        is one, has terms that training adds to the loss: {name: term}.
        """
        x, terms = self.stack(self.wte(idx), idx, cache)
        logits = self.head(x)
        if targets is None:
            return logits, None
        loss = self.loss(logits, targets)
        # detached, because a compiled backward pass would allocate zeros as the gradient of the logits
        return (logits.detach(), loss, terms) if terms else (logits.detach(), loss)

    def next_logits(self, idx, cache=None):
        """Compute the logits (B, V) of the token that follows idx."""
        x, _ = self.stack(self.wte(idx), idx, cache)
        return self.head(x[:, -1])

    def head(self, x):
        """x: (..., C). Returns logits (..., V). Source of the soft cap: Gemma 2, arXiv:2408.00118, section 2."""
        logits = self.lm_head(x)
        if cap := self.config.logit_soft_cap:
            logits = cap * torch.tanh(logits.float() / cap)
        return logits

    def loss(self, logits, targets):
        """Mean of -ln(probability of the target) over all targets except -1.

        In training, part of each target is spread over all tokens, against overconfidence: arXiv:1512.00567, section 7.
        """
        smoothing = self.config.label_smoothing if self.training else 0.0
        # a sum over the vocabulary in 16 bits would be too coarse; float64 stays
        logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-1, label_smoothing=smoothing)

    def make_cache(self, size: int | None = None) -> Cache:
        """Make an empty cache for up to `size` tokens, by default block_size."""
        block_size = self.config.block_size
        return Cache(self.config.n_layer, min(size or block_size, block_size))

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0):
        """Append sampled tokens to idx, (B, T) with T >= 1. Returns (B, T + max_new_tokens). Call eval() before.

        temperature: above 0. top_k: sample from the k most probable tokens only; 0: from all. sample.py can do more.
        """
        block_size = self.config.block_size
        cache = self.make_cache() if self.has_cache else None
        new = idx[:, -block_size:]
        for _ in range(max_new_tokens):
            if cache and cache.length + new.shape[1] > block_size:
                # it is full: read the newest half of the context again, and the new token, from position 0
                cache, new = self.make_cache(), idx[:, -(block_size // 2 + 1) :]
            logits = self.next_logits(new, cache).float() / temperature
            if top_k:
                smallest = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
                logits[logits < smallest] = -torch.inf
            idx = torch.cat([idx, torch.multinomial(logits.softmax(dim=-1), 1)], dim=1)
            new = idx[:, -1:] if cache else idx[:, -block_size:]
        return idx


def init_weights(model: nn.Module) -> None:
    """Draw the weights of embeddings and linear layers from normal distributions with mean 0. Biases are 0.

    As in GPT-2, the standard deviation is 0.02, but 0.02 / sqrt(branches) in the last layer of each branch, so that
    what all 2 n_layer of them add to the residual stream does not grow with their number. INITS has other rules.
    """
    modules = dict(model.named_modules())
    # {last layer: its branch}, as in stack.blocks.0.mlp.down_proj: stack.blocks.0.mlp. Some branches have several
    branches = {x: ".".join(x.split(".")[:4]) for x in modules if x.endswith(LAST)}
    count = Counter(name.split(".")[0] for name in {*branches.values()})  # of each stack
    for name, module in modules.items():
        if isinstance(module, nn.Embedding | nn.Linear):
            std = 0.02 / math.sqrt(count[name.split(".")[0]] if name in branches else 1)
            std = INITS[model.config.init](std, name, module, model.config)
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


# ======================================================================================
# The second half: what a config can select instead


# --------------------------------------------------------------------------------------
# What the blocks share


def share(stack, idx, cache=None, padding=None, losses=None, **kept) -> Shared:
    """Compute what the blocks of a stack share while they read T new tokens, idx (B, T).

    padding: (B, T) bool, only without a cache, which knows its own. losses, kept: as in Shared. A layer may add to kept
    but not change a value, because it runs again if activations are recomputed, and finds what it left.
    """
    T = idx.shape[1]
    start = cache.length if cache else 0
    S = start + T
    assert stack.block_size >= S, f"{S} tokens, but block_size is {stack.block_size}"
    at = slice(start, S)
    key_at = torch.arange(S, device=idx.device)
    query_at = start + key_at[:T]
    if cache and cache.n_padding is not None:
        padding = key_at < cache.n_padding[:, None]
        at = (query_at - cache.n_padding[:, None]).clamp(min=0)
    distance = query_at[:, None] - key_at
    position = stack.position
    bias = position.score_bias(distance) if position.score_bias else None
    masks = {
        window: attention_mask(distance, stack.causal, window, bias, padding)
        for window in {block.attn.window for block in stack.blocks}
    }
    rotation = position.rotation(at) if position.rotation else None
    return Shared(idx, at, S, rotation, masks, padding, kept, losses or {})


def add_loss(shared: Shared, name: str, term: Tensor) -> None:
    """Add a scalar to the loss that training minimises. Terms of one name are summed.

    If activations are recomputed, a layer adds its term again, but after the sum has been used.
    """
    shared.losses[name] = shared.losses.get(name, 0) + term


def attention_mask(distance, causal=True, window=0, bias=None, padding=None) -> Mask:
    """Make a mask that hides later keys if causal, keys `window` or more tokens away unless it is 0, and padding.

    distance: (T, S) int64, query position minus key position. bias: (1, H, T, S), from Position.score_bias.
    padding: (B, S) bool, True if a key is padding.
    """
    T, S = distance.shape
    windowed = 0 < window < S
    if causal and not windowed and bias is None and padding is None and T in (1, S):
        return None  # attend() hides later tokens itself
    hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window:
        hidden = hidden | (distance.abs() >= window)
    if padding is not None:
        # softmax over no keys at all is nan, so every token can at least attend to itself
        hidden = hidden | (padding[:, None, None, :] & (distance != 0))
    return torch.where(hidden, -torch.inf, 0.0 if bias is None else bias)


# --------------------------------------------------------------------------------------
# Norms and positions


class RMSNorm(nn.RMSNorm):
    """x / root mean square over the last dimension, times a trained scale. No mean is subtracted.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config.n_embd, eps=config.norm_eps)


class Position(nn.Module):
    """No positional encoding. One acts on embeddings, on queries and keys, or on scores, and overrides what it needs:

    rotation(at): cos and sin for rotate(). score_bias(distance): a term to add to the scores, (1, H, T, S), from query
    position minus key position, (T, S).
    """

    rotation = score_bias = None

    def __init__(self, config: ModelConfig):
        super().__init__()

    def embed(self, x, at):  # token embeddings (B, T, C) -> (B, T, C)
        return x


class SinusoidalPosition(Position):
    """Fixed sinusoids with geometrically spaced wavelengths, added to the embedding.

    Features 2i and 2i + 1 are sin and cos of p / 10000^(2i/C) at position p. The embedding is first multiplied by
    sqrt(C), as in the paper.
    Source: Vaswani et al. 2017, arXiv:1706.03762, sections 3.4 and 3.5.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        C = config.n_embd
        frequency = 10000.0 ** (-torch.arange(0, C, 2) / C)
        angle = torch.arange(config.block_size)[:, None] * frequency  # (block_size, C / 2)
        sinusoids = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :C]
        self.register_buffer("sinusoids", sinusoids, persistent=False)

    def embed(self, x, at):
        return x * math.sqrt(x.shape[-1]) + self.sinusoids[at]


class RotaryPosition(Position):
    """Rotate feature pairs of queries and keys by angles proportional to position, so that scores depend on distance.

    Pair i of the D / 2 pairs is rotated by rope_base^(-2i/D) radians per position, computed in float32.
    Source: Su et al. 2021, arXiv:2104.09864, eq. 34; pairs are (i, i + D/2), the layout of Llama's weights.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        D = config.features
        frequency = config.rope_base ** (-torch.arange(0, D, 2) / D)  # radians per position
        frequency = frequency * llama_scale(frequency, config)
        angle = torch.arange(config.block_size)[:, None] * frequency  # (block_size, D / 2)
        cos = angle.cos().repeat(1, 2)  # (block_size, D)
        sin = torch.cat([-angle.sin(), angle.sin()], dim=1)  # signs are those of rotate()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def rotation(self, at):
        return self.cos[at].unsqueeze(-3), self.sin[at].unsqueeze(-3)


def llama_scale(frequency: Tensor, config: ModelConfig) -> Tensor:
    """Compute the factors by which Llama 3.1 multiplies frequencies to extend the context of a trained model.

    Frequencies with fewer than rope_low_freq_factor rotations in the original context are divided by rope_factor, so
    that no angle exceeds those seen in training. Frequencies with more than rope_high_freq_factor rotations tell nearby
    tokens apart and are unchanged. In between, the factors are interpolated. With rope_factor=1, all factors are 1.
    Source: Grattafiori et al. 2024, arXiv:2407.21783, and the code of Llama 3.1.
    """
    turns = config.rope_original_context * frequency / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    unscaled = ((turns - low) / (high - low)).clamp(0, 1)  # weight of the frequency itself
    return unscaled + (1 - unscaled) / config.rope_factor


def rotate(x, rotation):
    """Rotate all pairs at once: each (a, b) becomes (a cos - b sin, b cos + a sin).

    x: (B, H, T, D). Returns the same shape and dtype.
    """
    cos, sin = rotation  # sin is negated in its first half, because a gets - b sin
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # (b, a)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


class AlibiPosition(Position):
    """Scores decrease linearly with distance, at a different rate in each head.

    Source: Press et al. 2021, arXiv:2108.12409.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        slopes = torch.tensor(alibi_slopes(config.n_head)).view(1, -1, 1, 1)
        self.register_buffer("slopes", slopes, persistent=False)

    def score_bias(self, distance):
        return -self.slopes * distance.abs()


def alibi_slopes(n_head: int) -> list[float]:
    """Compute a slope for each head.

    With n the largest power of two of heads, head i of the first n has 2^(-8i/n). Further heads have the slopes that 2n
    heads would have, beginning with every second one.
    """
    n = 2 ** int(math.log2(n_head))
    order = [*range(2, 2 * n + 1, 2), *range(1, 2 * n, 2)]
    return [2 ** (-4 * i / n) for i in order[:n_head]]


# --------------------------------------------------------------------------------------
# Feed-forward networks, and a convolution before them


def relu_squared(x):
    """max(x, 0)^2. Source: So et al. 2021, arXiv:2109.08668."""
    x = torch.relu(x)
    return x * x  # on a GPU, autocast would compute x.square() in float32


ACTIVATIONS = {
    "relu": F.relu,  # max(x, 0)
    "gelu": F.gelu,  # x times the probability that a standard normal variable is below x. Source: arXiv:1606.08415
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # GPT-2's, within 0.001 of gelu
    "silu": F.silu,  # x / (1 + e^-x). Source: arXiv:1702.03118
    "relu_squared": relu_squared,
}


class GatedMLP(MLP):
    """Multiply each hidden neuron by a gate; the activation is applied to the gate. With silu, this is SwiGLU.

    By default it has 8/3 C neurons, so that its three matrices have as many weights as the two of MLP. The number is
    rounded up to a multiple of 8, with which GPUs are faster. Source: Shazeer 2020, arXiv:2002.05202.
    """

    gated = True

    def forward(self, x, shared=None):  # (B, T, C) -> (B, T, C)
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class CausalConv(nn.Module):
    """To each token, add the n tokens before it, each with a trained weight per feature: x_t + w_1 x_(t-1) + ...

    It starts as the identity. Sources: So et al. 2021 (Primer), arXiv:2109.08668; Allen-Zhu 2025, arXiv:2512.17351
    (Canon layers, of which this is the one before the MLP).
    """

    # AdamW moves every parameter about as far in a step; w, GAIN times its parameter, moves GAIN times as far
    GAIN = 4.0

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.mlp_conv, config.n_embd))

    def forward(self, x, shared, cache=None):  # (B, T, C) -> (B, T, C)
        n, T = len(self.weight), x.shape[1]
        if shared.padding is not None:
            x = x.masked_fill(shared.padding[:, -T:, None], 0)
        before = cache.state.get("inputs") if cache else None
        if before is None:
            before = x.new_zeros(len(x), n, x.shape[2])  # zeros come before the first token
        inputs = torch.cat([before, x], dim=1)  # (B, n + T, C)
        if cache:
            cache.state["inputs"] = inputs[:, T:]
        weight = self.GAIN * self.weight.to(x.dtype)
        for back in range(1, n + 1):
            x = torch.addcmul(x, inputs[:, n - back : n - back + T], weight[back - 1])
        return x


# --------------------------------------------------------------------------------------
# Blocks, and initial weights


class PostNormBlock(Block):
    """The norm is on the residual stream, as in the original transformer. Training needs more warmup.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.1.
    """

    ends_with_norm = True

    def forward(self, x, shared, cache=None):
        x = self.attn_norm(x + self.attn_dropout(self.attn(x, shared, cache)))
        if self.mlp:
            x = self.mlp_norm(x + self.mlp_dropout(self.feed_forward(x, shared, cache)))
        return x


class PlainBlock(Block):
    """Pre-norm without residual connections, to show what they contribute.

    Source of residual connections: He et al. 2015, arXiv:1512.03385.
    """

    residual = False

    def forward(self, x, shared, cache=None):
        x = self.attn_dropout(self.attn(self.attn_norm(x), shared, cache))
        if self.mlp:
            x = self.mlp_dropout(self.feed_forward(self.mlp_norm(x), shared, cache))
        return x


# names of the layers at the end of a branch: attention's, and an MLP's
LAST = ("o_proj", "down_proj")


def gpt2_std(std, name, module, config) -> float:
    """std, as init_weights() chose it; in blocks without residual connections 1 / sqrt(inputs), to keep the scale."""
    alone = ".blocks." in name and not BLOCKS[config.block].residual
    return module.weight.shape[1] ** -0.5 if alone else std


def zero_std(std, name, module, config) -> float:
    """1 / sqrt(inputs), to keep the scale, but 0 in the last layer of each branch, so that a new branch adds nothing.

    Without tied weights, the embedding gets 1, and the head 0, so that all tokens are equally likely.
    """
    untied = not config.tie_weights
    if name.endswith(LAST) or (untied and name == "lm_head"):
        return 0.0
    if untied and isinstance(module, nn.Embedding):
        return 1.0
    return module.weight.shape[1] ** -0.5


# --------------------------------------------------------------------------------------
# The choices. A variant is a class or function, and a line here

NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm, "none": nn.Identity}
POSITIONS = {
    "none": Position,
    "learned": LearnedPosition,
    "sinusoidal": SinusoidalPosition,
    "rotary": RotaryPosition,
    "alibi": AlibiPosition,
}
ATTENTIONS = {"softmax": SelfAttention}
MLPS = {"plain": MLP, "gated": GatedMLP, "none": None}
BLOCKS = {"pre_norm": Block, "post_norm": PostNormBlock, "plain": PlainBlock}
INITS = {"gpt2": gpt2_std, "zero": zero_std}

# {setting: the variants that it can name}
CHOICES = {
    "position": POSITIONS,
    "norm": NORMS,
    "block": BLOCKS,
    "attention": ATTENTIONS,
    "mlp": MLPS,
    "activation": ACTIVATIONS,
    "init": INITS,
}


# --------------------------------------------------------------------------------------
# What a config may be

# {names of settings: (smallest, largest value)}
LIMITS = {
    "n_members n_layer": (1, 2**12),
    "n_head n_kv_head n_embd head_size n_hidden block_size vocab_size": (1, 2**20),
    "dropout label_smoothing": (0, 0.99),
    "mlp_conv logit_soft_cap norm_eps": (0, 10**9),
    "rope_low_freq_factor rope_high_freq_factor": (0, 10**9),
    "rope_base rope_factor rope_original_context": (1, 10**9),
}


def check_values(config: ModelConfig) -> None:
    """Raise ValueError for the first value that is invalid on its own."""
    for name, choices in config.choices().items():
        if (value := getattr(config, name)) not in choices:
            table = [f" ({k} in model.py)" for k, x in globals().items() if x is choices]
            raise ValueError(f"{name}={value} is not one of: {', '.join(choices)}{''.join(table)}")
    for names, (least, most) in LIMITS.items():
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name}={value} must be from {least} to {most}")
    if not 0 <= config.window <= config.block_size:
        raise ValueError(f"window={config.window} must be from 0 to block_size={config.block_size}")


def check_combinations(config: ModelConfig) -> None:
    """Raise ValueError for the first invalid combination of values."""
    if config.head_size is None and config.n_embd % config.n_head:
        raise ValueError(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head} unless head_size is set")
    if config.n_head % config.kv_heads:
        raise ValueError(f"n_head={config.n_head} must be a multiple of n_kv_head={config.n_kv_head}")
    if config.position == "rotary" and config.features % 2:
        raise ValueError(f"position=rotary rotates feature pairs, so head_size={config.features} must be even")
    if config.rope_low_freq_factor >= config.rope_high_freq_factor:
        raise ValueError(
            f"rope_low_freq_factor={config.rope_low_freq_factor:g} must be below"
            f" rope_high_freq_factor={config.rope_high_freq_factor:g}"
        )
    if config.init == "zero" and not BLOCKS[config.block].residual:
        raise ValueError(
            f"block={config.block} has no residual connections, so with init=zero it would output 0; use init=gpt2"
        )


# --------------------------------------------------------------------------------------
# Counts


def count_parameters(model: nn.Module) -> int:
    """Count the trained parameters. A matrix that is used twice is counted once."""
    return sum(p.numel() for p in model.parameters())


def flops_per_token(model: nn.Module) -> int:
    """Floating-point operations to train on one token. The backward pass costs twice as much as the forward pass.

    In the forward pass, each matrix weight costs one multiply-add. Attention costs 2 H D multiply-adds per token of the
    window, even if heads share keys and values; a causal mask would halve that. Source: Chowdhery et al. 2022,
    arXiv:2204.02311, app. B.
    """
    matrices = attended = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            matrices += module.weight.numel()
        if hasattr(module, "window"):
            window = module.window or model.config.block_size
            attended += window * module.n_head * module.head_size
    return 6 * matrices + 12 * attended
