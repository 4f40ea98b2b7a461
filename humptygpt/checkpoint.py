"""Checkpoints: tensors and plain data, written whole or not at all, checked when they are read. They never run code.

This module owns their schema, and no other one turns a checkpoint into a model.
"""

import os
import shlex
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from humptygpt import config as configurator
from humptygpt import machine, tokenizers
from humptygpt.config import UserError, nearest_path, note, one_line, refuse
from humptygpt.schema import check_schema
from humptygpt.tasks import build_on_meta, config_class, model_class
from model import GPT, ModelConfig

READ_SHARDED = "humptygpt.parallel.sharded:read"
SHARDED = ".metadata"  # the file that makes a folder a sharded checkpoint
FORMAT = "gpt checkpoint 3"  # a change of the schema gets a new number
CONFIG = {str: (int, float, bool, str, None)}
SCALER = dict.fromkeys(("scale", "growth_factor", "backoff_factor"), float)
SCALER |= dict.fromkeys(("growth_interval", "_growth_tracker"), range(2**31))
COUNT = range(2**63)
PROGRESS = dict.fromkeys(("tokens", "best_iter", "evals_since_best"), COUNT) | {
    "iter": COUNT[1:]
}
PROGRESS |= dict.fromkeys(("seconds", "best_val_loss"), float) | {"losses": [float]}
PROGRESS |= {"position?": float, "run_seconds?": float}  # older checkpoints lack them
SCHEMA = {
    "format": str,
    "train_config": CONFIG,
    "model_config": CONFIG,
    "tokenizer": dict,  # as from Tokenizer.state()
    "task": str,
    "data": {"source": str, "identity": {str: (int, str)}, "command?": str},
    "progress": PROGRESS,
    "model": {str: Tensor},
    # only in ckpt.pt, for resuming
    "optimizer?": {"steps": COUNT, "state": {str: {str: Tensor}}},
    "scaler?": (SCALER, None),  # only with float16
}


def save(path: Path, entries: dict) -> None:
    """Write a checkpoint. entries: all of SCHEMA except the format."""
    from humptygpt.files import remove, write_whole  # here, since most scripts only read

    state = {"format": FORMAT, **entries}
    check_schema(state, SCHEMA)
    write_whole(path, lambda file: torch.save(state, file))
    for folder in sharded_folders(path):  # the checkpoint before this one
        remove(folder)


def read(path: Path, with_tensors: bool = True) -> dict:
    """Return the checked entries of a checkpoint, on the CPU. Whoever resumes has to check the optimizer state.

    with_tensors=False leaves the tensors of a sharded checkpoint unread, on the meta device.
    Raises UserError for a file that is missing, damaged, not a checkpoint, or would run code.
    """
    path = stored(path)
    device = "cpu" if with_tensors or not is_sharded(path) else "meta"
    return check(path, read_plain(path, with_tensors=with_tensors), device)


# --------------------------------------------------------------------------------------
# Paths


def find_checkpoint(out_dir: Path, which: str) -> Path:
    """Return the path of a run's best.pt, or its ckpt.pt if which is "latest" or there is no best.pt yet.

    out_dir: the run's folder; a checkpoint is returned as it is.
    """
    if out_dir.suffix == ".pt" or os.path.isfile(out_dir) or is_sharded(out_dir):
        return out_dir
    best = stored(out_dir / "best.pt")
    latest = stored(out_dir / "ckpt.pt")
    if which == "best":
        if os.path.exists(best) or not os.path.exists(latest):
            return best
        note(f"there is no best.pt yet; taking {latest}")
    return latest


def is_sharded(path: Path) -> bool:
    """True if this is the folder of a sharded checkpoint."""
    return (path / SHARDED).exists()


def sharded_folders(path: Path) -> list[Path]:
    """Return the folders of sharded checkpoints that were saved in place of path, such as ckpt for ckpt.pt."""
    # the second one is there if its replacement was interrupted
    return [*filter(is_sharded, (path.with_suffix(""), path.with_suffix(".old")))]


def stored(path: Path) -> Path:
    """Return path, such as ckpt.pt, or the folder of a sharded checkpoint, such as ckpt, whichever is later."""
    folders = sharded_folders(path)
    if path.suffix != ".pt" or not folders:
        return path
    sharded_at = (folders[0] / SHARDED).stat().st_mtime
    return (
        path if os.path.exists(path) and path.stat().st_mtime > sharded_at else folders[0]
    )


