"""The update rule of each parameter: AdamW, Muon or NorMuon; schedules."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from humptygpt.core.device import multiplies_bfloat16
from humptygpt.core.errors import UserError


class Optimizer:
    """Groups of parameters, each with an update rule and its settings, and the state of each parameter by its name.

    It has what a training loop and a GradScaler ask of an optimizer. It is not a torch.optim.Optimizer: those load
    torch's compiler, which takes longer than anything else at the start.
    """

    def __init__(self, groups: list[dict]):
        """groups: dicts of rule, names, params, lr and what else the rule needs; see make_optimizer."""
        self.param_groups = groups
        self.state: dict[str, dict[str, Tensor]] = {}
        self.steps = 0
        # several processes divide the matrices: Processes.spread, sharding.spread_rows and sharding.total
        self.spread = lambda function, x, rows: function(x)
        self.total: Callable[[Tensor], Tensor] | None = None

    def set_lr(self, scale: float) -> None:
        """Each group's learning rate becomes scale times its peak."""
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * scale

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        self.steps += 1
        for group in self.param_groups:
            named = zip(group["names"], group["params"], strict=True)
            if with_gradient := {name: p for name, p in named if p.grad is not None}:
                group["rule"](self, group, with_gradient)

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def state_dict(self) -> dict:
        """Plain data and tensors: {"steps": int, "state": {parameter: {name: tensor}}}."""
        return {"steps": self.steps, "state": self.state}

    def load_state_dict(self, saved: dict) -> None:
        """Take over the state; the settings of the groups stay as they are now."""
        names = {name for group in self.param_groups for name in group["names"]}
        assert saved["state"].keys() <= names, "the state is of another model"
        self.steps = saved["steps"]
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                if name in saved["state"]:
                    self.state[name] = {
                        key: own_part(value, p) for key, value in saved["state"][name].items()
                    }

    def get_state(self, rule: Callable, key: str, params: dict[str, Tensor]) -> list[Tensor]:
        """What the rule keeps of each parameter under this key, of this process; zeros at first."""
        found = []
        for name, p in params.items():
            state = self.state.setdefault(name, {})
            if key not in state:
                state[key] = torch.zeros_like(STATE[rule][key](p))
            found.append(local(state[key]))
        return found

    def prepare_state(self) -> None:
        """Make the state of every parameter, which is else made in the first step."""
        for group in self.param_groups:
            for key in STATE[group["rule"]]:
                self.get_state(
                    group["rule"], key, dict(zip(group["names"], group["params"], strict=True))
                )


def adamw(optimizer: Optimizer, group: dict, params: dict[str, Tensor]) -> None:
    """Update by the mean gradient over the root mean square gradient: each element by about lr.

    Source: Loshchilov and Hutter 2017, arXiv:1711.05101.
    """
    weights, gradients = (
        [local(p) for p in params.values()],
        [local(p.grad) for p in params.values()],
    )
    exp_avg, exp_avg_sq = (optimizer.get_state(adamw, key, params) for key in STATE[adamw])
    beta1, beta2 = group["betas"]
    # One kernel for all parameters, the one behind torch.optim.AdamW(fused=True). It is private to torch: should it go,
    # the lines after it do the same, in more kernels.
    if hasattr(torch, "_fused_adamw_"):
        steps = torch.full((), float(optimizer.steps), device=weights[0].device)
        settings = {
            "lr": group["lr"],
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": group["weight_decay"],
        }
        settings |= {"eps": 1e-8, "amsgrad": False, "maximize": False}
        torch._fused_adamw_(
            weights, gradients, exp_avg, exp_avg_sq, [], [steps] * len(weights), **settings
        )
        return
    torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
    torch._foreach_lerp_(exp_avg, gradients, 1 - beta1)
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, gradients, gradients, 1 - beta2)
    denominator = torch._foreach_sqrt(exp_avg_sq)
    torch._foreach_div_(denominator, math.sqrt(1 - beta2**optimizer.steps))
    torch._foreach_add_(denominator, 1e-8)
    torch._foreach_addcdiv_(
        weights, exp_avg, denominator, -group["lr"] / (1 - beta1**optimizer.steps)
    )


