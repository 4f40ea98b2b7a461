"""LoRA: fine-tuning by small matrices beside large ones, which stay as they are.

add() puts them into a model, merge() multiplies them into its weights. Source: Hu et al. 2021, arXiv:2106.09685.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from humptygpt.config import UserError
from humptygpt.layers import Linear

MARK = ".lora_"  # in the names of its parameters
# the defaults of ModelConfig
OFF = {"lora_rank": 0, "lora_alpha": 16.0, "lora_targets": "q_proj,v_proj"}


class LoRALinear(Linear):
    """W x + b + alpha / rank * B A x. W and b are those of a layer; A (rank, inputs) and B (outputs, rank) train.

    B starts at 0, so that the model is what it was.
    """

    def __init__(self, linear: Linear, rank: int, alpha: float):
        adopt(self, linear.weight, linear.bias)
        self.scale = alpha / rank
        self.lora_A = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs). Returns (..., outputs)."""
        return F.linear(x, self.weight, self.bias) + self.scale * self.lora_B(
            self.lora_A(x)
        )

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + alpha / rank * B A, (outputs, inputs)."""
        return self.weight + self.scale * (self.lora_B.weight @ self.lora_A.weight)


def adopt(layer: Linear, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
    """Initialise a layer with these parameters; its constructor would draw random ones first."""
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    layer.weight = weight
    layer.bias = bias


def add(model: nn.Module) -> nn.Module:
    """Put LoRA beside the layers that the model's config names; nothing else of it trains. Raises UserError."""
    config = model.config
    targets = {name.strip() for name in config.lora_targets.split(",")}
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, Linear)
    }
    known = {name.split(".")[-1] for name in layers}
    if unknown := targets - known:
        raise UserError(
            f"lora_targets={config.lora_targets}: {min(unknown)!r} is not one of: {', '.join(sorted(known))}"
        )
    model.requires_grad_(False)
    for name, layer in layers.items():
        if name.split(".")[-1] in targets:
            model.set_submodule(
                name, LoRALinear(layer, config.lora_rank, config.lora_alpha)
            )
    return model


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
    }


def merged_state(model: nn.Module) -> tuple[object, dict[str, Tensor]]:
    """(config, state dict) of the same model without LoRA; new tensors for the layers that it changed alone."""
    changed = {f"{name}.weight": layer.merged() for name, layer in adapted(model).items()}
    state = {name: x for name, x in model.state_dict().items() if MARK not in name}
    return (replace(model.config, **OFF) if changed else model.config), state | changed


def merge(model: nn.Module) -> nn.Module:
    """The same model without LoRA."""
    for name, layer in adapted(model).items():
        plain = Linear.__new__(Linear)
        adopt(plain, nn.Parameter(layer.merged()), layer.bias)
        model.set_submodule(name, plain)
    if model.config.lora_rank:
        model.config = replace(model.config, **OFF)
        model.requires_grad_(True)
    return model
