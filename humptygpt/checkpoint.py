"""Checkpoints: tensors and plain data, written atomically and checked when read. Reading one never runs code.

This module owns their schema and is the only one that turns a checkpoint into a model.
"""

import os
import shlex
import warnings
import zipfile
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from humptygpt import cli, tokenizers
from humptygpt.cli import UserError, note, refuse
from humptygpt.files import check_schema, refuse_damaged, write_whole
from humptygpt.tasks import MODELS, build_on_meta, config_class
from model import ModelConfig

FORMAT = "gpt checkpoint 3"  # the number increases whenever the schema changes
CONFIG = {str: (int, float, bool, str, None)}
COUNT = range(2**63)
LORA = {"lora_rank?": COUNT, "lora_alpha?": float, "lora_targets?": str}
AMOUNTS = ("position", "seconds", "run_seconds", "best_val_loss")
PROGRESS = {"iter": COUNT[1:], "losses": [float], **dict.fromkeys(AMOUNTS, float)}
PROGRESS |= dict.fromkeys(("tokens", "best_iter", "evals_since_best"), COUNT)
SCHEMA = {
    "format": str,
    "train_config": CONFIG,
    "model_config": CONFIG,
    "tokenizer": dict,  # from Tokenizer.state()
    "task": str,
    "data": {
        "source": str,
        "identity": {str: (int, str)},
        "command?": str,
        "questions?": [str],
    },
    "progress": PROGRESS,
    "model": {str: Tensor},
    # only in ckpt.pt, for resuming
    "optimizer?": {"steps": COUNT, "state": {str: {str: Tensor}}},
    "scaler?": ({str: float}, None),  # only with float16
}


def save(path: Path, entries: dict) -> None:
    """Write a checkpoint. entries: everything in SCHEMA except the format."""
    state = {"format": FORMAT, **entries}
    check_schema(state, SCHEMA)
    write_whole(path, lambda file: torch.save(state, file))


def read(path: Path) -> dict:
    """Load a checkpoint onto the CPU and check its entries. Optimizer.load() checks the optimizer state later.

    Raises UserError if the file is missing or damaged, is not a checkpoint, or would run code.
    """
    saved = read_plain(path)
    check(path, saved)
    return saved


# --------------------------------------------------------------------------------------
# Paths


def find_checkpoint(out_dir: Path, which: str) -> Path:
    """Return the path of a run's best.pt, or of its ckpt.pt if `which` is "latest" or there is no best.pt yet.

    out_dir: the run's folder, or a checkpoint, which is returned unchanged.
    """
    if out_dir.suffix == ".pt" or os.path.isfile(out_dir):
        return out_dir
    best, latest = out_dir / "best.pt", out_dir / "ckpt.pt"
    if which == "best":
        if os.path.exists(best) or not os.path.exists(latest):
            return best
        note(f"there is no best.pt yet; using {latest}")
    return latest


def has_checkpoint(out_dir: Path) -> bool:
    refuse_sharded(out_dir)
    return any(os.path.exists(out_dir / name) for name in ("ckpt.pt", "best.pt"))


def refuse_sharded(out_dir: Path) -> None:
    """Raise UserError if an earlier version wrote folders with the parts of a checkpoint here."""
    for folder in (out_dir, out_dir / "ckpt", out_dir / "best"):
        if os.path.exists(folder / ".metadata"):
            raise UserError(
                f"{folder} is a checkpoint in parts, which commit 57d295e of this repository reads; its"
                " `python export.py --checkpoint=latest --to=ckpt.pt` makes one file of it"
            )


# --------------------------------------------------------------------------------------
# Reading a torch.save file: checksums are verified, and code in it is never run


def load_plain(path: Path, legacy: bool = False) -> object:
    """Load a torch.save file onto the CPU. Raises an exception of any type if it is corrupt or would run code.

    legacy: also read files written by PyTorch before version 1.6, which are not zip files and have no checksums.
    """
    if not legacy or zipfile.is_zipfile(path):
        check_records(path)
    # torch warns at length about a pickle that it did not write
    with warnings.catch_warnings(action="ignore"):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    if any(x.device.type != "cpu" for x in tree_leaves(loaded) if isinstance(x, Tensor)):
        raise ValueError("a tensor has no values")
    return loaded


