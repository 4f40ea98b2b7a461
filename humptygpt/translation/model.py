"""The original transformer: an encoder reads the source, and a decoder writes the target.

It consists of two stacks like the GPT's. In the encoder, each source token attends to the whole source. The decoder's
blocks have a third branch, cross-attention, between attention and feed-forward: in it, each target token attends to the
encoder's output. Source: Vaswani et al. 2017, arXiv:1706.03762.

Shapes: see model.py. S is the length of the source.
"""

import torch
from torch import Tensor

from model import (
    BLOCKS,
    GPT,
    NORMS,
    Cache,
    Context,
    LayerCache,
    ModelConfig,
    SelfAttention,
    Shared,
    Stack,
    attend,
)


class CrossAttention(SelfAttention):
    """Queries come from the target, keys and values from the source.

    Positions are not used, because those of target and source are unrelated.
    """

    def forward(self, x: Tensor, shared: Shared, cache: LayerCache | None = None) -> Tensor:
        """x: (B, T, C). cache: from Transformer.make_cache(). Returns (B, T, C)."""
        context, mask = shared.context
        q = self.heads(self.q_proj(x))
        if self.qk_norm:
            q = self.qk_norm(q)
        k, v = (cache.source_k, cache.source_v) if cache else self.keys_and_values(context)
        y = attend(q, k, v, mask, self.dropout)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context: (B, S, C). Returns keys and values, each (B, H, S, D), or with n_kv_head heads if that is set."""
        k = self.heads(self.k_proj(context))
        if self.qk_norm:
            k = self.qk_norm(k)
        return k, self.heads(self.v_proj(context))


class Cross:
    """Mixin that adds cross-attention to a kind of block, as a branch between the other two."""

    def make_attention(self, config: ModelConfig, layer: int) -> None:
        super().make_attention(config, layer)
        if not self.one_norm:
            self.cross_norm = NORMS[config.norm](config)
        self.cross_attn = CrossAttention(config)

    def branches(self) -> list:
        norm = self.attn_norm if self.one_norm else self.cross_norm
        attention, *rest = super().branches()
        return [attention, (norm, self.cross_attn), *rest]


CROSS_BLOCKS = {
    name: type(f"Cross{block.__name__}", (Cross, block), {})
    for name, block in BLOCKS.items()
}


class Transformer(GPT):
    """An encoder and a decoder that share one vocabulary and its embedding."""

    tasks = ("translation",)
    has_encoder = True

    def make_stacks(self, config: ModelConfig) -> None:
        self.encoder = Stack(config, causal=False)
        self.decoder = Stack(config, CROSS_BLOCKS)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        source: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """source: (B, S) token ids; shorter sources are padded with -1. Omit it with a cache, which already holds it.

        idx: (B, T) token ids of the target, which starts with end-of-text; with a cache, only those after the cached
        tokens. targets: (B, T); targets of -1 are ignored. Returns logits and loss as GPT does.
        """
        # with a cache, cross-attention finds the keys and values of the source there, and they need no mask
        context = (None, (None, False)) if cache else self.encode(source)
        logits = self.head(self.decoder(self.wte(idx), cache, context=context))
        return logits, None if targets is None else self.loss(logits, targets)

    def next_logits(self, idx: Tensor, cache: Cache) -> Tensor:
        """Compute the logits (B, V) of the token that follows idx."""
        logits, _ = self(idx, cache=cache)
        return logits[:, -1]

    def encode(self, source: Tensor) -> Context:
        """Run the encoder. source: as in forward(). Returns the output, (B, S, C), and the padding mask."""
        padding = source < 0
        mask = torch.where(padding[:, None, None, :], -torch.inf, 0.0)  # (B, 1, 1, S)
        x = self.encoder(self.wte(source.clamp(min=0)), padding=padding)
        return x, (mask, False)

    def make_cache(self, source: Tensor) -> Cache:
        """Make a cache for up to block_size target tokens. source: (B, S), without padding.

        The cache of each block also holds the keys and values of the source, each (B, H, S, D).
        """
        context, _ = self.encode(source)
        cache = super().make_cache()
        for block, layer in zip(self.decoder.blocks, cache.layers, strict=True):
            layer.source_k, layer.source_v = block.cross_attn.keys_and_values(context)
        return cache
