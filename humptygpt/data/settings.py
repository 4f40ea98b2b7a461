"""The settings of prepare_data.py."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from humptygpt.cli import check_least
from humptygpt.sources import repository
from humptygpt.tokenizers.basic import TOKENIZERS

CHOICES = ("auto", *TOKENIZERS)  # values of --tokenizer besides paths and names of models
# {key: the tokenizers that use it}
OPTIONS = {"vocab_size": ("sentencepiece", "bpe"), "split_digits": ("bpe",)}


@dataclass(frozen=True)
class PrepareConfig:
    # data
    name: str | None = None  # name of the folder in data/; the --name= prefix is optional
    input: str | None = None  # file, folder or pattern
    text_key: str | None = None  # key of the text, or of a question and its answer: q,a
    lines: bool | None = None  # each line of a text file is a document; None: off
    val_fraction: float | None = None  # None: 0.1, or 0.02 for pairs; 0: learn all
    val_input: str | None = None  # validation text of its own; None: a part of input
    files: int | None = None  # maximum number of files
    max_pair_tokens: int | None = None  # drop sentence pairs with a longer side; None: 128
    # tokens
    tokenizer: str = "auto"  # auto: chosen to fit the text; or the tokenizer of a run, a model folder or owner/model
    vocab_size: int | None = None  # at most this many tokens; None: fits the text, or 4096
    split_digits: bool | None = None  # bpe: each digit is a token, to learn sums; None: off
    # existing data
    overwrite: bool = False  # replace a different dataset of the same name

    @classmethod
    def choices(cls) -> dict[str, Collection[str]]:
        return {"tokenizer": CHOICES}

    def validate(self) -> None:
        check_least(self, 1, "files")
        check_least(self, 2, "max_pair_tokens")
        check_least(self, 257, "vocab_size")  # 256 bytes and end-of-text
        check_least(self, 0, "val_fraction", below=1)
        name, tokenizer = self.name, self.tokenizer
        if not (tokenizer in CHOICES or os.path.exists(tokenizer) or repository(tokenizer)):
            raise ValueError(
                f"tokenizer={tokenizer} is not one of: {', '.join(CHOICES)}, a folder or file with a tokenizer,"
                " or owner/model on the Hugging Face Hub"
            )
        if name is None:
            raise ValueError("the data set has no name; add one, such as --name=mine")
        if name == ".." or Path(name).name != name:
            raise ValueError(f"name={name!r} must be the name of a folder in data/")
