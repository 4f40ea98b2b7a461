"""A trained model -> the same model made for generation: weights in fewer bits, and a shorter way for single tokens.

Token by token, a processor waits for weights to come from memory, so half the bits are nearly half the time; in a small
model it waits for Python and PyTorch to start operators. Norms, sums and the residual stream stay in float32. What
BlockDecoder and FusedSelfAttention repeat of model.py, tests hold equal to it.

Shapes: see model.py.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from humptygpt.layers import NO_MASK
from model import (
    GPT,
    MLP,
    Block,
    BlockInputs,
    DecoderState,
    GatedMLP,
    LayerState,
    ModelConfig,
    PreNormBlock,
    SelfAttention,
    Stack,
    rotate,
)

Product = Callable[[Tensor], Tensor]  # (..., inputs) -> (..., outputs)
AddProduct = Callable[[Tensor, Tensor], Tensor]  # x, y -> x + product(y)


CPU = torch.device("cpu")


def prepare_for_generation(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    compiles: bool = False,
    shortcuts: bool = True,
) -> nn.Module:
    """Return the model itself with its layers swapped, on the device; it can no longer be trained or saved.

    dtype: of the weights, float32, bfloat16 or float16, or on a CPU int8. They are converted now, once; under autocast
    each token would convert them all again. Embeddings stay as they are: a token reads one row, and of a file that is
    mapped only the rows that were read are in memory. compiles: for a CompiledGPT, whose compiler finds the shorter
    way itself. shortcuts: swap attention and the stack, too, as long as model.py computes what they compute.
    """
    model.eval().requires_grad_(False)
    for module in model.modules():  # yields the children after they are swapped here
        if isinstance(module, Block) and shortcuts:
            module.attn = FusedSelfAttention(module.attn)
        for name, child in list(module.named_children()):
            # a user's kind of linear layer computes something else
            if type(child).forward is nn.Linear.forward:
                # a GPU attends in few bits, too, and keeps keys and values in them
                keeps = (
                    name.endswith(("q_proj", "k_proj", "v_proj")) and device.type != "cpu"
                )
                result = dtype if keeps else torch.float32
                linear = low_bit_linear(child.to(device), dtype, result, compiles)
                setattr(module, name, linear)
    model.to(device)
    if isinstance(model, GPT) and shortcuts and not compiles:
        kinds = {type(block) for block in model.stack.blocks}
        if kinds == {PreNormBlock}:
            model.stack = FastStack(model.stack, model.config)
    return model


# --------------------------------------------------------------------------------------
# Weights in fewer bits, and in the order in which a processor reads them

# Weights; the packed product of fewer takes longer to start than it saves
PACKED_FROM = 2**17


def low_bit_linear(
    linear: nn.Linear, dtype: torch.dtype, result: torch.dtype, compiles: bool
) -> nn.Module:
    """Return the layer, or one that computes the same faster for few tokens; result: the dtype of what it returns."""
    if dtype == torch.int8:
        return ProductLinear(int8_product(linear), torch.float32, result)
    weight = linear.weight.to(dtype)
    bias = None if linear.bias is None else linear.bias.to(dtype)
    on_cpu = weight.device.type == "cpu"
    if on_cpu and compiles:
        return ProductLinear(partial(sum_of_products, weight, bias), dtype, result)
    packs = on_cpu and torch.backends.mkldnn.is_available()
    if packs and dtype != torch.float32:
        packs = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if packs and weight.numel() >= PACKED_FROM:
        return ProductLinear(packed_product(weight, bias), dtype, result)
    if dtype == torch.float32:
        return linear
    return ProductLinear(partial(F.linear, weight=weight, bias=bias), dtype, result)


class ProductLinear(nn.Module):
    """A linear layer whose matrix product is a function that takes inputs of this dtype and holds the weights."""

    def __init__(self, product: Product, dtype: torch.dtype, result: torch.dtype):
        super().__init__()
        self.product = product
        self.dtype = dtype
        self.result = result

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs). Returns (..., outputs), of dtype result."""
        return self.product(x.to(self.dtype)).to(self.result)


