"""A checkpoint and a prompt -> text, or its translation.

    python sample.py --out_dir=out/shakespeare_char
    python sample.py --out_dir=out/shakespeare_char --start="ROMEO:" --num_samples=1 --temperature=0
    python sample.py --out_dir=out/shakespeare_char --start=FILE:prompt.txt > text.txt
    echo "ROMEO:" | python sample.py --out_dir=out/shakespeare_char --start=-
    python sample.py --out_dir=out/shakespeare_char --prompts=prompts.txt --stop=X     a prompt on each line
    python sample.py --out_dir=out/shakespeare_char --interactive=True
    python sample.py --out_dir=out/shakespeare_char --logprobs=5     each token's probability, and the likeliest five
    python sample.py --out_dir=out/shakespeare_char --score=text.txt     how well the model predicts a text
    python sample.py --init_from=FOLDER --start="..."     a model in Hugging Face's format, or nanoGPT's ckpt.pt
    python sample.py --out_dir=out/translate_de_en --start="Wo wohnst du?"
    python sample.py --out_dir=out/translate_de_en --start=FILE:german.txt > english.txt     line by line

Only text goes to stdout, or with --logprobs JSON lines, all else to stderr.
"""

import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

from humptygpt import machine

if __name__ == "__main__":
    machine.start()  # before numpy and torch are loaded

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from humptygpt import config as configurator
from humptygpt import loading as interchange
from humptygpt.config import (
    UserError,
    check_above_0,
    check_choices,
    check_least,
    in_vain,
    nearest_path,
    note,
)
from humptygpt.decoding import make_generator
from humptygpt.device import DTYPES, free_memory, pick_device, sample_dtype
from humptygpt.sampling import (
    Context,
    TextStream,
    bytes_per_text,
    continue_texts,
)
from humptygpt.scoring import log_probabilities
from humptygpt.tasks import find_task
from humptygpt.tokenizers import END_OF_TEXT, Tokenizer

SEPARATOR = "---------------"
TRANSLATED_AT_ONCE = 500  # lines of a text, before the first of them is printed
CONTINUED_AT_ONCE = 128  # texts
SAMPLER_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
# {key: another setting, and its values with which the key does nothing}
OF_TEXT = "prompts score num_samples stop logprobs temperature top_k repetition_penalty"
OF_TEXT += " seed context compile"
IN_VAIN = dict.fromkeys(OF_TEXT.split(), ("task", ("translation",)))
IN_VAIN |= dict.fromkeys(("top_p", "min_p"), ("temperature", (0.0,)))
IN_VAIN |= {"stride": ("score", (None,)), "dtype": ("quantize", ("int8",))}
IN_VAIN |= dict.fromkeys(("num_beams", "length_penalty"), ("task", ("language modelling",)))


@dataclass(frozen=True)
class SampleConfig:
    # what
    init_from: str = "resume"  # resume: from a checkpoint in out_dir; or a run, a checkpoint, a model's folder, gpt2
    out_dir: str = "out"  # folder of the run to sample from, or a checkpoint in it
    checkpoint: str = "best"  # best: best.pt, the lowest loss; latest: ckpt.pt
    start: str | None = None  # the prompt, FILE:path of one, or - for standard input
    prompts: str | None = None  # a file with a prompt on each line, or -
    interactive: bool = False  # read prompts from the terminal, one after another
    score: str | None = None  # a text file, or -: how well does the model predict it?
    stride: int | None = None  # score: tokens from one window to the next
    num_samples: int = 3  # texts for each prompt, generated together in one batch
    max_new_tokens: int = 500  # tokens of each after the prompt
    stop: tuple[str, ...] = ()  # a text ends before this; several may be given
    logprobs: int | None = None  # JSON lines of tokens and the K likeliest; or colours
    # beam search, for translations
    num_beams: int = 4  # hypotheses; 1: greedy
    length_penalty: float = 1.0  # score: log-probability / tokens^this
    # sampling, for text
    temperature: float = 0.8  # below 1 sharper, above 1 more random; 0: greedy
    top_k: int | None = 200  # sample only from the k most probable tokens
    top_p: float | None = None  # nucleus sampling: probability kept
    min_p: float | None = None  # leave out tokens less probable than this times the best
    repetition_penalty: float = 1.0  # above 1, tokens of the text become less probable
    seed: int = 1337  # the same seed gives the same text
    context: str = "fast"  # when full: fast continues from its newest half; exact recomputes it per token
    # system
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto: float32 on a CPU
    quantize: str | None = None  # weights in 8 bits, on a CPU
    compile: bool = False  # compile the step of one token, for a GPU: a minute at first

    @classmethod
    def choices(cls) -> dict[str, Collection[str]]:
        return {
            "checkpoint": ("best", "latest"),
            "context": ("fast", "exact"),
            "dtype": ("auto", *DTYPES),
            "quantize": ("int8",),
        }

    def validate(self) -> None:
        check_choices(self)
        check_least(
            self, 1, "stride", "num_samples", "max_new_tokens", "num_beams", "top_k"
        )
        check_least(self, 0, "logprobs", "temperature", "seed")
        check_above_0(self, "top_p", "repetition_penalty")
        ranges = {
            "top_p": (0, 1),
            "min_p": (0, 1),
            "repetition_penalty": (0, 100),
            "length_penalty": (-10, 10),
        }
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(
                    f"{name}={value} must be at least {least} and at most {most}"
                )
        for keys in (
            ("start", "prompts", "score"),
            ("interactive", "prompts", "score"),
            ("compile", "score"),
            ("compile", "quantize"),
        ):
            given = [key for key in keys if getattr(self, key)]
            if len(given) > 1:
                raise ValueError(
                    f"{given[0]} and {given[1]} exclude each other; leave one out"
                )


