"""Load a model, its tokenizer and its task from any source. convert/ reads the formats of other programs."""

import math
import os
import sys
import zlib
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import model as models
from humptygpt import checkpoint
from humptygpt.cli import UserError, note
from humptygpt.device import DTYPES, pick_device, pick_dtype
from humptygpt.files import parse_json, refuse_damaged
from humptygpt.source import ModelSource
from humptygpt.tokenizers import Tokenizer

FILES_OF_A_FOLDER = (".safetensors", ".bin", ".json", ".gguf")
# [(key, another setting, the values of that setting for which the key has no effect)]
IN_VAIN = [("dtype", "quantize", ("int8",))]


class Loaded(NamedTuple):
    model: nn.Module  # float32, on the CPU, in evaluation mode, LoRA merged
    tokenizer: Tokenizer
    path: Path  # the checkpoint or the folder that was read
    description: str  # one line for the user
    task: str = "language modelling"
    saved: dict | None = None  # the entries of a run's checkpoint: see Run.state()
    questions: tuple | list = ()  # examples of what a chat model can be asked


class Pipeline(NamedTuple):
    """A trained model, ready for generation, with its tokenizer, task and device."""

    model: nn.Module
    tokenizer: Tokenizer
    task: str
    device: torch.device
    questions: tuple | list = ()  # as in Loaded


def load(source: str | Path, which: str = "best") -> Loaded:
    """Load the model that init_from=source names. No weight is in memory twice.

    which: best or latest, the checkpoint to load if source is a run. Raises UserError if loading fails.
    """
    path = find_source(source, which)
    if os.path.isdir(path):
        from humptygpt.convert.sources import from_folder

        loaded = from_folder(path, source)
    elif checkpoint.is_nanogpt(saved := checkpoint.read_plain(path)):
        from humptygpt.convert.sources import from_nanogpt

        loaded = from_nanogpt(path, saved)
    else:
        loaded = from_run(path, saved)
    loaded.model.eval()
    if not is_finite(loaded.model):
        raise UserError(
            f"{path} has weights that are not finite: did its training diverge?"
        )
    tokens, rows = loaded.tokenizer.vocab_size, loaded.model.config.vocab_size
    if tokens > rows:
        raise UserError(
            f"the tokenizer in {path} has {tokens:,} tokens, but the model has only {rows:,};"
            " use the tokenizer that belongs to the model"
        )
    return loaded


def is_finite(model: nn.Module) -> bool:
    """True unless a weight is nan or infinite."""
    return all(p.isfinite().all() for p in model.parameters())


def from_run(path: Path, saved: object) -> Loaded:
    """Make a model from the checkpoint of a run. Raises UserError if the checkpoint is not valid."""
    model, tokenizer = checkpoint.check(path, saved)
    checkpoint.restore_model(model, saved["model"])
    if saved["train_config"].get("lora_rank"):
        from humptygpt.finetune.lora import merge

        model = merge(model)
    note_edits(path.parent)
    with refuse_damaged(path):
        steps, loss = saved["progress"]["iter"], saved["progress"]["best_val_loss"]
        best = f"best val loss {loss:.4f}" if loss < math.inf else "not evaluated yet"
        description = f"{path}: iter {steps:d}, {best}"
        questions = [*map(str, saved["data"].get("questions", ()))]
        return Loaded(model, tokenizer, path, description, saved["task"], saved, questions)


def code_checksum() -> str:
    """Compute the checksum of model.py, which a run records in its config.json."""
    return f"{zlib.crc32(Path(models.__file__).read_bytes()):08x}"


def note_edits(out_dir: Path) -> None:
    """Print a note if model.py has changed since a run recorded its checksum."""
    with suppress(OSError, ValueError):
        settings = parse_json((out_dir / "config.json").read_bytes(), {"_model.py": str})
        if settings["_model.py"] != code_checksum():
            note(
                f"model.py has changed since the run in {out_dir}, whose losses may not hold"
            )


# --------------------------------------------------------------------------------------
# Generation


@dataclass(frozen=True)
class PipelineConfig(ModelSource):
    """A model, and how it is prepared for generation."""

    # system
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # dtype of the linear layers; auto: float32 on a CPU
    quantize: str | None = None  # int8: 8-bit weights, CPU only; None: off

    @classmethod
    def choices(cls) -> dict[str, Collection[str]]:
        return super().choices() | {"dtype": ("auto", *DTYPES), "quantize": ("int8",)}

    def pipeline(self, source: str | Path) -> Pipeline:
        """Load the model that init_from=source names, and prepare it for generation.

        Raises UserError if it is missing, damaged or not supported.
        """
        from humptygpt.fast.generation import make_generator

        device = pick_device(self.device)
        dtype = torch.int8 if self.quantize else pick_dtype(self.dtype, device)
        loaded = load(source, self.checkpoint)
        print(loaded.description, file=sys.stderr)
        model = make_generator(loaded.model, dtype, device)
        return Pipeline(model, loaded.tokenizer, loaded.task, device, loaded.questions)


# --------------------------------------------------------------------------------------
# Finding a model


def chosen_source(config: ModelSource, given: dict) -> str | Path:
    """Find the source that the settings name. given: the keys that the user set."""
    if config.init_from == "resume":
        return checkpoint.find_checkpoint(Path(config.out_dir), config.checkpoint)
    if "out_dir" in given:
        note(f"out_dir={config.out_dir} has no effect with init_from={config.init_from}")
    return config.init_from


def find_source(source: str | Path, which: str = "best", key: str = "init_from") -> Path:
    """Find the checkpoint or folder that key=source names, or fetch it from the Hugging Face Hub.

    Raises UserError if it cannot be found or fetched.
    """
    path = Path(source)
    if os.path.isdir(path):
        if checkpoint.has_checkpoint(path) or os.path.exists(path / "metrics.jsonl"):
            return checkpoint.find_checkpoint(path, which)
        return path
    if path.suffix in FILES_OF_A_FOLDER:
        raise UserError(
            f"{key}={source} is not a complete model; name the folder that contains it and config.json"
        )
    if os.path.isfile(path) or path.suffix == ".pt":
        return path  # a missing file is reported when it is read
    from humptygpt.convert import hub

    if repo := hub.repository(str(source)):
        return hub.fetch(repo) if key == "tokenizer" else hub.fetch_model(repo)
    raise UserError(f"{key}={source}: there is no such file or folder")
