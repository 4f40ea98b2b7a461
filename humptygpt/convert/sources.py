"""Load models and tokenizers of other programs, from Hugging Face folders, PEFT adapters or nanoGPT checkpoints."""

from collections import OrderedDict
from pathlib import Path

from humptygpt import checkpoint, tokenizers
from humptygpt.cli import UserError, refuse, restore
from humptygpt.convert.adapters import CONFIG, merge_adapter, read_config
from humptygpt.convert.families import GPT2
from humptygpt.convert.huggingface import build_model, read_pretrained
from humptygpt.convert.read_huggingface import read_tokenizer, tokenizer_file
from humptygpt.convert.weight_files import check_dense
from humptygpt.files import check_schema
from humptygpt.loading import Loaded, find_source, is_folder, load
from humptygpt.prepare.nanogpt import GPT2_TOKENS, read_characters
from humptygpt.tokenizers import Tokenizer
from model import ModelConfig

NANOGPT = {
    "model": (dict, OrderedDict),
    "model_args": {"vocab_size": int},
    "config?": {"dataset?": str},
}
# nanoGPT's matrices are (outputs, inputs), like ours
NANOGPT_FAMILY = GPT2._replace(transposed=False)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load the tokenizer that --tokenizer names, without the model's weights. Raises UserError if this fails."""
    if tokenizer_file(Path(source)):
        return read_tokenizer(Path(source))
    *_, path = with_bases(find_source(source, key="tokenizer"))
    if is_folder(path):
        return read_tokenizer(path)
    saved = checkpoint.read_plain(path)
    if checkpoint.is_nanogpt(saved):
        return nanogpt_tokenizer(path, saved)
    return tokenizers.from_state(checkpoint.check(path, saved)["tokenizer"])


def from_folder(path: Path, source: str | Path) -> Loaded:
    """Load a model from a folder in Hugging Face's format, or an adapter in PEFT's format, merged into its base."""
    *adapters, base_path = with_bases(path)
    if adapters:
        base = load(base_path)
        for adapter in reversed(adapters):
            merge_adapter(adapter, base.model)
        about = f"{path}: an adapter for {base.path}"
        return base._replace(path=path, description=about, saved=None)
    return Loaded(read_pretrained(path), read_tokenizer(path), path, f"{source}")


def with_bases(path: Path) -> list[Path]:
    """List a path and, if it is an adapter, its base model, which may be an adapter as well, and so on.

    Raises UserError if a base model is missing, or an adapter is its own base model.
    """
    paths = [path]
    while (file := path / CONFIG).is_file():
        key = "base_model_name_or_path"
        path = find_source(read_config(path)[key], key=f"{file}: {key}")
        if path in paths:
            raise UserError(f"{path}: the adapter is its own base model")
        paths.append(path)
    return paths


def from_nanogpt(path: Path, saved: dict) -> Loaded:
    with refuse(f"cannot read {path}: "):
        check_schema(saved, NANOGPT)
        check_dense(saved["model"])
        always = {"activation": "gelu", "tie_weights": True}
        settings = GPT2.fixed | always | saved["model_args"] | {"dropout": 0.0}
        config = restore(ModelConfig, settings)
    # torch.compile puts this prefix before all names
    weights = {name.removeprefix("_orig_mod."): x for name, x in saved["model"].items()}
    model = build_model(path, NANOGPT_FAMILY, config, weights)
    return Loaded(model, nanogpt_tokenizer(path, saved), path, f"nanoGPT's {path}")


def nanogpt_tokenizer(path: Path, saved: dict) -> Tokenizer:
    """Read the dataset's meta.pkl, from our data/ or from nanoGPT's. If there is none, return GPT-2's tokenizer."""
    dataset = Path(saved.get("config", {}).get("dataset", "")).name
    meta = Path("data", dataset, "meta.pkl")
    for file in (meta, path.absolute().parent.parent / meta):
        if file.is_file():
            return read_characters(file)
    if saved["model_args"]["vocab_size"] < GPT2_TOKENS:
        raise UserError(
            f"{path} needs the alphabet of its dataset, but there is no {meta} here or in nanoGPT's folder"
        )
    from humptygpt.prepare.vocabulary import gpt2_pieces  # late import: it is rarely needed

    return tokenizers.GPT2Tokenizer(gpt2_pieces(), separated=True)
