"""A run -> a folder that transformers opens, or one file for llama.cpp.

    python export.py --out_dir=out/shakespeare_char_llama --to=exported
    python export.py --out_dir=out/shakespeare_char_llama --to=model.gguf --format=gguf --dtype=q8_0
    python export.py --out_dir=out/gpt2_1558m --checkpoint=latest --to=ckpt.pt --format=ckpt    of a sharded run
    python export.py --init_from=nanoGPT/out-x --to=exported     any other model: nanoGPT's, a folder, an adapter, gpt2

The folder has the model, its tokenizer and a model card, and is what the hub of Hugging Face takes. The file is for
llama.cpp and what is built on it, such as Ollama and LM Studio. GPT-2's and Llama's architectures can be exported; with
format=ckpt every model, as the one file that all scripts open.
"""

import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from humptygpt.core import settings as configurator
from humptygpt.core.errors import UserError
from humptygpt.core.settings import check, setting

# torch is imported where it is needed: it takes seconds, and a misspelt key should not wait.

INIT_FROM = "resume: from a checkpoint in out_dir; or a run, a checkpoint, a model's folder, gpt2"
DTYPES = {
    "transformers": ("float32", "bfloat16"),
    "gguf": ("float32", "bfloat16", "q8_0"),
    "ckpt": ("float32",),
}
ONE_FILE = {"gguf": "model.gguf", "ckpt": "ckpt.pt"}


@dataclass(frozen=True)
class ExportConfig:
    init_from: str = setting("resume", INIT_FROM, "export")
    out_dir: str = setting("out", "folder of the run to export, or a checkpoint in it", path=True)
    checkpoint: str = setting(
        "best", "best.pt (lowest loss), or latest: ckpt.pt", choices=("best", "latest")
    )
    to: str | None = setting(None, "new folder, or of gguf and ckpt the file, to write", path=True)
    format: str = setting(
        "transformers",
        "gguf: a file for llama.cpp; ckpt: one checkpoint of a sharded one",
        choices=DTYPES,
    )
    dtype: str = setting(
        "float32", "of the weights; q8_0, of gguf alone: 8 bits", choices=DTYPES["gguf"]
    )

    def __post_init__(self):
        check(self)
        if self.dtype not in DTYPES[self.format]:
            raise ValueError(
                f"dtype={self.dtype} is for --format=gguf; take {' or '.join(DTYPES[self.format])}"
            )


def main(argv: list[str]) -> None:
    given = configurator.read(argv, ExportConfig)
    config = configurator.make(ExportConfig, given)
    to = where(config)
    from humptygpt.checkpoint.checkpoint import Loaded, restore_model
    from humptygpt.interchange.load import chosen_model, load_base

    base = load_base(chosen_model(config, given), config.checkpoint)
    if config.format == "ckpt" and base.saved is None:
        raise UserError(
            f"format=ckpt is for checkpoints of runs, and {base.path} is none; scripts open it by --init_from"
        )
    loaded = Loaded(restore_model(base.weights, base.config).eval(), base.tokenizer, base.saved)
    write = {"transformers": write_folder, "gguf": write_file, "ckpt": write_checkpoint}[
        config.format
    ]
    print(write(loaded, base.path, to, config.dtype))


def where(config: ExportConfig) -> Path:
    """The path to write. Raises UserError where something is in its place."""
    example = ONE_FILE.get(config.format, "exported")
    kind = "file" if config.format in ONE_FILE else "folder"
    if config.to is None:
        raise UserError(f"export needs a {kind} to write; give one, as --to={example}")
    to = Path(config.to)
    if kind == "file" and os.path.isdir(to):
        raise UserError(f"to={to} is a folder; name a file, as --to={to / example}")
    if kind == "file" and os.path.exists(to) and not os.path.isfile(to):
        raise UserError(
            f"to={to} is a device or a pipe, which a file cannot replace; name a new file"
        )
    if kind == "folder" and os.path.exists(to) and not os.path.isdir(to):
        raise UserError(f"to={to} is a file; name a new folder")
    if kind == "folder" and os.path.isdir(to) and any(to.iterdir()):
        raise UserError(f"to={to} has files in it; remove it, or name a new folder")
    return to


def write_folder(loaded, path: Path, to: Path, dtype: str) -> str:
    """What transformers opens; loaded: a checkpoint.Loaded, of this path. Returns a line on what was written."""
    import torch

    from humptygpt.core.files import whole, write_whole
    from humptygpt.interchange.huggingface import write_pretrained
    from humptygpt.interchange.model_card import model_card
    from humptygpt.tokenizer.write_huggingface import tokenizer_files

    model, tokenizer, _ = loaded
    files = tokenizer_files(tokenizer, model.config.block_size)
    texts = {
        "generation_config.json": generation_config(loaded),
        "README.md": model_card(loaded, path, to.name),
    }
    files |= {name: text.encode() for name, text in texts.items()}
    with whole(to) as folder:
        write_pretrained(model, folder, getattr(torch, dtype), tokenizer.eot, tokenizer.bos)
        for name, content in files.items():
            write_whole(folder / name, lambda file, content=content: file.write(content))
    return f"{to}: {size(to)}; its README.md shows how to use it"


def write_file(loaded, path: Path, to: Path, dtype: str) -> str:
    """What llama.cpp opens; as write_folder."""
    from humptygpt.core.files import whole
    from humptygpt.interchange.gguf import KINDS, vocabulary, write_gguf
    from humptygpt.interchange.huggingface import to_pretrained
    from humptygpt.interchange.model_card import describe

    content, weights = to_pretrained(loaded.model)
    tokens, about = (
        vocabulary(loaded.tokenizer),
        {"name": to.stem, "description": describe(loaded, path)},
    )
    with whole(to) as file:
        exact = write_gguf(file, content, weights, tokens, kind=KINDS[dtype], about=about)
    if exact:
        few = f"{len(exact)} matrices, such as {exact[0]}" if len(exact) > 1 else exact[0]
        print(
            f"note: {few}: float32, since q8_0 needs rows of a multiple of 32 weights",
            file=sys.stderr,
        )
    return f"{to}: {size(to)}; for llama.cpp: llama-completion -m {shlex.quote(str(to))} -n 200"


def write_checkpoint(loaded, path: Path, to: Path, dtype: str) -> str:
    """All entries of the checkpoint in one file; as write_folder."""
    from humptygpt.checkpoint.checkpoint import save

    to.parent.mkdir(parents=True, exist_ok=True)
    save(to, loaded.saved)
    more = "what training needs to resume" if "optimizer" in loaded.saved else "the model"
    return f"{to}: {size(to)}, {more}; python sample.py {shlex.quote(f'--out_dir={to}')}"


def generation_config(loaded) -> str:
    """generate() of transformers samples as sample.py does by default; loaded: a checkpoint.Loaded."""
    from sample import SampleConfig

    model, tokenizer, _ = loaded
    content = {
        "do_sample": True,
        "temperature": SampleConfig.temperature,
        "top_k": SampleConfig.top_k,
    }
    if tokenizer.eot is not None:
        content |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot)
    if tokenizer.bos is not None:
        content["bos_token_id"] = tokenizer.bos
    if padding := list(range(tokenizer.vocab_size, model.config.vocab_size)):
        content["suppress_tokens"] = padding  # rows of the embedding that stand for no token
    return json.dumps(content, indent=2) + "\n"


def size(path: Path) -> str:
    """Of a file, or of those in a folder."""
    files = list(path.iterdir()) if path.is_dir() else [path]
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"


if __name__ == "__main__":
    configurator.run(main)
