"""Data folders prepared by nanoGPT. They hold uint16 tokens: the characters listed in meta.pkl, or GPT-2's tokens."""

import io
import pickle
from pathlib import Path

import numpy as np

from humptygpt.cli import note
from humptygpt.files import refuse_damaged
from humptygpt.tokenizers.basic import CharTokenizer, GPT2Tokenizer, Tokenizer, gpt2_pieces

GPT2_TOKENS = 50_257  # size of GPT-2's vocabulary


def describe(folder: Path) -> dict:
    """Return the content of meta.json for a folder prepared by nanoGPT. Raises UserError if meta.pkl cannot be read."""
    if (folder / "meta.pkl").exists():
        tokenizer = read_characters(folder / "meta.pkl")
    else:
        note(f"{folder} has no meta.json or meta.pkl; assuming that its tokens are GPT-2's")
        tokenizer = GPT2Tokenizer(gpt2_pieces(), separated=True)
        val = folder / "val.bin"
        # if the data has no end-of-text, samples must not begin with it, because the model has never seen it
        if val.exists() and tokenizer.eot not in np.fromfile(val, "<u2"):
            tokenizer.eot = None
    return {
        "task": "language modelling",
        "source": f"nanoGPT's {folder.name}",
        "dtype": "uint16",
        "splits": {
            split: {"files": [{"name": f"{split}.bin"}]} for split in ("train", "val")
        },
        "tokenizer": tokenizer.state(),
    }


class PlainUnpickler(pickle._Unpickler):
    """Reads dicts, lists, tuples, sets, strings and numbers, and refuses everything else, since it could run code.

    It extends the Python unpickler, because a damaged pickle can make the C version allocate any amount of memory.
    """

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not allowed")


def read_characters(path: Path) -> Tokenizer:
    """Read a character tokenizer from meta.pkl, a dictionary {vocab_size, itos, stoi}. Raises UserError if invalid."""
    with refuse_damaged(path):
        meta = PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        characters = [meta["itos"][i] for i in range(meta["vocab_size"])]
        if any(len(char) != 1 for char in characters):
            raise ValueError("its tokens are not single characters")
        return CharTokenizer("".join(characters))
