"""Export a model: a folder for transformers, one file for llama.cpp, or one checkpoint.

    python export.py --out_dir=out/shakespeare_char_llama --to=exported
    python export.py --out_dir=out/shakespeare_char_llama --to=model.gguf --dtype=q8_0
    python export.py --out_dir=out/gpt2_1558m --checkpoint=latest --to=ckpt.pt    one file from a sharded run
    python export.py --init_from=nanoGPT/out-x --to=exported     any other model: nanoGPT's, a folder, an adapter, gpt2

The folder has the model, its tokenizer and a model card, and is ready to upload to the Hugging Face Hub. The GGUF file
is for llama.cpp and for programs that are built on it, such as Ollama and LM Studio. Both formats support only GPT-2's
and Llama's architectures. With format=ckpt, any run becomes one file that all scripts can open.
"""

import json
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from humptygpt import config as configurator
from humptygpt import machine
from humptygpt.config import UserError, check_choices
from humptygpt.files import whole, write_whole

# torch takes seconds to import. Only the functions that need it import it, so a misspelt key is reported at once.

DTYPES = {
    "transformers": ("float32", "bfloat16"),
    "gguf": ("float32", "bfloat16", "q8_0"),
    "ckpt": ("float32",),
}
# export format by file extension; for any other name it is transformers
FORMATS = {".gguf": "gguf", ".pt": "ckpt"}


@dataclass(frozen=True)
class ExportConfig:
    # export
    init_from: str = "resume"  # resume: a checkpoint in out_dir; otherwise a run, a checkpoint, a model folder or gpt2
    out_dir: str = "out"  # folder of the run to export, or a checkpoint in it
    checkpoint: str = "best"  # best: best.pt (lowest loss); latest: ckpt.pt
    to: str | None = None  # new folder to write; for gguf and ckpt, the file
    format: str | None = None  # None: chosen by the file extension of --to
    dtype: str = "float32"  # type of the weights; q8_0: 8 bits, only for gguf

    @classmethod
    def choices(cls) -> dict[str, Collection[str]]:
        return {
            "checkpoint": ("best", "latest"),
            "format": DTYPES,
            "dtype": DTYPES["gguf"],
        }

    def validate(self) -> None:
        check_choices(self)
        dtypes = DTYPES[self.resolved_format]
        if self.dtype not in dtypes:
            raise ValueError(
                f"dtype={self.dtype} needs --format=gguf; otherwise use {' or '.join(dtypes)}"
            )

    @property
    def resolved_format(self) -> str:
        return self.format or FORMATS.get(Path(self.to or "").suffix, "transformers")


def main(argv: list[str]) -> None:
    given = configurator.read(argv, ExportConfig)
    config = configurator.make(ExportConfig, given)
    to = check_target(config.to, config.resolved_format)
    from humptygpt.convert.huggingface import find_family
    from humptygpt.loading import chosen_source, load
    from humptygpt.page.known_settings import check_formulas

    loaded = load(chosen_source(config, given), config.checkpoint)
    if config.resolved_format != "ckpt":
        find_family(loaded.model.config)
        check_formulas(loaded.model.config, "transformers or llama.cpp")
    write = {
        "transformers": write_folder,
        "gguf": write_gguf_file,
        "ckpt": write_checkpoint,
    }
    print(write[config.resolved_format](loaded, to, config.dtype))


def check_target(to: str | None, format_: str) -> Path:
    """Return the path to write. Raises UserError if it exists, unless it is an empty folder or a file to replace."""
    kind = "folder" if format_ == "transformers" else "file"
    if to is None:
        raise UserError(f"export needs a {kind} to write; name it with --to")
    path = Path(to)
    is_empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not (path.is_file() if kind == "file" else is_empty):
        raise UserError(f"to={to} exists and is never replaced; name a new {kind}")
    return path


def write_folder(loaded, to: Path, dtype: str) -> str:
    """Write a folder for transformers and return a line to print. loaded: a loading.Loaded."""
    import torch

    from humptygpt.convert.huggingface import write_pretrained
    from humptygpt.convert.model_card import model_card
    from humptygpt.convert.write_huggingface import tokenizer_files
    from humptygpt.settings import TrainConfig
    from humptygpt.tasks import find_task
    from model import ModelConfig

    defaults = vars(ModelConfig()) | vars(TrainConfig())
    task = find_task(loaded.task)
    card = model_card(loaded, to.name, task.card_prompt, task.card_note, defaults)
    files = tokenizer_files(loaded.tokenizer, loaded.model.config.block_size)
    files["generation_config.json"] = generation_config(loaded).encode()
    files["README.md"] = card.encode()
    with whole(to) as folder:
        folder.mkdir()  # made here, so that an error names the folder that cannot be written
        write_pretrained(loaded.model, folder, getattr(torch, dtype), loaded.tokenizer)
        for name, content in files.items():
            write_whole(folder / name, lambda file, content=content: file.write(content))
    return f"{to}: its README.md shows how to use it"


def write_gguf_file(loaded, to: Path, dtype: str) -> str:
    """Write a file for llama.cpp and return a line to print."""
    from humptygpt.convert.gguf import vocabulary, write_gguf
    from humptygpt.convert.huggingface import to_pretrained
    from humptygpt.convert.model_card import summary

    content, weights = to_pretrained(loaded.model)
    tokens = vocabulary(loaded.tokenizer)
    about = {"name": to.stem, "description": summary(loaded)}
    with whole(to) as file:
        write_gguf(file, content, weights, tokens, dtype, about)
    return f"{to}: with llama.cpp, run: llama-completion -m {shlex.quote(str(to))} -n 200"


def write_checkpoint(loaded, to: Path, dtype: str) -> str:
    """Write all entries of a run's checkpoint to one file and return a line to print."""
    from humptygpt.checkpoint import save

    if loaded.saved is None:
        raise UserError(
            f"format=ckpt is only for the checkpoint of a run, which {loaded.path} is not; use it with --init_from"
        )
    save(to, loaded.saved)
    return f"{to}: python sample.py {shlex.quote(f'--out_dir={to}')}"


def generation_config(loaded) -> str:
    """Make generation_config.json, which makes transformers sample with sample.py's defaults."""
    from sample import SampleConfig

    model, tokenizer = loaded.model, loaded.tokenizer
    content = {
        "do_sample": True,
        "temperature": SampleConfig.temperature,
        "top_k": SampleConfig.top_k,
    }
    if tokenizer.eot is not None:
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            content[key] = tokenizer.eot
    if tokenizer.bos is not None:
        content["bos_token_id"] = tokenizer.bos
    # rows of the embedding that belong to no token
    if padding := list(range(tokenizer.vocab_size, model.config.vocab_size)):
        content["suppress_tokens"] = padding
    return json.dumps(content, indent=2) + "\n"


if __name__ == "__main__":
    machine.run(main)
