"""Export a model as a folder for transformers, a file for llama.cpp or a single checkpoint.

    python export.py --out_dir=out/shakespeare_char_llama --to=exported
    python export.py --out_dir=out/shakespeare_char_llama --to=model.gguf --dtype=q8_0
    python export.py --out_dir=out/gpt2_1558m --checkpoint=latest --to=ckpt.pt    one file from a sharded run
    python export.py --init_from=nanoGPT/out-x --to=exported     any other model: nanoGPT's, a folder, an adapter, gpt2

The folder has the model, its tokenizer and a model card, and is ready to upload to the Hugging Face Hub. The GGUF file
is for llama.cpp and for programs that are built on it, such as Ollama and LM Studio. Both formats support only GPT-2's
and Llama's architectures. Any run can be exported to a .pt file, a single file that all scripts can open. The file
extension of --to selects the format.
"""

import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from humptygpt import cli, machine
from humptygpt.cli import UserError, check_choices
from humptygpt.files import whole

if TYPE_CHECKING:
    from humptygpt.loading import Loaded

# torch takes seconds to import. Only the functions that need it import it, so a misspelt key is reported at once.

DTYPES = {  # by file extension
    ".gguf": ("float32", "bfloat16", "q8_0"),
    ".pt": ("float32",),
}
FOLDER_DTYPES = ("float32", "bfloat16")  # with any other extension, or none


@dataclass(frozen=True)
class ExportConfig:
    # export
    init_from: str = "resume"  # resume: a checkpoint in out_dir; otherwise a run, a checkpoint, a model folder or gpt2
    out_dir: str = "out"  # folder of the run to export, or a checkpoint in it
    checkpoint: str = "best"  # best: best.pt (lowest loss); latest: ckpt.pt
    to: str = "exported"  # file to write, ending in .gguf or .pt, or a new folder
    dtype: str = "float32"  # dtype of the weights; q8_0: 8 bits, .gguf only

    @classmethod
    def choices(cls) -> dict[str, Collection[str]]:
        return {"checkpoint": ("best", "latest"), "dtype": DTYPES[".gguf"]}

    def validate(self) -> None:
        check_choices(self)
        dtypes = DTYPES.get(Path(self.to).suffix, FOLDER_DTYPES)
        if self.dtype not in dtypes:
            raise ValueError(
                f"dtype={self.dtype} needs a file that ends in .gguf; otherwise use {' or '.join(dtypes)}"
            )


def main(argv: list[str]) -> None:
    given = cli.read(argv, ExportConfig)
    config = cli.make(ExportConfig, given)
    from humptygpt.convert.families import find_family
    from humptygpt.loading import chosen_source, load
    from humptygpt.page.known_settings import check_formulas

    loaded = load(chosen_source(config, given), config.checkpoint)
    to = Path(config.to)
    if to.suffix != ".pt":
        find_family(loaded.model.config)  # refuse now, not after asking for packages
        check_formulas(loaded.model.config, "transformers or llama.cpp")
    writers = {".gguf": write_gguf_file, ".pt": write_checkpoint}
    write = writers.get(to.suffix, write_folder)
    print(write(loaded, to, config.dtype))


def write_folder(loaded: "Loaded", to: Path, dtype: str) -> str:
    """Write a folder for transformers and return a line to print."""
    from humptygpt.convert.huggingface import write_files, write_pretrained
    from humptygpt.convert.model_card import model_card
    from humptygpt.convert.write_huggingface import tokenizer_files

    files = tokenizer_files(loaded.tokenizer, loaded.model.config.block_size) | {
        "README.md": model_card(loaded, to.name),
        "generation_config.json": generation_config(loaded),
    }
    with whole(to) as folder:
        folder.mkdir()  # here rather than later, so that an error names the folder that cannot be written
        write_pretrained(loaded.model, folder, dtype)
        write_files(folder, files)
    return f"{to}: its README.md shows how to use it"


def write_gguf_file(loaded: "Loaded", to: Path, dtype: str) -> str:
    """Write a file for llama.cpp and return a line to print."""
    from humptygpt.convert.gguf import vocabulary, write_gguf

    tokens = vocabulary(loaded.tokenizer)
    with whole(to) as file:
        write_gguf(file, to.stem, loaded.model, tokens, dtype)
    return f"{to}: with llama.cpp, run: llama-completion -m {shlex.quote(str(to))} -n 200"


def write_checkpoint(loaded: "Loaded", to: Path, dtype: str) -> str:
    """Write all entries of a run's checkpoint to one file and return a line to print."""
    from humptygpt.checkpoint import save

    if loaded.saved is None:
        raise UserError(
            f"only a run can be exported as a checkpoint, which {loaded.path} is not; load it directly with --init_from"
        )
    save(to, loaded.saved)
    return f"{to}: python sample.py {shlex.quote(f'--out_dir={to}')}"


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
