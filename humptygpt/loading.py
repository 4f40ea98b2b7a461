"""The one door to every model: a run, nanoGPT's ckpt.pt, Hugging Face's format, its hub, an adapter of PEFT."""

import math
import os
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from torch import nn

from humptygpt import checkpoint, tokenizers
from humptygpt.config import (
    UserError,
    as_written_here,
    nearest_path,
    note,
    our_configs,
)
from humptygpt.convert import adapters, hub, huggingface
from humptygpt.convert.families import GPT2
from humptygpt.convert.read_huggingface import read_tokenizer, tokenizer_file
from humptygpt.convert.weight_files import check_dense, reading
from humptygpt.schema import check_schema
from humptygpt.tasks import find, make_model_config
from humptygpt.token_files import GPT2_TOKENS, read_nanogpt_meta
from humptygpt.tokenizers import Tokenizer
from model import ModelConfig

FILES_OF_A_FOLDER = (".safetensors", ".bin", ".json", ".gguf")
MODEL_ARGS = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size"), int)
NANOGPT = {
    "model_args": MODEL_ARGS | {"bias?": bool},
    "config?": {"dataset?": str},
}
# its matrices are (outputs, inputs), as ours
NANOGPT_FAMILY = GPT2._replace(transposed=False)


class Loaded(NamedTuple):
    model: nn.Module  # float32, on the CPU, in evaluation mode, LoRA merged
    tokenizer: Tokenizer
    path: Path  # the checkpoint or the folder that was read
    description: str  # in one line
    task: str = "language modelling"
    saved: dict | None = None  # the entries of a run's checkpoint: see checkpoint.SCHEMA


def load(source: str | Path, which: str = "best", mapped: bool = False) -> Loaded:
    """Load the model that init_from=source means; which: best or latest, of a run. Raises UserError.

    mapped: weights of a run stay in its file until they are used. Nothing is in memory twice in any case.
    """
    path = find_source(source, which)
    if is_adapter(path):
        loaded = from_adapter(path)
    elif is_folder(path):
        loaded = from_folder(path, source)
    else:
        saved = checkpoint.read_plain(path, mapped)
        loaded = from_nanogpt(path, saved) if is_nanogpt(saved) else from_run(path, saved)
    loaded.model.eval()
    tokens, rows = loaded.tokenizer.vocab_size, loaded.model.config.vocab_size
    if tokens > rows:
        raise UserError(
            f"the tokenizer in {path} has {tokens:,} tokens, but the model only {rows:,};"
            " take the tokenizer that belongs to it"
        )
    return loaded


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load the tokenizer that tokenizer=source means, without the weights beside it. Raises UserError."""
    if tokenizer_file(Path(source)):
        return read_tokenizer(Path(source))
    path = find_source(source, key="tokenizer")
    if is_adapter(path):
        return load_tokenizer(find_base(path))
    if is_folder(path):
        return read_tokenizer(path)
    saved = checkpoint.read_plain(path, mapped=sys.platform == "linux")
    if is_nanogpt(saved):
        return nanogpt_tokenizer(path, saved)
    return tokenizers.from_state(checkpoint.check(path, saved)["tokenizer"])


# --------------------------------------------------------------------------------------
# Where it is


def chosen_source(config: object, given: dict) -> str | Path:
    """Return what init_from, out_dir and checkpoint of a config name together; given: the keys that the user set."""
    if config.init_from == "resume":
        return checkpoint.find_checkpoint(Path(config.out_dir), config.checkpoint)
    if "out_dir" in given:
        note(f"out_dir={config.out_dir} has no effect with init_from={config.init_from}")
    return config.init_from


def find_source(source: str | Path, which: str = "best", key: str = "init_from") -> Path:
    """Return the checkpoint or folder that key=source stands for; a model of the hub is fetched. Raises UserError."""
    path = Path(os.path.expanduser(source))  # noqa: PTH111, which loses the end of "folder/"
    if os.path.isdir(path):
        files = (
            checkpoint.stored(path / name)
            for name in ("best.pt", "ckpt.pt", "metrics.jsonl")
        )
        return (
            checkpoint.find_checkpoint(path, which)
            if any(map(os.path.exists, files))
            else path
        )
    if path.suffix in FILES_OF_A_FOLDER:
        raise UserError(
            f"{key}={source} is no model by itself; name its folder, which also has config.json"
        )
    if os.path.isfile(path) or path.suffix == ".pt":
        return path  # reading it reports a file that is missing
    if repo := hub.repository(str(source)):
        if key == "tokenizer":
            return hub.fetch_tokenizer(repo)
        return hub.fetch_model(repo)
    run = Path("out", source)
    near = f"; did you mean {run}?" if os.path.isdir(run) else nearest_path(str(source))
    if not near and (config := our_configs().get(str(source))):
        command = as_written_here(f"python train.py {shlex.quote(config)}")
        near = f"; train it first: {command} --out_dir={run}"
    raise UserError(f"{key}={source}: there is no such file or folder{near}")


def find_base(adapter: Path) -> Path:
    """Return where the model is that an adapter was trained beside. Raises UserError."""
    key = "base_model_name_or_path"
    name = adapters.read_config(adapter)[key]
    base = find_source(name, key=f"{adapter / adapters.CONFIG}: {key}")
    if is_adapter(base):
        raise UserError(
            f"the base model of the adapter {adapter} is an adapter, too: {name}; merge that one first"
        )
    return base


def is_adapter(folder: Path) -> bool:
    return (folder / adapters.CONFIG).is_file()


def is_folder(path: Path) -> bool:
    """Whether it is a folder in Hugging Face's format."""
    return os.path.isdir(path) and not checkpoint.is_sharded(path)


