"""Speed up generation with a trained model: fewer bits in its linear layers, and fewer operators.

On a CPU, a small model is limited by the overhead of Python and PyTorch for each operator, a large one by reading its
weights from memory. Norms, sums and the residual stream stay in float32. The formulas stay in model.py: only linear
layers and RMS norms are replaced with faster equivalents. compiled.py compiles the single-token step.

Shapes: see model.py.
"""

import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from humptygpt.config import UserError, note
from humptygpt.device import free_memory
from humptygpt.machine import check_fits
from model import SelfAttention

Product = Callable[[Tensor], Tensor]  # (..., inputs) -> (..., outputs)
CPU = torch.device("cpu")
QKV = ("q_proj", "k_proj", "v_proj")


def make_generator(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    compiles: bool = False,
) -> nn.Module:
    """Prepare a model for generation and move it to the device. It can no longer be trained or saved.

    dtype: float32, bfloat16 or float16, or int8 on a CPU. The weights are converted once, here; autocast would convert
    them for each token. Embeddings are not converted: a token reads only one row, and in a memory-mapped file only the
    rows that have been read take up memory. compiles: compile the single-token step.

    Raises UserError if there is not enough memory, or for int8 on a GPU.
    """
    if dtype == torch.int8 and device.type != "cpu":
        raise UserError(
            f"int8 weights need a CPU, but the device is {device}; use --dtype=bfloat16"
        )
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    advice = "close other programs, or on a CPU use --quantize=int8"
    check_fits("the weights take", weights * dtype.itemsize, free_memory(device), advice)
    model.eval().requires_grad_(False)
    shortcuts = not compiles and model.has_cache and agrees(model, join, call_directly)
    if model.has_cache and not shortcuts and not agrees(model):
        note(
            "model.py computes different logits with a cache than without one; generating without it, which is slower"
        )
        model.has_cache = False
    if compiles and not model.has_cache:
        note(f"compile=True has no effect: model={model.config.model} has no cache")
        compiles = False
    if shortcuts:
        join(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            # a user's subclass of nn.Linear may compute something different
            if type(child).forward is nn.Linear.forward:
                # on a GPU, attention and the cached keys and values use this dtype, too
                keeps = device.type != "cpu" and name in ("qkv_proj", *QKV)
                result = dtype if keeps else torch.float32
                linear = low_bit_linear(child.to(device), dtype, result, compiles)
                setattr(module, name, linear)
    model.to(device)
    if shortcuts:
        call_directly(model)
    if not compiles:
        return model
    from humptygpt.compiled import CompiledGPT

    print("compiling: this takes about a minute", file=sys.stderr)
    # reduce-overhead replays CUDA graphs, so it is not for a CPU
    return CompiledGPT(model, mode="reduce-overhead" if device.type == "cuda" else None)


@torch.inference_mode()
def agrees(model: nn.Module, *changes: Callable[[nn.Module], None]) -> bool:
    """Check that model.py, which the user may have edited, computes the same logits with a cache as without one.

    The check takes milliseconds, because it uses a tiny model with the same classes and settings. changes: functions
    that are applied to the tiny model before it runs with a cache. If the tiny model raises an error, returns False
    with changes and True without: a user's class may need other sizes.
    """
    config = model.config
    window = min(config.window, 5)
    sizes = {"n_embd": 4 * config.n_head, "vocab_size": 11}
    random = torch.Generator().manual_seed(0)
    T = min(config.block_size, window + 12)
    idx = torch.randint(11, (1, T), generator=random)
    texts = {"source": idx} if model.has_encoder else {}
    try:
        small = type(model)(replace(config, **sizes, window=window)).eval()
        for p in small.parameters():
            p.normal_(std=0.5, generator=random)
        expected = small(idx, **texts)[0][:, -1]
        for change in changes:
            change(small)
        cache = small.make_cache(**texts)
        for piece in idx.split([1, T - 3, 1, 1] if T > 3 else 1, dim=1):
            found = small.next_logits(piece, cache)
    except Exception:
        return not changes
    return torch.allclose(found, expected, 1e-3, 1e-3)


# --------------------------------------------------------------------------------------
# Fewer operators


def join(model: nn.Module) -> None:
    """Compute the queries, keys and values of self-attention with a single matrix product."""
    for module in list(model.modules()):
        # other kinds of attention may give the three layers different inputs
        if type(module).forward is SelfAttention.forward:
            module.joint = JointLinear([getattr(module, name) for name in QKV])
            for number, name in enumerate(QKV):
                delattr(module, name)
                setattr(module, name, partial(module.joint.part, number))


class JointLinear(nn.Module):
    """Several linear layers with the same input as one matrix product, computed when the first layer is called."""

    def __init__(self, layers: list[nn.Linear]):
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        self.qkv_proj = layers[0]
        for name, p in self.qkv_proj.named_parameters():  # weight, perhaps bias
            p.data = torch.cat([layer.get_parameter(name) for layer in layers])
        self.x = None

    def part(self, number: int, x: Tensor) -> Tensor:
        """Return the output of one layer, (..., outputs). x: (..., inputs)."""
        if x is not self.x:
            self.x = x
            self.parts = self.qkv_proj(x).split(self.sizes, dim=-1)
        return self.parts[number]


def call_directly(model: nn.Module) -> None:
    """Replace each layer with its forward function: nn.Module's overhead is as large as a small product."""
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):  # it can only hold modules
            continue
        for name, child in list(module.named_children()):
            if type(child).forward is nn.RMSNorm.forward:
                function = rms_norm(child)
            elif isinstance(child, nn.Linear | ProductLinear | nn.LayerNorm):
                function = child.forward
            else:
                continue
            delattr(module, name)
            setattr(module, name, function)


