"""A config -> a model, on the CPU or without values; and what a training step needs of it: dropout by row, losses."""

import functools
import inspect
import pkgutil

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from humptygpt import cli
from humptygpt.cli import UserError
from humptygpt.machine import random_key
from humptygpt.model import ModelConfig
from humptygpt.models.attention import use_fused_kernel

# {name: ("module:class", the tasks that it can learn)}; a module is imported when a setting names its model
MODELS = {
    "gpt": ("humptygpt.model:GPT", ("language modelling", "translation", "chat")),
    "transformer": ("humptygpt.models.transformer:Transformer", ("translation",)),
    "window_mlp": ("humptygpt.models.window_mlp:WindowMLP", ("language modelling",)),
    "number_mlp": ("humptygpt.models.window_mlp:NumberMLP", ("language modelling",)),
}


def model_class(name: str) -> type[nn.Module]:
    """Return the class that model=name stands for. Raises UserError if there is none."""
    if name not in MODELS:
        raise UserError(f"model={name} is not one of: {', '.join(MODELS)}")
    path, _ = MODELS[name]
    return pkgutil.resolve_name(path)


def config_class(settings: dict[str, object]) -> type[ModelConfig]:
    cls = model_class(settings.get("model", ModelConfig.model))
    return getattr(cls, "config_class", ModelConfig)


def make_model_config(settings: dict[str, object]) -> ModelConfig:
    """Return a model's config, given settings that include its keys. Raises UserError if a value is invalid."""
    return cli.make(config_class(settings), settings)


def build(config: ModelConfig, training: dict | None = None) -> nn.Module:
    """Return a new model with random weights, on the CPU. training: a run's settings; with lora_rank, LoRA is added."""
    cls = model_class(config.model)
    if config.n_members > 1:
        if config.model != "gpt":
            raise UserError(f"n_members={config.n_members} works only with model=gpt")
        from humptygpt.models.ensemble import Ensemble

        cls = Ensemble
    model = cls(config)
    use_fused_kernel(model)
    if training and training.get("lora_rank"):
        from humptygpt.models import lora

        lora.add(model, training)
    return model


def build_on_meta(config: ModelConfig, training: dict | None = None) -> nn.Module:
    """Build a model without allocating its weights. training: as in build()."""
    with torch.device("meta"), WithoutValues():
        return build(config, training)


# functions that make constants, such as the tables of positions
CONSTANTS = {torch.arange, torch.eye, torch.full, torch.linspace, torch.logspace}
CONSTANTS |= {torch.ones, torch.tensor, torch.zeros}


class WithoutValues(TorchFunctionMode):
    """Skips weight initialization and creates constants on the CPU.

    Doing either on the meta device would make torch load its compiler, which takes more than a second. Constants are in
    no checkpoint, so they need their values.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        if func is torch.zeros_like:
            return args[0]
        if func in CONSTANTS:
            kwargs = kwargs | {"device": "cpu"}
        return func(*args, **kwargs)


def restore_model(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Make these tensors the state of a model on the meta device, so no weight is in memory twice. Ties stay ties."""
    named = [*model.named_parameters(remove_duplicate=False)]
    first_name = {p: path for path, p in reversed(named)}  # a tied parameter has several
    model.load_state_dict(weights, assign=True)
    for path, p in named:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, model.get_parameter(first_name[p]))
    return model


def is_finite(model: nn.Module) -> bool:
    """True unless a weight is nan or infinite."""
    return all(p.isfinite().all() for p in model.parameters())


# --------------------------------------------------------------------------------------
# What a training step needs of a model


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


def with_progress(model: nn.Module, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
    """Add the progress of a run, from 0 to 1, to the arguments of a model, if its forward() has an argument for it."""
    member = getattr(model, "members", [model])[0]
    if "progress" not in signature_of(type(member).forward).parameters:
        return batch
    return batch | {"progress": torch.tensor(progress)}  # a number would be compiled anew


signature_of = functools.cache(inspect.signature)  # asked for in every step


def losses_of(outputs: tuple) -> dict[str, Tensor]:
    """Return the loss in a model's outputs, as train_loss, and the terms that the model adds to it, {name: term}."""
    _, loss, *terms = outputs
    return {"train_loss": loss} | (terms[0] if terms else {})
