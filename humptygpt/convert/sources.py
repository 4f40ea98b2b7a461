"""Load models and tokenizers from other programs: Hugging Face folders, PEFT adapters, nanoGPT checkpoints."""

import sys
from pathlib import Path

from humptygpt import checkpoint, tokenizers
from humptygpt.config import UserError
from humptygpt.convert import adapters, huggingface
from humptygpt.convert.families import GPT2
from humptygpt.convert.read_huggingface import read_tokenizer, tokenizer_file
from humptygpt.convert.weight_files import check_dense, reading
from humptygpt.loading import Loaded, find_source, is_folder, is_nanogpt, load
from humptygpt.prepare.nanogpt import GPT2_TOKENS, read_characters
from humptygpt.schema import check_schema
from humptygpt.tokenizers import Tokenizer
from model import ModelConfig

MODEL_ARGS = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size"), int)
NANOGPT = {
    "model_args": MODEL_ARGS | {"bias?": bool},
    "config?": {"dataset?": str},
}
# nanoGPT's matrices are (outputs, inputs), like ours
NANOGPT_FAMILY = GPT2._replace(transposed=False)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load the tokenizer given by tokenizer=source, without loading the model's weights. Raises UserError."""
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


def from_folder(path: Path, source: str | Path) -> Loaded:
    """Load a folder in Hugging Face's format, or an adapter."""
    if is_adapter(path):
        return from_adapter(path)
    config, weights = huggingface.read_pretrained(path)
    model = checkpoint.restore_model(weights, config)
    return Loaded(model, read_tokenizer(path), path, f"{source}")


def from_adapter(path: Path) -> Loaded:
    """Load an adapter in PEFT's format, and merge it into its base model."""
    base = load(find_base(path))
    config = base.model.config
    weights = adapters.merge_adapter(path, config, base.model.state_dict())
    model = checkpoint.restore_model(weights, config)
    return Loaded(
        model, base.tokenizer, path, f"{path}: an adapter of {base.path}", base.task
    )


def find_base(adapter: Path) -> Path:
    """Find the base model of an adapter. Raises UserError."""
    key = "base_model_name_or_path"
    name = adapters.read_config(adapter)[key]
    base = find_source(name, key=f"{adapter / adapters.CONFIG}: {key}")
    if is_adapter(base):
        raise UserError(
            f"the base model of the adapter {adapter} is itself an adapter: {name}; merge that one first"
        )
    return base


def is_adapter(folder: Path) -> bool:
    return (folder / adapters.CONFIG).is_file()


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
    # names in a compiled model have a prefix
    weights = {name.removeprefix("_orig_mod."): x for name, x in saved["model"].items()}
    like = checkpoint.build_like(path, config, weights).state_dict()
    with reading(path):
        weights = huggingface.read_weights(NANOGPT_FAMILY, config, weights, like)
    model = checkpoint.restore_model(weights, config)
    return Loaded(model, nanogpt_tokenizer(path, saved), path, f"nanoGPT's {path}")


def nanogpt_tokenizer(path: Path, saved: dict) -> Tokenizer:
    """Read the dataset's meta.pkl from data/ here or in nanoGPT's checkout; if there is none, use GPT-2's tokenizer."""
    dataset = (saved.get("config") or {}).get("dataset", "")
    folders = (Path(), path.absolute().parent.parent)
    metas = [folder / "data" / Path(dataset).name / "meta.pkl" for folder in folders]
    for meta in metas:
        if meta.is_file():
            return read_characters(meta)
    if saved["model_args"]["vocab_size"] < GPT2_TOKENS:
        missing = " and no ".join(map(str, metas))
        raise UserError(
            f"{path} needs the characters of its dataset, but there is no {missing}"
        )
    return tokenizers.GPT2Tokenizer.train(separated=True)
