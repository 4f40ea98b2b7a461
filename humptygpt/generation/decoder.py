"""A trained model -> the same model made for generation: fewer matrix products, and weights in fewer bits.

Token by token, a processor waits for weights to come from memory; half the bits are nearly half the time. Norms, sums
and softmax stay in float32.
"""

import ctypes
import math
import mmap
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from humptygpt.nn.layers import Linear, with_loss
from model import (
    GPT,
    MLP,
    BlockInputs,
    DecoderState,
    GatedMLP,
    LayerState,
    PreNormBlock,
    SelfAttention,
    embed_tokens,
)


class PackedLinear(nn.Module):
    """A linear layer with weights in float32 or bfloat16, in the order in which oneDNN reads them: for CPUs.

    Input and output are float32. On two cores a product with one token or a few takes half of the time.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, mapped: bool):
        super().__init__()
        self.dtype = dtype
        weight = (
            linear.weight.detach() if dtype == torch.float32 else to_bfloat16(linear.weight, mapped)
        )
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs). Returns (..., outputs)."""
        return torch.ops.mkldnn._linear_pointwise(
            x.to(self.dtype), self.packed, self.bias, "none", [], ""
        ).float()


class Bfloat16Linear(nn.Module):
    """A linear layer with weights in bfloat16; input and output are float32."""

    def __init__(self, linear: nn.Linear, mapped: bool):
        super().__init__()
        self.weight = to_bfloat16(linear.weight, mapped)
        self.bias = None if linear.bias is None else linear.bias.detach().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs). Returns (..., outputs)."""
        return F.linear(x.bfloat16(), self.weight, self.bias).float()


class Int8Linear(nn.Module):
    """A linear layer with weights in int8, one scale for each output; inputs are rounded to 8 bits as they come.

    By PyTorch's own quantized products, which are for CPUs alone.
    """

    def __init__(self, linear: nn.Linear, mapped: bool):
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach()
        rows, scales = quantize_rows(linear.weight, mapped)
        zeros = torch.zeros(len(rows), dtype=torch.int64)
        with (
            warnings.catch_warnings()
        ):  # PyTorch means to move these products to a library, which has none as fast
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(rows, scales.double(), zeros, 0)
        self.packed = torch.ops.quantized.linear_prepack(quantized, bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs), float32. Returns (..., outputs)."""
        return torch.ops.quantized.linear_dynamic(x, self.packed)


PACKED_FROM = 2**17  # weights; the packed product of fewer takes longer to start than it saves


def to_bfloat16(weight: Tensor, mapped: bool) -> Tensor:
    """The matrix in bfloat16."""
    found = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
    for rows in row_slices(weight, mapped):
        found[rows] = weight.detach()[rows]
    return found


def quantize_rows(weight: Tensor, mapped: bool = False) -> tuple[Tensor, Tensor]:
    """(the matrix in int8, (outputs, inputs); the scale of each row, at which its largest weight is 127)."""
    found, scales = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
    for rows in row_slices(weight, mapped):
        smallest, largest = weight.detach()[rows].aminmax(dim=1)
        scales[rows] = torch.maximum(-smallest, largest).clamp(min=1e-12) / 127
        found[rows] = (weight.detach()[rows] / scales[rows, None]).round_().to(torch.int8)
    return found, scales


def row_slices(weight: Tensor, mapped: bool) -> Iterator[slice]:
    """A matrix of a mapped file a few megabytes at a time, whose pages are given back after each; of others, all."""
    step = max(1, 2**21 // weight.shape[1]) if mapped else len(weight)
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        yield rows
        if mapped:
            give_back_pages(weight.detach()[rows])


def prepare_for_generation(
    model: nn.Module, dtype: torch.dtype = torch.float32, int8: bool = False, mapped: bool = False
) -> nn.Module:
    """The model itself, which can no longer be trained or saved: with fused projections, and weights in dtype or int8.

    dtype: float32, or bfloat16. int8: on a CPU alone. mapped: its weights are in a mapped file, as from
    checkpoint.read; the pages of those that are replaced are given back. Embeddings stay as they are: a token
    reads one row, and of a mapped file only the rows that were read are in memory.
    """
    model.eval().requires_grad_(False)
    # not the layers themselves, or the list would keep all that are replaced; the model last, since its head is largest
    parents = [
        module for module in model.modules() if not isinstance(module, nn.Linear | nn.Embedding)
    ]
    for module in reversed(parents):
        replaced = fuse_projections(module) if isinstance(module, SelfAttention) else []
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, converted(child, dtype, int8, mapped))
            if getattr(module, name) is not child and name != "qkv_proj":  # which is in no file
                replaced.append(child)
        for layer in replaced if mapped else []:
            give_back_pages(layer.weight)
    if isinstance(model, GPT) and all(type(block) is PreNormBlock for block in model.stack.blocks):
        model.next_logits = GPTDecoder(model)
    return model