@dataclass(frozen=True)
class Pipeline:
    """A trained model, made for generation, and what belongs to it."""

    model: nn.Module
    tokenizer: Tokenizer
    task: str
    device: torch.device


def main(argv: list[str]) -> None:
    given = configurator.read(argv, SampleConfig)
    config = configurator.make(SampleConfig, given)
    refuse_vain(given, config)
    source = interchange.chosen_source(config, given)
    loaded = load(
        source,
        config.checkpoint,
        device=config.device,
        dtype=config.dtype,
        quantize=config.quantize,
        compile=config.compile,
    )
    refuse_vain(given, config, loaded.task)
    smaller = "try fewer --num_samples, --max_new_tokens or --num_beams"
    with machine.memory_advice(smaller):
        if config.interactive:
            converse(config, loaded)
        elif not find_task(loaded.task).continues_text:
            print_translations(config, loaded)
        elif config.score:
            print_score(config, loaded)
        else:
            print_texts(config, loaded)


def refuse_vain(given: dict, config: SampleConfig, task: str | None = None) -> None:
    """Raise UserError for a key that does nothing in these settings. task: None before the model is known."""
    settings = asdict(config) | {"task": task}
    for why in in_vain(given, settings, IN_VAIN).values():
        raise UserError(f"{why}; leave it out")


def load(
    source: str | Path,
    which: str = "best",
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    compile: bool = False,
) -> Pipeline:
    """Load what init_from names, made for generation; the keys are those of SampleConfig. Raises UserError."""
    torch_device = pick_device(device)
    weight_dtype = sample_dtype(dtype, torch_device)
    on_cpu = torch_device.type == "cpu"
    if quantize:
        weight_dtype = torch.int8
        if not on_cpu:
            raise UserError(
                f"quantize={quantize} is for CPUs, and the device is {torch_device}; use --dtype=bfloat16"
            )
    # Windows would not let a run replace a file that is mapped
    mapped = on_cpu and sys.platform != "win32"
    loaded = interchange.load(source, which, mapped=mapped)
    print(loaded.description, file=sys.stderr)
    model = loaded.model
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    machine.check_fits(
        f"{source} takes",
        weights * weight_dtype.itemsize,
        free_memory(torch_device),
        "end other programs, or on a CPU take --quantize=int8",
    )
    if compile and not model.has_cache:
        note(f"compile=True has no effect: model={model.config.model} has no cache")
    compiles = compile and model.has_cache and find_task(loaded.task).continues_text
    model = make_generator(model, weight_dtype, torch_device, compiles)
    return Pipeline(model, loaded.tokenizer, loaded.task, torch_device)


# --------------------------------------------------------------------------------------
# Text


class Piece(NamedTuple):
    """What a new token of a text lets appear; token and logits are None for what was held back at its end."""

    row: int  # of this text
    text: str
    token: int | None = None
    logits: torch.Tensor | None = None  # (V,), those that the token was drawn from