def muon(optimizer: Optimizer, group: dict, params: dict[str, Tensor]) -> None:
    """Update by the momentum with all its singular values set to about 1, so that no direction is lost.

    Matrices of one shape are stacked and orthogonalised together, in bfloat16 where that is fast. Source: Jordan et al.
    2024, "Muon: an optimizer for the hidden layers of neural networks".
    NorMuon, where it is the group's rule, does more: see normalize_neurons.
    """
    rule = group["rule"]
    by_shape: dict[tuple[int, int], dict[str, Tensor]] = {}
    for name, p in params.items():
        by_shape.setdefault(tuple(p.shape), {})[name] = p
    for (rows, columns), alike in by_shape.items():
        weights = [local(p) for p in alike.values()]
        gradients = torch.stack(
            [local(p.grad) for p in alike.values()]
        )  # (n, rows, columns); sharded, fewer rows
        momentum = optimizer.get_state(rule, "momentum_buffer", alike)
        torch._foreach_lerp_(momentum, list(gradients), 1 - group["momentum"])
        gradients = gradients.lerp_(
            torch.stack(momentum), group["momentum"]
        )  # Nesterov: one look ahead
        updates = optimizer.spread(orthogonalize, gradients, rows)
        if rule is normuon:
            second_moment = optimizer.get_state(rule, "second_moment_buffer", alike)
            updates = normalize_neurons(
                updates, second_moment, group, (rows, columns), optimizer.total
            )
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(
            weights, list(updates), alpha=-group["lr"] * math.sqrt(max(1, rows / columns))
        )


def normuon(optimizer: Optimizer, group: dict, params: dict[str, Tensor]) -> None:
    """Muon with updates that are normalised for each neuron. Source: Li et al. 2025, arXiv:2510.05491."""
    muon(optimizer, group, params)


