"""Make a trained model from any source ready to generate: lower precision in its linear layers, and fewer operators.

On a CPU, a small model is limited by the overhead of Python and PyTorch for each operator, a large one by reading
its weights from memory. Norms, sums and the residual stream stay in float32. The formulas stay in model.py: only linear
layers and RMS norms are replaced with faster equivalents.

Shapes: see model.py.
"""

import math
import sys
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from humptygpt.cli import UserError, Vain, note
from humptygpt.device import DTYPES, THREADS, free_memory, pick_device, pick_dtype
from humptygpt.formats import checkpoint
from humptygpt.formats.load import load
from humptygpt.machine import check_fits
from humptygpt.model import SelfAttention, count_parameters, rotate
from humptygpt.models.build import build_on_meta
from humptygpt.models.checks import check_model, is_close, smaller
from humptygpt.sources import ModelSource
from humptygpt.tokenizers.basic import Tokenizer

IN_VAIN: Vain = [("dtype", "quantize", ("int8",))]
# entries of a checkpoint that say which data a run was trained on
RUN = ("train_config", "model_config", "tokenizer", "data")

Product = Callable[[Tensor], Tensor]  # (..., inputs) -> (..., outputs)
CPU = torch.device("cpu")
QKV = ("q_proj", "k_proj", "v_proj")
# parameters from which threads that share operators generate faster than one; beside other programs they are slower
THREADED_FROM = 5e6
WORTH = 1.1  # a choice replaces the default only if it is at least this many times as fast


class Pipeline(NamedTuple):
    """A trained model, ready for generation, with its tokenizer, task and device."""

    model: nn.Module
    tokenizer: Tokenizer
    task: str
    device: torch.device
    questions: tuple | list = ()  # as in Loaded
    run: dict | None = None  # what the checkpoint of a run says about its settings and data


@dataclass(frozen=True)
class PipelineConfig(ModelSource):
    """A model, and how it is prepared for generation."""

    # system
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # dtype of the linear layers; auto: float32 on a CPU
    quantize: str | None = None  # int8: 8-bit weights, CPU only; None: off

    @classmethod
    def choices(cls) -> dict[str, Collection[str]]:
        return super().choices() | {"dtype": ("auto", *DTYPES), "quantize": ("int8",)}

    def pipeline(self, source: str | Path) -> Pipeline:
        """Load the model that init_from=source names, and prepare it for generation.

        Raises UserError if it is missing, damaged or not supported.
        """
        device = pick_device(self.device)
        dtype = torch.int8 if self.quantize else pick_dtype(self.dtype, device)
        loaded = load(source, self.checkpoint)
        print(loaded.description, file=sys.stderr)
        model = make_generator(loaded.model, dtype, device)
        run = None
        if loaded.saved:  # without its tensors, which would stay in memory
            run = {key: loaded.saved[key] for key in RUN}
        return Pipeline(model, loaded.tokenizer, loaded.task, device, loaded.questions, run)


def chosen_source(config: ModelSource, given: dict) -> str | Path:
    """Find the source that the settings name. given: the keys that the user set."""
    if config.init_from == "resume":
        return checkpoint.find_checkpoint(Path(config.out_dir), config.checkpoint)
    if "out_dir" in given:
        note(f"out_dir={config.out_dir} has no effect with init_from={config.init_from}")
    return config.init_from


# --------------------------------------------------------------------------------------
# Faster layers