def check_there(path: Path) -> None:
    """Raise UserError if a file cannot be read."""
    try:
        path.open("rb").close()
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint {path}{suggest_run(path.parent)}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def suggest_run(out_dir: Path) -> str:
    """Suggest the run that was probably meant by a folder that has none, or how to train one: "; ..."."""
    runs = [*out_dir.glob("*/ckpt.pt"), *Path("out", out_dir.name).glob("ckpt.pt")]
    if runs:
        newest = max(runs, key=lambda path: path.stat().st_mtime).parent
        return f"; did you mean {shlex.quote(f'--out_dir={newest}')}?"
    command = f"python train.py {shlex.quote(f'--out_dir={out_dir}')}"
    near = "" if os.path.exists(out_dir) else nearest_path(str(out_dir))
    return near or f"; train first: {configurator.as_written_here(command)}"


# --------------------------------------------------------------------------------------
# Reading a file of torch.save: its checksums are checked, and code in it is not run


def load_plain(path: Path, mapped: bool = False, legacy: bool = False) -> object:
    """Return the content of a file of torch.save, on the CPU. Raises an Exception if it is corrupt or would run code.

    mapped: tensors stay in the file until they are used. legacy: also read files of PyTorch before 1.6, which are not
    zip files and have no checksums.
    """
    in_records = not legacy or zipfile.is_zipfile(path)
    sizes = check_records(path) if in_records else []
    with warnings.catch_warnings():
        # torch says more than one line about a foreign pickle
        warnings.simplefilter("ignore")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    # torch would map what follows a record that is too short
    if mapped and in_records and storage_sizes(content) != sizes:
        raise ValueError("a record has another size than its tensor")
    return content


def check_records(path: Path) -> list[int]:
    """Compare all checksums, and return the sizes in bytes of the tensors' records, sorted, without empty ones."""
    with zipfile.ZipFile(path) as file:
        records = file.infolist()
        damaged = file.testzip() is not None
    # torch.load takes a record that is marked as a directory for an empty one, and leaves its tensor uninitialized
    if damaged or any(info.external_attr & 0x10 for info in records):
        raise ValueError("a record is damaged")
    sizes = (info.file_size for info in records if "/data/" in info.filename)
    return sorted(size for size in sizes if size)


def storage_sizes(content: object) -> list[int]:
    """Return the sizes in bytes of the storages of all tensors, sorted, without empty ones."""
    storages = {}
    remaining = [content]
    while remaining:
        entry = remaining.pop()
        if isinstance(entry, dict):
            remaining += entry.values()
        elif isinstance(entry, list | tuple):
            remaining += entry
        elif isinstance(entry, Tensor):
            storage = entry.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sorted(size for size in storages.values() if size)


@contextmanager
def refuse_damaged(path: Path, problem: str = "") -> Iterator[None]:
    """Turn any error of the block into a UserError: zip, pickle and torch raise many kinds for a corrupt file."""
    try:
        yield
    except Exception as error:
        if machine.is_out_of_memory(error):
            raise
        problem = problem or f"is damaged: {one_line(error)}"
        raise UserError(f"{path} {problem}") from error


# --------------------------------------------------------------------------------------
# Checking the content


def read_plain(path: Path, mapped: bool = False, with_tensors: bool = True) -> object:
    """Return the content of a file or of a sharded checkpoint, unchecked. Raises UserError as read() does.

    mapped: tensors stay in the file until they are used. Changing them does not change the file.
    """
    path = stored(path)
    if is_sharded(path):
        return configurator.find(READ_SHARDED)(path, with_tensors)
    check_there(path)
    problem = "is not a checkpoint: it is truncated, damaged or holds more than tensors and plain data"
    with refuse_damaged(path, problem):
        return load_plain(path, mapped)


def check(path: Path, saved: object, device: str = "cpu") -> dict:
    """Check the content of a file, and return its entries. device: where its tensors are. Raises UserError."""
    entries = saved if isinstance(saved, dict) else {}
    if "model_args" in entries:
        source = shlex.quote(f"--init_from={path}")
        raise UserError(f"{path} is a checkpoint of nanoGPT; start from it by {source}")
    if entries.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a checkpoint of this version, whose format is {FORMAT!r}"
        )
    with refuse(f"{path} is damaged: "):
        check_schema(saved, SCHEMA)
    with refuse(f"{path}: "):
        tokens = tokenizers.from_state(saved["tokenizer"]).vocab_size
    modernize(saved)
    with refuse_other_code(path):
        config = check_content(saved, tokens)
    model = build_like(path, config, saved["model"], saved["train_config"])
    with refuse_other_code(path):
        check_weights(saved["model"], model, device)
    return saved


