"""Export a model as a folder for transformers or a file for llama.cpp.

    python export.py --out_dir=out/shakespeare_char_llama --to=exported
    python export.py --out_dir=out/shakespeare_char_llama --to=model.gguf --dtype=q8_0
    python export.py --init_from=gpt2 --to=gpt2.gguf     any other model: a folder, a name on the Hugging Face Hub

The folder has the model and its tokenizer, and is ready to upload to the Hugging Face Hub. The GGUF file is for
llama.cpp and for programs that are built on it, such as Ollama and LM Studio. Both formats support only GPT-2's and
Llama's architectures. The file extension of --to selects the format.
"""

import shlex
from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from humptygpt import cli, machine
from humptygpt.files import whole
from humptygpt.sources import ModelSource

if TYPE_CHECKING:
    from humptygpt.formats.load import Loaded

# torch takes seconds to import. Only the functions that need it import it, so a misspelt key is reported at once.

DTYPES = ("float32", "bfloat16", "q8_0")


@dataclass(frozen=True)
class ExportConfig(ModelSource):
    # export
    to: str = "exported"  # file to write, ending in .gguf, or a new folder
    dtype: str = "float32"  # dtype of the weights; q8_0: 8 bits, .gguf only

    @classmethod
    def choices(cls) -> dict[str, Collection[str]]:
        return super().choices() | {"dtype": DTYPES}

    def validate(self) -> None:
        super().validate()
        extension = Path(self.to).suffix
        if extension in (".bin", ".onnx", ".pt", ".safetensors"):
            raise ValueError(
                f"to={self.to} must be a folder or end in .gguf; a run's own best.pt can be copied as it is"
            )
        if self.dtype == "q8_0" and extension != ".gguf":
            raise ValueError("dtype=q8_0 needs a file that ends in .gguf; otherwise use float32 or bfloat16")


def main(argv: list[str]) -> None:
    given = cli.read(argv, ExportConfig)
    config = cli.make(ExportConfig, given)
    from humptygpt.formats.checkpoint import refuse_edits
    from humptygpt.formats.families import find_family
    from humptygpt.formats.load import load
    from humptygpt.generation.generator import chosen_source

    loaded = load(chosen_source(config, given), config.checkpoint)
    to = Path(config.to)
    find_family(loaded.model.config)  # refuse now, not after asking for packages
    if to.suffix == ".gguf" or not find_spec("transformers"):
        refuse_edits()
    write = write_gguf_file if to.suffix == ".gguf" else write_folder
    print(write(loaded, to, config.dtype))


def write_folder(loaded: "Loaded", to: Path, dtype: str) -> str:
    """Write a folder for transformers and return a line to print."""
    from humptygpt.formats.huggingface import (
        compare_logits,
        write_files,
        write_pretrained,
    )
    from humptygpt.formats.tokenizer_json import tokenizer_files

    files = tokenizer_files(loaded.tokenizer, loaded.model.config.block_size) | {
        "generation_config.json": generation_config(loaded),
    }
    with whole(to) as folder:
        folder.mkdir()  # here rather than later, so that an error names the folder that cannot be written
        write_pretrained(loaded.model, folder, dtype)
        write_files(folder, files)
        if find_spec("transformers"):
            compare_logits(loaded.model, folder, dtype)
    return f'{to}: in Python, transformers.pipeline("text-generation", "{to}")'


def write_gguf_file(loaded: "Loaded", to: Path, dtype: str) -> str:
    """Write a file for llama.cpp and return a line to print."""
    from humptygpt.formats.gguf import vocabulary, write_gguf

    with whole(to) as file:
        write_gguf(file, to.stem, loaded.model, vocabulary(loaded.tokenizer), dtype)
    return f"{to}: with llama.cpp, run: llama-completion -m {shlex.quote(str(to))} -n 200"


def generation_config(loaded: "Loaded") -> dict[str, object]:
    """Make the contents of generation_config.json, which gives transformers the sampling defaults of sample.py."""
    tokenizer, rows = loaded.tokenizer, loaded.model.config.vocab_size
    eot, bos = tokenizer.eot, tokenizer.bos
    return {
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 200,
        "bos_token_id": eot if bos is None else bos,
        "eos_token_id": eot,
        "pad_token_id": eot,
        # embedding rows without a token
        "suppress_tokens": [*range(tokenizer.vocab_size, rows)] or None,
    }


if __name__ == "__main__":
    machine.run(main)
