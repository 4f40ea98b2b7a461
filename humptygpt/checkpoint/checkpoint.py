"""Checkpoints: tensors and plain data, written whole or not at all, and checked when they are read; they run no code.

This module owns their schema. It alone turns a checkpoint into a model.
"""

import os
import shlex
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import model as models
from humptygpt.core import limits
from humptygpt.core import settings as configurator
from humptygpt.core.errors import UserError
from humptygpt.core.files import remove, write_whole
from humptygpt.core.schema import check_schema
from humptygpt.core.settings import REMOVED, nearest_path
from humptygpt.tokenizer import tokenizers

SHARDED = ".metadata"  # the file that makes a folder a sharded checkpoint
FORMAT = "gpt checkpoint 3"  # a change of the schema gets a new number
CONFIG = {str: (int, float, bool, str, None)}
SCALER = dict.fromkeys(("scale", "growth_factor", "backoff_factor"), float)
SCALER |= dict.fromkeys(("growth_interval", "_growth_tracker"), range(2**31))
COUNT = range(2**63)
PROGRESS = dict.fromkeys(("tokens", "best_iter", "evals_since_best"), COUNT) | {"iter": COUNT[1:]}
PROGRESS |= dict.fromkeys(("seconds", "best_val_loss"), float) | {"losses": [float]}
SCHEMA = {
    "format": str,
    "train_config": CONFIG,
    "model_config": CONFIG,
    "tokenizer": dict,  # as from Tokenizer.state()
    "task": str,
    "data": {"source": str, "identity": {str: (int, str)}, "command?": str},
    "progress": PROGRESS,
    "model": {str: Tensor},
    # of ckpt.pt alone: what training needs to resume
    "optimizer?": {"steps": COUNT, "state": {str: {str: Tensor}}},
    "scaler?": (SCALER, None),  # of float16 alone
}


def save(path: Path, entries: dict) -> None:
    """Write a checkpoint; entries: those of SCHEMA but the format."""
    state = {"format": FORMAT, **entries}
    check_schema(state, SCHEMA)
    write_whole(path, lambda file: torch.save(state, file))


def find_checkpoint(out_dir: Path, which: str) -> Path:
    """best.pt or ckpt.pt of a run; the latest one where no evaluation has found a best. Of a checkpoint, itself."""
    if out_dir.suffix == ".pt" or os.path.isfile(out_dir) or is_sharded(out_dir):
        return out_dir
    path = stored(out_dir / {"best": "best.pt", "latest": "ckpt.pt"}[which])
    latest = stored(out_dir / "ckpt.pt")
    if which == "best" and not os.path.exists(path) and os.path.exists(latest):
        path = latest
        print(f"note: there is no best.pt yet; taking {path}", file=sys.stderr)
    return path


def is_sharded(path: Path) -> bool:
    """Whether this is the folder of a sharded checkpoint."""
    return (path / SHARDED).exists()


def stored(path: Path) -> Path:
    """path, such as ckpt.pt, or the folder of a sharded checkpoint instead, such as ckpt: the later of both."""
    folders = (
        path.with_suffix(""),
        path.with_suffix(".old"),
    )  # the second: where a replacement was interrupted
    folder = next(filter(is_sharded, folders), None)
    if path.suffix != ".pt" or folder is None:
        return path
    older = os.path.exists(path) and path.stat().st_mtime > (folder / SHARDED).stat().st_mtime
    return path if older else folder


def remove_sharded(path: Path) -> None:
    """A sharded checkpoint that was there before this one, such as ckpt.pt."""
    for folder in filter(is_sharded, (path.with_suffix(""), path.with_suffix(".old"))):
        remove(folder)


def nearest_run(out_dir: Path) -> str:
    """ "; ..." with a run that was probably meant by a folder without one, or ""."""
    trained = [*out_dir.glob("*/ckpt.pt"), *Path("out", out_dir.name).glob("ckpt.pt")]
    if trained:
        newest = max(trained, key=lambda path: path.stat().st_mtime).parent
        return f"; did you mean {shlex.quote(f'--out_dir={newest}')}?"
    return "" if os.path.exists(out_dir) else nearest_path(str(out_dir))