# --------------------------------------------------------------------------------------
# One function a format


def from_run(path: Path, saved: object) -> Loaded:
    saved = checkpoint.check(path, saved)
    config = make_model_config(saved["model_config"])
    training = saved["train_config"]
    model = checkpoint.restore_model(saved["model"], config, training)
    if training.get("lora_rank"):
        model = find("humptygpt.finetune.lora:merge")(model)
    progress = saved["progress"]
    loss = progress["best_val_loss"]
    best = f"best val loss {loss:.4f}" if loss < math.inf else "not evaluated yet"
    return Loaded(
        model=model,
        tokenizer=tokenizers.from_state(saved["tokenizer"]),
        task=saved["task"],
        path=path,
        description=f"{path}: iter {progress['iter']}, {best}",
        saved=saved,
    )


def from_folder(path: Path, source: str | Path) -> Loaded:
    config, weights = huggingface.read_pretrained(path)
    model = checkpoint.restore_model(weights, config)
    return Loaded(model, read_tokenizer(path), path, f"{source}")


def from_adapter(path: Path) -> Loaded:
    """Return the model that an adapter in PEFT's format was trained beside, with its matrices merged."""
    base = load(find_base(path))
    config = base.model.config
    weights = adapters.merge_adapter(path, config, base.model.state_dict())
    model = checkpoint.restore_model(weights, config)
    return Loaded(
        model, base.tokenizer, path, f"{path}: an adapter of {base.path}", base.task
    )


def is_nanogpt(saved: object) -> bool:
    return isinstance(saved, dict) and "model_args" in saved and "format" not in saved


def from_nanogpt(path: Path, saved: dict) -> Loaded:
    with reading(path):
        check_dense(saved.get("model"), path.name)
        check_schema(saved, NANOGPT)
        args = {"bias": True} | saved["model_args"]
        sizes = {key: args[key] for key in ("bias", *MODEL_ARGS)}
        config = ModelConfig(
            **GPT2.fixed | {"activation": "gelu", "tie_weights": True} | sizes
        )
        config.validate()
    # the names of a compiled model have a prefix
    weights = {name.removeprefix("_orig_mod."): x for name, x in saved["model"].items()}
    like = checkpoint.build_like(path, config, weights).state_dict()
    with reading(path):
        weights = huggingface.read_weights(NANOGPT_FAMILY, config, weights, like)
    model = checkpoint.restore_model(weights, config)
    return Loaded(model, nanogpt_tokenizer(path, saved), path, f"nanoGPT's {path}")


def nanogpt_tokenizer(path: Path, saved: dict) -> Tokenizer:
    """Read the dataset's meta.pkl, in data/ here or beside the folder of the run; without one, take GPT-2's tokens."""
    dataset = (saved.get("config") or {}).get("dataset", "")
    folders = (Path(), path.absolute().parent.parent)
    metas = [folder / "data" / Path(dataset).name / "meta.pkl" for folder in folders]
    for meta in metas:
        if meta.is_file():
            return tokenizers.from_state(read_nanogpt_meta(meta)["tokenizer"])
    if saved["model_args"]["vocab_size"] < GPT2_TOKENS:
        missing = " and no ".join(map(str, metas))
        raise UserError(
            f"{path} needs the characters of its data set: there is no {missing}"
        )
    return tokenizers.GPT2Tokenizer.train(separated=True)
