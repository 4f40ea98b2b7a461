"""A model -> its config, weights and tokenizer: a run, nanoGPT's ckpt.pt, Hugging Face's format, an adapter of PEFT.

This is what init_from names, and what --tokenizer=PATH may name in prepare_data.py.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from humptygpt.checkpoint import checkpoint
from humptygpt.core.errors import UserError
from humptygpt.core.schema import check_schema
from humptygpt.core.settings import make, nearest_path
from humptygpt.data.token_files import GPT2_TOKENS, read_nanogpt_meta
from humptygpt.interchange import adapters, hub
from humptygpt.interchange import huggingface as pretrained
from humptygpt.interchange.families import GPT2
from humptygpt.interchange.weight_files import FORMATS, store
from humptygpt.nn import lora
from humptygpt.tokenizer import tokenizers
from humptygpt.tokenizer.read_huggingface import read_tokenizer
from humptygpt.tokenizer.tokenizers import Tokenizer
from model import ModelConfig

SIZE = range(1, 2**20 + 1)
MODEL_ARGS = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size"), SIZE) | {
    "bias?": bool
}
NANOGPT = {"model": dict, "model_args": MODEL_ARGS, "config?": {"dataset?": str}}
# its linear layers are (outputs, inputs), as ours; GPT-2's own are the other way round
NANOGPT_FAMILY = GPT2._replace(weights=[(theirs, ours, "same") for theirs, ours, _ in GPT2.weights])


class BaseModel(NamedTuple):
    path: Path
    config: ModelConfig
    weights: dict[str, Tensor]  # the state dict, in float32 on the CPU
    tokenizer: Tokenizer
    description: str
    task: str = "language modelling"
    saved: dict | None = None  # of a run, its checkpoint: see checkpoint.SCHEMA
    mapped: bool = False  # whether all weights are in the mapped file


def load_base(name: str | Path, which: str = "best", mapped: bool = False) -> BaseModel:
    """The model that init_from=name means; which: best or latest, of a run. Raises UserError.

    mapped: weights of a run stay in the file until they are used, as in checkpoint.read.
    """
    path = find_base(name, which)
    if path.is_dir() and path.suffix != ".pt" and not checkpoint.is_sharded(path):
        base = from_adapter(path) if adapters.is_adapter(path) else from_folder(path)
    else:
        saved = checkpoint.read(path, mapped)
        base = from_nanogpt(path, saved) if is_nanogpt(saved) else from_run(path, saved, mapped)
    if (tokens := base.tokenizer.vocab_size) > base.config.vocab_size:
        problem = f"the tokenizer in {path} has {tokens:,} tokens, but the model only {base.config.vocab_size:,}"
        raise UserError(f"{problem}; take the tokenizer that belongs to it")
    return base


def chosen_model(config: object, given: dict) -> str | Path:
    """What init_from, out_dir and checkpoint of a config name together; given: the keys that the user set."""
    if config.init_from == "resume":
        if is_pretrained(Path(config.out_dir)):
            way_out = shlex.quote(f"--init_from={config.out_dir}")
            raise UserError(
                f"out_dir={config.out_dir} is no run, but a model's folder; write {way_out}"
            )
        return checkpoint.find_checkpoint(Path(config.out_dir), config.checkpoint)
    if "out_dir" in given:
        print(
            f"note: out_dir={config.out_dir} has no effect with init_from={config.init_from}",
            file=sys.stderr,
        )
    return config.init_from


def find_base(name: str | Path, which: str = "best", key: str = "init_from") -> Path:
    """The checkpoint, or the folder in Hugging Face's or PEFT's format, that key=name stands for. Raises UserError."""
    path = Path(os.path.expanduser(name))  # noqa: PTH111, which loses the end of "folder/", as in configurator.py
    if os.path.isfile(path) and path.suffix in (".safetensors", ".bin", ".json", ".gguf"):
        kind = (
            "for llama.cpp alone"
            if path.suffix == ".gguf"
            else "one file of a model; name its folder"
        )
        raise UserError(f"{key}={name} is {kind}")
    if os.path.isfile(path) or path.suffix == ".pt":  # reading it says where it is missing
        return path
    if not os.path.isdir(path):
        if repo := hub.repository(str(name)):
            return hub.fetch_model(repo, pretrained.check_supported)
        raise UserError(f"{key}={name}: there is no such file or folder{nearest_path(str(name))}")
    if checkpoint.is_sharded(path):
        return path
    if any(
        os.path.exists(checkpoint.stored(path / file))
        for file in ("best.pt", "ckpt.pt", "metrics.jsonl")
    ):
        return checkpoint.find_checkpoint(path, which)
    if is_pretrained(path) or os.path.exists(path / "config.json"):
        return path
    raise UserError(
        f"{key}={name} holds no model: neither best.pt nor ckpt.pt, nor config.json and weights"
    )


def is_pretrained(path: Path) -> bool:
    """Whether it is a folder with weights or an adapter in Hugging Face's format."""
    files = (adapters.CONFIG, *FORMATS, *(f"{name}.index.json" for name in FORMATS))
    return any(os.path.exists(path / file) for file in files)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of the model that tokenizer=name means. Raises UserError."""
    path = find_base(name, key="tokenizer")
    if path.is_dir() and not checkpoint.is_sharded(path):
        return (
            load_tokenizer(adapters.base_of(path))
            if adapters.is_adapter(path)
            else read_tokenizer(path)
        )
    saved = checkpoint.read(path, mapped=sys.platform == "linux")
    if is_nanogpt(saved):
        return nanogpt_tokenizer(path, saved)
    return tokenizers.from_state(checkpoint.check(path, saved)["tokenizer"])


def from_folder(path: Path) -> BaseModel:
    return BaseModel(path, *pretrained.read_pretrained(path), read_tokenizer(path), f"{path}")


def from_adapter(path: Path) -> BaseModel:
    """The model that an adapter in PEFT's format was trained beside, with its matrices merged."""
    name = adapters.base_of(path)
    found = find_base(name, key=f"{path / adapters.CONFIG}: base_model_name_or_path")
    if adapters.is_adapter(found):
        raise UserError(
            f"the base model of the adapter {path} is an adapter, too: {name}; merge that one first"
        )
    base = load_base(found)
    weights = adapters.merge_adapter(path, base.config, base.weights)
    return base._replace(
        path=path,
        weights=weights,
        description=f"{path}: an adapter of {base.path}",
        saved=None,
        mapped=False,
    )


