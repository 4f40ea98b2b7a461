"""Which rule moves which parameter, and how far: AdamW, Muon, Adagrad; learning rates over a run; averaged weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from humptygpt.device import multiplies_bfloat16


class Optimizer:
    """AdamW for every parameter, or Muon for the matrices inside the blocks and AdamW for the rest; ngrams by Adagrad.

    It has what a training loop and a GradScaler ask of an optimizer: param_groups, step, zero_grad and states. It is
    not a torch.optim.Optimizer, since those load torch's compiler, which takes longer than anything else at the start.
    """

    def __init__(self, groups: list[dict]):
        """groups: dicts of rule (one of RULES), params, lr and what the rule needs; see make_optimizer."""
        self.param_groups = groups
        self.state: dict[Tensor, dict] = {}  # what the rule remembers of each parameter
        self.steps = 0

    def set_rates(self, share: float) -> None:
        """Each learning rate becomes this share of its highest."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * share

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        self.steps += 1
        for group in self.param_groups:
            RULES[group["rule"]](self, group)

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def state_dict(self) -> dict:
        """Plain data and tensors: settings of the groups, and memories in the order of the parameters."""
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        memories = [self.state.get(p, {}) for group in self.param_groups for p in group["params"]]
        return {"steps": self.steps, "groups": groups, "memories": memories}

    def load_state_dict(self, state: dict) -> None:
        """Take over memories; the settings stay as they are now."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        assert len(parameters) == len(state["memories"]), "the state is of another model"
        self.steps = state["steps"]
        for p, memory in zip(parameters, state["memories"], strict=True):
            assert all(len(value) == len(p) for value in memory.values()), "the state is of another model"
            if memory:
                self.state[p] = {key: value.to(p.device) for key, value in memory.items()}

    def memory(self, p: Tensor, *names: str) -> list[Tensor]:
        """What is remembered of p under these names; zeros at first."""
        if p not in self.state:
            self.state[p] = {name: torch.zeros_like(p) for name in names}
        return [self.state[p][name] for name in names]


def adamw(optimizer: Optimizer, group: dict) -> None:
    """Each number moves by about lr, in the direction of its mean gradient, less the surer where that changes much.

    Source: Loshchilov and Hutter 2017, arXiv:1711.05101.
    """
    params = [p for p in group["params"] if p.grad is not None]
    if not params:
        return
    means, squares = zip(*(optimizer.memory(p, "mean", "square") for p in params), strict=True)
    steps = torch.full((), float(optimizer.steps), device=params[0].device)
    torch._fused_adamw_(  # one kernel for all of them, the one behind torch.optim.AdamW(fused=True)
        params,
        [p.grad for p in params],
        list(means),
        list(squares),
        [],
        [steps] * len(params),
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )


def adagrad_of_rows(optimizer: Optimizer, group: dict) -> None:
    """Each row of a table that was read moves against its gradient, by about lr at first and less the more it moved.

    Rows that were not read cost nothing, however many there are. A row remembers one number, its squared gradients'
    mean, summed. Source: Duchi et al. 2011, "Adaptive subgradient methods for online learning and stochastic
    optimization"; one number a row: Mudigere et al. 2021, arXiv:2104.05158, section 4.1.
    """
    for p in group["params"]:
        if p.grad is None:
            continue
        if p not in optimizer.state:
            optimizer.state[p] = {"squares": p.new_zeros(len(p), 1)}
        squares, gradient = optimizer.state[p]["squares"], p.grad.coalesce()
        rows, gradient = gradient.indices()[0], gradient.values()  # (read,), (read, columns)
        squares.index_add_(0, rows, gradient.square().mean(dim=1, keepdim=True))
        p.index_add_(0, rows, gradient / (squares[rows].sqrt() + 1e-12), alpha=-group["lr"])


def muon(optimizer: Optimizer, group: dict) -> None:
    """Each matrix moves by the nearest matrix of equal singular values to its mean gradient, so no direction is lost.

    Matrices of one shape are stacked and orthogonalised together, in bfloat16 where that is fast. Source: Jordan et al.
    2024, "Muon: an optimizer for the hidden layers of neural networks".
    """
    by_shape: dict[tuple[int, int], list[Tensor]] = {}
    for p in group["params"]:
        if p.grad is not None:
            by_shape.setdefault(tuple(p.shape), []).append(p)
    for (rows, columns), params in by_shape.items():
        gradients = torch.stack([p.grad for p in params])  # (n, rows, columns)
        means = [optimizer.memory(p, "mean")[0] for p in params]
        torch._foreach_lerp_(means, list(gradients), 1 - group["momentum"])
        gradients = gradients.lerp_(torch.stack(means), group["momentum"])  # Nesterov: one look ahead
        lr = group["lr"] * math.sqrt(max(1, rows / columns))
        updates = orthogonalize(gradients)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(updates), alpha=-lr)


def orthogonalize(x: Tensor, steps: int = 5) -> Tensor:
    """x: (n, rows, columns). Each matrix U S V^T becomes about U V^T; singular values end between 0.7 and 1.2.

    A polynomial that draws singular values towards 1, applied steps times: Newton-Schulz with Jordan's coefficients.
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