def give_back_pages(weight: Tensor) -> None:
    """Let Linux drop this part of a mapped file from memory. Where somebody uses it, it is read again."""
    if sys.platform != "linux":
        return
    page, first = mmap.PAGESIZE, weight.data_ptr()
    begin, end = -(-first // page) * page, (first + weight.nbytes) // page * page
    if begin < end:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def converted(linear: nn.Linear, dtype: torch.dtype, int8: bool, mapped: bool) -> nn.Module:
    """The layer, or one that computes the same faster for few tokens."""
    if int8:
        return Int8Linear(linear, mapped)
    packs = linear.weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    packs &= dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if packs and linear.weight.numel() >= PACKED_FROM:
        return PackedLinear(linear, dtype, mapped)
    return linear if dtype == torch.float32 else Bfloat16Linear(linear, mapped)


def fuse_projections(attention: SelfAttention) -> list[nn.Linear]:
    """Queries, keys and values by one matrix product. Returns the three layers that it replaces."""
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    fused = Linear(
        parts[0].in_features, sum(part.out_features for part in parts), parts[0].bias is not None
    )
    fused.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    if fused.bias is not None:
        fused.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
    attention.qkv_proj = fused
    del attention.q_proj, attention.k_proj, attention.v_proj
    return parts


# --------------------------------------------------------------------------------------
# One token at a time


def product(linear: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the layer computes, (B, inputs) -> (B, outputs), without the time that nn.Module takes."""
    if not isinstance(linear, nn.Linear):
        return linear.forward
    weight = linear.weight.t()
    return (
        partial(torch.mm, mat2=weight)
        if linear.bias is None
        else partial(torch.addmm, linear.bias, mat2=weight)
    )


def add_product(linear: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """x, y -> x + what the layer makes of y."""
    if isinstance(linear, nn.Linear) and linear.bias is None:
        return partial(torch.addmm, mat2=linear.weight.t())
    of = product(linear)
    return lambda x, y: x + of(y)


def normalization(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the norm computes, (B, C) -> (B, C), likewise."""
    if not isinstance(norm, nn.LayerNorm):
        return norm.forward
    keys = {
        "normalized_shape": norm.normalized_shape,
        "weight": norm.weight,
        "bias": norm.bias,
        "eps": norm.eps,
    }
    return partial(torch.layer_norm, **keys)


class BlockDecoder:
    """What PreNormBlock computes, for one new token of each text: (B, C) instead of (B, T, C).

    In a small model a token takes as long as Python and PyTorch need to start its operators, so they are few, and what
    can be looked up once is.
    """

    def __init__(self, block: PreNormBlock):
        attn, mlp = block.attn, block.mlp
        self.head_size, self.qk_norm = attn.head_size, attn.qk_norm
        self.n_head, self.n_kv_head = attn.n_head, attn.n_kv_head
        self.norm_scale = (
            math.sqrt(attn.head_size) if attn.qk_norm else 1.0
        )  # what a vector of length 1 lacks
        self.root_of_eps = torch.tensor(math.sqrt(torch.finfo(torch.float32).eps * attn.head_size))
        self.attn_norm, self.qkv_proj = normalization(block.attn_norm), product(attn.qkv_proj)
        self.add_o_proj = add_product(attn.o_proj)
        self.mlp, self.has_conv = mlp, block.conv is not None
        self.known_mlp = type(mlp) in (MLP, GatedMLP)  # and not one that a user has added
        if mlp:
            self.mlp_norm = normalization(block.mlp_norm)
        if self.known_mlp:
            self.activation = mlp.activation
            self.up_proj, self.add_down_proj = product(mlp.up_proj), add_product(mlp.down_proj)
            self.gate_proj = product(mlp.gate_proj) if isinstance(mlp, GatedMLP) else None
        if block.conv:  # of the token itself and of those before it, the newest first
            self.conv_weight = F.pad(block.conv.GAIN * block.conv.weight, (0, 0, 1, 0), value=1.0)
            self.conv_size = len(self.conv_weight)

    def __call__(self, x: Tensor, inputs: BlockInputs, state: LayerState) -> Tensor:
        """x: (B, C). inputs.rotary: (1, 1, D) or (B, 1, D), times norm_scale. Returns (B, C)."""
        n_head, n_kv_head, end = self.n_head, self.n_kv_head, inputs.cached[0]
        heads = self.qkv_proj(self.attn_norm(x)).view(
            -1, n_head + 2 * n_kv_head, self.head_size
        )  # (B, heads, D)
        qk, v = (
            heads.narrow(1, 0, n_head + n_kv_head),
            heads.narrow(1, n_head + n_kv_head, n_kv_head),
        )
        if self.qk_norm:  # as F.rms_norm, which on a CPU is three times as many operators
            qk = qk / torch.hypot(
                torch.linalg.vector_norm(qk, dim=-1, keepdim=True), self.root_of_eps
            )
        if inputs.rotary:
            cos, sin = inputs.rotary
            qk = torch.addcmul(qk * cos, qk.roll(self.head_size // 2, -1), sin)
        elif self.qk_norm:
            qk = qk * self.norm_scale
        state.k.select(2, end - 1).copy_(qk.narrow(1, n_head, n_kv_head))
        state.v.select(2, end - 1).copy_(v)
        k, v = state.k.narrow(2, 0, end), state.v.narrow(2, 0, end)
        q = qk.narrow(1, 0, n_head).unsqueeze(2)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=inputs.mask, enable_gqa=n_head != n_kv_head
        )
        x = self.add_o_proj(x, y.flatten(1))
        return self.add_feed_forward(x, state) if self.mlp else x

    def add_feed_forward(self, x: Tensor, state: LayerState) -> Tensor:
        """x: (B, C). Returns (B, C)."""
        y = self.mlp_norm(x)
        if self.has_conv:
            text = torch.cat([y.unsqueeze(1), state.last_inputs], dim=1)  # the newest first
            n = text.shape[1]
            y = (text * (self.conv_weight if n == self.conv_size else self.conv_weight[:n])).sum(
                dim=1
            )
            state.last_inputs = text.narrow(1, 0, min(n, self.conv_size - 1))
        if not self.known_mlp:
            return x + self.mlp(y)
        hidden = self.up_proj(y)
        gate = self.activation(hidden if self.gate_proj is None else self.gate_proj(y))
        return self.add_down_proj(x, gate if self.gate_proj is None else gate * hidden)


class GPTDecoder:
    """GPT.next_logits of a GPT made for generation: prompts go through the model, single tokens through here."""

    def __init__(self, model: GPT):
        self.model, self.stack, self.read_prompt = model, model.stack, model.next_logits
        self.norm, self.lm_head = normalization(model.stack.norm), product(model.lm_head)
        self.blocks = [BlockDecoder(block) for block in model.stack.blocks]
        self.norm_scale = self.blocks[0].norm_scale
        config, position = model.config, model.stack.position
        # each token attends to all before it, and its position is in the rotary tables alone: there is no mask to make
        self.plain = config.position == "rotary" and not config.window and not config.embed_norm
        if self.plain:
            self.tables = [
                table[:, None, None] * self.norm_scale for table in (position.cos, position.sin)
            ]

    def __call__(self, idx: Tensor, state: DecoderState | None = None) -> Tensor:
        """As GPT.next_logits."""
        if idx.shape[1] > 1 or not state or not state.length:
            return self.read_prompt(idx, state)
        x, inputs = self.enter(embed_tokens(self.model, idx, state), state)
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x = block(x, inputs, layer)
        state.length += 1
        return with_loss(self.model, self.lm_head(self.norm(x)), None)[0]

    def enter(self, x: Tensor, state: DecoderState) -> tuple[Tensor, BlockInputs]:
        """As Stack.enter, but returns (B, C) and rotary tables for BlockDecoder. x: (B, 1, C)."""
        if self.plain and state.padding is None:
            rotary = [table[state.length] for table in self.tables]
            cached = state.make_room(1), state.size
            return x.squeeze(1), BlockInputs(cached, None, False, rotary, None, None, None)
        x, inputs = self.stack.enter(x, state)
        if inputs.rotary:
            tables = (table.view(-1, 1, table.shape[-1]) for table in inputs.rotary)
            inputs = inputs._replace(rotary=[table * self.norm_scale for table in tables])
        return x.squeeze(1), inputs