def sum_of_products(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """As F.linear; of a single token as a sum, which a compiler makes one loop that reads weights as fast as it can."""
    if x.numel() != weight.shape[1]:
        return F.linear(x, weight, bias)
    y = (weight.float() * x.float().view(-1)).sum(dim=-1).to(weight.dtype)
    y = y if bias is None else y + bias
    return y.view(*x.shape[:-1], -1)


def packed_product(weight: Tensor, bias: Tensor | None) -> Product:
    """Return the product with weights in the order in which oneDNN reads them: for CPUs, in float32 or bfloat16.

    On two cores a product with one token or a few takes half of the time.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    product = torch.ops.mkldnn._linear_pointwise
    return lambda x: product(x, packed, bias, "none", [], "")


def int8_product(linear: nn.Linear) -> Product:
    """Return the product with weights in int8, one scale for each output; inputs are rounded to 8 bits as they come.

    By PyTorch's own quantized products, which are for CPUs alone.
    """
    rows = quantize_rows(linear.weight)
    packed = torch.ops.quantized.linear_prepack(rows, linear.bias)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed)


def quantize_rows(weight: Tensor) -> Tensor:
    """Return the matrix in int8, each row with the scale at which its largest weight is 127 or -127."""
    scales = torch.linalg.vector_norm(weight, torch.inf, dim=1).clamp(min=1e-12) / 127
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():
        # PyTorch will move this to a library that has no product as fast
        warnings.simplefilter("ignore", UserWarning)
        return torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)


class FusedSelfAttention(nn.Module):
    """SelfAttention with queries, keys and values by one matrix product, and queries and keys rotated together."""

    def __init__(self, attention: SelfAttention):
        super().__init__()
        self.attention = attention
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        del attention.q_proj, attention.k_proj, attention.v_proj
        self.qkv_proj = projections[0]
        for name, parameter in self.qkv_proj.named_parameters():  # weight, perhaps bias
            rows = [projection.get_parameter(name) for projection in projections]
            parameter.data = torch.cat(rows)

    def forward(
        self, x: Tensor, inputs: BlockInputs, state: LayerState | None = None
    ) -> Tensor:
        """As SelfAttention.forward."""
        attention = self.attention
        n_head, n_kv_head = attention.n_head, attention.n_kv_head
        heads = attention.split_heads(self.qkv_proj(x))
        qk, v = heads.split((n_head + n_kv_head, n_kv_head), dim=1)
        if attention.qk_norm:
            qk = F.rms_norm(qk, qk.shape[-1:])
        if inputs.rotary:
            qk = rotate(qk, inputs.rotary)
        q, k = qk.split((n_head, n_kv_head), dim=1)
        if state:
            k, v = state.append(k, v, *inputs.cached)
        return attention.attend_and_project(q, k, v, inputs.masks[attention.window])


# --------------------------------------------------------------------------------------
# One token at a time


class FastStack(nn.Module):
    """The stack of a GPT: prompts go through the stack as it is, single tokens through a BlockDecoder a block."""

    def __init__(self, stack: Stack, config: ModelConfig):
        super().__init__()
        self.stack = stack
        self.norm = norm_function(stack.norm)
        self.blocks = [BlockDecoder(block) for block in stack.blocks]
        self.windows = stack.windows
        # a position acts in rotary tables alone, and a new token attends to all: there is nothing to add and no mask
        unlimited = stack.windows == {0}
        self.plain = config.position == "rotary" and unlimited and not config.embed_norm
        if self.plain:
            self.cos = self.scaled_table(stack.position.cos)
            self.sin = self.scaled_table(stack.position.sin)

    def forward(self, x: Tensor, state: DecoderState | None = None) -> Tensor:
        """As Stack.forward."""
        if x.shape[1] > 1 or not state or not state.length:
            return self.stack(x, state)
        if self.plain and state.padding is None:  # what Stack.enter gives, in less time
            rotary = self.cos[state.length], self.sin[state.length]
            cached = state.make_room(1), state.size
            inputs = BlockInputs(cached, {0: NO_MASK}, rotary, None, NO_MASK, None)
        else:
            x, inputs = self.stack.enter(x, state)
            if inputs.rotary:
                rotary = [self.scaled_table(table) for table in inputs.rotary]
                inputs = inputs._replace(rotary=rotary)
        x = x.squeeze(1)
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x = block(x, inputs, layer)
        state.length += 1
        return self.norm(x).unsqueeze(1)

    def scaled_table(self, table: Tensor) -> Tensor:
        """table: (positions, D), or (B, 1, 1, D). Returns (positions or B, 1, D)."""
        return self.blocks[0].norm_scale * table.view(-1, 1, table.shape[-1])


class BlockDecoder:
    """What PreNormBlock computes, for one new token of each text, by few operators: (B, C) instead of (B, T, C)."""

    def __init__(self, block: PreNormBlock):
        attention = block.attn.attention
        self.attention = attention
        # RMS norm is x / |x| times this; the rotary tables are multiplied by it, once for all blocks
        self.norm_scale = math.sqrt(attention.head_size) if attention.qk_norm else 1.0
        eps = torch.finfo(torch.float32).eps * attention.head_size
        self.root_of_eps = torch.tensor(math.sqrt(eps))
        self.attn_norm = norm_function(block.attn_norm)
        self.qkv_proj = linear_function(block.attn.qkv_proj)
        self.add_o_proj = add_linear_function(attention.o_proj)
        self.mlp = block.mlp
        self.conv = block.conv
        if block.mlp:
            self.mlp_norm = norm_function(block.mlp_norm)
            self.add_mlp = add_mlp_function(block.mlp)
        if block.conv:
            # weights of the tokens before a token, the oldest first, and of the token itself; of the last n by n
            weight = block.conv.GAIN * block.conv.weight.flip(0)
            weight = F.pad(weight, (0, 0, 0, 1), value=1.0)
            self.conv_weights = [weight[len(weight) - n :] for n in range(len(weight) + 1)]
            self.conv_size = len(block.conv.weight)

    def __call__(self, x: Tensor, inputs: BlockInputs, state: LayerState) -> Tensor:
        """x: (B, C). inputs.rotary: (1, 1, D) or (B, 1, D), times norm_scale. Returns (B, C)."""
        x = self.add_attention(x, inputs, state)
        if not self.mlp:
            return x
        y = self.mlp_norm(x)
        if self.conv:
            y = self.convolve(y, state)
        return self.add_mlp(x, y)

    def add_attention(self, x: Tensor, inputs: BlockInputs, state: LayerState) -> Tensor:
        """x: (B, C). Returns (B, C)."""
        attention = self.attention
        n_head, n_kv_head, D = attention.n_head, attention.n_kv_head, attention.head_size
        end, _ = inputs.cached
        heads = self.qkv_proj(self.attn_norm(x)).view(-1, n_head + 2 * n_kv_head, D)
        qk, v = heads.split_with_sizes((n_head + n_kv_head, n_kv_head), 1)  # (B, H, D)
        if attention.qk_norm:
            # as F.rms_norm, which on a CPU is three times as many operators
            length = torch.linalg.vector_norm(qk, dim=-1, keepdim=True, dtype=torch.float32)
            qk = qk / torch.hypot(length, self.root_of_eps)
        if inputs.rotary:
            cos, sin = inputs.rotary
            qk = torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin)
        elif attention.qk_norm:
            qk = qk * self.norm_scale
        q, k = qk.split_with_sizes((n_head, n_kv_head), 1)
        state.k.select(2, end - 1).copy_(k)
        state.v.select(2, end - 1).copy_(v)
        mask, _ = inputs.masks[attention.window]
        y = F.scaled_dot_product_attention(
            q.unsqueeze(2).to(state.k.dtype),
            state.k.narrow(2, 0, end),
            state.v.narrow(2, 0, end),
            attn_mask=mask if mask is None else mask.to(state.k.dtype),
            enable_gqa=n_head != n_kv_head,
        )
        return self.add_o_proj(x, y.flatten(1))

    def convolve(self, x: Tensor, state: LayerState) -> Tensor:
        """x: (B, C). Returns (B, C)."""
        text = torch.cat([state.last_inputs, x.unsqueeze(1)], dim=1)
        n = text.shape[1]
        first = max(0, n - self.conv_size)
        state.last_inputs = text.narrow(1, first, n - first)
        return (text * self.conv_weights[n]).sum(dim=1)


def norm_function(norm: nn.Module) -> Product:
    """Return what the norm computes, (B, C) -> (B, C), without the time that nn.Module takes."""
    if not isinstance(norm, nn.LayerNorm):
        return norm.forward
    return partial(
        torch.layer_norm,
        normalized_shape=norm.normalized_shape,
        weight=norm.weight,
        bias=norm.bias,
        eps=norm.eps,
    )


def linear_function(linear: nn.Module) -> Product:
    """Return what the layer computes, (B, inputs) -> (B, outputs), without the time that nn.Module takes."""
    if not isinstance(linear, nn.Linear):
        return linear.forward
    weight = linear.weight.t()
    if linear.bias is None:
        return partial(torch.mm, mat2=weight)
    return partial(torch.addmm, linear.bias, mat2=weight)


def add_linear_function(linear: nn.Module) -> AddProduct:
    """Return x, y -> x + linear(y)."""
    if isinstance(linear, nn.Linear) and linear.bias is None:
        return partial(torch.addmm, mat2=linear.weight.t())
    function = linear_function(linear)
    return lambda x, y: x + function(y)


def add_mlp_function(mlp: nn.Module) -> AddProduct:
    """Return x, y -> x + mlp(y)."""
    if type(mlp) not in (MLP, GatedMLP):  # one that a user has added
        return lambda x, y: x + mlp(y)
    activation = mlp.activation
    up_proj = linear_function(mlp.up_proj)
    add_down_proj = add_linear_function(mlp.down_proj)
    if type(mlp) is MLP:
        return lambda x, y: add_down_proj(x, activation(up_proj(y)))
    gate_proj = linear_function(mlp.gate_proj)
    return lambda x, y: add_down_proj(x, activation(gate_proj(y)) * up_proj(y))