RULES = {"adamw": adamw, "adagrad_of_rows": adagrad_of_rows, "muon": muon}


def make_optimizer(
    name: str,
    model: nn.Module,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    muon_learning_rate: float = 0.02,
    muon_momentum: float = 0.95,
    ngram_learning_rate: float = 0.15,
) -> Optimizer:
    """The optimizer with that name for a model, every parameter in exactly one group.

    The tables of ngrams have a rule of their own, whatever the name. Weight decay pulls matrices and embeddings towards
    zero, not biases and norms, which have one dimension.
    """
    parameters = list(model.parameters())
    linear = [m for place, m in model.named_modules() if isinstance(m, nn.Linear) and place != "lm_head"]
    hidden = [module.weight for module in linear] if name == "muon" else []
    sparse = [module.weight for module in model.modules() if isinstance(module, nn.EmbeddingBag)]
    taken = {id(p) for p in hidden + sparse}
    tables = [p for p in parameters if p.dim() >= 2 and id(p) not in taken]
    vectors = [p for p in parameters if p.dim() < 2]
    by_adamw = {"rule": "adamw", "lr": learning_rate, "betas": betas}
    by_muon = {"rule": "muon", "lr": muon_learning_rate, "momentum": muon_momentum}
    groups = [
        {**by_muon, "weight_decay": weight_decay, "params": hidden},
        {**by_adamw, "weight_decay": weight_decay, "params": tables},
        {**by_adamw, "weight_decay": 0.0, "params": vectors},
        {"rule": "adagrad_of_rows", "lr": ngram_learning_rate, "params": sparse},
    ]
    groups = [{**group, "base_lr": group["lr"]} for group in groups if group["params"]]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in parameters), "every parameter belongs to exactly one group"
    return Optimizer(groups)


OPTIMIZERS = ("adamw", "muon")


class AveragedWeights:
    """A moving mean of a model's weights, whose loss is often lower than that of the weights of any one step.

    Each step takes the mean a share of 1 - decay towards the newest weights, so that it reaches back over about
    1 / (1 - decay) steps; at first over fewer, that the random first weights do not count for long.
    Source: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging"; the share of the first
    steps: Szegedy et al. 2015, arXiv:1512.00567, as TensorFlow's moving averages have it.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.parameters, self.decay = list(model.parameters()), decay
        self.means = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """After that many steps of the optimizer."""
        torch._foreach_lerp_(self.means, self.parameters, 1 - min(self.decay, (1 + steps) / (10 + steps)))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this, the model has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        for i, (p, mean) in enumerate(zip(self.parameters, self.means, strict=True)):
            self.means[i], p.data = p.data, mean


# --------------------------------------------------------------------------------------
# The learning rate over a run: shapes of its fall, from 1 at progress 0 to 0 at progress 1


def cosine(progress: float) -> float:
    """Half a wave: slow at both ends. Source: Loshchilov and Hutter 2016, arXiv:1608.03983."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """Straight down. Source: Defazio et al. 2023, arXiv:2310.07831, who find it the best of all."""
    return 1 - progress


def warmup_stable_decay(progress: float) -> float:
    """At the top for four fifths, then straight down. Source: Hu et al. 2024, arXiv:2404.06395."""
    return min(1.0, (1 - progress) / 0.2)


SCHEDULES = {"cosine": cosine, "linear": linear, "wsd": warmup_stable_decay}


def learning_rate_at(
    it: int, schedule: str, learning_rate: float, warmup_iters: int, lr_decay_iters: int, min_lr: float
) -> float:
    """The learning rate of step it, the first being 0: a straight way up, then down to min_lr as the schedule has it.

    The first step's rate is above zero, and steps from lr_decay_iters on have min_lr.
    """
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    progress = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + SCHEDULES[schedule](progress) * (learning_rate - min_lr)
