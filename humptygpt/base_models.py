"""A model to start from -> config, weights and tokenizer: a run of ours, nanoGPT's ckpt.pt, or Hugging Face's format.

This is what init_from names, in train.py and sample.py, and what --tokenizer=PATH may name in prepare_data.py.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from humptygpt import checkpoint, hub, lora, pretrained
from humptygpt import tokenizer as tokenizers
from humptygpt.configurator import UserError, make, nearest_path
from humptygpt.families import GPT2
from humptygpt.schema import check_schema
from humptygpt.token_files import GPT2_TOKENS, read_nanogpt_meta
from humptygpt.tokenizer import Tokenizer
from humptygpt.tokenizer_files import read_tokenizer
from humptygpt.weight_files import store
from model import ModelConfig

SIZE = range(1, 2**20 + 1)
MODEL_ARGS = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size"), SIZE) | {"bias?": bool}
NANOGPT = {"model": dict, "model_args": MODEL_ARGS, "config?": {"dataset?": str}}
# its linear layers are (outputs, inputs), as ours; GPT-2's own are the other way round
NANOGPT_FAMILY = GPT2._replace(weights=[(theirs, ours, "same") for theirs, ours, _ in GPT2.weights])


class BaseModel(NamedTuple):
    path: Path
    config: ModelConfig
    weights: dict[str, Tensor]  # the state dict, in float32 on the CPU
    tokenizer: Tokenizer
    task: str
    description: str


def load_base(name: str, which: str = "best") -> BaseModel:
    """The model that init_from=name means; which: best or latest, of a run. Raises UserError."""
    path = find_base(name, which)
    if path.is_dir() and not (path / checkpoint.SHARDED).exists():
        config, weights = pretrained.read_pretrained(path)
        tokenizer = read_tokenizer(path)
        base = BaseModel(path, config, weights, tokenizer, "language modelling", f"{path}")
    else:
        saved = checkpoint.read(path)
        base = from_nanogpt(path, saved) if is_nanogpt(saved) else from_run(path, saved)
    if (tokens := base.tokenizer.vocab_size) > base.config.vocab_size:
        problem = f"the tokenizer in {path} has {tokens:,} tokens, but the model only {base.config.vocab_size:,}"
        raise UserError(f"{problem}; take the tokenizer that belongs to it")
    return base


def find_base(name: str, which: str = "best") -> Path:
    """The folder in Hugging Face's format, or the checkpoint, that a name stands for. Raises UserError."""
    path = Path(os.path.expanduser(name))  # noqa: PTH111, which loses the end of "folder/", as in configurator.py
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        if repo := hub.repository(name):
            return hub.fetch_model(repo, pretrained.check_supported)
        raise UserError(f"init_from={name}: there is no such file or folder{nearest_path(name)}")
    if (path / checkpoint.SHARDED).exists():
        return path
    names = ("best.pt", "ckpt.pt") if which == "best" else ("ckpt.pt",)
    for file in names:
        if os.path.exists(found := checkpoint.stored(path / file)):
            return found
    weights = ("config.json", "model.safetensors", "pytorch_model.bin")
    if any(os.path.exists(path / file) for file in weights):
        return path
    raise UserError(f"init_from={name} holds no model: neither {' nor '.join(names)}, nor config.json and weights")


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a run or of a nanoGPT checkpoint. Raises UserError."""
    path = find_base(str(path))
    if path.is_dir() and not (path / checkpoint.SHARDED).exists():
        return read_tokenizer(path)
    saved = checkpoint.read(path, mapped=sys.platform == "linux")
    if is_nanogpt(saved):
        return nanogpt_tokenizer(path, saved)
    return tokenizers.from_state(checkpoint.check(path, saved)["tokenizer"])


# --------------------------------------------------------------------------------------
# Checkpoints


def from_run(path: Path, saved: object) -> BaseModel:
    saved = checkpoint.check(path, saved)
    config, progress = make(ModelConfig, saved["model_config"]), saved["progress"]
    weights = saved["model"] | (saved.get("ema") or {})
    if config.lora_rank:
        config, weights = lora.merged_state(checkpoint.restore_model(weights, config))
    description = f"{path}: iter {progress['iter']}, best val loss {progress['best_val_loss']:.4f}"
    return BaseModel(path, config, weights, tokenizers.from_state(saved["tokenizer"]), saved["task"], description)


def is_nanogpt(saved: object) -> bool:
    return isinstance(saved, dict) and "model_args" in saved and "format" not in saved


def from_nanogpt(path: Path, saved: dict) -> BaseModel:
    try:
        weights = saved.get("model")
        check_schema(saved | {"model": dict(weights) if isinstance(weights, dict) else None}, NANOGPT)
        args = {key.removesuffix("?"): saved["model_args"].get(key.removesuffix("?"), True) for key in MODEL_ARGS}
        config = ModelConfig(**GPT2.fixed | {"activation": "gelu"} | args)
        # the names of a compiled model have a prefix
        weights = {name.removeprefix("_orig_mod."): x for name, x in weights.items()}
        weights = pretrained.read_stored(NANOGPT_FAMILY, config, store(weights, path.name))
    except (ValueError, AttributeError, OverflowError) as error:  # AttributeError: a name that is no string
        raise checkpoint.damaged(path, error) from error
    return BaseModel(path, config, weights, nanogpt_tokenizer(path, saved), "language modelling", f"{path}: nanoGPT's")


def nanogpt_tokenizer(path: Path, saved: dict) -> Tokenizer:
    """Of the dataset's meta.pkl, in data/ here or beside the folder of the run; without one, GPT-2's tokens."""
    dataset = (saved.get("config") or {}).get("dataset", "")
    metas = [folder / "data" / Path(dataset).name / "meta.pkl" for folder in (Path(), path.absolute().parent.parent)]
    found = next((meta for meta in metas if dataset and meta.is_file()), None)
    if found:
        return tokenizers.from_state(read_nanogpt_meta(found)["tokenizer"])
    if saved["model_args"]["vocab_size"] < GPT2_TOKENS:
        raise UserError(f"{path} needs the characters of its data set: there is no {' and no '.join(map(str, metas))}")
    return tokenizers.GPT2Tokenizer.train(separated=True)
