"""What networks are built from: the decoder's state, layers, attention, activations, loss; and devices.

Shapes: B batch, H heads, T queries or new tokens, S keys or source length, D head size, C n_embd, V vocabulary.
"""

import ctypes
import os
import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from humptygpt.config import UserError
from humptygpt.machine import available_memory

# Positions of the tokens of one forward pass: T consecutive ones, or (B, T) where each text of a batch has its own
PositionIds = slice | Tensor
# What is added to the scores, broadcasts to (B, H, T, S), or None; and whether instead, with T = S, no query attends to
# a later key, for which SDPA has fast kernels
Mask = tuple[Tensor | None, bool]
NO_MASK: Mask = (None, False)
# Elements of the scores up to which explicit attention is used: 64 MB a block in bfloat16
EXPLICIT_SCORES = 2**25


# --------------------------------------------------------------------------------------
# The decoder's state: what generating the next token needs of the tokens read so far


class LayerState:
    """Keys and values of one block, in buffers that hold `size` tokens."""

    def __init__(self):
        # (B, H, size, D), made when the first token shows shape, dtype and device
        self.k = None
        self.v = None
        # keys and values of the encoder's output, each (B, H, S, D), where there is one
        self.cross: Sequence[Tensor] = ()
        # (B, up to n, C), of a convolution over n tokens before each
        self.last_inputs = None

    def append(self, k: Tensor, v: Tensor, end: int, size: int) -> tuple[Tensor, Tensor]:
        """k, v: (B, H, T, D), which go before position `end` of the buffers. Returns all up to it, (B, H, end, D)."""
        B, H, T, D = k.shape
        if self.k is None:
            # zeros, since masked keys must be finite where a compiled step attends to whole buffers
            self.k = k.new_zeros(B, H, size, D)
            self.v = v.new_zeros(B, H, size, D)
        self.k[:, :, end - T : end] = k
        self.v[:, :, end - T : end] = v
        return self.k[:, :, :end], self.v[:, :, :end]

    def copy(self, first: int, end: int, size: int, rows: Tensor | slice) -> None:
        """Move what the buffers hold from `first` to `end` into new ones, of these rows of the batch."""
        if self.k is None:
            return
        k = self.k[:, :, first:end][rows]
        v = self.v[:, :, first:end][rows]
        self.k = None
        self.append(k, v, end - first, size)


class DecoderState:
    """A decoder's KV cache: what it keeps of the tokens read. Its length is an int: no step waits for a GPU.

    size: the most tokens that will be read. windows: of the layers' sliding-window attention; keys and values that are
    out of every later token's reach are dropped, so that the buffers never hold more than about twice the widest
    window; with 0 among the windows, all are kept.
    padding: (B,) int64, how many of the first tokens of each text are padding, where a batch holds texts of different
    lengths; None: all texts start at the first token.
    """

    def __init__(self, n_layer: int, size: int, windows: set[int]):
        self.length = 0  # tokens read
        self.held = 0  # of these, the newest, that the buffers hold
        self.window = 0 if 0 in windows else max(windows)
        self.size = min(size, 2 * self.window or size)
        self.padding: Tensor | None = None
        self.layers = [LayerState() for _ in range(n_layer)]

    def clear(self) -> None:
        """Forget the tokens read; the buffers stay."""
        self.length = 0
        self.held = 0
        self.padding = None
        for layer in self.layers:
            layer.last_inputs = None

    def make_room(self, T: int) -> int:
        """For the next T tokens. Returns how many tokens they can attend to, themselves included."""
        if self.held + T > self.size:
            assert self.window, (
                f"{self.held + T} tokens, but the state was made for {self.size}"
            )
            kept = min(self.held, self.window - 1)
            self.size = max(2 * self.window, kept + T)
            for layer in self.layers:
                layer.copy(self.held - kept, self.held, self.size, slice(None))
            self.held = kept
        self.held += T
        return self.held

    def positions(self, T: int) -> PositionIds:
        """Of the next T tokens."""
        if self.padding is None:
            return slice(self.length, self.length + T)
        index = torch.arange(self.length, self.length + T, device=self.padding.device)
        return (index - self.padding[:, None]).clamp(min=0)

    def padding_mask(self, T: int, S: int) -> Tensor | None:
        """(B, S) bool, True where a token is padding, of the last S up to the next T."""
        if self.padding is None:
            return None
        end = self.length + T
        return (
            torch.arange(end - S, end, device=self.padding.device) < self.padding[:, None]
        )

    def select(self, rows: Tensor) -> None:
        """The batch becomes these of its rows, int64 (any number,), in this order; a row may occur several times."""
        for layer in self.layers:
            layer.copy(0, self.held, self.size, rows)
            layer.cross = [x[rows] for x in layer.cross]
            if layer.last_inputs is not None:
                layer.last_inputs = layer.last_inputs[rows]
        if self.padding is not None:
            self.padding = self.padding[rows]


# --------------------------------------------------------------------------------------
# Layers


