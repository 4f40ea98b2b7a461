"""What the networks of this project are built from: linear layers, a convolution, dropout, activations, loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from humptygpt.nn.decoder_state import LayerState


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


dropped_rows: Rows | None = None  # see rows_of_batch; None: all


@contextmanager
def rows_of_batch(rows: Rows) -> Iterator[None]:
    """Within this, a batch is these rows of a larger one, and its dropout masks are these rows of the larger one's."""
    global dropped_rows
    dropped_rows = rows
    try:
        yield
    finally:
        dropped_rows = None


class Dropout(nn.Module):
    """In training, each activation is zeroed with probability p and the others are scaled by 1 / (1 - p).

    No activation can be relied on alone, so that the network memorises less. Source: Srivastava et al. 2014, "Dropout:
    a simple way to prevent neural networks from overfitting".
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p) if self.training else x


def drop(x: Tensor, p: float) -> Tensor:
    """x with each element zeroed with probability p and the others scaled by 1 / (1 - p).

    On a CPU the random numbers take longest, so there each 64 random bits decide on four elements.
    """
    if not p or x.device.type != "cpu":
        return F.dropout(x, p)
    first, total = dropped_rows or (0, len(x))
    row = x.numel() // len(x)  # elements
    bits = torch.empty(total * row // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[first * row : first * row + x.numel()].view(x.shape)
    kept = bits >= min(round(2**16 * p), 2**16 - 1) - 2**15
    return x * (kept.to(x.dtype) * (1 / (1 - p)))


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
    if soft_cap := model.config.logit_soft_cap:  # Source: Gemma 2, arXiv:2408.00118, section 2
        logits = soft_cap * torch.tanh(logits / soft_cap)
    if targets is None:
        return logits, None
    smoothing = model.config.label_smoothing if model.training else 0.0
    flat = logits.flatten(0, 1).float()
    return logits, F.cross_entropy(
        flat, targets.flatten(), ignore_index=-1, label_smoothing=smoothing
    )
