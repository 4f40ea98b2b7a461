"""Optimizers (AdamW, Muon and NorMuon) and learning rate schedules.

An optimizer is a torch.optim.Optimizer. One of another project, or of your own in that style, is one import and one
line in OPTIMIZERS, and its settings are fields of TrainConfig. A new schedule is one function and one line in
SCHEDULES.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from humptygpt.cli import UserError
from humptygpt.formats.checkpoint import check_tensors

if TYPE_CHECKING:  # settings.py imports this file
    from humptygpt.training.settings import TrainConfig

# parameters and their settings, as torch.optim takes them; make_optimizer() makes them
Groups = list[dict]


def apply(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


class Optimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer that starts without torch's compiler, and whose parameters ranks may divide.

    So the update of a parameter must not depend on others.
    """

    # torch wraps it in a decorator that loads the compiler, which takes one to three seconds
    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__

    def __init__(self, groups: Groups):
        """groups: from make_optimizer(), with all settings."""
        super().__init__(groups, {})

    def fresh_state(self, p: Tensor, group: dict) -> dict[str, Tensor]:
        """Return the state of a parameter before the first step."""
        raise NotImplementedError

    def update(self, params: list[Tensor], group: dict) -> None:
        """Update the parameters of a group that have a gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.make_state()
        for group in self.param_groups:
            if params := [p for p in group["params"] if p.grad is not None]:
                self.update(params, group)

    def make_state(self) -> None:
        """Make the state of each parameter that has none."""
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    self.state[p] = self.fresh_state(p, group)


class AdamW(Optimizer):
    """p -= lr * (m / (sqrt(v) + eps) + weight_decay * p), where m and v are the means of the gradient and its square.

    The means are over recent steps, and corrected for their start at 0. This calls the kernel behind
    torch.optim.AdamW(fused=True) once for each group. Source: Loshchilov and Hutter 2017, arXiv:1711.05101.
    """

    def fresh_state(self, p: Tensor, group: dict) -> dict[str, Tensor]:
        step = torch.zeros((), device=p.device)
        return {
            "step": step,
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }

    def update(self, params: list[Tensor], group: dict) -> None:
        steps, means, squares = ([self.state[p][key] for p in params] for key in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_add_(steps, 1)
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            params,
            [p.grad for p in params],
            means,
            squares,
            [],
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )


class Muon(AdamW):
    """Update each matrix by its momentum, with all singular values set to about 1 so that no direction is neglected.

    Matrices of the same shape are stacked and orthogonalised together. Groups without "momentum" are AdamW's.
    Source: Jordan et al. 2024, "Muon: an optimizer for the hidden layers of neural networks".
    """

    spread: Callable  # Ranks.spread; make_optimizer() sets it

    def fresh_state(self, p: Tensor, group: dict) -> dict[str, Tensor]:
        if "momentum" not in group:
            return super().fresh_state(p, group)
        return {"momentum_buffer": torch.zeros_like(p)}

    def update(self, params: list[Tensor], group: dict) -> None:
        if "momentum" not in group:
            return super().update(params, group)
        by_shape = defaultdict(list)
        for p in params:
            by_shape[p.shape].append(p)
        for (rows, columns), alike in by_shape.items():
            gradients = torch.stack([p.grad for p in alike])  # (n, rows, columns)
            momentum = [self.state[p]["momentum_buffer"] for p in alike]
            torch._foreach_lerp_(momentum, list(gradients), 1 - group["momentum"])
            # Nesterov momentum
            gradients.lerp_(torch.stack(momentum), group["momentum"])
            function = partial(orthogonalize, dtype=group["dtype"])
            updates = self.spread(function, gradients).to(gradients.dtype)
            updates = self.normalize(updates, alike, group)
            torch._foreach_mul_(alike, 1 - group["lr"] * group["weight_decay"])
            lr = group["lr"] * math.sqrt(max(1, rows / columns))
            torch._foreach_add_(alike, list(updates), alpha=-lr)

    def normalize(self, updates: Tensor, params: list[Tensor], group: dict) -> Tensor:
        """Return the updates of parameters of the same shape, (n, rows, columns)."""
        return updates


class NorMuon(Muon):
    """Muon whose neurons all move at about the same speed; see normalize_neurons()."""

    def fresh_state(self, p: Tensor, group: dict) -> dict[str, Tensor]:
        state = super().fresh_state(p, group)
        if "momentum" in group:
            across = p[:, :1] if p.shape[0] >= p.shape[1] else p[:1]
            state["second_moment_buffer"] = torch.zeros_like(across)
        return state

    def normalize(self, updates: Tensor, params: list[Tensor], group: dict) -> Tensor:
        moments = [self.state[p]["second_moment_buffer"] for p in params]
        return normalize_neurons(updates, moments, group["betas"][1])


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


def muon(groups: Groups, config: "TrainConfig", kind: type[Muon] = Muon) -> Muon:
    """Let Muon update the matrices of hidden layers, and AdamW the rest."""
    for group in groups:
        if group["kind"] == "hidden":
            group["lr"] = config.muon_learning_rate
            group["momentum"] = config.muon_momentum
            # float16 would overflow
            is_bfloat16 = config.dtype == "bfloat16"
            group["dtype"] = torch.bfloat16 if is_bfloat16 else torch.float32
    return kind(groups)


MUONS = {"muon": muon, "normuon": partial(muon, kind=NorMuon)}
# {name: a class of torch.optim, or a function that makes an optimizer from groups and the settings}
OPTIMIZERS = {"adamw": AdamW, **MUONS}


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
            raise UserError(f"freeze={names}: no parameter has {name.strip()!r} in its name; see print(model)")
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


def make_optimizer(config: "TrainConfig", model: nn.Module, spread: Callable = apply) -> torch.optim.Optimizer:
    """Make the optimizer of a run. Each group has its kind, the peak of its rate, and what AdamW needs.

    spread: Ranks.spread, with which several ranks share the work of Muon.

    Weight decay pulls matrices and embeddings towards zero, but not biases and norms.
    """
    groups = [
        {
            "kind": kind,
            "params": [*members.values()],
            "lr": config.learning_rate,
            "betas": (config.beta1, config.beta2),
            "weight_decay": 0.0 if kind == "vectors" else config.weight_decay,
        }
        for kind, members in group_parameters(model).items()
        if members
    ]
    make = OPTIMIZERS[config.optimizer]
    optimizer = make(groups) if isinstance(make, type) else make(groups, config)
    optimizer.spread = spread
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Set each group's learning rate to scale times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale


# --------------------------------------------------------------------------------------
# What a checkpoint holds: the state of each parameter by its name, because torch keys it by position


def named_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict]:
    """Return {name of a parameter: its state}, without those that have none."""
    named = trained_parameters(model).items()
    return {name: optimizer.state[p] for name, p in named if p in optimizer.state}


def restore_state(optimizer: torch.optim.Optimizer, model: nn.Module, saved: dict, receive: Callable) -> None:
    """Undo named_state() of an optimizer that has taken a step. The groups keep their settings.

    receive: Ranks.receive. Raises an exception of any type if the names do not fit the model or, for classes made here,
    the shapes and dtypes.
    """
    parameters = trained_parameters(model)
    if unknown := saved.keys() - parameters.keys():
        raise ValueError(f"it has optimizer.{min(unknown)}, which this code does not know")
    if isinstance(optimizer, Optimizer):
        optimizer.make_state()
        for name, p in parameters.items():
            check_tensors(f"optimizer.{name}.", saved.get(name, {}), optimizer.state[p])
    for name, values in saved.items():
        p = parameters[name]
        like = optimizer.state[p]
        optimizer.state[p] = {
            key: receive(x, like.get(key, p)) if isinstance(x, Tensor) else x for key, x in values.items()
        }


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
