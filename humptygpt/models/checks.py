"""If model.py has been edited, try its model before it is used, and say in a line what does not hold.

It tries a smaller model with the same classes and settings, or one of the same width if that is small, with random
weights.
"""

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from humptygpt import model as models
from humptygpt.cli import first_line, note
from humptygpt.machine import is_out_of_memory
from humptygpt.model import count_parameters
from humptygpt.models.build import add_seeds, build, losses_of, set_seeds, with_progress

TRIED_IN_FULL = 2e6  # a model of up to this many parameters is tried in its own width
VOCABULARY = 11  # tokens that the smaller model knows
TOKENS = 70  # length of its text


def check_model(model: nn.Module) -> None:
    """Print a note for each check that finds a problem, and one for those that cannot be tried.

    If the cache is among them, the model generates without one.
    """
    if models.attend in [getattr(part, "kernel", None) for part in model.modules()]:
        note("attend() in model.py has been edited, so PyTorch's fused kernel is not used")
    problems, untried = {}, {}
    make_small = functools.cache(lambda: smaller(model))  # one for all, unless it fails
    # with its own random numbers, and with gradients even if the caller needs none
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        for name, check in CHECKS.items():
            try:
                problems[name] = check(*make_small())
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                untried[name] = describe(error)
    for problem in filter(None, problems.values()):
        note(problem)
    if untried:
        reasons = "; ".join(dict.fromkeys(untried.values()))
        note(f"a small model like this one fails, so these are not checked: {', '.join(untried)} ({reasons})")
    if model.has_cache and (problems | untried)["cache"]:
        model.has_cache = False
        note("generating without a cache, which is slower")


# --------------------------------------------------------------------------------------
# The checks: each returns what does not hold, or "". small, text: see smaller()


def check_gradients(small: nn.Module, text: dict[str, Tensor]) -> str:
    """Some weights must get a gradient in a new model, and each must get one with random weights."""
    new = build(small.config)
    if len(without_gradient(new, text, tries=1)) == len(list(new.parameters())):
        return (
            f"no weight of a new model gets a gradient, so it cannot learn; is a residual connection missing? With"
            f" init={new.config.init}, some layers start at 0"
        )
    lost = without_gradient(small, text, tries=VOCABULARY)
    if not lost:
        return ""
    return f"{len(lost)} weights get no gradient, so they cannot learn, such as {', '.join(lost[:5])}"


def without_gradient(small: nn.Module, text: dict[str, Tensor], tries: int) -> list[str]:
    """Name the parameters whose gradient is 0 for each of several texts. A single text may not reach every expert."""
    small.train().zero_grad()
    for shift in range(tries):
        batch = {name: (x + shift) % VOCABULARY for name, x in text.items()}
        # if the backward pass fails, torch shows which line of the forward pass is to blame
        with torch.autograd.set_detect_anomaly(True, check_nan=False):
            losses = small_losses(small, batch | {"targets": batch["idx"]})
            sum(losses.values()).backward()
        named = small.named_parameters()
        lost = [name for name, p in named if p.grad is None or not p.grad.any()]
        if not lost:
            break
    return lost


def check_evaluation(small: nn.Module, text: dict[str, Tensor]) -> str:
    """Without dropout, training and evaluation must compute the same logits, and neither may be random."""
    training = finite_logits(small.train(), text)
    if is_close(finite_logits(small.eval(), text), training):
        return ""
    return "training and evaluation compute different logits, even without dropout"


def check_future(small: nn.Module, text: dict[str, Tensor]) -> str:
    """Another last token must not change the logits of the tokens before it."""
    changed = text["idx"].clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCABULARY
    found = []
    for idx in (text["idx"], changed):
        torch.manual_seed(0)  # model.py may be random in evaluation
        found.append(finite_logits(small.eval(), text | {"idx": idx})[:, :-1])
    if is_close(*found):
        return ""
    return (
        "a token sees later tokens, so the model can copy what it should predict: its losses are no measure of"
        " prediction, and it cannot write"
    )


def check_cache(small: nn.Module, text: dict[str, Tensor]) -> str:
    """Read the text in pieces, which are cached, and beside a shorter one."""
    if not small.has_cache:
        return ""
    logits = finite_logits(small.eval(), text)[:, -1]
    idx, *source = text.values()
    T = idx.shape[1]
    cache = small.make_cache(*source)
    singles = min(3, T - 1)
    for piece in idx.split([T - singles, *[1] * singles], dim=1):
        found = small.next_logits(piece, cache)
    if not is_close(found, logits):
        return "with a cache, next_logits() computes other logits than forward()"
    if not source and T > 2:  # prompts of different lengths
        cache = small.make_cache()
        cache.n_padding = torch.tensor([0, 2])
        both = torch.cat([idx, F.pad(idx[:, 2:], (2, 0))])
        alone = torch.cat([logits, small.next_logits(idx[:, 2:])])
        if not is_close(small.next_logits(both, cache), alone):
            return "with a cache, next_logits() computes other logits beside a longer text"
    return ""


