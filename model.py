"""The GPT: every block of it, and the model built from them.

Shapes are written with these letters:
    B batch, T tokens read now, S tokens attended to, C n_embd, H n_head, D head size (C / H), V vocab_size

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

A variant is one class or function and one line in a dictionary (NORMS, POSITIONS, ...); the configuration names it.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class RotaryPosition(Position):
    """Rotate query and key pairs by angles proportional to their positions, so that q.k depends on distance alone.

    Pair i of the D / 2 pairs turns by rope_base^(-2i/D) a position. Angles in float32.
    Source: Su et al. 2021, arXiv:2104.09864, eq. 34; pairs are (i, i + D/2), the layout of Llama's weights.
    """

    def __init__(self, config: "ModelConfig"):
        super().__init__(config)
        head_size = config.n_embd // config.n_head
        frequency = config.rope_base ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
        angle = torch.arange(config.block_size, dtype=torch.float32)[:, None] * frequency  # (block_size, D / 2)
        self.register_buffer("cos", angle.cos().repeat(1, 2), persistent=False)  # (block_size, D)
        self.register_buffer("sin", torch.cat([-angle.sin(), angle.sin()], dim=1), persistent=False)

    def rotate(self, q: Tensor, k: Tensor, start: int) -> tuple[Tensor, Tensor]:
        cos, sin = self.cos[start : start + q.shape[2]], self.sin[start : start + q.shape[2]]

        def turn(x: Tensor) -> Tensor:  # (a, b) -> (a cos - b sin, b cos + a sin), for all pairs at once
            return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)

        return turn(q), turn(k)


POSITIONS = {"none": Position, "learned": LearnedPosition, "rotary": RotaryPosition}


# --------------------------------------------------------------------------------------
# Attention


class KVCache:
    """Keys and values that one attention layer has computed, so that generating a token reads only that token."""

    def __init__(self, size: int):
        self.size = size  # tokens there is room for
        self.length = 0  # tokens held
        self.k = self.v = None  # (B, H, size, D), made when the first token shows shape, dtype and device

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
        self.length = 0


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v: the mean of the values, weighted by how well each key answers the query.

    q: (B, H, T, D); k, v: (B, H, S, D); bias: broadcasts to (B, H, T, S). Returns (B, H, T, D).
    causal: the last query is the last key's token, and no query sees a later key.
    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
    """
    T, S = q.shape[2], k.shape[2]
    mask, is_causal = bias, False
    if causal and T > 1:  # a single newest query sees every key
        # SDPA's own causal mask starts at the top left, wrong where a cache makes S > T, and refuses a bias beside it.
        is_causal = bias is None and T == S
        if not is_causal:
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)  # True: may attend
            if bias is not None:
                mask = bias.masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)


class Attention(nn.Module):
    """Several heads of attention side by side, their results concatenated and mixed."""

    def __init__(self, config: "ModelConfig", causal: bool):
        super().__init__()
        self.n_head, self.causal, self.dropout = config.n_head, causal, config.dropout
        self.query = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.key = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.value = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor, position: Position, cache: KVCache | None = None) -> Tensor:
        """x: (B, T, C), the newest T tokens, which follow those in the cache. Returns (B, T, C)."""
        B, T, C = x.shape
        q = self.query(x).view(B, T, self.n_head, -1)  # (B, T, H, D)
        k = self.key(x).view(B, T, self.n_head, -1)
        v = self.value(x).view(B, T, self.n_head, -1)
        if self.qk_norm:  # scores cannot grow without bound. Source: Henry et al. 2020, arXiv:2010.04245
            q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        q, k = position.rotate(q, k, start=cache.length if cache else 0)
        if cache:
            k, v = cache.append(k, v)
        bias = position.bias(T, k.shape[2])
        y = attend(q, k, v, self.causal, bias, self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


# --------------------------------------------------------------------------------------
# Feed-forward networks: the article's first network, applied to every token by itself.


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2. Source: So et al. 2021, arXiv:2109.08668."""
    return F.relu(x).square()


ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "relu_squared": relu_squared}


class MLP(nn.Module):
    """Two layers of neurons with an activation between them; the middle layer is four times as wide."""

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C). Returns (B, T, C)."""
        return self.proj(self.activation(self.fc(x)))


MLPS = {"plain": MLP}


# --------------------------------------------------------------------------------------
# Blocks: how attention and feed-forward are joined. A stack repeats one.


class PreNormBlock(nn.Module):
    """x + f(norm(x)): the norm sits on the branch, so that the residual path runs through untouched.

    Source: Radford et al. 2019 (GPT-2); Xiong et al. 2020, arXiv:2002.04745.
    """

    def __init__(self, config: "ModelConfig", causal: bool):
        super().__init__()
        self.attn_norm = NORMS[config.norm](config)
        self.attn = Attention(config, causal)
        self.mlp_norm = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, position: Position, cache: KVCache | None = None) -> Tensor:
        x = x + self.dropout(self.attn(self.attn_norm(x), position, cache))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


BLOCKS = {"pre_norm": PreNormBlock}


class Stack(nn.Module):
    """n_layer blocks, one after another, and a last norm."""

    def __init__(self, config: "ModelConfig", causal: bool):
        super().__init__()
        self.blocks = nn.ModuleList(BLOCKS[config.block](config, causal) for _ in range(config.n_layer))
        self.norm = NORMS[config.norm](config)

    def forward(self, x: Tensor, position: Position, caches: list[KVCache] | None = None) -> Tensor:
        """x: (B, T, C); caches: one a block. Returns (B, T, C)."""
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, position, cache)
        return self.norm(x)