def stream_texts(
    loaded: Pipeline, context: Context, samples: list[int], config: SampleConfig
) -> Iterator[Piece]:
    """Continue the texts of the context; samples: the number of each, which chooses its random numbers."""
    tokenizer = loaded.tokenizer
    streams = [TextStream(tokenizer, config.stop) for _ in samples]
    stopped = set()
    for step in continue_texts(
        context,
        config.max_new_tokens,
        tokenizer.vocab_size,
        samples=samples,
        eot=tokenizer.eot,
        stopped=stopped,
        **{key: getattr(config, key) for key in SAMPLER_KEYS},
    ):
        for row, token, logits in zip(step.rows, step.ids, step.logits, strict=True):
            yield Piece(row, streams[row].feed(token), token, logits)
            if streams[row].ended:
                stopped.add(row)
    for row, stream in enumerate(streams):
        yield Piece(row, stream.close())


def complete(loaded: Pipeline, prompt: str, max_new_tokens: int = 500, **keys) -> str:
    """Return the prompt and its continuation, or its translation, for a notebook.

    keys: temperature, stop, num_beams and others of SampleConfig.
    """
    config = SampleConfig(max_new_tokens=max_new_tokens, **keys)
    if not find_task(loaded.task).continues_text:
        return translate_lines([prompt], 1, config, loaded)[0]
    context = make_context([encode_prompt(prompt, loaded.tokenizer)], config, loaded)
    pieces = stream_texts(loaded, context, [0], config)
    return prompt + "".join(piece.text for piece in pieces)


def make_context(
    texts: list[np.ndarray], config: SampleConfig, loaded: Pipeline
) -> Context:
    """Return the context of texts, token ids, that are continued together."""
    rows = [torch.from_numpy(ids) for ids in texts]
    idx = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")
    size = None if config.interactive else idx.shape[1] + config.max_new_tokens
    idx = idx.to(loaded.device)
    return Context(loaded.model, idx, size, exact=config.context == "exact")


def print_texts(config: SampleConfig, loaded: Pipeline) -> None:
    num_samples = config.num_samples if config.temperature else 1
    if num_samples < config.num_samples:
        note("at temperature=0 all texts are the same; here is one")
    prompts = read_prompts(config, loaded)
    size = max(len(ids) for _, ids in prompts) + config.max_new_tokens
    at_once = min(CONTINUED_AT_ONCE, texts_that_fit(loaded, size))
    texts = list(product(range(len(prompts)), range(num_samples)))
    for first in range(0, len(texts), at_once):
        print_batch(prompts, texts[first : first + at_once], config, loaded)


def print_batch(
    prompts: list[tuple[str, np.ndarray]],
    texts: list[tuple[int, int]],
    config: SampleConfig,
    loaded: Pipeline,
) -> None:
    """texts: (number of the prompt, number of the sample). The first is printed while it is written."""
    written = [prompts[number][0] for number, _ in texts]
    ids = [prompts[number][1] for number, _ in texts]
    samples = [sample for _, sample in texts]
    context = make_context(ids, config, loaded)
    pieces = stream_texts(loaded, context, samples, config)
    if config.logprobs is not None:
        if not sys.stdout.isatty():
            print_json_lines(pieces, texts, config.logprobs, loaded.tokenizer)
            return
        pieces = coloured(pieces)
    if texts[0] != (0, 0):
        print(SEPARATOR, file=sys.stderr, flush=True)
    print(written[0], end="", flush=True)
    for piece in pieces:
        written[piece.row] += piece.text
        if piece.row == 0:
            print(piece.text, end="", flush=True)
    print(flush=True)
    for text in written[1:]:
        print(SEPARATOR, file=sys.stderr, flush=True)
        print(text, flush=True)


def texts_that_fit(loaded: Pipeline, size: int, beams: int = 1) -> int:
    """Return how many texts of this many tokens can be continued together in the memory that is free.

    Raises UserError where not even one can.
    """
    free = int(0.9 * free_memory(loaded.device))
    needed = beams * bytes_per_text(loaded.model, size)
    advice = "try fewer --max_new_tokens or --num_beams"
    machine.check_fits(f"a text of {size:,} tokens takes", needed, free, advice)
    return free // needed


