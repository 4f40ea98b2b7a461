"""The original transformer: an encoder reads the source, and a decoder writes the target.

It is two of the GPT's stacks. In the encoder each token of the source attends to all of them. The decoder's blocks have
a third branch between attention and feed-forward, cross-attention, in which each token of the target attends to the
encoder's output. Source: Vaswani et al. 2017, arXiv:1706.03762.

Shapes: see model.py. Here S is the length of the source.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import (
    GPT,
    NORMS,
    Cache,
    LayerCache,
    Mask,
    ModelConfig,
    ParallelBlock,
    PlainBlock,
    PostNormBlock,
    PreNormBlock,
    SelfAttention,
    Shared,
    Stack,
    attend,
    attention_mask,
)

NO_MASK: Mask = (None, False)


class CrossShared(NamedTuple):
    """What the decoder's blocks share in one forward pass: the fields of model.Shared, and the source."""

    at: slice | Tensor
    end: int
    rotary: tuple[Tensor, Tensor] | None
    masks: dict[int, Mask]
    padding: Tensor | None
    context: (
        Tensor | None
    )  # (B, S, C), the encoder's output; None if a cache has its keys and values
    context_mask: Mask


class CrossLayerCache(LayerCache):
    """Also holds the keys and values of the source."""

    source: tuple[Tensor, Tensor]  # each (B, H, S, D)

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        k, v = self.source
        self.source = k[rows], v[rows]


class CrossAttention(SelfAttention):
    """Queries from the target, keys and values from the source. Their positions are unrelated."""

    def forward(
        self, x: Tensor, shared: CrossShared, cache: CrossLayerCache | None = None
    ) -> Tensor:
        """x: (B, T, C). Returns (B, T, C)."""
        q = self.heads(self.q_proj(x))
        if self.qk_norm:
            q = self.qk_norm(q)
        k, v = cache.source if cache else self.keys_and_values(shared.context)
        y = attend(q, k, v, shared.context_mask, self.dropout)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context: (B, S, C). Returns twice (B, H, S, D), or fewer heads."""
        k = self.heads(self.k_proj(context))
        if self.qk_norm:
            k = self.qk_norm(k)
        return k, self.heads(self.v_proj(context))


class Cross:
    """Adds cross-attention to a kind of block; each subclass joins the three branches."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        if not self.one_norm:
            self.cross_norm = NORMS[config.norm](config)
        self.cross_attn = CrossAttention(config)
        # cross-attention comes before the feed-forward network, also in the order in which weights are drawn
        for name in ("mlp_norm", "conv", "mlp", "dropout"):
            if name in self._modules:
                self._modules[name] = self._modules.pop(name)


class CrossPreNormBlock(Cross, PreNormBlock):
    def forward(
        self, x: Tensor, shared: CrossShared, cache: CrossLayerCache | None = None
    ) -> Tensor:
        """x: (B, T, C). Returns (B, T, C)."""
        x = x + self.dropout(self.attn(self.attn_norm(x), shared, cache))
        x = x + self.dropout(self.cross_attn(self.cross_norm(x), shared, cache))
        if self.mlp:
            x = x + self.dropout(self.feed_forward(self.mlp_norm(x), shared, cache))
        return x


class CrossPostNormBlock(Cross, PostNormBlock):
    def forward(
        self, x: Tensor, shared: CrossShared, cache: CrossLayerCache | None = None
    ) -> Tensor:
        """x: (B, T, C). Returns (B, T, C)."""
        x = self.attn_norm(x + self.dropout(self.attn(x, shared, cache)))
        x = self.cross_norm(x + self.dropout(self.cross_attn(x, shared, cache)))
        if self.mlp:
            x = self.mlp_norm(x + self.dropout(self.feed_forward(x, shared, cache)))
        return x


class CrossPlainBlock(Cross, PlainBlock):
    def forward(
        self, x: Tensor, shared: CrossShared, cache: CrossLayerCache | None = None
    ) -> Tensor:
        """x: (B, T, C). Returns (B, T, C)."""
        x = self.dropout(self.attn(self.attn_norm(x), shared, cache))
        x = self.dropout(self.cross_attn(self.cross_norm(x), shared, cache))
        if self.mlp:
            x = self.dropout(self.feed_forward(self.mlp_norm(x), shared, cache))
        return x


class CrossParallelBlock(Cross, ParallelBlock):
    def forward(
        self, x: Tensor, shared: CrossShared, cache: CrossLayerCache | None = None
    ) -> Tensor:
        """x: (B, T, C). Returns (B, T, C)."""
        y = self.attn_norm(x)
        x = x + self.dropout(self.attn(y, shared, cache))
        x = x + self.dropout(self.cross_attn(y, shared, cache))
        return x + self.dropout(self.feed_forward(y, shared, cache))


CROSS_BLOCKS = {
    "pre_norm": CrossPreNormBlock,
    "post_norm": CrossPostNormBlock,
    "plain": CrossPlainBlock,
    "parallel": CrossParallelBlock,
}


class Encoder(Stack):
    causal = False


class Decoder(Stack):
    def make_block(self, config: ModelConfig, layer: int) -> nn.Module:
        return CROSS_BLOCKS[config.block](config, layer)

    def forward(
        self, x: Tensor, cache: Cache | None, context: Tensor | None, context_mask: Mask
    ) -> Tensor:
        """x: (B, T, C), embedded tokens of the target. context, context_mask: as CrossShared has them."""
        shared: Shared = self.share(x, cache, None)
        return self.run(x, CrossShared(*shared, context, context_mask), cache)


class Transformer(GPT):
    """Encoder and decoder share one vocabulary and its embedding."""

    tasks = ("translation",)
    has_encoder = True

    def make_stacks(self, config: ModelConfig) -> None:
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        source: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """source: (B, S) token ids, -1 after the end of the shorter ones; not needed with a cache, which holds it.

        idx: (B, T) token ids of the target so far, which follow those in the cache; the first is end-of-text. targets:
        (B, T), -1 where no loss is counted. Returns as GPT does.
        """
        context, mask = (None, NO_MASK) if cache else self.encode(source)
        logits = self.head(self.decoder(self.wte(idx), cache, context, mask))
        return logits, None if targets is None else self.loss(logits, targets)

    def next_logits(self, idx: Tensor, cache: Cache) -> Tensor:
        """Return the logits (B, V) of the token that follows idx."""
        return self.head(self.decoder(self.wte(idx), cache, None, NO_MASK)[:, -1])

    def encode(self, source: Tensor) -> tuple[Tensor, Mask]:
        """source: (B, S), as in forward. Returns the encoder's output, (B, S, C), and the mask of its padding."""
        padding = source < 0
        distance = torch.zeros_like(source[:1])
        mask = attention_mask(distance, causal=False, padding=padding)
        return self.encoder(self.wte(source.clamp(min=0)), padding=padding), mask

    def make_cache(self, source: Tensor) -> Cache:
        """Return a cache for block_size tokens of the target that holds the sources, (B, S), all equally long."""
        assert (source >= 0).all(), "sources must be equally long"
        context, _ = self.encode(source)
        cache = Cache(self.config.n_layer, self.config.block_size)
        cache.layers = [CrossLayerCache(self.config.block_size) for _ in cache.layers]
        for block, layer in zip(self.decoder.blocks, cache.layers, strict=True):
            layer.source = block.cross_attn.keys_and_values(context)
        return cache
