"""Whether what repeats formulas of model.py still computes the same, since a user may have edited model.py.

The generator's shortcuts are compared with a small copy of the model. What other programs compute is in reference.json:
logits of tiny models, for each setting, as the page's JavaScript computed them. Tests hold the JavaScript, transformers
and llama.cpp equal to model.py.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from humptygpt.core.errors import UserError
from model import ModelConfig, build

REFERENCE = Path(__file__).with_name("reference.json")
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


# --------------------------------------------------------------------------------------
# The generator's shortcuts


def difference(model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> str:
    """Say how the changed model, token by token, differs from the model's forward on a whole text; "" if it does not.

    It is tried on a copy that keeps the classes and settings, but is so small that this takes milliseconds. change:
    takes a model and returns one with next_logits() and make_state().
    """
    try:
        return "" if agrees(model, change) else OTHER_LOGITS
    except Exception as error:  # a class of the user's may need other sizes, for instance
        return f"{type(error).__name__}: {error}".partition("\n")[0]


@torch.inference_mode()
def agrees(model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> bool:
    """As difference(). The text is longer than any window, and read by single tokens and by several at once."""
    config = model.config
    sizes = {
        "n_layer": min(config.n_layer, 3),
        "n_embd": 4 * config.n_head,
        "head_size": config.head_size and 4,
        "n_hidden": config.n_hidden and 24,
        "vocab_size": 11,
        "window": min(config.window, 5),
    }
    small = type(model)(replace(config, **sizes))
    windows = [getattr(module, "window", 0) for module in small.modules()]
    T = min(config.block_size, max(windows) + 12)
    idx = (torch.arange(T) ** 2 * 3 % 11)[None]
    expected = known_logits(small, idx)
    ready = change(small)
    state = ready.make_state(**texts(small, idx))
    for piece in idx.split([1, 1, T - 4, 1, 1] if T > 4 else 1, dim=1):
        found = ready.next_logits(piece, state)
    return torch.allclose(found, expected, 1e-3, 1e-3)


# --------------------------------------------------------------------------------------
# Other programs


@torch.inference_mode()
def check_formulas(config: ModelConfig, reader: str) -> None:
    """Raise UserError if model.py no longer computes what the reader of this model computes: a page, say."""
    reference = json.loads(REFERENCE.read_bytes())
    for settings, logits in reference["logits"]:
        # of a number or a switch it only matters whether it is on
        same = [
            getattr(config, key) == tried
            if isinstance(tried, str)
            else bool(getattr(config, key)) == bool(tried)
            for key, tried in settings.items()
        ]
        if not all(same):
            continue
        model = build(replace(config, **reference["config"] | settings))
        found = known_logits(model, torch.tensor([reference["text"]]))
        if not torch.allclose(found, torch.tensor([logits]), 2e-4, 2e-4):
            edited = ", ".join(f"{key}={value}" for key, value in settings.items())
            raise UserError(
                f"{reader} would not compute what model.py computes: it was edited, as {edited} shows"
            )
