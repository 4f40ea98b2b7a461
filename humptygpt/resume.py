"""The model of a run, what it takes over from a checkpoint or from a model that it starts from, and what has to fit."""

import shlex

import torch
from torch import nn

from humptygpt import checkpoint
from humptygpt.config import UserError, as_written_here, find
from humptygpt.data import Dataset
from humptygpt.loading import Loaded
from humptygpt.optimizers import freeze, trained_parameters
from humptygpt.parallel.processes import ONE_PROCESS, Processes
from humptygpt.tasks import LORA
from humptygpt.token_files import is_command
from humptygpt.tokenizers import from_state
from model import ModelConfig, Stack, count_parameters


def make_model(
    config,
    model_config: ModelConfig,
    processes: Processes = ONE_PROCESS,
    saved: dict | None = None,
    base: Loaded | None = None,
) -> nn.Module:
    """Return the model that trains, on the CPU, or sharded without its weights. config: a TrainConfig."""
    if saved:
        model = checkpoint.restore_model(saved["model"], model_config, vars(config))
    elif base:
        model = adapt_model(base, config, model_config)
    else:
        torch.manual_seed(config.seed)
        model = processes.build(model_config)
    for module in model.modules():
        if isinstance(module, Stack):
            module.checkpoint_activations = config.checkpoint_activations
    freeze(model, config.freeze)
    return model


# --------------------------------------------------------------------------------------
# A run that is resumed


def check_same_data(saved: dict, dataset: Dataset, out_dir: str) -> None:
    """Raise UserError unless these are the data that a checkpoint was trained on; it says how to get those."""
    pieces = from_state(saved["tokenizer"]).pieces
    identity = dataset.identity()
    # a checkpoint of an earlier version may have other keys
    known = saved["data"]["identity"].items()
    same = all(identity.get(key, value) == value for key, value in known)
    if pieces == dataset.tokenizer.pieces and same:
        return
    problem = f"{dataset.folder} is not the data that {out_dir}/ckpt.pt was trained on"
    advice = "; if another folder has that, add --dataset=NAME"
    command = saved["data"].get("command", "")
    if is_command(command):
        advice += f"; to make it again: {as_written_here(command)}"
    raise UserError(problem + advice)


# --------------------------------------------------------------------------------------
# A run that starts from a model


def check_same_tokens(base: Loaded, dataset: Dataset) -> None:
    """Raise UserError where the data has other tokens than the model knows; it says how to prepare them."""
    tokenizer = base.tokenizer
    if dataset.tokenizer.pieces == tokenizer.pieces:
        return
    source = tokenizer.name if tokenizer.name == "gpt2" else base.path
    keys = shlex.join([f"--tokenizer={source}", "--overwrite=True"])
    raise UserError(
        f"{dataset.folder} has tokens ({dataset.tokenizer.name}) that are not those of the model {base.path}"
        f" ({tokenizer.name}); prepare it again with {keys}"
    )


def adapt_model(base: Loaded, config, model_config: ModelConfig) -> nn.Module:
    """Return the model to start from, on the CPU, with this config: fewer positions, other dropout, LoRA."""
    weights = dict(base.model.state_dict())
    for name, x in weights.items():
        if name.endswith("position.wpe.weight"):  # as nanoGPT: the first positions
            weights[name] = x[: model_config.block_size].clone()
    model = checkpoint.restore_model(weights, model_config)
    torch.manual_seed(config.seed)
    return find(LORA)(model, vars(config)) if config.lora_rank else model


def trained_part(model: nn.Module) -> str:
    """Say how many parameters train, and how much of the model that is."""
    trained = sum(p.numel() for p in trained_parameters(model).values())
    return f"training: {trained:,} parameters, {trained / count_parameters(model):.1%}"
