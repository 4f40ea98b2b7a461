"""LoRA: fine-tune small matrices that are added to a model's large ones, which stay frozen.

add() inserts the small matrices into a model. merged_state() adds their products to the large ones.
Source: Hu et al. 2021, arXiv:2106.09685.
"""

import torch
from torch import Tensor, nn

from humptygpt.cli import UserError


class LoRALinear(nn.Linear):
    """A linear layer with LoRA: W x + b + alpha / rank * B A x, where only A and B are trained.

    A is (rank, inputs), and B is (outputs, rank). B starts at 0, so the model is unchanged at first.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        """Take over W and b of `linear`, which can no longer be used."""
        vars(self).update(vars(linear))
        self.scale = alpha / rank
        self.lora_A = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False)
        for layer in (self.lora_A, self.lora_B):
            layer.optimizer_group = "matrices"  # AdamW trains them
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs). Returns (..., outputs)."""
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(x))

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return W + alpha / rank * B A, (outputs, inputs)."""
        return self.weight + self.scale * (self.lora_B.weight @ self.lora_A.weight)


def add(model: nn.Module, training: dict) -> nn.Module:
    """Add LoRA to the layers named in lora_targets, and freeze the rest of the model.

    training: the training settings, of which lora_rank, lora_alpha and lora_targets are used.
    Raises UserError if the model has no layer of one of these names.
    """
    targets = {name.strip() for name in training["lora_targets"].split(",")}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }
    known = {name.split(".")[-1] for name in layers}
    if unknown := targets - known:
        raise UserError(
            f"lora_targets={training['lora_targets']}: {min(unknown)!r} is not one of: {', '.join(sorted(known))}"
        )
    model.requires_grad_(False)
    for name, layer in layers.items():
        if name.split(".")[-1] in targets:
            beside = LoRALinear(layer, training["lora_rank"], training["lora_alpha"])
            model.set_submodule(name, beside)
    return model


def train_rows(model: nn.Module, rows: list[int]) -> None:
    """Train these rows of the frozen embedding and of the output head as well. The other rows stay as they are."""
    index = (torch.tensor(rows),)
    for name, layer in model.named_modules():
        if name.endswith(("wte", "lm_head")):
            # the vectors have no weight decay, which would change every row
            layer.optimizer_group = "vectors"
            layer.weight.requires_grad_().register_hook(
                lambda gradient: torch.zeros_like(gradient).index_put(index, gradient[index])
            )


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the equivalent model without LoRA. Weights that LoRA did not change are not copied."""
    state = {name: x for name, x in model.state_dict().items() if ".lora_" not in name}
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            state[f"{name}.weight"] = layer.merged()
    return state