def rms_norm(norm: nn.RMSNorm) -> Product:
    """Return an equivalent function with a third of the operators: x / root mean square = sqrt(C) x / |x|."""
    C = norm.normalized_shape[0]
    eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    root = torch.tensor(math.sqrt(C * eps))
    scale = math.sqrt(C) if norm.weight is None else math.sqrt(C) * norm.weight

    def function(x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return x / torch.hypot(length, root) * scale

    return function


# --------------------------------------------------------------------------------------
# Weights in fewer bits, stored in the order in which the processor reads them

PACKED_FROM = 2**17  # weights; a smaller packed product takes longer to start than it saves


def low_bit_linear(
    linear: nn.Linear, dtype: torch.dtype, result: torch.dtype, compiles: bool
) -> nn.Module:
    """Return an equivalent layer that is faster for a few tokens, or `linear` itself. result: dtype of its output."""
    if dtype == torch.int8:
        return ProductLinear(int8_product(linear), torch.float32, result)
    weight = linear.weight.to(dtype)
    bias = None if linear.bias is None else linear.bias.to(dtype)
    if compiles and weight.device.type == "cpu":
        product = partial(sum_of_products, weight, bias)
    elif packs(weight):
        product = packed_product(weight, bias)
    elif dtype == torch.float32:
        return linear
    else:
        product = partial(F.linear, weight=weight, bias=bias)
    return ProductLinear(product, dtype, result)


class ProductLinear(nn.Module):
    """A linear layer computed by a function that holds the weights and takes inputs of one dtype."""

    def __init__(self, product: Product, dtype: torch.dtype, result: torch.dtype):
        super().__init__()
        self.product = product
        self.dtype = dtype
        self.result = result

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs). Returns (..., outputs), of dtype result."""
        return self.product(x.to(self.dtype)).to(self.result)


def sum_of_products(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Same as F.linear, but a single token uses a sum, which the compiler turns into one loop over the weights."""
    if x.numel() != weight.shape[1]:
        return F.linear(x, weight, bias)
    y = (weight.float() * x.float().view(-1)).sum(dim=-1).to(weight.dtype)
    y = y if bias is None else y + bias
    return y.view(*x.shape[:-1], -1)


def packs(weight: Tensor) -> bool:
    """True if oneDNN can pack this matrix and it is large enough to benefit."""
    large = weight.device.type == "cpu" and weight.numel() >= PACKED_FROM
    if not large or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def packed_product(weight: Tensor, bias: Tensor | None) -> Product:
    """Return a linear function with its weights in the order in which oneDNN reads them.

    On two cores, this halves the time for a few tokens.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    product = torch.ops.mkldnn._linear_pointwise
    return lambda x: product(x, packed, bias, "none", [], "")


def int8_product(linear: nn.Linear) -> Product:
    """Return a linear function with int8 weights and one scale per output. Inputs are rounded to 8 bits as well.

    It uses PyTorch's quantized matrix multiplication, which is CPU-only.
    """
    rows = quantize_rows(linear.weight)
    packed = torch.ops.quantized.linear_prepack(rows, linear.bias)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed)


def quantize_rows(weight: Tensor) -> Tensor:
    """Quantize a matrix to int8, with a scale for each row that maps its largest weight to 127 or -127."""
    scales = torch.linalg.vector_norm(weight, torch.inf, dim=1).clamp(min=1e-12) / 127
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():
        # a deprecation warning: the library that will replace this has no product as fast
        warnings.simplefilter("ignore", UserWarning)
        return torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
