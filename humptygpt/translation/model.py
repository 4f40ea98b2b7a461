"""The original transformer: an encoder reads the source, and a decoder writes the target.

Each is a stack of blocks, like a GPT's. In the encoder, each source token attends to the whole source. The decoder's
blocks have a third branch, cross-attention, between self-attention and the feed-forward network: each target token
attends to the encoder's output. Source: Vaswani et al. 2017, arXiv:1706.03762.

Letters in shapes are explained in model.py. Here, S is the length of the source.
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
)


class CrossAttention(SelfAttention):
    """Attention from the target to the source: queries come from the target, keys and values from the source.

    It uses no positions, because positions in the target and in the source are unrelated.
    """

    def forward(self, x: Tensor, shared: Shared, cache: LayerCache | None = None) -> Tensor:
        """x: (B, T, C). cache: from Transformer.make_cache(). Returns (B, T, C)."""
        context, mask = shared.context
        q = self.heads(self.q_proj(x))
        if self.qk_norm:
            q = self.qk_norm(q)
        k, v = (cache.source_k, cache.source_v) if cache else self.keys_and_values(context)
        y = self.attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context: (B, S, C). Returns keys and values, each (B, H, S, D); if n_kv_head is set, H is n_kv_head."""
        k = self.heads(self.k_proj(context))
        if self.qk_norm:
            k = self.qk_norm(k)
        return k, self.heads(self.v_proj(context))


class Cross:
    """Mixin that adds a branch for cross-attention to a block class, between its two other branches."""

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
        """Compute logits and loss. They are returned in the same form as by GPT.

        idx: (B, T) token ids of the target, which starts with end-of-text. With a cache, only the ids after the cached
        tokens. targets: (B, T); targets of -1 are ignored. source: (B, S) token ids; shorter sources are padded with
        -1. With a cache, omit the source, because the cache already holds it.
        """
        # a cache holds the source's keys and values, and they need no mask, because its sources are not padded
        context = (None, (None, False)) if cache else self.encode(source)
        logits = self.head(self.decoder(self.wte(idx), cache, context=context))
        return logits, None if targets is None else self.loss(logits, targets)

    def next_logits(self, idx: Tensor, cache: Cache) -> Tensor:
        """Compute the logits (B, V) of the token that follows idx."""
        logits, _ = self(idx, cache=cache)
        return logits[:, -1]

    def encode(self, source: Tensor) -> Context:
        """Run the encoder. source: as in forward(). Returns its output, (B, S, C), and the mask for attention to it."""
        padding = source < 0
        mask = torch.where(padding[:, None, None, :], -torch.inf, 0.0)  # (B, 1, 1, S)
        x = self.encoder(self.wte(source.clamp(min=0)), padding=padding)
        return x, (mask, False)

    def make_cache(self, source: Tensor) -> Cache:
        """Make a cache for up to block_size target tokens. source: (B, S) token ids, without padding.

        The cache of each block also holds the keys and values of the source, each (B, H, S, D).
        """
        context, _ = self.encode(source)
        cache = super().make_cache()
        for block, layer in zip(self.decoder.blocks, cache.layers, strict=True):
            layer.source_k, layer.source_v = block.cross_attn.keys_and_values(context)
        return cache
