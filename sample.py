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

import model as models
from humptygpt import checkpoint, configurator
from humptygpt import tokenizer as tokenizers
from humptygpt.beams import NUM_BEAMS, translate
from humptygpt.configurator import UserError, check, setting, without_effect
from humptygpt.device import DTYPES, autocast, pick_device, pick_dtype_to_write
from humptygpt.tokenizer import END_OF_TEXT, Tokenizer

LINES = 500  # of a text that are translated before the first of them is printed


DRAWN = {"only_with": {"task": "language modelling"}}
BY_CHANCE = DRAWN | {"not_with": {"temperature": 0.0}}
TRANSLATED = {"only_with": {"task": "translation"}}


@dataclass(frozen=True)
class SampleConfig:
    init_from: str = setting(
        "resume", "resume: from a checkpoint in out_dir; nanoGPT's gpt2 models are not here yet", group="what"
    )
    out_dir: str = setting("out", "the folder of the run to sample from")
    checkpoint: str = setting(
        "best",
        "best: lowest validation loss (best.pt); latest: the end of training (ckpt.pt)",
        choices=("best", "latest"),
    )
    start: str | None = setting(
        None, "the prompt, or FILE:path of one; None: an end-of-text token, or else a line break"
    )
    num_samples: int = setting(3, "texts, generated together in one batch", at_least=1, **DRAWN)
    max_new_tokens: int = setting(500, "tokens of each text after the prompt", at_least=1)

    num_beams: int = setting(
        NUM_BEAMS, "hypotheses kept by beam search; 1: greedy", group="translation", at_least=1, **TRANSLATED
    )
    length_penalty: float = setting(
        1.0,
        "hypotheses compare by log-probability / tokens^length_penalty; above 1 favours long ones",
        at_least=-10,
        at_most=10,
        **TRANSLATED,
    )

    temperature: float = setting(
        0.8,
        "below 1 sharper, above 1 more random; 0: always the most probable token",
        group="sampling",
        at_least=0,
        **DRAWN,
    )
    top_k: int | None = setting(200, "sample from the k most probable tokens only", at_least=1, **BY_CHANCE)
    top_p: float | None = setting(
        None,
        "sample from the most probable tokens that together have this probability",
        above=0,
        at_most=1,
        **BY_CHANCE,
    )
    seed: int = setting(1337, "the same seed gives the same text", at_least=0, below=2**63, **BY_CHANCE)
    context: str = setting(
        "fast",
        "context full: fast continues from its newest half; exact recomputes all of it for every token",
        choices=("fast", "exact"),
        **DRAWN,
    )

    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps", group="system")
    dtype: str = setting(
        "auto",
        "auto: float32 on a CPU, bfloat16 or float16 on CUDA; float32, bfloat16, float16",
        choices=("auto", *DTYPES),
    )
    compile: bool = setting(False, "nanoGPT's key; has no effect, since every length of text would be compiled anew")

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
    saved = load(config)
    model = models.build(configurator.make(models.ModelConfig, saved["model_config"]))
    model.load_state_dict(saved["model"])
    model.to(device).eval()
    tokenizer = tokenizers.from_state(saved["tokenizer"])
    translates = saved["task"] == "translation"
    settings = asdict(config) | {"task": saved["task"]}
    for name, why in without_effect(settings, SampleConfig).items():
        if name in given:
            print(f"note: {name}={given[name]} has no effect {why}", file=sys.stderr)
    if config.compile:
        print("note: compile=True has no effect in sample.py", file=sys.stderr)
    with autocast(device, pick_dtype_to_write(config.dtype, device)):
        if translates:
            print_translations(config, model, tokenizer)
        else:
            print_texts(config, model, tokenizer, device)


def print_texts(config: SampleConfig, model: nn.Module, tokenizer: Tokenizer, device: torch.device) -> None:
    num_samples = config.num_samples if config.temperature else 1
    if num_samples < config.num_samples:
        print("note: at temperature=0 all texts are the same; here is one", file=sys.stderr)
    prompt, ids = read_prompt(config.start, tokenizer)

    idx = torch.from_numpy(ids).to(device).repeat(num_samples, 1)
    new_tokens = generate(
        model,
        idx,
        config.max_new_tokens,
        known=tokenizer.vocab_size,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        exact=config.context == "exact",
        generator=torch.Generator(device).manual_seed(config.seed),
    )
    others = []  # what the texts beside the first one say, (num_samples - 1,) a step

    def first_text() -> Iterator[int]:
        for first, *rest in map(Tensor.tolist, new_tokens):
            others.append(rest)
            yield first

    print(prompt, end="", flush=True)
    for piece in tokenizer.decode_stream(first_text()):
        print(piece, end="", flush=True)
    print(flush=True)
    for ids in zip(*others, strict=True):
        print("---------------", file=sys.stderr, flush=True)
        print(prompt + tokenizer.decode(ids), flush=True)