class Linear(nn.Linear):
    """A linear layer inside the network, whose matrix Muon may train. The output head is a plain nn.Linear.

    ends_branch: it is the last layer of a residual branch, which init_weights scales down.
    """

    optimizer_group = "hidden"

    def __init__(self, inputs: int, outputs: int, bias: bool, ends_branch: bool = False):
        super().__init__(inputs, outputs, bias=bias)
        self.ends_branch = ends_branch


class CausalConv(nn.Module):
    """Add to each token the n tokens before it, each feature with its own trained weights: x_t + w_1 x_(t-1) + ...

    It starts as the identity. Source: So et al. 2021 (Primer), arXiv:2109.08668; before each layer: Allen-Zhu 2025
    (Canon layers), arXiv:2512.17351.
    """

    GAIN = 4.0  # w is this times a parameter: AdamW moves all parameters equally fast, and these are to move faster

    def __init__(self, n: int, n_embd: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n, n_embd))

    def forward(self, x: Tensor, state: LayerState | None = None) -> Tensor:
        """x: (B, T, C), which follow the tokens in the state. Returns (B, T, C)."""
        text = x
        if state:
            if state.last_inputs is not None:
                text = torch.cat([state.last_inputs, x], dim=1)
            state.last_inputs = text[:, -len(self.weight) :]
        y = text
        for back, weight in enumerate(self.weight[: text.shape[1] - 1], start=1):
            shifted = F.pad(text, (0, 0, back, -back))
            y = torch.addcmul(y, shifted, weight.to(x.dtype), value=self.GAIN)
        return y if text is x else y[:, -x.shape[1] :]


class Rows(NamedTuple):
    """Which rows of a batch this process has: those from the first on."""

    first: int
    total: int


class Dropout(nn.Module):
    """In training, each activation is zeroed with probability p and the others are scaled by 1 / (1 - p).

    No activation can be relied on alone, so that the network memorises less. Source: Srivastava et al. 2014, "Dropout:
    a simple way to prevent neural networks from overfitting".

    rows: on a CPU, the mask is that of these rows of a batch that several processes share; None: of a batch of its own.
    """

    rows: Rows | None = None

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p or x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        # the random numbers take longest, so each 64 random bits decide on four elements
        first, total = self.rows or (0, len(x))
        row = x.numel() // len(x)  # elements
        bits = torch.empty(total * row // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
        bits = bits.view(torch.int16)[first * row : first * row + x.numel()].view(x.shape)
        kept = bits >= min(round(2**16 * self.p), 2**16 - 1) - 2**15
        return x * (kept.to(x.dtype) * (1 / (1 - self.p)))


# --------------------------------------------------------------------------------------
# Attention: its mask, and the way to compute it that is fastest on this device


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: Dropout) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v: the mean of the values, weighted by how well each key answers the query.

    q: (B, H, T, D); k, v: (B, H or fewer, S, D), inputs by groups of neighbouring queries where they are fewer.
    dropout: of the weights. Returns (B, H, T, D). Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
    """
    bias, is_causal = mask
    if bias is not None:
        bias = bias.to(v.dtype)
    grouped = q.shape[1] != k.shape[1]
    p = dropout.p if dropout.training else 0.0
    if not prefers_explicit(q, k, p):
        # a float32 parameter that a user multiplies them by makes them float32
        q, k = q.to(v.dtype), k.to(v.dtype)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=p, is_causal=is_causal, enable_gqa=grouped
        )
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, T, S)
    if is_causal:
        scores += scores.new_full(scores.shape[-2:], -torch.inf).triu(1)
    if bias is not None:
        scores += bias
    return dropout(scores.softmax(dim=-1)) @ v


def prefers_explicit(q: Tensor, k: Tensor, p: float) -> bool:
    """Return whether the formula as it stands trains faster than SDPA.

    On a CPU the backward pass of SDPA in bfloat16 takes three times as long; but it does not keep all the scores. With
    dropout (p) it does, and draws its masks more slowly than Dropout and for the rows of its own process alone.
    """
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    scores = q.shape[:3].numel() * k.shape[2]
    return p > 0 or (torch.is_autocast_enabled("cpu") and scores <= EXPLICIT_SCORES)


def attention_mask(
    T: int,
    S: int,
    device: torch.device,
    *,
    causal: bool = False,
    window: int = 0,
    bias: Tensor | None = None,
    padding: Tensor | None = None,
) -> Mask:
    """What is added to the scores of T queries and S keys: -inf where a query must not attend, and bias.

    The queries are the last T of the S positions. causal: no query attends to a later key. window: none to a key that
    is window or more positions away; 0: no limit. bias: (1, H, T, S). padding: (B, S), True where a key is no token.
    """
    limited = 0 < window < S
    if causal and T == S and not limited and bias is None and padding is None:
        return None, True
    allowed = None  # broadcasts to (B, H, T, S)
    if (causal and T > 1) or limited:
        distance = distances(T, S, device)
        allowed = distance.abs() < (window or S)
        if causal:
            allowed &= distance >= 0
    if padding is not None:
        tokens = ~padding[:, None, None, :]
        # softmax over no key at all is nan: each position may at least attend to itself
        allowed = tokens if allowed is None else (allowed & tokens) | (distance == 0)
    if allowed is None:
        return bias, False
    mask = torch.zeros_like(allowed, dtype=torch.float32) if bias is None else bias
    return mask.masked_fill(~allowed, -torch.inf), False


def distances(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S) int64: positions from each key to each query, the last T of S; negative where the key is later."""
    key = torch.arange(S, device=device)
    return key[S - T :, None] - key


