"""Checkpoints: tensors and plain data, written atomically and checked when read. Reading one never runs code.

This module is the only one that turns a checkpoint into a model. Run.state() has the entries.
"""

import os
import warnings
import zipfile
import zlib
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from humptygpt import cli
from humptygpt import model as models
from humptygpt.cli import UserError, note
from humptygpt.files import parse_json, refuse_damaged, write_whole
from humptygpt.model import ModelConfig
from humptygpt.models.build import MODELS, build_on_meta, config_class
from humptygpt.tokenizers import basic as tokenizers
from humptygpt.tokenizers.saved import from_state

FORMAT = "gpt checkpoint 3"  # the number increases whenever the entries change
SHIPPED_CODE = "3b64ed21"  # code_checksum() of model.py as it is in the repository


def save(path: Path, entries: dict) -> None:
    """Write a checkpoint. entries: from Run.state()."""
    write_whole(path, lambda file: torch.save({"format": FORMAT, **entries}, file))


def read(path: Path) -> dict:
    """Load a checkpoint onto the CPU and check what its model needs; whoever uses other entries checks them.

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
    return any(os.path.exists(out_dir / name) for name in ("ckpt.pt", "best.pt"))


# --------------------------------------------------------------------------------------
# Reading a torch.save file: checksums are verified, and code in it is never run


def load_plain(path: Path) -> object:
    """Load a torch.save file onto the CPU. Raises an exception of any type if it is corrupt or would run code.

    Files written by PyTorch before version 1.6 are not zip files and have no checksums.
    """
    if zipfile.is_zipfile(path):
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
        raise UserError(f"no checkpoint {path}; train first, or name the folder of a run with --out_dir")
    problem = "it is truncated or damaged, or holds more than tensors and plain data"
    with refuse_damaged(path, problem):
        return load_plain(path)


def check(path: Path, saved: object) -> tuple[nn.Module, tokenizers.Tokenizer]:
    """Build the model of a checkpoint, still on the meta device, and its tokenizer. Raises UserError if that fails."""
    with refuse_damaged(path):
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}: another program or another version wrote it")
        tokenizer = from_state(saved["tokenizer"])
        settings, training = saved["model_config"], saved["train_config"]
        config = cli.restore(config_class(settings), settings)
        _, learns = MODELS[config.model]
        if saved["task"] not in learns:
            raise ValueError(f"model={config.model} does not support task={saved['task']}")
        check_sizes(config, saved["model"])
    saved["model_config"] = asdict(config)  # with defaults for keys that it predates
    model = build_on_meta(config)
    with refuse_damaged(path):
        if training.get("lora_rank"):
            model = build_on_meta(config, training)
        check_tensors("the parameter ", saved["model"], model.state_dict())
    return model, tokenizer


def check_sizes(config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Raise an exception of any type unless a model of these weights may have these sizes, before it is built."""
    # number_mlp has n_embd=1 and no embedding weights
    sizes = {1}.union(*(x.shape for x in weights.values()))
    layers = config.n_layer * config.n_members
    if None is config.vocab_size or layers > len(weights) or config.n_embd not in sizes:
        raise ValueError(
            f"vocab_size={config.vocab_size}, n_members={config.n_members}, n_layer={config.n_layer} and"
            f" n_embd={config.n_embd} do not match its weights"
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
            raise ValueError(f"{entry}{name} must be a dense, contiguous tensor of {dtype} and shape {tuple(shape)}")


# --------------------------------------------------------------------------------------
# The model


def code_checksum() -> str:
    """Compute the checksum of model.py, which a run records in its config.json."""
    return f"{zlib.crc32(Path(models.__file__).read_bytes()):08x}"


def is_edited() -> bool:
    """True if model.py is not as it is in the repository."""
    return code_checksum() != SHIPPED_CODE


def refuse_edits() -> None:
    """Raise UserError if model.py was edited, so that other programs may compute something else."""
    if is_edited():
        raise UserError(
            "model.py has been edited, so other programs may compute something else; export a folder, whose logits are"
            " compared if transformers is installed: pip install transformers"
        )


def note_edits(out_dir: Path) -> None:
    """Print a note if model.py has changed since a run recorded its checksum."""
    with suppress(OSError, ValueError):
        settings = parse_json((out_dir / "config.json").read_bytes(), {"_model.py": str})
        if settings["_model.py"] != code_checksum():
            note(f"model.py has changed since the run in {out_dir}, whose losses may not hold")
