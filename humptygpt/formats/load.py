"""Load a model, its tokenizer and its task from any source: one function for each format.

To add a format, write a function that returns Loaded, and let load() call it.
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

from torch import nn

from humptygpt import sources
from humptygpt.cli import UserError
from humptygpt.files import refuse_damaged
from humptygpt.formats import checkpoint
from humptygpt.models.build import build_on_meta, is_finite, restore_model
from humptygpt.tokenizers.basic import Tokenizer

FILES_OF_A_FOLDER = (".safetensors", ".bin", ".json", ".model", ".gguf")


class Loaded(NamedTuple):
    model: nn.Module  # float32, on the CPU, in evaluation mode, LoRA merged
    tokenizer: Tokenizer
    path: Path  # the checkpoint or the folder that was read
    description: str  # one line for the user
    task: str = "language modelling"
    saved: dict | None = None  # the entries of a run's checkpoint: see Run.state()
    questions: tuple | list = ()  # examples of what a chat model can be asked


def load(source: str | Path, which: str = "best") -> Loaded:
    """Load the model that init_from=source names. No weight is in memory twice.

    which: best or latest, the checkpoint to load if source is a run. Raises UserError if loading fails.
    """
    path = find_source(source, which)
    is_folder = os.path.isdir(path)
    loaded = from_folder(path, source) if is_folder else from_checkpoint(path)
    loaded.model.eval()
    if not is_finite(loaded.model):
        raise UserError(f"{path} has weights that are not finite: did its training diverge?")
    tokens, rows = loaded.tokenizer.vocab_size, loaded.model.config.vocab_size
    if tokens > rows:
        raise UserError(
            f"the tokenizer in {path} has {tokens:,} tokens, but the model has only {rows:,};"
            " use the tokenizer that belongs to the model"
        )
    return loaded


def from_checkpoint(path: Path) -> Loaded:
    """Make a model from the checkpoint of a run. Raises UserError if it is not valid."""
    saved = checkpoint.read_plain(path)
    model, tokenizer = checkpoint.check(path, saved)
    restore_model(model, saved["model"])
    if saved["train_config"].get("lora_rank"):
        from humptygpt.models.lora import merged_state

        model = restore_model(build_on_meta(model.config), merged_state(model))
    checkpoint.note_edits(path.parent)
    with refuse_damaged(path):
        steps, loss = saved["progress"]["iter"], saved["progress"]["best_val_loss"]
        best = f"best val loss {loss:.4f}" if loss < math.inf else "not evaluated yet"
        description = f"{path}: iter {steps:d}, {best}"
        questions = [*map(str, saved["data"].get("questions", ()))]
        return Loaded(model, tokenizer, path, description, saved["task"], saved, questions)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load the tokenizer that --tokenizer names. Raises UserError if this fails.

    The weights of a model in Hugging Face's format are not needed.
    """
    from humptygpt.tokenizers.huggingface import read_tokenizer, tokenizer_file

    path = Path(source)
    if not tokenizer_file(path).is_file():
        path = find_source(source, key="tokenizer")
        if not path.is_dir():
            return load(path).tokenizer
    return read_tokenizer(path)


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
        raise UserError(f"{key}={source} is not a complete model; name the folder that contains it and config.json")
    if os.path.isfile(path) or path.suffix == ".pt":
        return path  # a missing file is reported when it is read
    if repo := sources.repository(str(source)):
        if key == "tokenizer":
            return sources.fetch(repo)
        from humptygpt.formats.huggingface import read_config

        return sources.fetch_model(repo, read_config)
    raise UserError(f"{key}={source}: there is no such file or folder")


def from_folder(path: Path, source: str | Path) -> Loaded:
    """Load a model from a folder in Hugging Face's format."""
    from humptygpt.formats.huggingface import read_pretrained
    from humptygpt.tokenizers.huggingface import read_tokenizer

    model, tokenizer = read_pretrained(path), read_tokenizer(path)
    task = "chat" if tokenizer.name == "chat" else "language modelling"
    return Loaded(model, tokenizer, path, f"{source}", task)