# --------------------------------------------------------------------------------------
# Models


class GPT(nn.Module):
    """A stack of causal blocks that reads tokens and predicts, at each place, the next one."""

    task = "language modelling"

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        assert config.vocab_size is not None, "the data set gives vocab_size before the model is built"
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.position = POSITIONS[config.position](config)
        self.embed_norm = NORMS[config.norm if config.embed_norm else "none"](config)
        self.dropout = nn.Dropout(config.dropout)
        self.stack = Stack(config, causal=True)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:  # one table to read and to write tokens. Source: Press and Wolf 2016, arXiv:1608.05859
            self.lm_head.weight = self.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """init=gpt2                        init=zero

        embeddings                     normal, 0.02                     normal, 1; tied 1 / sqrt(n_embd)
        matrices                       normal, 0.02                     normal, 1 / sqrt(inputs)
        last matrix of each branch     normal, 0.02 / sqrt(branches)    0, so that a new block changes nothing
        an untied head                 normal, 0.02                     0, so that all tokens have the same chance
        biases, norms                  0, 1                             0, 1

        GPT-2 divides by the square root of 2 n_layer branches to keep the residual path as large as its input.
        """
        zero = self.config.init == "zero"
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                last, head = name.endswith(".proj"), name == "lm_head"
                if zero and (last or (head and not self.config.tie_weights)):
                    std = 0.0
                elif zero:
                    std = 1.0 if isinstance(module, nn.Embedding) else module.in_features**-0.5
                else:
                    std = 0.02 / math.sqrt(2 * self.config.n_layer) if last else 0.02
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, caches: list[KVCache] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """idx: (B, T) token ids, which follow the tokens in the caches. targets: (B, T), -1 where no loss is counted.

        Returns logits (B, T, V) and the mean cross-entropy in nats, None without targets.
        """
        start = caches[0].length if caches else 0
        end = start + idx.shape[1]
        assert end <= self.config.block_size, f"{end} tokens, but block_size is {self.config.block_size}"
        x = self.dropout(self.embed_norm(self.position.embed(self.wte(idx), start)))
        x = self.stack(x, self.position, caches)
        logits = self.lm_head(x)
        if cap := self.config.logit_soft_cap:
            logits = cap * torch.tanh(logits / cap)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    def make_caches(self) -> list[KVCache]:
        """Empty caches for one batch of texts, with room for block_size tokens."""
        return [KVCache(self.config.block_size) for _ in self.stack.blocks]


MODELS = {"gpt": GPT}


@dataclass(frozen=True)
class ModelConfig:
    """What a model is made of: all that a checkpoint needs to build it again."""

    # --- model
    model: str = "gpt"  # gpt: a decoder-only transformer
    n_layer: int = 4  # blocks, one after another
    n_head: int = 4  # attention heads in a block
    n_embd: int = 128  # numbers that stand for a token: the width of the model
    block_size: int = 64  # context: tokens the model can look back on
    vocab_size: int | None = None  # tokens it knows; None: as many as the data set has; more pads the table
    dropout: float = 0.0  # share of the numbers zeroed in training, against overfitting; 0.1 to 0.3 on small data
    bias: bool = False  # learnt shifts in linear layers and layer norms, as GPT-2 has them
    tie_weights: bool = True  # one table both reads tokens and predicts them
    position: str = "learned"  # how places are told apart: none, learned or rotary
    rope_base: float = 10000.0  # position=rotary: the slowest pair turns once in about 2 pi rope_base tokens
    norm: str = "layernorm"  # layernorm, rmsnorm or none
    block: str = "pre_norm"  # how norms and residuals are placed: pre_norm
    mlp: str = "plain"  # feed-forward network: plain
    activation: str = "gelu"  # relu, gelu, silu or relu_squared
    qk_norm: bool = False  # queries and keys of length sqrt(D), so that attention's scores stay small
    embed_norm: bool = False  # a norm right after the embedding
    logit_soft_cap: float = 0.0  # logits squeezed between -cap and cap by tanh; 0: no cap
    init: str = "gpt2"  # first weights: gpt2, or zero (each block starts by changing nothing)

    def __post_init__(self):
        for key in ("n_layer", "n_head", "n_embd", "block_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if not 1 < self.rope_base < math.inf:
            raise ValueError(f"rope_base={self.rope_base} must be above 1")
        if not 0 <= self.logit_soft_cap < math.inf:
            raise ValueError(f"logit_soft_cap={self.logit_soft_cap} must be at least 0")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if self.position == "rotary" and self.n_embd // self.n_head % 2:
            raise ValueError(f"position=rotary turns pairs: n_embd/n_head={self.n_embd}/{self.n_head} must be even")
        choices = {
            "model": MODELS,
            "position": POSITIONS,
            "norm": NORMS,
            "block": BLOCKS,
            "mlp": MLPS,
            "activation": ACTIVATIONS,
            "init": ("gpt2", "zero"),
        }
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise ValueError(f"{key}={getattr(self, key)} is not one of: {', '.join(known)}")


def build(config: ModelConfig) -> nn.Module:
    """A new model with freshly drawn weights, on the CPU."""
    return MODELS[config.model](config)


def count_parameters(model: nn.Module) -> int:
    """Numbers that training sets; a table that is used twice counts once."""
    return sum(p.numel() for p in model.parameters())


def flops_per_token(model: nn.Module) -> int:
    """Floating-point operations to train on one token: forward, and twice as many backward.

    Each weight of a matrix multiplies and adds once (2), and attention takes 2 C of both for each token in the window.
    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    config = model.config
    return 6 * matrices + 12 * config.n_layer * config.n_embd * config.block_size