def read_prompts(config: SampleConfig, loaded: Pipeline) -> list[tuple[str, np.ndarray]]:
    """Return (the prompt as it is shown, its token ids) for each text to be continued."""
    tokenizer, block_size = loaded.tokenizer, loaded.model.config.block_size
    if config.start is None and config.prompts is None:
        ids = tokenizer.start()
        return [("" if tokenizer.eot is not None else tokenizer.decode(ids), ids)]
    if config.prompts is None:
        texts = [read_start(config.start)]
    else:
        texts = read_text(config.prompts).removesuffix("\n").split("\n")
        if texts == [""]:
            raise UserError(f"{config.prompts} has no prompts; write one on each line")
    prompts = []
    for number, text in enumerate(texts, start=1):
        try:
            ids = encode_prompt(text, tokenizer)
        except UserError as error:
            raise UserError(f"prompt {number:,}: {error}") from error
        if len(ids) > block_size:
            note(
                f"prompt {number:,} has {len(ids):,} tokens; the last {block_size:,} are read"
            )
        prompts.append((text.removeprefix(END_OF_TEXT), ids))
    return prompts


def read_start(start: str) -> str:
    """Return what --start says, or the content of what it names."""
    if start.startswith("FILE:"):
        return read_text(os.path.expanduser(start[5:]))  # noqa: PTH111
    return read_text(start) if start == "-" else start


def read_text(path: str) -> str:
    """Return the text in a file, or for "-" on standard input."""
    try:
        if path == "-":
            return sys.stdin.read()
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the text {path}: it is not UTF-8") from error
    except OSError as error:
        near = nearest_path(path) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"cannot read the text {path}: {error.strerror}{near}") from error


