"""The models that a run can train and the tasks that they learn. Each is imported only when a setting names it.

Datasets and checkpoints name their task.
"""

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from humptygpt import cli
from humptygpt.cli import UserError
from humptygpt.data import Batch
from model import ModelConfig

# {name: ("module:class", the tasks that it can learn)}
MODELS = {
    "gpt": ("model:GPT", ("language modelling", "translation", "chat")),
    "transformer": ("humptygpt.translation.model:Transformer", ("translation",)),
    "window_mlp": ("humptygpt.window_mlp.model:WindowMLP", ("language modelling",)),
    "number_mlp": ("humptygpt.window_mlp.model:NumberMLP", ("language modelling",)),
}
TASKS = {
    "language modelling": "humptygpt.evaluation:TEXT",
    "translation": "humptygpt.translation.task:TRANSLATION",
    "chat": "humptygpt.chat.task:CHAT",
}


# --------------------------------------------------------------------------------------
# Models


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
        from humptygpt.minutes.ensemble import Ensemble

        cls = Ensemble
    from humptygpt.fast.attention import use_fused_kernel

    model = cls(config)
    use_fused_kernel(model)
    if training and training.get("lora_rank"):
        from humptygpt.finetune import lora

        lora.add(model, training)
    return model


def build_on_meta(config: ModelConfig, training: dict | None = None) -> nn.Module:
    """Build a model without allocating its weights. training: as in build()."""
    with torch.device("meta"), WithoutValues():
        return build(config, training)


def with_progress(model: nn.Module, batch: Batch, progress: float) -> Batch:
    """Add the progress of a run, from 0 to 1, to the arguments of a model, if its forward() has an argument for it."""
    member = getattr(model, "members", [model])[0]
    if "progress" not in inspect.signature(member.forward).parameters:
        return batch
    return batch | {"progress": torch.tensor(progress)}  # a number would be compiled anew


def losses_of(outputs: tuple) -> dict[str, Tensor]:
    """Return the loss in a model's outputs, as train_loss, and the terms that the model adds to it, {name: term}."""
    _, loss, *terms = outputs
    return {"train_loss": loss} | (terms[0] if terms else {})


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


# --------------------------------------------------------------------------------------
# Tasks

Show = Callable[..., str]  # (model, dataset) -> text for the user


class Score(NamedTuple):
    text: str  # shown to the user
    metrics: dict[str, float]  # for metrics.jsonl


@dataclass(frozen=True)
class Task:
    """What differs between tasks. Its functions get the model on its device, in evaluation mode, under autocast."""

    dataset: type  # a subclass of humptygpt.data.Dataset
    package: str | None = None  # the package that computes the score
    batches_vary: bool = False  # batches differ in shape
    # shown after each evaluation; its third argument is the number of examples
    evaluation_examples: Show | None = None
    final_examples: Show | None = None  # shown at the end of a run
    # the texts or replies that the model writes, (model, dataset) -> list of them, to compare with the training text
    write: Callable[..., list[str]] | None = None
    score: Callable[..., Score] | None = None  # at the end of a run and with --eval_only
    sample_label: str = "more of this"  # label printed before sample_command
    sample_command: str = "python sample.py {}"  # {} is the argument that names the run


def find_task(name: str) -> Task:
    return pkgutil.resolve_name(TASKS[name])