# --------------------------------------------------------------------------------------
# Checkpoints


def from_run(path: Path, saved: object, mapped: bool = False) -> BaseModel:
    saved = checkpoint.check(path, saved)
    config, progress = make(ModelConfig, saved["model_config"]), saved["progress"]
    weights = saved["model"] | (saved.get("ema") or {})
    if config.lora_rank:
        config, weights = lora.merged_state(checkpoint.restore_model(weights, config))
        mapped = False
    description = f"{path}: iter {progress['iter']}, best val loss {progress['best_val_loss']:.4f}"
    tokenizer = tokenizers.from_state(saved["tokenizer"])
    return BaseModel(path, config, weights, tokenizer, description, saved["task"], saved, mapped)


def is_nanogpt(saved: object) -> bool:
    return isinstance(saved, dict) and "model_args" in saved and "format" not in saved


def from_nanogpt(path: Path, saved: dict) -> BaseModel:
    try:
        weights = saved.get("model")
        check_schema(
            saved | {"model": dict(weights) if isinstance(weights, dict) else None}, NANOGPT
        )
        args = {
            key.removesuffix("?"): saved["model_args"].get(key.removesuffix("?"), True)
            for key in MODEL_ARGS
        }
        config = ModelConfig(**GPT2.fixed | {"activation": "gelu"} | args)
        # the names of a compiled model have a prefix
        weights = {name.removeprefix("_orig_mod."): x for name, x in weights.items()}
        weights = pretrained.read_stored(NANOGPT_FAMILY, config, store(weights, path.name))
    except (
        ValueError,
        AttributeError,
        OverflowError,
    ) as error:  # AttributeError: a name that is no string
        raise checkpoint.damaged(path, error) from error
    return BaseModel(path, config, weights, nanogpt_tokenizer(path, saved), f"{path}: nanoGPT's")


def nanogpt_tokenizer(path: Path, saved: dict) -> Tokenizer:
    """Of the dataset's meta.pkl, in data/ here or beside the folder of the run; without one, GPT-2's tokens."""
    dataset = (saved.get("config") or {}).get("dataset", "")
    metas = [
        folder / "data" / Path(dataset).name / "meta.pkl"
        for folder in (Path(), path.absolute().parent.parent)
    ]
    found = next((meta for meta in metas if dataset and meta.is_file()), None)
    if found:
        return tokenizers.from_state(read_nanogpt_meta(found)["tokenizer"])
    if saved["model_args"]["vocab_size"] < GPT2_TOKENS:
        raise UserError(
            f"{path} needs the characters of its data set: there is no {' and no '.join(map(str, metas))}"
        )
    return tokenizers.GPT2Tokenizer.train(separated=True)
