"""A model made faster for generation: its linear layers in fewer bits, and its step of one token compiled.

On a CPU a small model waits for Python and PyTorch to start operators, a large one for its weights to come from memory.
Norms, sums and the residual stream stay in float32. The formulas are the model's own: what is swapped are its linear
layers, and what is compiled is its next_logits().

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

from humptygpt.config import note
from humptygpt.machine import is_out_of_memory
from model import GPT, Cache, LayerCache, ModelConfig, SelfAttention

Product = Callable[[Tensor], Tensor]  # (..., inputs) -> (..., outputs)
CPU = torch.device("cpu")


def make_generator(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    compiles: bool = False,
) -> nn.Module:
    """Return the model made for generation, on the device; it can no longer be trained or saved.

    dtype: of the weights, float32, bfloat16 or float16, or on a CPU int8. They are converted now, once; under autocast
    each token would convert them all again. Embeddings stay as they are: a token reads one row, and of a file that is
    mapped only the rows that were read are in memory. compiles: compile the step of one token.
    """
    model.eval().requires_grad_(False)
    shortcuts = not compiles and model.has_cache and agrees(model, join, call_directly)
    if model.has_cache and not shortcuts and not agrees(model):
        note(
            "with a cache, model.py gives other logits: each token is computed from the whole text"
        )
        model.has_cache = compiles = False
    if shortcuts:
        join(model)
    for module in model.modules():  # yields the children after they are swapped here
        for name, child in list(module.named_children()):
            # a user's kind of linear layer computes something else
            if type(child).forward is nn.Linear.forward:
                # a GPU attends in few bits, too, and keeps keys and values in them
                keeps = device.type != "cpu" and name in ("qkv_proj", *QKV)
                result = dtype if keeps else torch.float32
                linear = low_bit_linear(child.to(device), dtype, result, compiles)
                setattr(module, name, linear)
    model.to(device)
    if shortcuts:
        call_directly(model)
    if not compiles:
        return model
    print("compiling: this takes about a minute", file=sys.stderr)
    # a CUDA graph; on a CPU there is none
    return CompiledGPT(model, mode="reduce-overhead" if device.type == "cuda" else None)


@torch.inference_mode()
def agrees(model: nn.Module, *changes: Callable[[nn.Module], None]) -> bool:
    """Whether this model.py, which a user may have edited, computes the same with a cache as from the whole text.

    It is tried on a model of the same classes and settings that is so small that this takes milliseconds. changes: made
    to it for the former. An error is an answer only with changes, because a user's class may need other sizes.
    """
    config = model.config
    window = min(config.window, 5)
    n_layer = min(config.n_layer, 3)
    sizes = {"n_layer": n_layer, "n_embd": 4 * config.n_head, "vocab_size": 11}
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
# What a CPU spends on small models: starting operators

QKV = ("q_proj", "k_proj", "v_proj")


def join(model: nn.Module) -> None:
    """Let queries, keys and values of self-attention come from one product."""
    for module in list(model.modules()):
        # a kind of attention may give them different inputs
        if type(module).forward is SelfAttention.forward:
            layers = [getattr(module, name) for name in QKV]
            joint = JointLinear(layers)
            for number, name in enumerate(QKV):
                setattr(module, name, Part(joint, number))


class JointLinear(nn.Module):
    """Linear layers as one, which is computed once for each input."""

    def __init__(self, layers: list[nn.Linear]):
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        self.qkv_proj = layers[0]
        for name, p in self.qkv_proj.named_parameters():  # weight, perhaps bias
            p.data = torch.cat([layer.get_parameter(name) for layer in layers])
        self.x = None

    def part(self, number: int, x: Tensor) -> Tensor:
        if x is not self.x:
            self.x = x
            self.parts = self.qkv_proj(x).split(self.sizes, dim=-1)
        return self.parts[number]


class Part(nn.Module):
    """One of the layers of a JointLinear."""

    def __init__(self, joint: JointLinear, number: int):
        super().__init__()
        self.joint = joint
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs). Returns (..., outputs)."""
        return self.joint.part(self.number, x)


