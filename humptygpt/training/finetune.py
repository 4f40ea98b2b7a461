"""Start a run from an existing model: its settings, its tokens and its weights."""

import shlex
from dataclasses import asdict

import torch
from torch import nn

from humptygpt import cli
from humptygpt.cli import UserError, note
from humptygpt.data.dataset import Dataset
from humptygpt.formats.load import Loaded
from humptygpt.model import ModelConfig
from humptygpt.models import lora
from humptygpt.models.build import build_on_meta, restore_model
from humptygpt.training.optimizers import MUONS
from humptygpt.training.settings import GENTLE, TRAINING_ONLY, TrainConfig

# training settings that a run shares with the run that it starts from, unless they are given
LIKE_BASE = ("optimizer", "beta1", "beta2", "muon_momentum", "grad_clip")
RATES = ("learning_rate", "muon_learning_rate")
# with these fractions of a new model's rates, a trained model goes on: see RECORDS.md
FRACTION = 0.5
LORA_FRACTION = 2.0
# models that no run of ours trained count as trained at this rate, if they are as wide as the default
FOREIGN = {"learning_rate": 1e-3}


def base_defaults(base: Loaded, given: dict) -> dict[str, object]:
    """Choose the optimizer and the learning rates of a run that starts from a model: those of the model's own run.

    The rates are a fraction of that run's, or the same if it started from a model itself. A model that no run of ours
    trained counts as trained with AdamW, at rates that are the lower the wider the model is.
    """
    saved = base.saved["train_config"] if base.saved else FOREIGN
    keys = saved.keys() & {*LIKE_BASE, *RATES} - given.keys()
    own = vars(cli.restore(TrainConfig, {key: saved[key] for key in keys}))
    scale = LORA_FRACTION if given.get("lora_rank") else FRACTION
    if saved is FOREIGN:
        scale *= ModelConfig.n_embd / base.model.config.n_embd
    elif saved.get("init_from") != "scratch":
        scale = 1
    rates = {"learning_rate": scale * own["learning_rate"]}
    if given.get("optimizer", own["optimizer"]) in MUONS:
        rates["muon_learning_rate"] = scale * own["muon_learning_rate"]
    return GENTLE | {key: own[key] for key in LIKE_BASE} | rates


def base_settings(base: Loaded, given: dict) -> dict[str, object]:
    """Return the settings of a run that starts from a model: the model's, except for those that the run may choose."""
    own = asdict(base.model.config)
    free = {key: getattr(ModelConfig, key) for key in TRAINING_ONLY}
    free["block_size"] = own["block_size"]
    for key in given.keys() & own.keys():
        if key in free:
            free[key] = given[key]
        elif given[key] not in (own[key], None):
            note(f"{key}={given[key]} has no effect; the model {base.path} has {key}={own[key]}")
    if free["block_size"] > own["block_size"] and own["position"] == "learned":
        raise UserError(
            f"block_size={free['block_size']} is too large: the model {base.path} has learned"
            f" {own['block_size']} positions; use at most that many"
        )
    return own | free


def check_same_tokens(base: Loaded, dataset: Dataset) -> None:
    """Raise UserError unless the data uses the base model's tokens. The message says how to prepare it with them."""
    tokenizer = base.tokenizer
    # tokens may be added at the end, as those that mark turns are
    if dataset.tokenizer.pieces[: tokenizer.vocab_size] == tokenizer.pieces:
        return
    source = tokenizer.name if tokenizer.name == "gpt2" else base.path
    key = shlex.quote(f"--tokenizer={source}")
    raise UserError(
        f"the tokens of {dataset.folder} ({dataset.tokenizer.name}) differ from those of the model {base.path}"
        f" ({tokenizer.name}); prepare the data again with {key} --overwrite=True"
    )


def adapt_model(base: Loaded, config: TrainConfig, model_config: ModelConfig, tokens: int) -> nn.Module:
    """Return the base model, adapted to this config: fewer positions, more tokens, different dropout, LoRA."""
    weights = dict(base.model.state_dict())
    known = base.tokenizer.vocab_size
    for name, x in weights.items():
        if name.endswith("position.wpe.weight"):
            # keep the first positions, as nanoGPT does
            weights[name] = x[: model_config.block_size].clone()
        if name.endswith(("wte.weight", "lm_head.weight")):
            # the vectors of a new token, which may have been padding, start as the mean of the others
            mean = x[:known].mean(dim=0)
            weights[name] = grown = mean.repeat(model_config.vocab_size, 1)
            grown[: len(x)] = x
            grown[known:tokens] = mean
    model = restore_model(build_on_meta(model_config), weights)
    torch.manual_seed(config.seed)
    return lora.add(model, vars(config)) if config.lora_rank else model
