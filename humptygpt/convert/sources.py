"""Load models and tokenizers of other programs, from Hugging Face folders or nanoGPT checkpoints."""

from pathlib import Path

from humptygpt.cli import UserError, restore
from humptygpt.convert.families import NANOGPT
from humptygpt.convert.huggingface import build_model, read_pretrained
from humptygpt.convert.read_huggingface import read_tokenizer, tokenizer_file
from humptygpt.files import refuse_damaged
from humptygpt.loading import Loaded, find_source, load
from humptygpt.prepare.nanogpt import GPT2_TOKENS, gpt2_tokenizer, read_characters
from humptygpt.tokenizers import Tokenizer
from model import ModelConfig


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load the tokenizer that --tokenizer names. Raises UserError if this fails.

    The weights of a model in Hugging Face's format are not needed.
    """
    path = Path(source)
    if not tokenizer_file(path):
        path = find_source(source, key="tokenizer")
        if not path.is_dir():
            return load(path).tokenizer
    return read_tokenizer(path)


def from_folder(path: Path, source: str | Path) -> Loaded:
    """Load a model from a folder in Hugging Face's format."""
    model, tokenizer = read_pretrained(path), read_tokenizer(path)
    task = "chat" if tokenizer.name == "chat" else "language modelling"
    return Loaded(model, tokenizer, path, f"{source}", task)


def from_nanogpt(path: Path, saved: dict) -> Loaded:
    """Make a model from the content of a checkpoint of nanoGPT. Raises UserError if it is not valid."""
    with refuse_damaged(path):
        settings = NANOGPT.fixed | saved["model_args"] | {"dropout": 0.0}
        config = restore(ModelConfig, settings)
        # torch.compile puts this prefix before all names
        weights = {k.removeprefix("_orig_mod."): x for k, x in saved["model"].items()}
        dataset = Path(saved.get("config", {}).get("dataset", "")).name
    model = build_model(path, NANOGPT, config, weights)
    tokenizer = nanogpt_tokenizer(path, dataset, config.vocab_size)
    return Loaded(model, tokenizer, path, f"nanoGPT's {path}")


def nanogpt_tokenizer(path: Path, dataset: str, vocab_size: int) -> Tokenizer:
    """Read the dataset's meta.pkl, from our data/ or from nanoGPT's. If there is none, return GPT-2's tokenizer."""
    meta = Path("data", dataset, "meta.pkl")
    for file in (meta, path.absolute().parent.parent / meta):
        if file.is_file():
            return read_characters(file)
    if vocab_size < GPT2_TOKENS:
        raise UserError(
            f"{path} needs the alphabet of its dataset, but there is no {meta} here or in nanoGPT's folder"
        )
    return gpt2_tokenizer()