def print_translations(config: SampleConfig, model: nn.Module, tokenizer: Tokenizer) -> None:
    """One line for each line of the text; an empty one stays empty."""
    if config.start is None:
        raise UserError('nothing to translate; give a sentence, as --start="Wo wohnst du?", or --start=FILE:german.txt')
    text = read_start(config.start)
    if not text:
        raise UserError("an empty text; give at least one character to translate")
    lines = [" ".join(line.split()) for line in text.removesuffix("\n").split("\n")]
    # without the token that ends the source; where it shares the window with its translation, that has half of it
    room = (model.config.block_size if model.has_encoder else model.config.block_size // 2) - 1
    for first in tqdm(range(0, len(lines), LINES), unit=f"{LINES} lines", delay=2, disable=None):
        some = lines[first : first + LINES]
        sources = []
        for number, line in enumerate(some, start=first + 1):
            ids = tokenizer.encode(line)
            if len(ids) > room:
                print(f"note: line {number:,} has {len(ids):,} tokens; the first {room:,} are read", file=sys.stderr)
            sources.append(np.append(ids[:room], tokenizer.eot))
        found = iter(
            translate(
                model,
                [source for source in sources if len(source) > 1],
                tokenizer.eot,
                config.num_beams,
                config.length_penalty,
                config.max_new_tokens,
                tokenizer.vocab_size,
            )
        )
        for number, source in enumerate(sources, start=first + 1):
            text = ""
            if len(source) > 1:
                translation = next(found)
                text = " ".join(tokenizer.decode(translation.ids).split())  # on one line, whatever the model writes
                if not translation.ended:
                    print(f"note: line {number:,} has no room for more of its translation", file=sys.stderr)
            print(text, flush=True)


def load(config: SampleConfig) -> dict:
    path = Path(config.out_dir) / {"best": "best.pt", "latest": "ckpt.pt"}[config.checkpoint]
    if config.checkpoint == "best" and not os.path.exists(path) and os.path.exists(path.with_name("ckpt.pt")):
        path = path.with_name("ckpt.pt")
        print(f"note: no evaluation has found a best model yet; taking {path}", file=sys.stderr)
    saved = checkpoint.load(path)
    print(f"{path}: iter {saved['iter']}, best val loss {saved['best_val_loss']:.4f}", file=sys.stderr)
    return saved


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
# logits -> probabilities -> token


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The chances (B, V) that the next token is drawn from; logits: (B, V). Source for top_p: arXiv:1904.09751."""
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # the shift changes nothing but cannot overflow
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = logits.softmax(dim=-1)
    if top_p is not None:
        ranked, order = probs.sort(dim=-1, descending=True)
        before = ranked.cumsum(dim=-1) - ranked  # the chance of all likelier tokens; 0 for the likeliest, which stays
        probs = torch.zeros_like(probs).scatter(-1, order, ranked.masked_fill(before >= top_p, 0.0))
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


@torch.inference_mode()
def generate(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    known: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    exact: bool = False,
    cached: bool = True,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue idx, (B, T) token ids with T >= 1, by max_new_tokens; yields each new token as (B,).

    known: ids from here on, which pad the vocabulary, are never drawn. exact: what happens when the window of
    block_size is full: True reads the newest block_size tokens again for every new one, False the newest half once and
    goes on from there. cached=False computes the same without a cache, for tests and for wonder at the difference.
    A model that has no cache reads all it can every time.
    """
    if not model.has_cache:
        cached, exact = False, True
    block_size = model.config.block_size
    caches = model.make_caches() if cached else None
    start = max(0, idx.shape[1] - block_size)  # the window is idx[:, start:]
    read = start  # tokens up to here are in the caches
    for _ in range(max_new_tokens):
        if idx.shape[1] - start > block_size:
            start = idx.shape[1] - (block_size if exact else max(1, block_size // 2))
            read = start
            for cache in caches or ():
                cache.clear()
        logits, _ = model(idx[:, read if cached else start :], caches=caches)
        read = idx.shape[1]
        probs = probabilities(logits[:, -1, :known].float(), temperature, top_k, top_p)
        token = torch.multinomial(probs, 1, generator=generator)
        idx = torch.cat([idx, token], dim=1)
        yield token[:, 0]


if __name__ == "__main__":
    configurator.run(main)