def encode_prompt(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Return the token ids of a text and what comes before one. Raises UserError: empty, or unknown characters."""
    if not text:
        raise UserError(
            "an empty prompt; give at least one character, or leave --start out"
        )
    before = np.array([] if tokenizer.bos is None else [tokenizer.bos], dtype=np.int64)
    # as nanoGPT's users write it
    if tokenizer.eot is not None and text.startswith(END_OF_TEXT):
        before = tokenizer.start()
        text = text.removeprefix(END_OF_TEXT)
    return np.concatenate([before, tokenizer.encode(text)]) if text else before


# --------------------------------------------------------------------------------------
# Log-probabilities and scores

# from this probability on: green, cyan, yellow, red
COLOURS = {0.5: 32, 0.1: 36, 0.01: 33, 0.0: 31}


def coloured(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Give each text the colour of its token's probability, for a terminal."""
    legend = ", ".join(f"\033[{code}m{least:.0%}\033[0m" for least, code in COLOURS.items())
    print(f"colours: the token's probability is at least {legend}", file=sys.stderr)
    code = 0
    for piece in pieces:
        if piece.token is not None:
            probability = float(piece.logits.softmax(dim=-1)[piece.token])
            code = next(code for least, code in COLOURS.items() if probability >= least)
        yield piece._replace(text=f"\033[{code}m{piece.text}\033[0m")


def print_json_lines(
    pieces: Iterable[Piece], texts: list[tuple[int, int]], k: int, tokenizer: Tokenizer
) -> None:
    """Print each token of a text, (number of the prompt, number of the sample), and the k likeliest beside it."""
    for row, _, token, logits in pieces:
        if token is None:
            continue
        logprobs = logits.log_softmax(dim=-1)
        likeliest = logprobs.topk(min(k, len(logprobs))).indices.tolist()
        line = {"prompt": texts[row][0], "sample": texts[row][1]}
        line |= json_token(token, logprobs, tokenizer)
        line["top"] = [json_token(other, logprobs, tokenizer) for other in likeliest]
        print(json.dumps(line, ensure_ascii=False), flush=True)


def json_token(token: int, logprobs: torch.Tensor, tokenizer: Tokenizer) -> dict:
    text = tokenizer.pieces[token].decode("utf-8", "replace")
    return {"token": token, "text": text, "logprob": round(float(logprobs[token]), 6)}


def print_score(config: SampleConfig, loaded: Pipeline) -> None:
    """Score the text in a file from its second token on, or from its first where end-of-text can come before it."""
    tokenizer, block_size = loaded.tokenizer, loaded.model.config.block_size
    ids = tokenizer.encode(read_text(config.score))
    if tokenizer.eot is not None or tokenizer.bos is not None:
        ids = np.concatenate([tokenizer.start(), ids])
    if len(ids) < 2:
        raise UserError(f"{config.score} has no token to predict; give a longer text")
    stride = config.stride or max(1, block_size // 2)
    if stride > block_size:
        raise UserError(
            f"stride={stride} leaves tokens out; it must be at most block_size={block_size}"
        )
    nats = -log_probabilities(loaded.model, ids, stride).astype(np.float64)
    size = int(tokenizer.token_bytes()[ids[1:]].sum())
    print(
        f"{nats.mean():.4f} nats per token, {nats.sum() / np.log(2) / size:.4f} bits per byte,"
        f" perplexity {np.exp(nats.mean()):.2f}, {nats.sum():.2f} nats in all;"
        f" {len(nats):,} tokens, {size:,} bytes, windows of {block_size:,} tokens, each {stride:,} further"
    )


# --------------------------------------------------------------------------------------
# Prompt after prompt


def converse(config: SampleConfig, loaded: Pipeline) -> None:
    """Read a line, write what follows it, and so on; what has been read and written is kept. Ends with Ctrl-D."""
    print("Ctrl-D ends; an empty line continues the text", file=sys.stderr)
    if not find_task(loaded.task).continues_text:
        for line in typed_lines():
            print(translate_lines([line], 1, config, loaded)[0], flush=True)
        return
    tokenizer = loaded.tokenizer
    context = None
    first = [] if config.start is None else [read_start(config.start)]
    for turn, line in enumerate(chain(first, typed_lines())):
        try:
            if context is None:  # the line begins the text
                ids = encode_prompt(line, tokenizer) if line else tokenizer.start()
                context = make_context([ids], config, loaded)
            elif line:
                ids = torch.from_numpy(tokenizer.encode_rest(line))
                context.append(ids[None].to(loaded.device))
        except UserError as error:
            note(str(error))
            continue
        for piece in stream_texts(loaded, context, [turn], config):
            print(piece.text, end="", flush=True)
        print(flush=True)


def typed_lines() -> Iterator[str]:
    """Yield lines from standard input, after a prompt where a person types them."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


# --------------------------------------------------------------------------------------
# Translations


def print_translations(config: SampleConfig, loaded: Pipeline) -> None:
    """Print a line for each line of the text; an empty one stays empty."""
    text = read_start(config.start or "")
    if not text:
        raise UserError(
            'nothing to translate; give a sentence, as --start="Wo wohnst du?", or --start=FILE:german.txt'
        )
    lines = [" ".join(line.split()) for line in text.removesuffix("\n").split("\n")]
    unit = f"{TRANSLATED_AT_ONCE} lines"
    for first in tqdm(
        range(0, len(lines), TRANSLATED_AT_ONCE), unit=unit, delay=2, disable=None
    ):
        batch = lines[first : first + TRANSLATED_AT_ONCE]
        for translation in translate_lines(batch, first + 1, config, loaded):
            print(translation, flush=True)


def translate_lines(
    lines: list[str], number: int, config: SampleConfig, loaded: Pipeline
) -> list[str]:
    """Translate each line; number: of the first line, for notes."""
    from humptygpt.translation.beams import translate

    model, tokenizer = loaded.model, loaded.tokenizer
    # without the end-of-text token; a source that shares the context with its translation has half of it
    room = (
        model.config.block_size if model.has_encoder else model.config.block_size // 2
    ) - 1
    sources = {}
    for i, ids in enumerate(tokenizer.encode_batch(lines)):
        if len(ids) > room:
            note(
                f"line {number + i:,} has {len(ids):,} tokens; the first {room:,} are read"
            )
        if len(ids):
            sources[i] = np.append(ids[:room], tokenizer.eot)
    texts_that_fit(loaded, model.config.block_size, config.num_beams)
    translations = translate(
        model,
        list(sources.values()),
        tokenizer.eot,
        tokenizer.vocab_size,
        num_beams=config.num_beams,
        length_penalty=config.length_penalty,
        max_new_tokens=config.max_new_tokens,
    )
    texts = [""] * len(lines)
    for i, translation in zip(sources, translations, strict=True):
        # on one line, whatever the model writes
        texts[i] = " ".join(tokenizer.decode(translation.ids).split())
        if not translation.ended:
            note(f"line {number + i:,} has no room for more of its translation")
    return texts


if __name__ == "__main__":
    machine.run(main)
