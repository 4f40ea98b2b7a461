"""A checkpoint and a prompt -> text, or its translation.

    python sample.py --out_dir=out/shakespeare_char
    python sample.py --out_dir=out/shakespeare_char --start="ROMEO:" --num_samples=1 --temperature=0
    python sample.py --out_dir=out/shakespeare_char --start=FILE:prompt.txt > text.txt
    python sample.py --out_dir=out/translate_de_en --start="Wo wohnst du?"
    python sample.py --out_dir=out/translate_de_en --start=FILE:german.txt > english.txt     line by line

Only text goes to stdout, all else to stderr.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from humptygpt import checkpoint, configurator
from humptygpt.beams import NUM_BEAMS, translate
from humptygpt.configurator import UserError, check, setting, without_effect
from humptygpt.device import DTYPES, autocast, pick_device, sample_dtype
from humptygpt.generation import generate
from humptygpt.tokenizer import END_OF_TEXT, Tokenizer

LINES = 500  # of a text that are translated before the first of them is printed
TEXT = {"only_with": {"task": "language modelling"}}
SAMPLING = TEXT | {"not_with": {"temperature": 0.0}}
TRANSLATION = {"only_with": {"task": "translation"}}


@dataclass(frozen=True)
class SampleConfig:
    init_from: str = setting(
        "resume", "resume: from a checkpoint in out_dir; GPT-2's weights cannot be read yet", "what"
    )
    out_dir: str = setting("out", "folder of the run to sample from")
    checkpoint: str = setting("best", "best.pt (lowest loss), or latest: ckpt.pt", choices=("best", "latest"))
    start: str | None = setting(None, "the prompt, or FILE:path of one; None: end-of-text, or a line break")
    num_samples: int = setting(3, "texts, generated together in one batch", at_least=1, **TEXT)
    max_new_tokens: int = setting(500, "tokens of each after the prompt", at_least=1)

    num_beams: int = setting(NUM_BEAMS, "hypotheses; 1: greedy", "beam search", at_least=1, **TRANSLATION)
    length_penalty: float = setting(
        1.0, "score: log-probability / tokens^this; above 1 favours long ones", at_least=-10, at_most=10, **TRANSLATION
    )

    temperature: float = setting(0.8, "below 1 sharper, above 1 more random; 0: greedy", "sampling", at_least=0, **TEXT)
    top_k: int | None = setting(200, "sample from the k most probable tokens only", at_least=1, **SAMPLING)
    top_p: float | None = setting(None, "nucleus sampling: probability kept", above=0, at_most=1, **SAMPLING)
    seed: int = setting(1337, "the same seed gives the same text", at_least=0, below=2**63, **SAMPLING)
    context: str = setting(
        "fast",
        "when full: fast continues from its newest half; exact recomputes it per token",
        choices=("fast", "exact"),
        **TEXT,
    )

    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps", "system")
    dtype: str = setting("auto", "auto: float32 on a CPU; " + ", ".join(DTYPES), choices=("auto", *DTYPES))
    compile: bool = setting(False, "nanoGPT's key; has no effect: every length of text would be compiled again")

    def __post_init__(self):
        check(self)
        if self.init_from.startswith("gpt2"):
            raise ValueError(f"init_from={self.init_from}: GPT-2's weights cannot be read yet; leave it at resume")
        if self.init_from != "resume":
            raise ValueError(f"init_from={self.init_from} is not one of: resume")


def main(argv: list[str]) -> None:
    given = configurator.read(argv, SampleConfig)
    config = configurator.make(SampleConfig, given)
    device = pick_device(config.device)
    dtype = sample_dtype(config.dtype, device)
    model, tokenizer, saved = load(config)
    model.to(device)
    settings = asdict(config) | {"task": saved["task"]}
    for key, why in without_effect(settings, SampleConfig).items():
        if key in given:
            print(f"note: {key}={given[key]} has no effect {why}", file=sys.stderr)
    if config.compile:
        print("note: compile=True has no effect in sample.py", file=sys.stderr)
    with autocast(device, dtype):
        if saved["task"] == "translation":
            print_translations(config, model, tokenizer)
        else:
            print_texts(config, model, tokenizer, device)


def load(config: SampleConfig) -> checkpoint.Loaded:
    path = Path(config.out_dir) / {"best": "best.pt", "latest": "ckpt.pt"}[config.checkpoint]
    if config.checkpoint == "best" and not os.path.exists(path) and os.path.exists(path.with_name("ckpt.pt")):
        path = path.with_name("ckpt.pt")
        print(f"note: no evaluation has found a best model yet; taking {path}", file=sys.stderr)
    loaded = checkpoint.load_model(path)
    progress = loaded.saved["progress"]
    print(f"{path}: iter {progress['iter']}, best val loss {progress['best_val_loss']:.4f}", file=sys.stderr)
    return loaded


# --------------------------------------------------------------------------------------
# Text


def print_texts(config: SampleConfig, model: nn.Module, tokenizer: Tokenizer, device: torch.device) -> None:
    num_samples = config.num_samples if config.temperature else 1
    if num_samples < config.num_samples:
        print("note: at temperature=0 all texts are the same; here is one", file=sys.stderr)
    prompt, ids = read_prompt(config.start, tokenizer)
    new_tokens = generate(
        model,
        torch.from_numpy(ids).to(device).repeat(num_samples, 1),
        config.max_new_tokens,
        tokenizer.vocab_size,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        exact=config.context == "exact",
        generator=torch.Generator(device).manual_seed(config.seed),
    )
    others = []  # the tokens of the texts beside the first, (num_samples - 1,) a step

    def first_text() -> Iterator[int]:
        for first, *rest in map(Tensor.tolist, new_tokens):
            others.append(rest)
            yield first

    print(prompt, end="", flush=True)
    for piece in tokenizer.decode_stream(first_text()):
        print(piece, end="", flush=True)
    print(flush=True)
    for ids_of_text in zip(*others, strict=True):
        print("---------------", file=sys.stderr, flush=True)
        print(prompt + tokenizer.decode(ids_of_text), flush=True)


def read_start(start: str) -> str:
    """What --start says, or the content of the file that it names."""
    if not start.startswith("FILE:"):
        return start
    try:
        return Path(start[5:]).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"cannot read the prompt {Path(start[5:])}: {reason}") from error


def read_prompt(start: str | None, tokenizer: Tokenizer) -> tuple[str, np.ndarray]:
    """(the prompt as it is shown, its token ids)."""
    if start is None:
        ids = tokenizer.start()
        return "" if tokenizer.eot is not None else tokenizer.decode(ids), ids
    start = read_start(start)
    ids = np.array([], dtype=np.int64)
    text = start
    if tokenizer.eot is not None and start.startswith(END_OF_TEXT):  # as nanoGPT's users write it
        ids, text = tokenizer.start(), start.removeprefix(END_OF_TEXT)
    if not start:
        raise UserError("an empty prompt; give at least one character, or leave --start out")
    return text, np.concatenate([ids, tokenizer.encode(text)]) if text else ids


# --------------------------------------------------------------------------------------
# Translations


def print_translations(config: SampleConfig, model: nn.Module, tokenizer: Tokenizer) -> None:
    """One line for each line of the text; an empty one stays empty."""
    if config.start is None:
        raise UserError('nothing to translate; give a sentence, as --start="Wo wohnst du?", or --start=FILE:german.txt')
    text = read_start(config.start)
    if not text:
        raise UserError("an empty text; give at least one character to translate")
    lines = [" ".join(line.split()) for line in text.removesuffix("\n").split("\n")]
    for first in tqdm(range(0, len(lines), LINES), unit=f"{LINES} lines", delay=2, disable=None):
        for translation in translate_lines(lines[first : first + LINES], first + 1, config, model, tokenizer):
            print(translation, flush=True)


def translate_lines(
    lines: list[str], number: int, config: SampleConfig, model: nn.Module, tokenizer: Tokenizer
) -> list[str]:
    """A translation for each line; number: of the first line, for notes."""
    # without the end-of-text token; a source that shares the context with its translation has half of it
    room = (model.config.block_size if model.has_encoder else model.config.block_size // 2) - 1
    sources = {}
    for i, line in enumerate(lines):
        ids = tokenizer.encode(line)
        if len(ids) > room:
            print(f"note: line {number + i:,} has {len(ids):,} tokens; the first {room:,} are read", file=sys.stderr)
        if len(ids):
            sources[i] = np.append(ids[:room], tokenizer.eot)
    found = translate(
        model,
        list(sources.values()),
        tokenizer.eot,
        tokenizer.vocab_size,
        num_beams=config.num_beams,
        length_penalty=config.length_penalty,
        max_new_tokens=config.max_new_tokens,
    )
    translations = [""] * len(lines)
    for i, translation in zip(sources, found, strict=True):
        translations[i] = " ".join(tokenizer.decode(translation.ids).split())  # on one line, whatever the model writes
        if not translation.ended:
            print(f"note: line {number + i:,} has no room for more of its translation", file=sys.stderr)
    return translations


if __name__ == "__main__":
    configurator.run(main)