def check_records(path: Path) -> None:
    """Verify the checksum of each record in a torch.save file. Raises ValueError if one is damaged."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip() is not None
        # torch.load treats a record that is marked as a directory as empty, and leaves its tensor uninitialized
        if damaged or any(info.external_attr & 0x10 for info in file.infolist()):
            raise ValueError("a record is damaged")


# --------------------------------------------------------------------------------------
# Checking the content


def read_plain(path: Path) -> object:
    """Read a checkpoint without checking its content. Raises UserError as read() does."""
    if not path.exists():
        refuse_sharded(path.parent)
        raise UserError(
            f"no checkpoint {path}; train first, or name the folder of a run with --out_dir"
        )
    problem = "is not a checkpoint: it is truncated, damaged or holds more than tensors and plain data"
    with refuse_damaged(path, problem):
        return load_plain(path)


def check(path: Path, saved: object) -> tuple[nn.Module, tokenizers.Tokenizer]:
    """Check the content of a checkpoint. Returns its model, still on the meta device, and its tokenizer.

    Raises UserError if something is not valid.
    """
    if is_nanogpt(saved):
        source = shlex.quote(f"--init_from={path}")
        raise UserError(f"{path} is a nanoGPT checkpoint; to start from it, use {source}")
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a checkpoint from this version, whose format is {FORMAT!r}"
        )
    with refuse(f"{path} is damaged: "):
        check_schema(saved, SCHEMA)
    with refuse(f"{path}: "):
        tokenizer = tokenizers.from_state(saved["tokenizer"])
    with refuse_other_code(path):
        config = check_content(saved, tokenizer.vocab_size)
    # fills in defaults for keys that the checkpoint predates
    saved["model_config"] = asdict(config)
    model = build_like(path, config, saved["model"], saved["train_config"])
    with refuse_other_code(path):
        check_tensors("the parameter ", saved["model"], model.state_dict())
    return model, tokenizer


def is_nanogpt(saved: object) -> bool:
    """True if this was read from a nanoGPT checkpoint."""
    return isinstance(saved, dict) and "model_args" in saved and "format" not in saved


def refuse_other_code(path: Path) -> AbstractContextManager:
    """Turn a ValueError in the block into a UserError: the file is intact, but was written by different code."""
    return refuse(f"{path} was written by different code: ")


def check_content(saved: dict, tokens: int) -> ModelConfig:
    """Check settings, task and progress, and return the model's config. tokens: size of the tokenizer's vocabulary.

    Raises ValueError or UserError if they are invalid or unknown to this code.
    """
    for key, value in saved["train_config"].items():
        if type(value) is str and not value.isprintable():
            raise ValueError(f"{key} must not contain control characters")
    check_schema(saved["train_config"], LORA, "train_config")
    config = cli.restore(config_class(saved["model_config"]), saved["model_config"])
    if config.vocab_size is None or tokens > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokens} tokens, but the model has vocab_size={config.vocab_size}"
        )
    _, learns = MODELS[config.model]
    if saved["task"] not in learns:
        raise ValueError(f"model={config.model} does not support task={saved['task']}")
    progress = saved["progress"]
    if unknown := progress.keys() - PROGRESS.keys():
        raise ValueError(f"it has progress.{min(unknown)}, which this code does not know")
    for key in AMOUNTS:
        if not progress[key] >= 0:
            raise ValueError(f"progress.{key}={progress[key]} must be at least 0")
    return config


def build_like(
    what: object,
    config: ModelConfig,
    weights: dict[str, Tensor],
    training: dict | None = None,
) -> nn.Module:
    """Build the model that a file describes, on the meta device.

    Raises UserError, before anything huge is built, if the sizes cannot match the weights. An error in a model's own
    code is not caught.
    what: the file, as named in messages. training: as in build_on_meta().
    """
    # number_mlp has n_embd=1 and no embedding weights
    sizes = {1}.union(*(x.shape for x in weights.values() if not x.is_nested))
    try:
        layers = config.n_layer * config.n_members
        if layers <= len(weights) and config.n_embd in sizes:
            return build_on_meta(config, training)
    except RuntimeError as error:
        if "overflow" not in str(error):  # from a tensor with too many elements
            raise
    raise UserError(
        f"cannot read {what}: n_members={config.n_members}, n_layer={config.n_layer} and n_embd={config.n_embd}"
        " do not match its weights"
    )


def check_tensors(
    entry: str,
    tensors: dict[str, Tensor],
    like: dict[str, Tensor],
    any_float: bool = False,
) -> None:
    """Raise ValueError unless tensors match `like` and are dense. entry: prefix of their names.

    any_float: a tensor may have any floating-point dtype.
    """
    if unknown := tensors.keys() - like.keys():
        raise ValueError(f"it has {entry}{min(unknown)}, which this code does not know")
    if missing := like.keys() - tensors.keys():
        raise ValueError(f"it lacks {entry}{min(missing)}, which this code needs")
    for name, tensor in tensors.items():
        strided = tensor.layout == torch.strided and not tensor.is_nested
        dense = strided and tensor.is_contiguous()
        dtype, shape = like[name].dtype, like[name].shape
        if any_float and tensor.is_floating_point():
            dtype = tensor.dtype
        if not dense or (tensor.dtype, tensor.shape) != (dtype, shape):
            raise ValueError(
                f"{entry}{name} must be a dense, contiguous tensor of {dtype} and shape {tuple(shape)}"
            )


# --------------------------------------------------------------------------------------
# The model


def restore_model(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Make these tensors the state of a model on the meta device, so no weight is in memory twice. Ties stay ties."""
    named = [*model.named_parameters(remove_duplicate=False)]
    first_name = {p: path for path, p in reversed(named)}  # a tied parameter has several
    model.load_state_dict(weights, assign=True)
    for path, p in named:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, model.get_parameter(first_name[p]))
    return model
