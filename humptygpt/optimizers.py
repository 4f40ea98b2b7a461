"""Update rules (AdamW, Muon and NorMuon) and learning rate schedules.

A new rule is one function and one line in OPTIMIZERS, and its settings are fields of OptimizerConfig; a new schedule is
one function and one line in SCHEDULES.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from humptygpt.checkpoint import check_tensors
from humptygpt.cli import UserError
from humptygpt.device import DTYPES

if TYPE_CHECKING:  # settings.py imports this file
    from humptygpt.settings import TrainConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of rules. A resumed run keeps them; those that may change are in settings.py."""

    # kept if the run is resumed
    optimizer: str = "adamw"  # optimizer of the blocks' matrices; AdamW trains the rest

    def validate(self) -> None:
        """Raise ValueError for a setting of your own that is invalid, for example with cli.check_least()."""


class Slot(NamedTuple):
    """One parameter during a step."""

    weight: Tensor
    gradient: Tensor
    state: Mapping[str, Tensor]  # each is changed in place


class Rule(NamedTuple):
    """An update rule, and the state that it keeps for each parameter."""

    update: Callable  # called with (optimizer, group, slots); works in place
    # {name of a state tensor: function that returns a tensor of its shape, such as a view, from a parameter}
    state: dict[str, Callable[[Tensor], Tensor]]
    learning_rate: str = "learning_rate"  # TrainConfig key of the peak learning rate
    takes: Collection[str] = ("hidden",)  # groups of parameters, of group_parameters()
    settings: Collection[str] = ()  # TrainConfig keys that only this rule reads
    by_parameter: bool = False  # no update depends on another, so workers may share them