def normalize_neurons(
    updates: Tensor,
    second_moment: list[Tensor],
    group: dict,
    shape: tuple[int, int] | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Each neuron's part of the updates, (n, rows, columns), over its root mean square of the last steps.

    In an orthogonal update some neurons move much less than others; so all move at about one speed, and a whole matrix
    as fast as without it. A neuron has a row, or a column of a matrix with more columns than rows; second_moment: n, as
    per_neuron() has it, is brought up to date. Where this process has only some of the rows, shape is that of a whole
    matrix, and total adds up over all processes.
    """

    def norm(x: Tensor) -> Tensor:
        found = x.norm(dim=(1, 2), keepdim=True)
        return total(found.square()).sqrt() if total else found

    rows, columns = shape or updates.shape[1:]
    if rows >= columns:
        mean_square = updates.square().mean(dim=2, keepdim=True)
    else:
        square = updates.square().sum(dim=1, keepdim=True)
        mean_square = (total(square) if total else square) / rows
    torch._foreach_lerp_(second_moment, list(mean_square), 1 - group["betas"][1])
    normalized = updates * (torch.stack(second_moment) + 1e-10).rsqrt()
    return normalized * (norm(updates) / (norm(normalized) + 1e-10))


def orthogonalize(x: Tensor, steps: int = 5) -> Tensor:
    """x: (n, rows, columns). Each matrix U S V^T becomes about U V^T; singular values end between 0.7 and 1.2.

    A polynomial that moves singular values towards 1, applied steps times: Newton-Schulz with Jordan's coefficients.
    """
    dtype = x.dtype
    if multiplies_bfloat16(x.device):
        x = x.bfloat16()  # exact enough here, and faster
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # the largest singular value is now at most 1
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return (x.mT if tall else x).to(dtype)


def whole(p: Tensor) -> Tensor:
    return p


def per_neuron(p: Tensor) -> Tensor:
    return p[:, :1] if p.shape[0] >= p.shape[1] else p[:1]


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: all, or its rows of a sharded one."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def own_part(value: Tensor, p: Tensor) -> Tensor:
    """The saved state of a parameter on its device; of a sharded one, the part of this process."""
    if not hasattr(p, "to_local"):
        return value.to(p.device)
    from humptygpt.parallel import fsdp as sharding  # here, since it takes a second to load

    return sharding.own_part(value, p)


def clip_gradients(parameters: list[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients so that their norm together is at most this, and return the norm before."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if hasattr(norm, "full_tensor"):  # sharded: of the parts of all processes
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


# The rule for the matrices of the blocks; AdamW trains the rest
OPTIMIZERS = {"adamw": adamw, "muon": muon, "normuon": normuon}
# {rule: {what it keeps of a parameter: a view of the parameter that has its shape}}
STATE = {
    adamw: {"exp_avg": whole, "exp_avg_sq": whole},
    muon: {"momentum_buffer": whole},
}
STATE[normuon] = STATE[muon] | {"second_moment_buffer": per_neuron}


def update_rules(optimizer: str) -> dict[str, Callable]:
    """{group: update rule}; a class that owns a matrix may name its group: hidden, in the blocks."""
    return {"hidden": OPTIMIZERS[optimizer], "matrices": adamw, "vectors": adamw}


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def freeze(model: nn.Module, names: str | None) -> None:
    """Keep parameters as they are. names: parts of their names, with commas between them. Raises UserError."""
    for name in (names or "").split(",") if names else ():
        found = [p for full, p in model.named_parameters() if f".{name.strip()}." in f".{full}."]
        if not found:
            parts = sorted(
                {part for full, _ in model.named_parameters() for part in full.split(".")[:-1]}
            )
            known = ", ".join(part for part in parts if not part.isdecimal())
            raise UserError(
                f"freeze={names}: no parameter has {name.strip()!r} in its name; there are: {known}"
            )
        for p in found:
            p.requires_grad_(False)
    if not trained_parameters(model):
        raise UserError(f"freeze={names} leaves nothing to train; name fewer parameters")


def group_parameters(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """{group: {name: parameter}}, every parameter that trains in exactly one group; no group is empty."""
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    groups = {"hidden": {}, "matrices": {}, "vectors": {}}
    for name, p in trained_parameters(model).items():
        group = getattr(owners[id(p)], "optimizer_group", "matrices") if p.dim() > 1 else "vectors"
        groups[group][name] = p
    return {group: members for group, members in groups.items() if members}


def state_bytes(optimizer: str, model: nn.Module) -> int:
    """Of the optimizer state of the parameters that train."""
    groups = (
        (STATE[update_rules(optimizer)[group]], members)
        for group, members in group_parameters(model).items()
    )
    return sum(
        view(p).nbytes
        for views, members in groups
        for view in views.values()
        for p in members.values()
    )


def make_optimizer(config, model: nn.Module) -> Optimizer:
    """The optimizer of a run; config: a TrainConfig.

    Weight decay pulls matrices and embeddings towards zero, but not biases and norms.
    """
    peak_lrs = dict.fromkeys((muon, normuon), config.muon_learning_rate)
    rules, groups = update_rules(config.optimizer), []
    for group, members in group_parameters(model).items():
        peak_lr = peak_lrs.get(rules[group], config.learning_rate)
        settings = {
            "rule": rules[group],
            "lr": peak_lr,
            "peak_lr": peak_lr,
            "momentum": config.muon_momentum,
        }
        settings |= {"betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
        if group == "vectors":
            settings["weight_decay"] = 0.0
        groups.append(settings | {"names": list(members), "params": list(members.values())})
    return Optimizer(groups)


# --------------------------------------------------------------------------------------
# Learning rate schedules: the shape of the decay, from 1 at progress 0 to 0 at progress 1


def cosine(progress: float) -> float:
    """Half a cosine: slow at both ends. Source: Loshchilov and Hutter 2016, arXiv:1608.03983."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """Source: Defazio et al. 2023, arXiv:2310.07831, who find it the best of all shapes."""
    return 1 - progress


def warmup_stable_decay(progress: float) -> float:
    """Constant for 80 %, then linear. Source: Hu et al. 2024, arXiv:2404.06395."""
    return min(1.0, (1 - progress) / 0.2)


SCHEDULES = {"cosine": cosine, "linear": linear, "wsd": warmup_stable_decay}


def learning_rate_at(
    it: int,
    schedule: str,
    learning_rate: float,
    *,
    warmup_iters: int,
    lr_decay_iters: int,
    min_lr: float,
) -> float:
    """The learning rate of step it, the first being 0: linear warmup, then decay to min_lr.

    The first step's is above zero, and that of steps from lr_decay_iters on is min_lr.
    """
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    progress = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + SCHEDULES[schedule](progress) * (learning_rate - min_lr)