CHECKS = {
    "gradients": check_gradients,
    "training unlike evaluation": check_evaluation,
    "future tokens": check_future,
    "cache": check_cache,
}


# --------------------------------------------------------------------------------------
# Ranks


def forking_problem(model: nn.Module) -> str | None:
    """Say why ranks cannot each train on some rows of a batch; None if they can."""
    losses, gradients = [], []
    try:
        with torch.random.fork_rng(devices=[]):
            small, text = smaller(model, model.config.dropout)
            add_seeds(small)
            # the second row is one token again and again, whose loss is unlike that of a text, with half of the targets
            batch = {k: torch.cat([x, x[:, :1].expand_as(x)]) for k, x in text.items()}
            batch["targets"] = batch["idx"].clone()
            batch["targets"][1, : batch["idx"].shape[1] // 2] = -1
            targets = (batch["targets"] >= 0).sum(1)
            for rows in ([0], [1], [0, 1]):
                set_seeds(small, rows)
                before = state_of(small)
                part = {name: x[rows] for name, x in batch.items()}
                loss = torch.stack([*small_losses(small, part).values()])
                loss = loss * (targets[rows].sum() / targets.sum())
                params = [p for p in small.parameters() if p.requires_grad]
                gradient = torch.autograd.grad(loss.sum(), params, materialize_grads=True)
                losses.append(loss.detach())
                gradients.append(torch.cat([x.flatten() for x in gradient]))
                after = state_of(small)
    except Exception as error:
        return describe(error)
    if not all(map(torch.equal, before, after)):
        return "in training, model.py changes a buffer or draws random numbers of its own"
    if not torch.allclose(losses[0] + losses[1], losses[2], 1e-3, 1e-6):
        return "the loss of a batch is not the mean of its targets' losses"
    difference = gradients[0] + gradients[1] - gradients[2]
    if difference.norm() > 1e-3 * gradients[2].norm():
        return "the gradient of a batch is not the sum of its rows' gradients"
    return None


def state_of(small: nn.Module) -> list[Tensor]:
    """Copy what a training step must not change: torch's random state and all weights and buffers."""
    return [torch.get_rng_state(), *(x.clone() for x in small.state_dict().values())]


# --------------------------------------------------------------------------------------
# The small model


def smaller(model: nn.Module, dropout: float = 0.0) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a smaller model with the same classes and settings and with random weights.

    Returns it and a text for it: the arguments of its forward().
    """
    config = model.config
    sizes = {
        "n_members": min(config.n_members, 2),
        "vocab_size": VOCABULARY,
        "window": min(config.window, 5),
        "dropout": dropout,
    }
    if count_parameters(model) > TRIED_IN_FULL:
        width = min(config.n_embd, 4 * config.n_head)
        sizes |= {"n_embd": width, "head_size": config.features}
    random = torch.Generator().manual_seed(0)
    idx = torch.randint(VOCABULARY, (1, min(config.block_size, TOKENS)), generator=random)
    text = {"idx": idx}
    if hasattr(model, "encode"):
        text["source"] = idx
    return randomized(build(replace(config, **sizes))), text


def randomized(small: nn.Module) -> nn.Module:
    """Draw all weights at random, also those that are 0 in a new model."""
    random = torch.Generator().manual_seed(0)
    std = (2 * small.config.n_layer) ** -0.5  # the sum of many blocks must not overflow
    for p in small.parameters():
        # a layer with more inputs sums more of them
        scale = min(1, 8 / p.shape[-1]) ** 0.5 if p.dim() > 1 else 1
        p.data.normal_(std=std * scale, generator=random)
    return small


def small_losses(small: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute the loss and its terms halfway through a run."""
    return losses_of(small(**with_progress(small, batch, 0.5)))


is_close = functools.partial(torch.allclose, rtol=1e-3, atol=1e-3)


def finite_logits(small: nn.Module, text: dict[str, Tensor]) -> Tensor:
    """Compute the logits, (1, T, V). Raises ArithmeticError if they cannot be compared."""
    logits = small(**text)[0]
    if not logits.isfinite().all():
        raise ArithmeticError(
            "model.py computes nan or infinity from small random weights; is a softmax or a norm missing?"
        )
    return logits


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


# --------------------------------------------------------------------------------------
# Other programs, whose logits of a text are compared


def text_to_compare(config: models.ModelConfig) -> Tensor:
    """Return up to 32 token ids from all over the vocabulary, (1, T)."""
    T = min(32, config.block_size)
    return torch.linspace(0, config.vocab_size - 1, T).long()[None]


@torch.inference_mode()
def rounded_logits(model: nn.Module, idx: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a model's weights to the dtype in which they are written, and compute its logits of a text, (T, V).

    idx: (1, T), the text and, for an encoder, the source, too.
    """
    for p in model.parameters():
        p.copy_(p.to(dtype))
    texts = {"source": idx} if hasattr(model, "encode") else {}
    return model.eval()(idx, **texts)[0][0]
