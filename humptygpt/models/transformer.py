"""The original transformer: an encoder reads the source, and a decoder writes the target.

Each is a stack of blocks, like a GPT's. In the encoder, each source token attends to the whole source. The decoder's
blocks have a third branch, cross-attention, between self-attention and the feed-forward network: each target token
attends to the encoder's output. Source: Vaswani et al. 2017, arXiv:1706.03762.

Letters in shapes are explained in model.py. Here, S is the length of the source.
"""

import torch
from torch import Tensor, nn

from humptygpt.cli import UserError
from humptygpt.model import (
    ATTENTIONS,
    GPT,
    MLPS,
    NORMS,
    Block,
    Cache,
    CausalConv,
    ModelConfig,
    SelfAttention,
    Stack,
    init_weights,
)


class CrossAttention(SelfAttention):
    """Attention from the target to the source: queries come from the target, keys and values from the source.

    It uses no positions, because positions in the target and in the source are unrelated.
    """

    def forward(self, x, shared, cache=None):  # (B, T, C) -> (B, T, C)
        q = self.heads(self.q_proj(x))
        if self.qk_norm:
            q = self.qk_norm(q)
        source = cache.state if cache else self.read(shared.kept)
        y = self.kernel(q, source["source_k"], source["source_v"], source["source_mask"])
        return self.output(y, x)

    def read(self, encoded: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute keys and values of the source, each (B, H, S, D) with n_kv_head heads. encoded: see encode()."""
        k = self.heads(self.k_proj(encoded["source"]))
        if self.qk_norm:
            k = self.qk_norm(k)
        v = self.heads(self.v_proj(encoded["source"]))
        return {"source_k": k, "source_v": v, "source_mask": encoded["source_mask"]}


class DecoderBlock(Block):
    """A block with cross-attention between its attention and its feed-forward network."""

    def __init__(self, config: ModelConfig, layer: int):
        nn.Module.__init__(self)
        mlp = MLPS[config.mlp]
        self.attn_norm = NORMS[config.norm](config)
        self.attn = ATTENTIONS[config.attention](config, layer)
        self.cross_norm = NORMS[config.norm](config)
        self.cross_attn = CrossAttention(config, layer)
        if mlp:
            self.mlp_norm = NORMS[config.norm](config)
        self.conv = CausalConv(config) if mlp and config.mlp_conv else None
        self.mlp = mlp(config, layer) if mlp else None
        self.attn_dropout = nn.Dropout(config.dropout)
        self.cross_dropout = nn.Dropout(config.dropout)
        self.mlp_dropout = nn.Dropout(config.dropout)


class PreNormDecoderBlock(DecoderBlock):
    def forward(self, x, shared, cache=None):
        x = x + self.attn_dropout(self.attn(self.attn_norm(x), shared, cache))
        x = x + self.cross_dropout(self.cross_attn(self.cross_norm(x), shared, cache))
        if self.mlp:
            x = x + self.mlp_dropout(self.feed_forward(self.mlp_norm(x), shared, cache))
        return x


class PostNormDecoderBlock(DecoderBlock):
    ends_with_norm = True

    def forward(self, x, shared, cache=None):
        x = self.attn_norm(x + self.attn_dropout(self.attn(x, shared, cache)))
        x = self.cross_norm(x + self.cross_dropout(self.cross_attn(x, shared, cache)))
        if self.mlp:
            x = self.mlp_norm(x + self.mlp_dropout(self.feed_forward(x, shared, cache)))
        return x


DECODER_BLOCKS = {"pre_norm": PreNormDecoderBlock, "post_norm": PostNormDecoderBlock}


class Transformer(nn.Module):
    """An encoder and a decoder that share one vocabulary and its embedding."""

    has_cache = True

    def __init__(self, config: ModelConfig):
        super().__init__()
        config.validate()
        if config.block not in DECODER_BLOCKS:
            blocks = " or ".join(DECODER_BLOCKS)
            raise UserError(f"model=transformer needs block={blocks}, not {config.block}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.encoder = Stack(config, causal=False)
        self.decoder = Stack(config, DECODER_BLOCKS[config.block])
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        init_weights(self)

    head = GPT.head
    loss = GPT.loss

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        source: Tensor | None = None,
    ) -> tuple:
        """Compute logits and loss. They are returned in the same form as by GPT.

        idx: (B, T) token ids of the target, which starts with end-of-text. With a cache, only the ids after the cached
        tokens. targets: (B, T); targets of -1 are ignored. source: (B, S) token ids; shorter sources are padded with
        -1. With a cache, omit the source, because the cache already holds it.
        """
        encoded = {} if cache else self.encode(source)
        x, terms = self.decoder(self.wte(idx), idx, cache, **encoded)
        logits = self.head(x)
        if targets is None:
            return logits, None
        loss = self.loss(logits, targets)
        return (logits, loss, terms) if terms else (logits, loss)

    def next_logits(self, idx: Tensor, cache: Cache) -> Tensor:
        """Compute the logits (B, V) of the token that follows idx."""
        logits, _ = self(idx, cache=cache)
        return logits[:, -1]

    def encode(self, source: Tensor) -> dict[str, Tensor]:
        """Run the encoder. source: as in forward().

        Returns its output, (B, S, C), the mask for attention to it, and its terms of the loss.
        """
        padding = source < 0
        mask = torch.where(padding[:, None, None, :], -torch.inf, 0.0)  # (B, 1, 1, S)
        x, terms = self.encoder(self.wte(source.clamp(min=0)), source, padding=padding)
        return {"source": x, "source_mask": mask, "losses": terms}

    def make_cache(self, source: Tensor) -> Cache:
        """Make a cache for up to block_size target tokens. source: (B, S) token ids, as in forward().

        The cache of each block also holds the keys and values of the source.
        """
        encoded = self.encode(source)
        cache = Cache(self.config.n_layer, self.config.block_size)
        for block, layer in zip(self.decoder.blocks, cache.layers, strict=True):
            layer.state.update(block.cross_attn.read(encoded))
        return cache
