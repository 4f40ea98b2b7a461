"""LoRA: fine-tuning by small matrices beside large ones, which stay as they are.

add() puts them into a model, merge() multiplies them into its weights. Source: Hu et al. 2021, arXiv:2106.09685.
"""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from humptygpt.core.errors import UserError
from humptygpt.core.settings import nearest
from humptygpt.nn.layers import Linear

MARK = ".lora_"  # in the names of its parameters
OFF = {
    "lora_rank": 0,
    "lora_alpha": 16.0,
    "lora_targets": "q_proj,v_proj",
}  # the defaults of ModelConfig


class LoRALinear(Linear):
    """W x + b + alpha / rank * B A x. W and b are those of a layer; A (rank, inputs) and B (outputs, rank) train.

    B starts at 0, so that the model is what it was.
    """

    def __init__(self, linear: Linear, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.ends_branch = (
            linear.in_features,
            linear.out_features,
            False,
        )
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.lora_A = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs). Returns (..., outputs)."""
        return F.linear(x, self.weight, self.bias) + self.scale * self.lora_B(self.lora_A(x))

    def merged(self) -> Tensor:
        """W + alpha / rank * B A, (outputs, inputs)."""
        return self.weight.detach() + self.scale * (
            self.lora_B.weight.detach() @ self.lora_A.weight.detach()
        )


def add(model: nn.Module) -> nn.Module:
    """Put LoRA beside the layers that the model's config names; nothing else of it trains. Raises UserError."""
    config = model.config
    targets = [name.strip() for name in config.lora_targets.split(",")]
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    kinds = sorted({name.rpartition(".")[2] for name in layers})
    for target in targets:
        if target not in kinds:
            near = f"; did you mean {near}?" if (near := nearest(target, kinds)) else ""
            raise UserError(
                f"lora_targets={config.lora_targets}: {target!r} is not one of: {', '.join(kinds)}{near}"
            )
    model.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, kind = name.rpartition(".")
        if kind in targets:
            setattr(
                model.get_submodule(parent),
                kind,
                LoRALinear(layer, config.lora_rank, config.lora_alpha),
            )
    return model


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)
    }


def merged_state(model: nn.Module) -> tuple[object, dict[str, Tensor]]:
    """(config, state dict) of the same model without LoRA; new tensors for the layers that it changed alone."""
    changed = {f"{name}.weight": layer.merged() for name, layer in adapted(model).items()}
    state = {name: x for name, x in model.state_dict().items() if MARK not in name}
    return (replace(model.config, **OFF) if changed else model.config), state | changed


def merge(model: nn.Module) -> nn.Module:
    """The same model without LoRA."""
    for name, layer in adapted(model).items():
        parent, _, kind = name.rpartition(".")
        plain = Linear.__new__(Linear)
        nn.Module.__init__(plain)
        plain.in_features, plain.out_features, plain.ends_branch = (
            layer.in_features,
            layer.out_features,
            False,
        )
        plain.weight, plain.bias = nn.Parameter(layer.merged()), layer.bias
        setattr(model.get_submodule(parent), kind, plain)
    if model.config.lora_rank:
        model.config = replace(model.config, **OFF)
        model.requires_grad_(True)
    return model
