"""Try a model before it is used, because its user may have edited model.py, and say in a line what does not hold.

It tries a smaller model with the same classes and settings, or one of the same width if that is small.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model as models
from humptygpt.cli import first_line, note
from humptygpt.machine import is_out_of_memory
from humptygpt.tasks import build, losses_of, with_progress
from humptygpt.workers import add_seeds, set_seeds
from model import count_parameters

SMALL = 2e6  # a model of up to this many parameters is tried in its own width
VOCABULARY = 11  # tokens that the smaller model knows
TOKENS = 70  # length of its text


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
            if is_out_of_memory(error):
                raise
            model.has_cache = False
            note(f"a small model like this one fails: {describe(error)}")


def problems(model: nn.Module) -> Iterator[str]:
    """Yield a line for each thing that does not hold."""
    kernels = [getattr(part, "kernel", None) for part in model.modules()]
    if models.attend in kernels:
        yield "attend() in model.py has been edited, so PyTorch's fused kernel is not used"
    small, text = smaller(model)
    lost = without_gradient(small, text, tries=1)
    if len(lost) == len(list(small.parameters())):
        yield (
            f"no weight of a new model gets a gradient, so it cannot learn; is a residual connection missing? With"
            f" init={model.config.init}, some layers start at 0"
        )
    randomize(small)
    if lost := without_gradient(small, text):
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        named = f"{', '.join(lost[:5])}{more}"
        yield f"these weights get no gradient, so they cannot learn: {named}"
    with torch.no_grad():
        training = small(**text)[0]
        logits, loss, *_ = small.eval()(**text, targets=text["idx"])
        if not logits.isfinite().all():
            yield "model.py computes nan or infinity from small random weights; is a softmax or a norm missing?"
            return
        if not is_close(small(**text)[0], logits):
            yield "model.py is random in evaluation, so its losses and texts are random, too"
            return
        if not is_close(training, logits):
            yield "training and evaluation compute different logits, even without dropout"
        if not is_close(F.cross_entropy(logits.flatten(0, 1), text["idx"].flatten()), loss):
            yield "the loss is not the cross-entropy, so bits per byte and perplexity do not follow from it"
        for key, without in (("position", "none"), ("qk_norm", False)):
            value = getattr(model.config, key)
            if value == without or not any(kernels):
                continue
            other = build(replace(small.config, **{key: without})).eval()
            other.load_state_dict(small.state_dict(), strict=False)
            if torch.equal(other(**text)[0], logits):
                yield f"{key}={value} has no effect: {key}={without} gives the same logits"
        idx = text["idx"].clone()
        idx[:, -1] = (idx[:, -1] + 1) % VOCABULARY
        changed = small(**text | {"idx": idx})[0]
        if not is_close(changed[:, :-1], logits[:, :-1]):
            yield (
                "a token sees later tokens, so the model can copy what it should predict: its losses are no measure"
                " of prediction, and it cannot write"
            )
        if "source" not in text and not is_close(small.next_logits(idx), changed[:, -1]):
            yield "next_logits(), with which the model writes, computes other logits than forward()"
        elif model.has_cache and (problem := cache_problem(small, text, logits)):
            model.has_cache = False
            yield f"generating without a cache, which is slower: {problem}"


def sharing_problem(model: nn.Module) -> str | None:
    """Say why workers cannot each train on some rows of a batch; None if they can."""
    losses = []
    try:
        with torch.random.fork_rng(devices=[]):
            small, text = smaller(model, model.config.dropout)
            add_seeds(small)
            randomize(small)
            text["targets"] = text["idx"]
            batch = {name: torch.cat([x, x.flip(1)]) for name, x in text.items()}
            for rows in ([0], [1], [0, 1]):
                set_seeds(small, rows)
                before = [x.clone() for x in (torch.get_rng_state(), *small.buffers())]
                part = {name: x[rows] for name, x in batch.items()}
                losses.append(torch.stack([*small_losses(small, part).values()]))
                after = torch.get_rng_state(), *small.buffers()
    except Exception as error:
        return describe(error)
    if not all(map(torch.equal, before, after)):
        return "in training, model.py changes a buffer or draws random numbers of its own"
    first, second, both = losses
    if not torch.allclose((first + second) / 2, both, 1e-3, 1e-6):
        return "the loss of a batch is not the mean of its rows' losses"
    return None


def smaller(model: nn.Module, dropout: float = 0.0) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a smaller model with the same classes and settings, and a text for it: the arguments of its forward()."""
    config = model.config
    sizes = {
        "n_members": min(config.n_members, 2),
        "vocab_size": VOCABULARY,
        "window": min(config.window, 5),
        "dropout": dropout,
    }
    if count_parameters(model) > SMALL:
        width = min(config.n_embd, 4 * config.n_head)
        sizes |= {"n_embd": width, "head_size": config.features}
    random = torch.Generator().manual_seed(0)
    idx = torch.randint(VOCABULARY, (1, min(config.block_size, TOKENS)), generator=random)
    text = {"idx": idx}
    if hasattr(model, "encode"):
        text["source"] = idx
    return build(replace(config, **sizes)), text


def randomize(small: nn.Module) -> None:
    """Draw all weights at random, also those that are 0 in a new model."""
    random = torch.Generator().manual_seed(0)
    std = (2 * small.config.n_layer) ** -0.5  # the sum of many blocks must not overflow
    for p in small.parameters():
        # a layer with more inputs sums more of them
        scale = min(1, 8 / p.shape[-1]) ** 0.5 if p.dim() > 1 else 1
        p.data.normal_(std=std * scale, generator=random)


def small_losses(small: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute the loss and its terms halfway through a run."""
    return losses_of(small(**with_progress(small, batch, 0.5)))


def without_gradient(
    small: nn.Module, text: dict[str, Tensor], tries: int = VOCABULARY
) -> list[str]:
    """Name the parameters whose gradient is 0 for each of several texts. A single text may not reach every expert."""
    small.zero_grad()
    for shift in range(tries):
        batch = {name: (x + shift) % VOCABULARY for name, x in text.items()}
        sum(small_losses(small, batch | {"targets": batch["idx"]}).values()).backward()
        named = small.named_parameters()
        lost = [name for name, p in named if p.grad is None or not p.grad.any()]
        if not lost:
            break
    return lost


def cache_problem(small: nn.Module, text: dict[str, Tensor], logits: Tensor) -> str:
    """Read a text in pieces with a cache, and beside a shorter one. Returns what does not hold.

    logits: those of the whole text, (1, T, V).
    """
    idx, *source = text.values()
    T = idx.shape[1]
    try:
        cache = small.make_cache(*source)
        singles = min(3, T - 1)
        for piece in idx.split([T - singles, *[1] * singles], dim=1):
            found = small.next_logits(piece, cache)
        if not is_close(found, logits[:, -1]):
            return "with one, model.py computes other logits"
        if not source and T > 2:  # prompts of different lengths
            cache = small.make_cache()
            cache.n_padding = torch.tensor([0, 2])
            both = torch.cat([idx, F.pad(idx[:, 2:], (2, 0))])
            found = small.next_logits(both, cache)
            alone = torch.cat([logits[:, -1], small.next_logits(idx[:, 2:])])
            if not is_close(found, alone):
                return "beside a longer text, model.py computes other logits"
    except Exception as error:
        return describe(error)
    return ""


def is_close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, 1e-3, 1e-3)


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