def call_directly(model: nn.Module) -> None:
    """Put the function of each layer in the layer's place: the rest of nn.Module takes as long as a small product."""
    layers = (nn.Linear, ProductLinear, Part, nn.LayerNorm)
    modules = [m for m in model.modules() if not isinstance(m, nn.ModuleList)]
    for module in modules:
        for name, child in list(module.named_children()):
            if type(child).forward is nn.RMSNorm.forward:
                function = rms_norm(child)
            elif isinstance(child, layers):
                function = child.forward
            else:
                continue
            delattr(module, name)
            setattr(module, name, function)


def rms_norm(norm: nn.RMSNorm) -> Product:
    """Return the same by a third of the operators: x / root mean square = sqrt(C) x / |x|."""
    C = norm.normalized_shape[0]
    eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    root = torch.tensor(math.sqrt(C * eps))
    scale = math.sqrt(C) if norm.weight is None else math.sqrt(C) * norm.weight

    def function(x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return x / torch.hypot(length, root) * scale

    return function


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


# --------------------------------------------------------------------------------------
# A compiled step. Source: gpt-fast


class StaticLayerCache(LayerCache):
    """Buffers of a layer at fixed addresses, into which one token is written at a position that is a tensor."""

    def __init__(self, layer: LayerCache):
        super().__init__(layer.size)
        self.k = layer.k
        self.v = layer.v
        if layer.last_inputs is not None:  # a part of a prompt until now
            layer.last_inputs = layer.last_inputs.contiguous()
        self.buffer = layer.last_inputs

    def append(self, k: Tensor, v: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: (B, H, 1, D); end: (1,). Returns the whole buffers, (B, H, size, D)."""
        self.k.index_copy_(2, end - 1, k.to(self.k.dtype))
        self.v.index_copy_(2, end - 1, v.to(self.v.dtype))
        return self.k, self.v

    @property
    def last_inputs(self) -> Tensor | None:
        return self.buffer

    @last_inputs.setter
    def last_inputs(self, inputs: Tensor | None) -> None:
        if inputs is not None:
            self.buffer.copy_(inputs)


class StaticCache(Cache):
    """A cache whose length is a tensor, so that one graph serves all lengths; masks hide what is not written yet."""

    def __init__(self, cache: Cache, B: int, device: torch.device):
        self.size = cache.size
        self.length = torch.full((1,), cache.length, device=device)
        self.padding = torch.zeros(B, dtype=torch.int64, device=device)
        if cache.padding is not None:
            self.padding += cache.padding
        self.layers = [StaticLayerCache(layer) for layer in cache.layers]

    def span(self, T: int) -> int:
        return self.size


class CompiledGPT(nn.Module):
    """A GPT whose step of one token is compiled. Prompts go through the model as it is.

    On CUDA the kernels of a step are replayed as one CUDA graph, which spares the CPU from launching each.
    """

    has_encoder = False
    has_cache = True

    def __init__(self, model: GPT, **options):
        """options: of torch.compile."""
        super().__init__()
        self.model = model
        self.step = torch.compile(
            model.next_logits, dynamic=False, fullgraph=True, **options
        )

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def make_cache(self, size: int | None = None) -> Cache:
        """Return an empty cache with room for block_size tokens: one shape for all texts."""
        return self.model.make_cache()

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple:
        """As GPT.forward."""
        return self.model(idx, targets)

    def next_logits(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        """As GPT.next_logits: a single token after others by the compiled step."""
        if idx.shape[1] > 1 or not cache or not cache.length:
            return self.model.next_logits(idx, cache)
        static = StaticCache(cache, len(idx), idx.device)
        if idx.is_cuda:
            for layer in static.layers:
                for buffer in (layer.k, layer.v, layer.buffer):
                    if buffer is not None:
                        torch._dynamo.mark_static_address(buffer, guard=False)
        try:
            # a tensor made outside of inference mode would be compiled for once more
            logits = self.step(idx.clone(), static)
        except Exception as error:  # compilers fail in as many ways as there are machines
            if self.step == self.model.next_logits or is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            note(f"torch.compile fails here ({reason}); generating uncompiled")
            self.step = self.model.next_logits
            logits = self.step(idx, StaticCache(cache, len(idx), idx.device))
        cache.length += 1
        return logits.clone()  # the next replay of a CUDA graph overwrites it