def restore_model(weights: dict[str, Tensor], config: models.ModelConfig) -> nn.Module:
    """A model of this config on the CPU, whose parameters are these tensors themselves: nothing is in memory twice."""
    model = build_on_meta(config)
    for stack in (module for module in model.modules() if isinstance(module, models.Stack)):
        stack.position = models.POSITIONS[config.position](
            config, stack.causal
        )  # its tables are in no checkpoint
        stack.position.requires_grad_(not config.lora_rank)
    model.load_state_dict(weights, assign=True)
    if config.tie_weights and config.model != "window_mlp":
        model.lm_head.weight = model.wte.weight
    return model


def load(path: Path, with_tensors: bool = True) -> dict:
    """Read a checkpoint onto the CPU and check all of it.

    with_tensors=False: those of a sharded checkpoint are on the meta device instead.
    Raises UserError for a file that is missing, damaged, of another kind, or would run code.
    """
    path = stored(path)
    saved = read(path, with_tensors=with_tensors)
    return check(path, saved, "cpu" if with_tensors or not os.path.isdir(path) else "meta")


def read(path: Path, mapped: bool = False, with_tensors: bool = True) -> object:
    """What is in the file or sharded checkpoint, which may be none of ours. Raises UserError, as load.

    mapped: the tensors of a file stay in it until they are used; they can be changed, but the file does not change.
    """
    if is_sharded(path := stored(path)):
        return read_sharded(path, with_tensors)
    try:
        path.open("rb").close()
    except FileNotFoundError as error:
        command = configurator.as_written_here(
            f"python train.py {shlex.quote(f'--out_dir={path.parent}')}"
        )
        near = nearest_run(path.parent)
        raise UserError(f"no checkpoint {path}{near or f'; train first: {command}'}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        return load_plain(path, mapped)
    except (
        Exception
    ) as error:  # zip, pickle and torch each have errors of their own for a file that is not theirs
        if limits.is_out_of_memory(error):
            raise
        raise UserError(
            f"{path} is not a checkpoint: it is truncated, damaged or holds more than tensors and plain data"
        ) from error


def read_sharded(path: Path, with_tensors: bool) -> dict:
    from humptygpt.checkpoint import (
        sharded as sharded_checkpoint,  # here, since it takes a second to load
    )

    try:
        return sharded_checkpoint.read(path, with_tensors)
    except UserError:
        raise
    except Exception as error:  # as in read()
        if limits.is_out_of_memory(error):
            raise
        raise damaged(path, error) from error


def check(path: Path, saved: object, device: str = "cpu") -> dict:
    """What was read from path, if it is a checkpoint. device: of all tensors."""
    if isinstance(saved, dict) and "model_args" in saved and "format" not in saved:
        way_out = (
            f"train.py, sample.py and export.py start from it: {shlex.quote(f'--init_from={path}')}"
        )
        raise UserError(f"{path} is a checkpoint of nanoGPT; {way_out}")
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a checkpoint of this version; it should say format={FORMAT!r}"
        )
    try:
        check_schema(saved, SCHEMA)
    except ValueError as error:
        raise damaged(path, error) from error
    drop_removed_entries(path, saved)
    try:
        check_content(saved, device)
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        OverflowError,
    ) as error:
        if limits.is_out_of_memory(error):
            raise
        raise damaged(path, error) from error
    return saved


def drop_removed_entries(path: Path, saved: dict) -> None:
    """Take out what earlier versions had besides. Raises UserError for a model that needs it."""
    if ngrams := saved["model_config"].get("ngrams"):
        raise UserError(
            f"{path} has ngrams={ngrams}, which was removed: {REMOVED['ngrams']}; train a new model"
        )
    if saved.pop("ema", None) is not None:
        print(f"note: {path}: taking its latest weights, not their average (EMA)", file=sys.stderr)
    for config in (saved["train_config"], saved["model_config"]):
        for key in REMOVED.keys() & config.keys():
            del config[key]


