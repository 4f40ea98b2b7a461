"""Try a model before it is used, because its user may have edited model.py, and say in a line what does not hold."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

import model as models
from humptygpt.cli import first_line, note
from model import SelfAttention


def check_model(model: nn.Module) -> None:
    """Try a tiny model with the same classes and settings, and print a note for each thing that does not hold.

    If its logits with a cache differ from those without one, or cannot be computed, the model generates without one.
    """
    # with its own random numbers, and with gradients even if the caller needs none
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        try:
            for problem in problems(model):
                note(problem)
        except Exception as error:
            model.has_cache = False
            note(f"a tiny model like this one fails: {describe(error)}")


def problems(model: nn.Module) -> Iterator[str]:
    """Yield a line for each thing that does not hold."""
    parts = (part for part in model.modules() if isinstance(part, SelfAttention))
    if any(part.kernel is models.attend for part in parts):
        yield "attend() in model.py has been edited, so PyTorch's fused kernel is not used"
    small, text = tiny(model)
    lost = without_gradient(small, text)
    if len(lost) == len(list(small.parameters())):
        yield (
            f"no weight of a new model gets a gradient, so it cannot learn; is a residual connection missing? With"
            f" init={model.config.init}, some layers start at 0"
        )
    randomize(small)
    if lost := without_gradient(small, text):
        yield f"these weights get no gradient, so they cannot learn: {', '.join(lost[:5])}"
    with torch.no_grad():
        training = small(**text)[0]
        logits = small.eval()(**text)[0]
        if not logits.isfinite().all():
            yield "model.py computes nan or infinity from small random weights; is a softmax or a norm missing?"
            return
        if not is_close(training, logits):
            yield "training and evaluation compute different logits, even without dropout"
        idx = text["idx"].clone()
        idx[:, -1] = (idx[:, -1] + 1) % 11
        changed = small(**text | {"idx": idx})[0]
        if not is_close(changed[:, :-1], logits[:, :-1]):
            yield (
                "a token sees later tokens, so the model can copy what it should predict: the losses below are no"
                " measure of prediction, and it cannot write"
            )
        if model.has_cache and (problem := cache_problem(small, text, logits)):
            model.has_cache = False
            yield f"generating without a cache, which is slower: {problem}"


def tiny(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a tiny model with the same classes and settings, and a text for it: the arguments of its forward()."""
    config = model.config
    sizes = {
        "n_members": min(config.n_members, 2),
        "n_embd": min(config.n_embd, 4 * config.n_head),
        "vocab_size": 11,
        "window": min(config.window, 5),
        "dropout": 0.0,
    }
    random = torch.Generator().manual_seed(0)
    idx = torch.randint(11, (1, min(config.block_size, 17)), generator=random)
    text = {"idx": idx} | ({"source": idx} if hasattr(model, "encode") else {})
    return type(model)(replace(config, **sizes)), text


def randomize(small: nn.Module) -> None:
    """Draw all weights at random, also those that are 0 in a new model."""
    random = torch.Generator().manual_seed(0)
    std = (2 * small.config.n_layer) ** -0.5  # the sum of many blocks must not overflow
    for p in small.parameters():
        p.data.normal_(std=std, generator=random)


def without_gradient(small: nn.Module, text: dict[str, Tensor]) -> list[str]:
    """Name the parameters whose gradient is 0."""
    small.zero_grad()
    small(**text, targets=text["idx"])[1].backward()
    named = small.named_parameters()
    return [name for name, p in named if p.grad is None or not p.grad.any()]


def cache_problem(small: nn.Module, text: dict[str, Tensor], logits: Tensor) -> str:
    """Read a text in pieces with a cache, and say so if the last logits are not those of the whole text."""
    idx, *source = text.values()
    try:
        cache = small.make_cache(*source)
        singles = min(3, idx.shape[1] - 1)
        for piece in idx.split([idx.shape[1] - singles, *[1] * singles], dim=1):
            found = small.next_logits(piece, cache)
    except Exception as error:
        return describe(error)
    return (
        "" if is_close(found, logits[:, -1]) else "with one, model.py computes other logits"
    )


def is_close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, 1e-3, 1e-3)


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