def make_generator(model: nn.Module, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> nn.Module:
    """Prepare a model for generation and move it to the device. It can no longer be trained or saved.

    The weights of linear layers are converted to dtype once, here; autocast would convert them for each token.
    Embeddings are not converted, because each token reads only one row.

    dtype: float32, bfloat16 or float16 or, on a CPU, int8.
    Raises UserError if there is not enough memory, or for int8 on a GPU.
    """
    if dtype == torch.int8 and device.type != "cpu":
        raise UserError(f"int8 weights need a CPU, but the device is {device}; use --dtype=bfloat16")
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    advice = "close other programs, or use --quantize=int8 on a CPU"
    check_fits("the weights take", weights * dtype.itemsize, free_memory(device), advice)
    model.eval().requires_grad_(False)
    if checkpoint.is_edited():
        check_model(model)
    joins = agrees(model, joins=True)
    if not joins and not agrees(model):
        note("not using faster layers, because this model.py's logits would change; generation is slower, in float32")
        return model.to(device)
    replace_layers(model, dtype, device, joins)
    model.to(device)
    # as plain attributes they are found without nn.Module.__getattr__, which is slow
    for module in model.modules():
        vars(module).update(module._parameters | module._buffers | module._modules)
    return model


def choose_threads(loaded: Pipeline) -> None:
    """On a CPU, let the operators of a large model use all cores."""
    if loaded.device.type == "cpu":
        large = count_parameters(build_on_meta(loaded.model.config)) > THREADED_FROM
        torch.set_num_threads(THREADS if large else 1)


@torch.inference_mode()
def agrees(model: nn.Module, joins: bool = False) -> bool:
    """True if replace_layers() does not change the logits of this model.py, which the user may have edited."""
    try:
        small, text = smaller(model)
        expected = small.eval()(**text)[0]
        replace_layers(small, torch.float32, CPU, joins)
        return is_close(small(**text)[0], expected)
    except Exception:
        return False


# --------------------------------------------------------------------------------------
# Fewer operators


def replace_layers(model: nn.Module, dtype: torch.dtype, device: torch.device, joins: bool) -> None:
    """Replace linear layers and RMS norms with faster equivalents, called as plain functions rather than as modules.

    A module call costs as much as a small matrix product. joins: also use JoinedAttention.
    """
    for name, module in list(model.named_modules()):
        # other kinds of attention may compute queries, keys and values from different inputs
        if joins and type(module) is SelfAttention:
            model.set_submodule(name, JoinedAttention(module))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if not isinstance(child, nn.Linear | nn.LayerNorm | nn.RMSNorm):
                continue
            layer = child.to(device)
            # a user's subclass may compute something different
            if type(child).forward is nn.Linear.forward:
                # on a GPU, attention and the cached keys and values also use this dtype
                keeps = device.type != "cpu" and name in ("qkv_proj", *QKV)
                result = dtype if keeps else torch.float32
                layer = low_bit_linear(layer, dtype, result)
            elif type(child).forward is nn.RMSNorm.forward and device.type == "cpu":
                # a GPU computes a norm in one kernel
                layer = FastRMSNorm(layer)
            if not isinstance(module, nn.ModuleList):  # which can only hold modules
                delattr(module, name)
                layer = layer.forward
            setattr(module, name, layer)


class JoinedAttention(SelfAttention):
    """SelfAttention with a single matrix product for queries, keys and values, qkv_proj."""

    def __init__(self, attention: SelfAttention):
        """Take over the layers of `attention`, which can no longer be used."""
        vars(self).update(vars(attention))
        layers = [self._modules.pop(name) for name in QKV]
        self.n_kv_head = layers[2].out_features // self.head_size
        self.qkv_proj = layers[0]
        for name, p in layers[0].named_parameters():  # weight and, if there is one, bias
            p.data = torch.cat([layer.get_parameter(name) for layer in layers])

    def qkv(self, x, shared):
        heads = self.heads(self.qkv_proj(x))  # q's, then k's, then v's
        qk, v = heads.tensor_split([-self.n_kv_head], dim=1)
        if self.qk_norm:
            qk = self.qk_norm(qk)
        if shared.rotation:
            qk = rotate(qk, shared.rotation)
        return *qk.tensor_split([self.n_head], dim=1), v


class FastRMSNorm(nn.Module):
    """RMSNorm with a third of the operators: x / root mean square = sqrt(C) x / |x|."""

    def __init__(self, norm: nn.RMSNorm):
        super().__init__()
        C = norm.normalized_shape[0]
        eps = norm.eps or torch.finfo(torch.float32).eps
        self.root = torch.tensor(math.sqrt(C * eps))
        self.scale = math.sqrt(C) * (1 if norm.weight is None else norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return x / torch.hypot(length, self.root) * self.scale


# --------------------------------------------------------------------------------------
# Lower-precision weights, packed in the order in which the processor reads them

PACKED_FROM = 2**17  # weights; packing a matrix with fewer costs more than it saves


def low_bit_linear(linear: nn.Linear, dtype: torch.dtype, result: torch.dtype) -> nn.Module:
    """Return a version of `linear` that is faster for a few tokens, or `linear` itself if there is none.

    dtype: type of its weights. result: dtype of its output.
    """
    if dtype == torch.int8:
        return ProductLinear(int8_product(linear), torch.float32, result)
    weight = linear.weight.to(dtype)
    bias = None if linear.bias is None else linear.bias.to(dtype)
    if weight.is_cpu and weight.numel() >= PACKED_FROM and packing_pays(dtype):
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
        """x: (..., inputs). Returns (..., outputs), of dtype self.result."""
        return self.product(x.to(self.dtype)).to(self.result)


@cache
@torch.inference_mode()
def packing_pays(dtype: torch.dtype) -> bool:
    """Measure whether a matrix packed by oneDNN is faster than a plain one for a single token."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype != torch.float32 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    # so large that it is read from memory, as the layers of a model are
    weight = torch.ones(4096, 4096, dtype=dtype)
    packed, plain = packed_product(weight, None), partial(F.linear, weight=weight)
    x = torch.ones(1, 4096, dtype=dtype)
    return fastest([packed, plain], lambda product: product(x)) == packed


def fastest(choices: Sequence, run: Callable) -> object:
    """Time run(choice) for each choice in turn, in about three seconds.

    Returns the first choice unless another is WORTH times as fast. The shortest times are compared, because other
    programs can only make a run slower.
    """
    shortest = dict.fromkeys(choices, math.inf)
    end = time.perf_counter() + 3
    for _ in range(10):
        for choice in choices:
            began = time.perf_counter()
            run(choice)
            shortest[choice] = min(shortest[choice], time.perf_counter() - began)
        if time.perf_counter() > end:
            break
    winner = min(choices, key=shortest.get)
    return winner if shortest[choices[0]] >= WORTH * shortest[winner] else choices[0]


def packed_product(weight: Tensor, bias: Tensor | None) -> Product:
    """Return a linear function whose weights are prepacked in oneDNN's layout.

    For an input of only a few tokens, it takes from half of the time to 1.3 times as long, depending on the machine.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    # PyTorch need not look for the overload in every call
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: product(x, packed, bias, "none", [], "")


def int8_product(linear: nn.Linear) -> Product:
    """Return a linear function with int8 weights and one scale per output. Inputs are rounded to 8 bits as well.

    It uses PyTorch's quantized matrix multiplication, which is CPU-only.
    """
    if torch.backends.quantized.engine == "none":  # torch chooses none for ARM
        torch.backends.quantized.engine = "qnnpack"
    rows = quantize_rows(linear.weight)
    packed = torch.ops.quantized.linear_prepack(rows, linear.bias)
    product = torch.ops.quantized.linear_dynamic.default
    # without VNNI, processors add products of 8 bits in 16 bits, which overflow: inputs then get 7 bits
    on_arm = torch.backends.quantized.engine == "qnnpack"
    fewer_bits = not on_arm and not torch.cpu._is_vnni_supported()
    return lambda x: product(x, packed, fewer_bits)


def quantize_rows(weight: Tensor) -> Tensor:
    """Quantize a matrix to int8, with a scale for each row that maps its largest weight to 127 or -127."""
    scales = torch.linalg.vector_norm(weight, torch.inf, dim=1).clamp(min=1e-12) / 127
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    # this function is deprecated, but the library that replaces it is slower
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        return torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