def apply(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


class Optimizer:
    """Groups of parameters, each with a rule and its settings, and the state of each parameter by name.

    It has the interface that a training loop and a GradScaler need. It is not a torch.optim.Optimizer,
    whose first step spends two to three seconds loading torch's compiler, longer than the rest of the startup.
    """

    def __init__(self, groups: list[dict], spread: Callable = apply):
        """groups: dicts with rule, params, named_params, lr and anything else the rule needs; see make_optimizer.

        spread: Process.spread, with which several processes share the work of a rule.
        """
        self.param_groups = groups
        self.spread = spread
        self.state = {}  # {parameter: {name of a state tensor: tensor}}
        self.steps = 0
        self.each = self.update  # Workers replace it, so that each of them does a part

    def set_lr(self, scale: float) -> None:
        """Set each group's learning rate to scale times its peak."""
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * scale

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        self.make_state()
        self.each([group["lr"] for group in self.param_groups])

    @torch.no_grad()
    def update(self, rates: list[float], worker: int = 0, workers: int = 1) -> None:
        """Do a worker's part of a step. It updates some of the parameters of a rule, if the rule allows that.

        Worker 0 updates all parameters of any other rule. rates: the learning rate of each group.
        """
        self.steps += 1
        for group, group["lr"] in zip(self.param_groups, rates, strict=True):
            slots = []
            for name, p in group["named_params"].items():
                if p.grad is not None:
                    slots.append(Slot(p, p.grad, MappingProxyType(self.state[name])))
            if group["rule"].by_parameter:
                slots = slots[worker::workers]
            elif worker:
                continue
            if slots:
                group["rule"].update(self, group, slots)

    def state_like(self) -> dict[str, dict[str, Tensor]]:
        """Return {parameter: {name of a state tensor: a tensor of its shape and dtype}}."""
        return {
            name: {key: view(p) for key, view in group["rule"].state.items()}
            for group in self.param_groups
            for name, p in group["named_params"].items()
        }

    def make_state(self) -> None:
        """Set the state of every parameter to zeros, unless it has one."""
        self.state = self.state or {
            name: {key: torch.zeros_like(x) for key, x in like.items()}
            for name, like in self.state_like().items()
        }

    def state_dict(self) -> dict:
        """Return plain data and tensors: {"steps": int, "state": {parameter: {name: tensor}}}."""
        return {"steps": self.steps, "state": self.state}

    def load(self, saved: dict, receive: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Load a saved state_dict. The groups keep their settings.

        receive: Process.receive. Raises an exception of any type if the names, shapes or dtypes of the state's tensors
        differ from those in state_like().
        """
        like = self.state_like() if saved["steps"] else {}
        check_tensors("optimizer.", flat(saved["state"]), flat(like))
        self.steps = int(float(saved["steps"]))
        for name, tensors in like.items():
            self.state[name] = {
                key: receive(saved["state"][name][key], x) for key, x in tensors.items()
            }


def flat(state: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return {"PARAMETER.NAME": state tensor}, where NAME is the name of the state tensor."""
    return {f"{name}.{key}": x for name in state for key, x in state[name].items()}


def adamw(optimizer: Optimizer, group: dict, slots: list[Slot]) -> None:
    """Move each element by lr times its mean gradient divided by its root mean square gradient: by at most about lr.

    This calls the kernel behind torch.optim.AdamW(fused=True) directly, once for all parameters.
    Source: Loshchilov and Hutter 2017, arXiv:1711.05101.
    """
    weights, gradients, states = map(list, zip(*slots, strict=True))
    steps = torch.full((), float(optimizer.steps), device=weights[0].device)
    config = group["config"]
    torch._fused_adamw_(
        weights,
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [steps] * len(slots),
        lr=group["lr"],
        beta1=config.beta1,
        beta2=config.beta2,
        weight_decay=group["weight_decay"],
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )


def muon(
    optimizer: Optimizer, group: dict, slots: list[Slot], normalize: bool = False
) -> None:
    """Update each matrix by its momentum, with all singular values set to about 1 so that no direction is neglected.

    Matrices of the same shape are stacked and orthogonalised together.
    normalize: use NorMuon instead; see normalize_neurons().
    Source: Jordan et al. 2024, "Muon: an optimizer for the hidden layers of neural networks".
    """
    config = group["config"]
    by_shape = defaultdict(list)
    for slot in slots:
        by_shape[slot.weight.shape].append(slot)
    for (rows, columns), alike in by_shape.items():
        gradients = torch.stack([slot.gradient for slot in alike])  # (n, rows, columns)
        momentum = [slot.state["momentum_buffer"] for slot in alike]
        torch._foreach_lerp_(momentum, list(gradients), 1 - config.muon_momentum)
        # Nesterov momentum
        gradients.lerp_(torch.stack(momentum), config.muon_momentum)
        dtype = DTYPES.get(config.muon_dtype, torch.float32)
        function = partial(orthogonalize, dtype=dtype)
        updates = optimizer.spread(function, gradients).to(gradients.dtype)
        if normalize:
            moment = [slot.state["second_moment_buffer"] for slot in alike]
            updates = normalize_neurons(updates, moment, config.beta2)
        weights = [slot.weight for slot in alike]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        lr = group["lr"] * math.sqrt(max(1, rows / columns))
        torch._foreach_add_(weights, list(updates), alpha=-lr)


def normalize_neurons(updates: Tensor, second_moment: list[Tensor], beta: float) -> Tensor:
    """Divide each neuron's part of the updates, (n, rows, columns), by its root mean square over recent steps.

    In an orthogonal update, some neurons move much less than others. This rule makes all of them move at about the
    same speed, without changing the norm of the whole update. A neuron is a row, or a column if there are more columns
    than rows.
    second_moment: the running mean squares, updated in place; see per_neuron().
    Source: Li et al. 2025, arXiv:2510.05491.
    """
    _, rows, columns = updates.shape
    across = 2 if rows >= columns else 1
    mean_square = updates.square().mean(dim=across, keepdim=True)
    torch._foreach_lerp_(second_moment, list(mean_square), 1 - beta)
    normalized = updates * (torch.stack(second_moment) + 1e-10).rsqrt()
    before, after = (x.norm(dim=(1, 2), keepdim=True) for x in (updates, normalized))
    return normalized * (before / (after + 1e-10))


def orthogonalize(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Replace each matrix U S V^T in x with approximately U V^T, in dtype. x: (n, rows, columns).

    Singular values of the result are between about 0.7 and 1.2. This is a Newton-Schulz iteration with Jordan's
    coefficients: each step applies a polynomial that moves singular values towards 1.
    """
    tall = x.shape[1] > x.shape[2]
    x = x.to(dtype)  # bfloat16 is accurate enough
    if tall:
        x = x.mT
    # scale each matrix so that its largest singular value is at most 1
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    # this takes fewer operations if there are more columns than rows, but bfloat16 is not accurate enough for it
    if x.shape[1] < x.shape[2] and dtype == torch.float32:
        x = product_of_polynomials(x @ x.mT) @ x
    else:
        for _ in range(5):
            a = x @ x.mT
            b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
            x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.mT if tall else x


def product_of_polynomials(a: Tensor) -> Tensor:
    """Compute the matrices by which the five iterations together multiply x. a: x x^T, (n, rows, rows)."""
    product = torch.eye(a.shape[1], device=a.device)
    for _ in range(5):
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        b.diagonal(dim1=1, dim2=2).add_(3.4445)
        product = b @ product
        a = b @ a @ b
    return product


def whole(p: Tensor) -> Tensor:
    return p


def per_neuron(p: Tensor) -> Tensor:
    return p[:, :1] if p.shape[0] >= p.shape[1] else p[:1]


ALL = ("hidden", "matrices", "vectors")
ADAMW = Rule(
    adamw,
    {"exp_avg": whole, "exp_avg_sq": whole},
    takes=ALL,
    by_parameter=True,
)
MUON = Rule(
    muon,
    {"momentum_buffer": whole},
    learning_rate="muon_learning_rate",
    settings=("muon_learning_rate", "muon_momentum", "muon_dtype"),
    by_parameter=True,
)
NORMUON = MUON._replace(
    update=partial(muon, normalize=True),
    state=MUON.state | {"second_moment_buffer": per_neuron},
)
# {name: rules, of which the first that takes a parameter updates it}. AdamW updates what they do not take.
OPTIMIZERS = {"adamw": [ADAMW], "muon": [MUON], "normuon": [NORMUON]}


# --------------------------------------------------------------------------------------
# Groups of parameters


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def freeze(model: nn.Module, names: str | None) -> None:
    """Exclude parameters from training. names: comma-separated parts of their names.

    Raises UserError if a part matches no parameter, or if nothing is left to train.
    """
    for name in names.split(",") if names else ():
        part = f".{name.strip()}."
        frozen = [p for full, p in model.named_parameters() if part in f".{full}."]
        if not frozen:
            raise UserError(
                f"freeze={names}: no parameter has {name.strip()!r} in its name; see print(model)"
            )
        for p in frozen:
            p.requires_grad_(False)
    if not trained_parameters(model):
        raise UserError(f"freeze={names} leaves nothing to train; name fewer parameters")


def group_parameters(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return {group: {name: parameter}} with every trained parameter in exactly one group.

    The group "hidden" holds the matrices of linear layers, except for the output head; "matrices" holds embeddings, the
    head and other tensors of at least two dimensions; "vectors" holds biases and the weights of norms. A module may
    choose a different group for its parameters with an optimizer_group attribute.
    """
    groups = {"hidden": {}, "matrices": {}, "vectors": {}}
    for name, p in trained_parameters(model).items():
        group = "vectors"
        if p.dim() > 1:
            owner = model.get_submodule(name.rpartition(".")[0])
            linear = isinstance(owner, nn.Linear) and not name.endswith("lm_head.weight")
            group = getattr(owner, "optimizer_group", "hidden" if linear else "matrices")
        groups[group][name] = p
    return groups


def rate_factor(name: str, p: Tensor, config: "TrainConfig") -> float:
    """Return a factor for the learning rate of a parameter. Edit it for rates that depend on the width, as in muP."""
    return 1.0


def make_optimizer(
    config: "TrainConfig", model: nn.Module, spread: Callable = apply
) -> Optimizer:
    """Make the optimizer of a run. spread: Process.spread.

    Weight decay pulls matrices and embeddings towards zero, but not biases and norms.
    """
    groups = []
    for kind, members in group_parameters(model).items():
        rule = next(x for x in [*OPTIMIZERS[config.optimizer], ADAMW] if kind in x.takes)
        factors = {name: rate_factor(name, p, config) for name, p in members.items()}
        for factor in dict.fromkeys(factors.values()):
            part = {name: p for name, p in members.items() if factors[name] == factor}
            peak_lr = factor * getattr(config, rule.learning_rate)
            groups.append(
                {
                    "rule": rule,
                    "named_params": part,
                    "params": list(part.values()),
                    "lr": peak_lr,
                    "peak_lr": peak_lr,
                    "config": config,
                    "weight_decay": 0.0 if kind == "vectors" else config.weight_decay,
                }
            )
    return Optimizer(groups, spread)


# --------------------------------------------------------------------------------------
# Learning rate schedules: the shape of the decay, from 1 at progress 0 to 0 at progress 1


def cosine(progress: float, config: "TrainConfig") -> float:
    """Half a cosine, which falls slowly at both ends. Source: Loshchilov and Hutter 2016, arXiv:1608.03983."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float, config: "TrainConfig") -> float:
    """Straight line, the best of the schedules compared in Defazio et al. 2023, arXiv:2310.07831."""
    return 1 - progress


def warmup_stable_decay(progress: float, config: "TrainConfig") -> float:
    """Constant for 80 %, then linear. Source: Hu et al. 2024, arXiv:2404.06395."""
    return min(1.0, (1 - progress) / 0.2)


SCHEDULES = {"cosine": cosine, "linear": linear, "wsd": warmup_stable_decay}
