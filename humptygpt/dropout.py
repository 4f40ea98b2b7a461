"""Dropout whose masks depend on the row that they are for."""

import torch
from torch import Tensor, nn

from humptygpt.data import random_key


class SeededDropout(nn.Dropout):
    """Dropout that draws the mask of each row of a batch from a seed of its own.

    So the masks are the same however rows are divided, and if activations are recomputed. A module that is called twice
    draws the same mask twice. On a GPU, in a compiled model and for a tensor without rows, it is nn.Dropout.
    """

    seeds: list[int] | None = None  # one for each row

    def __init__(self, p: float, number: int):
        """number: which of the model's dropouts it is."""
        super().__init__(p)
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        draws = self.training and self.p and x.is_cpu
        # a compiled model would be compiled anew for other seeds
        if not draws or torch.compiler.is_compiling() or len(self.seeds or ()) != len(x):
            return super().forward(x)
        keep = torch.empty_like(x, memory_format=torch.contiguous_format)
        generator = torch.Generator()
        for row, seed in zip(keep, self.seeds, strict=True):
            generator.manual_seed(random_key(seed, self.number))
            row.bernoulli_(1 - self.p, generator=generator)
        return x * keep.div_(1 - self.p)


def add_seeds(model: nn.Module) -> None:
    """Replace each nn.Dropout with a SeededDropout."""
    for number, (name, module) in enumerate(list(model.named_modules())):
        if type(module) is nn.Dropout:
            model.set_submodule(name, SeededDropout(module.p, number))


def set_seeds(model: nn.Module, seeds: list[int]) -> None:
    """Seed the random numbers for the rows that the model is about to train on."""
    torch.manual_seed(seeds[0])  # on a GPU, or if the model draws numbers of its own
    for module in model.modules():
        if isinstance(module, SeededDropout):
            module.seeds = seeds
