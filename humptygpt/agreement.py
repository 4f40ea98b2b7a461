"""Check that the faster copies of model.py's formulas still agree with it, since a user may have edited model.py."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

OTHER_LOGITS = "other logits"


def known_logits(model: nn.Module, idx: Tensor) -> Tensor:
    """Give a new model the same weights on every machine, and return the logits after idx, (1, T): (1, V).

    Every weight has an effect, and float16 holds it exactly.
    """
    model.eval().requires_grad_(False)
    for n, p in enumerate(model.parameters()):
        i = torch.arange(p.numel()).view(p.shape)
        scale = 2 / p.shape[-1:].numel() ** 0.5
        p.copy_(((p.dim() != 2) + scale * (i * (i + 7 * n) % 61 / 30 - 1)).half())
    return model(idx, **texts(model, idx))[0][:, -1]


def texts(model: nn.Module, idx: Tensor) -> dict[str, Tensor]:
    return {"source": idx} if model.has_encoder else {}


def difference(model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> str:
    """Describe how the changed model, token by token, differs from the model's forward on a whole text, or return "".

    It is tried on a copy that keeps the classes and settings, but is so small that this takes milliseconds. change:
    takes a model and returns one with next_logits() and make_state().
    """
    try:
        return "" if agrees(model, change) else OTHER_LOGITS
    except Exception as error:  # a class of the user's may need other sizes, for instance
        return f"{type(error).__name__}: {error}".partition("\n")[0]


@torch.inference_mode()
def agrees(model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> bool:
    """True if both give the same logits for a text longer than any window, read in pieces of one and more tokens."""
    config = model.config
    small_config = replace(
        config,
        n_layer=min(config.n_layer, 3),
        n_embd=4 * config.n_head,
        vocab_size=11,
        window=min(config.window, 5),
    )
    small = type(model)(small_config)
    windows = [getattr(module, "window", 0) for module in small.modules()]
    T = min(config.block_size, max(windows) + 12)
    idx = (torch.arange(T) ** 2 * 3 % 11)[None]
    expected = known_logits(small, idx)
    ready = change(small)
    state = ready.make_state(**texts(small, idx))
    for piece in idx.split([1, 1, T - 4, 1, 1] if T > 4 else 1, dim=1):
        found = ready.next_logits(piece, state)
    return torch.allclose(found, expected, 1e-3, 1e-3)