def load_plain(path: Path, mapped: bool = False, legacy: bool = False) -> object:
    """What torch.save wrote, on the CPU. Raises some Exception where the file is damaged or would run code.

    mapped: the system reads of the tensors what is used. legacy: also read files of PyTorch before 1.6, which are no
    zip files and have no checksums.
    """
    sizes = None
    if not legacy or zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as records:
            whole = records.testzip() is None  # compares the CRC-32 of every record
            # torch.load takes a record marked as a directory for an empty one and leaves its tensor uninitialized
            whole = whole and not any(info.external_attr & 0x10 for info in records.infolist())
            sizes = sorted(
                info.file_size for info in records.infolist() if "/data/" in info.filename
            )
        if not whole:
            raise ValueError("a record is damaged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says more about a foreign pickle than one line
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    if mapped and sizes and storage_sizes(found) != [size for size in sizes if size]:
        raise ValueError(
            "a record has another size than its tensor"
        )  # of which torch would map what follows it
    return found


def storage_sizes(found: object) -> list[int]:
    """Bytes of the storages of all tensors in dictionaries, sorted; empty ones left out."""
    storages, left = {}, [found]
    while left:
        entry = left.pop()
        if isinstance(entry, dict):
            left += entry.values()
        elif isinstance(entry, list | tuple):
            left += entry
        elif isinstance(entry, Tensor):
            storages[entry.untyped_storage().data_ptr()] = entry.untyped_storage().nbytes()
    return sorted(size for size in storages.values() if size)


def lacks_tensors(saved: dict) -> bool:
    """Return whether the tensors of a sharded checkpoint were not read, as load(with_tensors=False) leaves them."""
    return next(iter(saved["model"].values())).is_meta


def damaged(path: Path, error: Exception) -> UserError:
    """One line, whatever the error says: it may quote the file."""
    reason = "".join(char if char.isprintable() else " " for char in str(error))
    return UserError(f"{path} is damaged: {reason}")


def check_content(saved: dict, device: str) -> None:
    """Raise ValueError where the entries, each of the right type, do not fit together."""
    for key, value in saved["train_config"].items():
        if type(value) is str and not value.isprintable():
            raise ValueError(f"{key} must have no control characters")
    config = configurator.restore(models.ModelConfig, saved["model_config"])
    tokenizer, weights = tokenizers.from_state(saved["tokenizer"]), saved["model"]
    if config.vocab_size is None or tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model {config.vocab_size}"
        )
    if saved["task"] not in models.MODELS[config.model].tasks:
        raise ValueError(f"model={config.model} is not for task={saved['task']}")
    n_embd = weights["wte.weight"].shape[-1:] if "wte.weight" in weights else (1,)
    if (
        config.n_layer > len(weights) or (config.n_embd,) != n_embd
    ):  # found before something huge is built
        raise ValueError("model_config does not describe these weights")
    model = build_on_meta(config)
    check_tensors("model", weights, model.state_dict(), device)
    first = {}  # of the names of one parameter
    for name, p in model.named_parameters(remove_duplicate=False):
        same = weights[name] is weights[first.setdefault(p, name)]
        if not same and not torch.equal(weights[name], weights[first[p]]):
            raise ValueError(f"model.{name} must equal model.{first[p]}, to which it is tied")
    progress = saved["progress"]
    if unknown := progress.keys() - PROGRESS.keys():
        raise ValueError(f"progress.{min(unknown)} is unknown")
    seconds, best, *_ = map(
        float, (progress["seconds"], progress["best_val_loss"], *progress["losses"])
    )
    if not (0 <= seconds < 1e9 and best >= 0):
        raise ValueError(f"progress has seconds={seconds} and best_val_loss={best}")


def build_on_meta(config: models.ModelConfig) -> nn.Module:
    """Without memory for its weights."""
    with torch.device("meta"), WithoutValues():
        return models.build(config)


class WithoutValues(TorchFunctionMode):
    """Weights on the meta device are not initialized, and tables of positions are on the CPU.

    Either would make torch load its compiler, for more than a second.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func in (torch.arange, torch.tensor):
            kwargs = kwargs | {"device": "cpu"}
        return func(*args, **kwargs)


def check_tensors(
    entry: str, tensors: dict[str, Tensor], like: dict[str, Tensor], device: str
) -> None:
    """Raise ValueError where names, shapes, dtypes, layouts or devices differ."""
    if tensors.keys() != like.keys():
        name = min(tensors.keys() ^ like.keys())
        raise ValueError(f"{entry}.{name} is {'unknown' if name in tensors else 'missing'}")
    for name, tensor in tensors.items():
        dtype, shape = like[name].dtype, like[name].shape
        dense = (
            tensor.layout == torch.strided
            and tensor.device.type == device
            and tensor.is_contiguous()
        )
        if not dense or (tensor.dtype, tensor.shape) != (dtype, shape):
            raise ValueError(
                f"{entry}.{name} must be a dense tensor of {dtype} and shape {tuple(shape)}"
            )