def refuse_other_code(path: Path) -> AbstractContextManager:
    """Turn a ValueError of the block into a UserError: the file is whole, but was written by other code."""
    return refuse(f"{path} was written by other code: ")


def lacks_tensors(saved: dict) -> bool:
    """True if the tensors of a sharded checkpoint are still unread: see read(with_tensors=False)."""
    return next(iter(saved["model"].values())).is_meta


def modernize(saved: dict) -> None:
    """Rename and add settings in a checkpoint of an earlier version."""
    config = saved["model_config"]
    config.setdefault("mlp_conv", 0)
    for key in config.keys() & {"lora_rank", "lora_alpha", "lora_targets"}:
        saved["train_config"][key] = config.pop(key)
    if config.pop("embedding", "table") == "number":
        config["model"] = "number_mlp"


def check_content(saved: dict, tokens: int) -> ModelConfig:
    """Return the model's config. tokens: size of the vocabulary. Raises ValueError or UserError for other code's."""
    for key, value in saved["train_config"].items():
        if type(value) is str and not value.isprintable():
            raise ValueError(f"{key} must have no control characters")
    cls = config_class(saved["model_config"])
    config = configurator.restore(cls, saved["model_config"])
    if config.vocab_size is None or tokens > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokens} tokens, but the model {config.vocab_size}"
        )
    if saved["task"] not in model_class(config.model).tasks:
        raise ValueError(f"model={config.model} is not for task={saved['task']}")
    progress = saved["progress"]
    if unknown := progress.keys() - {key.rstrip("?") for key in PROGRESS}:
        raise ValueError(f"it has progress.{min(unknown)}, which this code lacks")
    for key in ("seconds", "run_seconds", "position"):
        if not 0 <= progress.get(key, 0) < 1e9:
            raise ValueError(f"progress has {key}={progress[key]}")
    if not progress["best_val_loss"] >= 0:
        raise ValueError(f"progress has best_val_loss={progress['best_val_loss']}")
    return config


def build_like(
    what: object,
    config: ModelConfig,
    weights: dict[str, Tensor],
    training: dict | None = None,
) -> nn.Module:
    """Build the model of a file on the meta device. what: the file. training: as in build_on_meta().

    Raises UserError for absurd sizes, before something huge is built. An error in a model's own code passes.
    """
    shapes = [x.shape for x in weights.values() if not x.is_nested]
    sizes = {1}.union(*shapes)  # 1: a model of numbers has no embedding
    try:
        if config.n_layer <= len(weights) and config.n_embd in sizes:
            return build_on_meta(config, training)
    except RuntimeError as error:
        if "overflow" not in str(error):  # torch's, for a tensor with too many elements
            raise
    raise UserError(
        f"cannot read {what}: n_layer={config.n_layer} and n_embd={config.n_embd} do not describe its weights"
    )


def check_weights(weights: dict[str, Tensor], model: nn.Module, device: str) -> None:
    """Raise ValueError unless these are the weights of this model."""
    check_tensors("the parameter ", weights, model.state_dict(), device)
    first_names: dict[nn.Parameter, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(p, name)
        same = weights[name] is weights[first]
        if not same and not torch.equal(weights[name], weights[first]):
            raise ValueError(f"{name} must equal {first}, to which it is tied")


def check_tensors(
    entry: str, tensors: dict[str, Tensor], like: dict[str, Tensor], device: str
) -> None:
    """Raise ValueError if names, shapes, dtypes, layouts or devices differ. entry: goes before a name."""
    if unknown := tensors.keys() - like.keys():
        raise ValueError(f"it has {entry}{min(unknown)}, which this code lacks")
    if missing := like.keys() - tensors.keys():
        raise ValueError(f"it lacks {entry}{min(missing)}, which this code has")
    for name, tensor in tensors.items():
        strided = tensor.layout == torch.strided and not tensor.is_nested
        dense = strided and tensor.is_contiguous()
        expected = (device, like[name].dtype, like[name].shape)
        if not dense or (tensor.device.type, tensor.dtype, tensor.shape) != expected:
            raise ValueError(
                f"{entry}{name} must be a dense tensor of {expected[1]} and shape {tuple(expected[2])}"
            )


# --------------------------------------------------------------------------------------
# The model


def restore_model(
    weights: dict[str, Tensor], config: ModelConfig, training: dict | None = None
) -> nn.Module:
    """Return a model on the CPU whose parameters are these very tensors, so that nothing is in memory twice.

    training: as in build_on_meta().
    """
    model = build_on_meta(config, training)
    model.load_state_dict(weights, assign=True)
    if config.tie_weights and isinstance(model, GPT):
        model.lm_head.weight = model.wte.weight
    return model
