"""Write text or sentence pairs to data/<name>: token ids (train.bin, val.bin), tokenizer and checksums (meta.json).

    python prepare_data.py shakespeare_char                                  a built-in text, downloaded if missing
    python prepare_data.py --input=FILE_FOLDER_OR_PATTERN --name=mine        your own text
    python prepare_data.py --input='corpus/*.jsonl.gz' --name=mine --tokenizer=gpt2 --val_fraction=0.001
    python prepare_data.py translate_de_en                                   built-in pairs, downloaded if missing
    python prepare_data.py --input=pairs.tsv --name=mine                     your own: SOURCE, a tab and TARGET per line
    python prepare_data.py --input=chats.jsonl --name=mine                   conversations

Input is text, .jsonl, .parquet or .csv, optionally compressed as .gz or .zst. Each line of JSON, each row of Parquet or
CSV, and each file with any other extension except .tsv is one document; with --lines=True, each line of a text file. In
a folder of documents, files that are not text are skipped and listed. Carriage returns become line breaks, and an
end-of-text token separates documents. A document's split, train or val, depends only on its text, so adding files does
not move existing documents to the other split. A single text file is cut in two instead, and so is each file if there
are few documents. A pair's split, train, val or test, depends only on its source; both sides share one vocabulary.
With --val_input=FILE_OR_FOLDER, that is the validation split. Files are streamed and never held in memory.
"""

import os
import runpy
import shlex
from pathlib import Path

from humptygpt import machine

if __name__ == "__main__":
    machine.start()  # before numpy is loaded

from humptygpt import cli
from humptygpt.cli import CONFIGS
from humptygpt.data.prepare import PrepareConfig, built_in, prepare
from humptygpt.data.settings import CHOICES
from humptygpt.tokenizers.basic import Tokenizer

WEIGHTS = (".pt", ".safetensors", ".bin")


def main(argv: list[str]) -> None:
    config = cli.make(PrepareConfig, cli.read(argv, PrepareConfig, positional="name"))
    arguments = training_arguments(config, prepare(config, open_tokenizer))
    print(f"\ntrain on it: python train.py {shlex.join(arguments)}")


def open_tokenizer(source: str) -> Tokenizer:
    from humptygpt.formats.load import load_tokenizer  # late import, because it loads torch

    return load_tokenizer(source)


def training_arguments(config: PrepareConfig, meta: dict) -> list[str]:
    """Choose train.py's arguments for this data: the model that the tokenizer comes from, or a config."""
    arguments = [f"--dataset={config.name}", f"--out_dir=out/{config.name}"]
    if config.tokenizer not in CHOICES and has_weights(Path(config.tokenizer)):
        return [f"--init_from={config.tokenizer}", *arguments]
    own = CONFIGS / f"{config.name}.py"
    pairs = meta["task"] == "translation"
    if built_in(config) and own.is_file():
        arguments = [os.path.relpath(own)]
    else:
        suited = "translate_de_en.py" if pairs else "shakespeare_char.py"
        arguments = [os.path.relpath(CONFIGS / suited), *arguments]
    if pairs and meta["longest"] > runpy.run_path(arguments[0])["block_size"]:
        arguments.append(f"--block_size={meta['longest']}")
    return arguments


def has_weights(source: Path) -> bool:
    """False if a file or folder holds a tokenizer without its model. A model on the Hub has weights."""
    suffixes = {path.suffix for path in (source, *source.glob("*"))}
    return not source.exists() or not suffixes.isdisjoint(WEIGHTS)


if __name__ == "__main__":
    machine.run(main)