# --------------------------------------------------------------------------------------
# Activations and loss


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2. Source: So et al. 2021, arXiv:2109.08668."""
    return torch.relu(x).square()


ACTIVATIONS = {
    "relu": F.relu,  # max(x, 0): the article's
    "gelu": F.gelu,  # x times the probability that a normal number is below x. Source: arXiv:1606.08415
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # the same to within 0.001: GPT-2's
    "silu": F.silu,  # x / (1 + e^-x). Source: arXiv:1702.03118
    "relu_squared": relu_squared,
}


def with_loss(
    model: nn.Module, logits: Tensor, targets: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """logits: (B, T, V); targets: (B, T), -1 where no loss is counted, or None.

    Returns the logits, soft-capped if the model's config says so, and the mean cross-entropy in nats, None without
    targets. In training the targets are smoothed: a fraction label_smoothing of each is spread over the vocabulary, so
    that the model does not become overconfident. Source: Szegedy et al. 2015, arXiv:1512.00567, section 7.
    """
    # Source: Gemma 2, arXiv:2408.00118, section 2
    if soft_cap := model.config.logit_soft_cap:
        # bfloat16 has only every eighth of a whole number near 20
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = soft_cap * torch.tanh(logits / soft_cap)
    if targets is None:
        return logits, None
    smoothing = model.config.label_smoothing if model.training else 0.0
    flat = logits.flatten(0, 1)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return logits, F.cross_entropy(
        flat, targets.flatten(), ignore_index=-1, label_smoothing=smoothing
    )


# --------------------------------------------------------------------------------------
# Devices and dtypes: what the machine has, or what the user says


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Dense bfloat16 or float16 peak in FLOP/s, from the makers' data sheets, by words of the card's name; the first counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
    "5090": 209e12,
    "4090": 165e12,
    "3090": 71e12,
}


def pick_device(name: str) -> torch.device:
    """auto: CUDA, else Apple's GPU, else the CPU. Raises UserError for a device that is not there."""
    cards = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    available = ["cuda", *cards] if cards else []
    if torch.backends.mps.is_available():
        available.append("mps")
    available.append("cpu")
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise UserError(
            f"device={name} is not available; this machine and this torch have: {', '.join(available)}; auto picks one"
        )
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the processor or the CUDA card multiplies it, float16 on an older card, else float32."""
    if name == "auto":
        if multiplies_bfloat16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    if name == "float16" and device.type != "cuda":
        raise UserError(
            f"dtype=float16 needs a CUDA device, and this is {device.type}; use float32 or bfloat16"
        )
    return DTYPES[name]


def sample_dtype(name: str, device: torch.device) -> torch.dtype:
    """As pick_dtype(), for generation: token by token, a CPU waits for memory, not for matrix products."""
    if name == "auto" and device.type == "cpu":
        return torch.float32
    return pick_dtype(name, device)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 matrix products. Where it has none, bfloat16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    has_products = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return device.type == "cpu" and bool(has_products)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Matrix products in dtype, sums and norms in float32; nothing changes with float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    on_gpu = device.type == "cuda"
    if on_gpu:
        # from pinned memory, which must be contiguous, the copy overlaps with the GPU's work; torch keeps it, and gives
        # it to a later batch when the copy is done
        batch = {name: value.contiguous().pin_memory() for name, value in batch.items()}
    return {name: value.to(device, non_blocking=on_gpu) for name, value in batch.items()}


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of the card; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next(
        (peak for words, peak in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", name)),
        None,
    )


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on the device; those of a CPU are divided among torchrun's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def tune_malloc(sharded: bool) -> None:
    """Set what glibc does with freed blocks of memory: it keeps them for the next step, or not if the model is sharded.

    Otherwise every large activation is mapped and cleared again in each step: a tenth of the time of a small model on a
    CPU, a sixth where the vocabulary is large. Of a sharded model, whole weights come and go, and the holes between
    what stays would take as much memory again; so blocks of a megabyte and more go back to the system at once.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # a Linux without glibc
        return
    # as malloc.h numbers them: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX
    if sharded:
        mallopt(-1, 1 << 20)
        mallopt(-3, 1 << 20)
    else:
        mallopt(-1, 2**31 - 1)
        mallopt(-4, 0)  # no block is mapped by itself, however large
