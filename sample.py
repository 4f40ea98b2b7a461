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
import shlex
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from humptygpt.core import limits

if __name__ == "__main__":
    limits.start(limits.TORCH)  # before numpy and torch are loaded

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from humptygpt.core import settings as configurator
from humptygpt.core.device import DTYPES, autocast, free_memory, pick_device, sample_dtype
from humptygpt.core.errors import UserError
from humptygpt.core.limits import gigabytes
from humptygpt.core.settings import check, check_path, nearest_path, setting, without_effect
from humptygpt.generation.beams import NUM_BEAMS, translate
from humptygpt.generation.decoder import prepare_for_generation
from humptygpt.generation.sampling import Context, Sampler, bytes_per_text, continue_texts
from humptygpt.generation.scoring import log_probabilities
from humptygpt.generation.streams import TextStream
from humptygpt.interchange import load as interchange
from humptygpt.tokenizer.tokenizers import END_OF_TEXT, Tokenizer
from humptygpt.training.memory import check_weights_fit

TRANSLATED_AT_ONCE = 500  # lines of a text, before the first of them is printed
CONTINUED_AT_ONCE = 64  # texts, but all samples of one prompt
TEXT = {"only_with": {"task": "language modelling"}}
SAMPLING = TEXT | {"not_with": {"temperature": 0.0}}
TRANSLATION = {"only_with": {"task": "translation"}}


@dataclass(frozen=True)
class SampleConfig:
    init_from: str = setting(
        "resume",
        "resume: from a checkpoint in out_dir; or a run, a checkpoint, a model's folder, gpt2",
        "what",
    )
    out_dir: str = setting(
        "out", "folder of the run to sample from, or a checkpoint in it", path=True
    )
    checkpoint: str = setting(
        "best", "best: best.pt, the lowest loss; latest: ckpt.pt", choices=("best", "latest")
    )
    start: str | None = setting(
        None,
        "the prompt, FILE:path of one, or - for standard input; None: end-of-text, or a line break",
    )
    prompts: str | None = setting(
        None,
        "a file with a prompt on each line, or -; they are continued together",
        path=True,
        **TEXT,
    )
    interactive: bool = setting(
        False, "read prompts from the terminal; each continues where the last text ended"
    )
    score: str | None = setting(
        None, "a text file, or -: how well does the model predict it?", path=True, **TEXT
    )
    stride: int | None = setting(
        None,
        "of --score: tokens that each window is further than the last; None: half of block_size",
        at_least=1,
        **TEXT,
    )
    num_samples: int = setting(
        3, "texts for each prompt, generated together in one batch", at_least=1, **TEXT
    )
    max_new_tokens: int = setting(500, "tokens of each after the prompt", at_least=1)
    stop: tuple[str, ...] = setting(
        (), "a text ends before this, which is not printed; several may be given", **TEXT
    )
    logprobs: int | None = setting(
        None,
        "JSON lines: tokens, their log-probabilities and the K likeliest; on a terminal, colours",
        at_least=0,
        **TEXT,
    )

    num_beams: int = setting(
        NUM_BEAMS, "hypotheses; 1: greedy", "beam search", at_least=1, **TRANSLATION
    )
    length_penalty: float = setting(
        1.0,
        "score: log-probability / tokens^this; above 1 favours long ones",
        at_least=-10,
        at_most=10,
        **TRANSLATION,
    )

    temperature: float = setting(
        0.8, "below 1 sharper, above 1 more random; 0: greedy", "sampling", at_least=0, **TEXT
    )
    top_k: int | None = setting(
        200, "sample from the k most probable tokens only", at_least=1, **SAMPLING
    )
    top_p: float | None = setting(
        None, "nucleus sampling: probability kept", above=0, at_most=1, **SAMPLING
    )
    min_p: float | None = setting(
        None,
        "leave out tokens less probable than this times the most probable",
        at_least=0,
        at_most=1,
        **SAMPLING,
    )
    repetition_penalty: float = setting(
        1.0,
        "above 1 makes tokens that the text already has less probable",
        above=0,
        at_most=100,
        **TEXT,
    )
    seed: int = setting(
        1337, "the same seed gives the same text", at_least=0, below=2**63, **SAMPLING
    )
    context: str = setting(
        "fast",
        "when full: fast continues from its newest half; exact recomputes it per token",
        choices=("fast", "exact"),
        **TEXT,
    )

    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps", "system")
    dtype: str = setting("auto", "auto: float32 on a CPU", choices=("auto", *DTYPES))
    quantize: str | None = setting(None, "weights in 8 bits, on a CPU", choices=("int8",))
    compile: bool = setting(
        False, "nanoGPT's key; has no effect: every length of text would be compiled again"
    )

    def __post_init__(self):
        check(self)
        if "" in self.stop:
            raise ValueError(
                "stop= is empty: every text would end at once; give at least one character"
            )
        modes = (
            ("start", "prompts", "score"),
            ("interactive", "prompts", "score"),
            ("interactive", "logprobs", "score"),
        )
        for keys in modes:
            given = [key for key in keys if getattr(self, key) not in (None, False)]
            if len(given) > 1:
                raise ValueError(
                    f"{given[0]} and {given[1]} exclude each other; leave one of them out"
                )
        if self.stride is not None and self.score is None:
            raise ValueError(f"stride={self.stride} is for --score=FILE alone")
        if self.quantize and self.dtype not in ("auto", "float32"):
            raise ValueError(
                f"quantize={self.quantize} has weights in 8 bits, not in dtype={self.dtype}; leave dtype out"
            )

    def sampling(self) -> dict:
        keys = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True)
class Pipeline:
    """A trained model, made for generation, and what belongs to it."""

    model: nn.Module
    tokenizer: Tokenizer
    task: str
    device: torch.device
    autocast: AbstractContextManager  # in which the model is to be used


def main(argv: list[str]) -> None:
    given = configurator.read(argv, SampleConfig)
    config = configurator.make(SampleConfig, given)
    options = {"device": config.device, "dtype": config.dtype, "quantize": config.quantize}
    loaded = load(interchange.chosen_source(config, given), config.checkpoint, **options)
    for key, why in without_effect(asdict(config) | {"task": loaded.task}, SampleConfig).items():
        if key in given:
            print(f"note: {key}={given[key]} has no effect {why}", file=sys.stderr)
    if config.compile:
        print("note: compile=True has no effect in sample.py", file=sys.stderr)
    if busy := limits.load_note():
        print(f"note: {busy}", file=sys.stderr)
    smaller = "try fewer --num_samples, --max_new_tokens or --num_beams"
    with limits.memory_advice(smaller), loaded.autocast:
        if config.interactive:
            converse(config, loaded)
        elif loaded.task == "translation":
            print_translations(config, loaded)
        elif config.score:
            print_score(config, loaded)
        else:
            print_texts(config, loaded)


def load(
    source: str | Path,
    which: str = "best",
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
) -> Pipeline:
    """The model of a run, or of what else init_from names; the keys are those of SampleConfig. Raises UserError."""
    torch_device = pick_device(device)
    torch_dtype = sample_dtype(dtype, torch_device)
    if quantize and torch_device.type != "cpu":
        raise UserError(
            f"quantize={quantize} is for CPUs, and the device is {torch_device}; use --dtype=bfloat16"
        )
    on_cpu = torch_device.type == "cpu"  # there the weights are converted; a GPU has autocast
    # Windows would not let a run replace a file that is mapped
    loaded = interchange.load(source, which, mapped=on_cpu and sys.platform == "linux")
    print(loaded.description, file=sys.stderr)
    model, tokenizer, task = loaded.model, loaded.tokenizer, loaded.task
    del loaded  # it would keep the weights that are replaced
    bits = 8 if quantize else 16 if on_cpu and torch_dtype == torch.bfloat16 else 32
    check_weights_fit(model, str(source), torch_device, bits=bits)
    model = prepare_for_generation(
        model.to(torch_device), torch_dtype if on_cpu else torch.float32, quantize == "int8"
    )
    context = autocast(torch_device, torch.float32 if on_cpu else torch_dtype)
    return Pipeline(model, tokenizer, task, torch_device, context)


# --------------------------------------------------------------------------------------
# Text


def complete(
    loaded: Pipeline,
    prompt: str,
    max_new_tokens: int = 500,
    *,
    stop: tuple[str, ...] = (),
    **sampling,
) -> str:
    """The prompt and its continuation, for a notebook; sampling: temperature, top_k, top_p, min_p, seed and so on."""
    _, ids = encode_prompt(prompt, loaded.tokenizer)
    context = Context(loaded.model, to_batch(ids, loaded), len(ids) + max_new_tokens)
    with loaded.autocast:
        return prompt + "".join(stream_one(loaded, context, max_new_tokens, stop, **sampling))


def stream_one(
    loaded: Pipeline, context: Context, n: int, stop: tuple[str, ...], sample: int = 0, **sampling
) -> Iterator[str]:
    """What follows a single text, n tokens at most, as it becomes readable; sample: the number of the sample."""
    tokenizer, stream, stopped = loaded.tokenizer, TextStream(loaded.tokenizer, stop), set()
    sampler = Sampler([sample], n, **sampling)
    for step in continue_texts(
        context, sampler, n, tokenizer.vocab_size, eot=tokenizer.eot, stopped=stopped
    ):
        yield stream.feed(step.ids[0])
        if stream.ended:
            stopped.add(0)
    yield stream.close()


def to_batch(ids: np.ndarray, loaded: Pipeline) -> torch.Tensor:
    """(1, T), on the device."""
    return torch.from_numpy(ids).to(loaded.device)[None]


def print_texts(config: SampleConfig, loaded: Pipeline) -> None:
    num_samples = config.num_samples if config.temperature else 1
    if num_samples < config.num_samples:
        print("note: at temperature=0 all texts are the same; here is one", file=sys.stderr)
    prompts = read_prompts(config, loaded)
    size = max(len(ids) for _, ids in prompts) + config.max_new_tokens
    check_texts_fit(loaded, "num_samples", num_samples, size)
    at_once = min(max(num_samples, CONTINUED_AT_ONCE), texts_that_fit(loaded, size))
    texts = [(number, sample) for number in range(len(prompts)) for sample in range(num_samples)]
    for first in range(0, len(texts), at_once):
        print_batch(prompts, texts[first : first + at_once], config, loaded)


def print_batch(
    prompts: list[tuple[str, np.ndarray]],
    texts: list[tuple[int, int]],
    config: SampleConfig,
    loaded: Pipeline,
) -> None:
    """texts: (number of the prompt, number of the sample). The first is printed while it is written."""
    tokenizer, n = loaded.tokenizer, config.max_new_tokens
    idx = left_padded([prompts[number][1] for number, _ in texts]).to(loaded.device)
    context = Context(loaded.model, idx, idx.shape[1] + n, exact=config.context == "exact")
    sampler = Sampler([sample for _, sample in texts], n, **config.sampling())
    streams, stopped = [TextStream(tokenizer, config.stop) for _ in texts], set()
    written = [prompts[number][0] for number, _ in texts]
    colours, json_lines = shown_logprobs(config)

    def write(row: int, text: str) -> None:
        written[row] += text
        if row == 0 and not json_lines:
            print(text, end="", flush=True)

    if texts[0] != (0, 0) and not json_lines:
        print("---------------", file=sys.stderr, flush=True)
    print("" if json_lines else written[0], end="", flush=True)
    for step in continue_texts(
        context, sampler, n, tokenizer.vocab_size, eot=tokenizer.eot, stopped=stopped
    ):
        if config.logprobs is not None:
            logprobs = step.logits.log_softmax(dim=-1)
        for i, (row, token) in enumerate(zip(step.rows, step.ids, strict=True)):
            if json_lines:
                print(
                    json_line(texts[row], token, logprobs[i], config.logprobs, tokenizer),
                    flush=True,
                )
            text = streams[row].feed(token)
            write(row, coloured(text, float(logprobs[i, token])) if colours else text)
            if streams[row].ended:
                stopped.add(row)
    if json_lines:
        return
    for row, stream in enumerate(streams):
        write(row, stream.close())
    print(flush=True)
    for text in written[1:]:
        print("---------------", file=sys.stderr, flush=True)
        print(text, flush=True)


def left_padded(prompts: list[np.ndarray]) -> torch.Tensor:
    """(B, T) int64, -1 before the first token of the shorter ones."""
    longest = max(map(len, prompts))
    return torch.from_numpy(
        np.stack([np.pad(ids, (longest - len(ids), 0), constant_values=-1) for ids in prompts])
    )


def texts_that_fit(loaded: Pipeline, size: int) -> int:
    """How many texts of this many tokens can be continued together in the memory that is free."""
    return int(0.9 * free_memory(loaded.device)) // bytes_per_text(loaded.model.config, size)


def check_texts_fit(loaded: Pipeline, key: str, count: int, size: int) -> None:
    """Raises UserError where `count` texts of `size` tokens each do not fit; key: what the user calls their number."""
    fit = texts_that_fit(loaded, size)
    if count <= fit:
        return
    way_out = f"--{key}={fit} would fit"
    if not fit:
        fitting = next(
            (n for n in (size >> i for i in range(1, 64)) if texts_that_fit(loaded, n)), 0
        )
        way_out = (
            f"--{key}=1 --max_new_tokens={fitting} would fit" if fitting else "free some memory"
        )
    needed = gigabytes(count * bytes_per_text(loaded.model.config, size))
    free = gigabytes(free_memory(loaded.device))
    raise UserError(
        f"{key}={count} texts of {size:,} tokens take {needed} of memory, and {free} are free; {way_out}"
    )


def read_prompts(config: SampleConfig, loaded: Pipeline) -> list[tuple[str, np.ndarray]]:
    """(the prompt as it is shown, its token ids) for each text to be continued."""
    tokenizer, block_size = loaded.tokenizer, loaded.model.config.block_size
    if config.prompts is None:
        prompts = [
            start_prompt(tokenizer)
            if config.start is None
            else encode_prompt(read_start(config.start), tokenizer)
        ]
    else:
        lines = read_text(config.prompts).splitlines()
        prompts = []
        for number, line in enumerate(lines, start=1):
            try:
                prompts.append(encode_prompt(line, tokenizer))
            except UserError as error:
                raise UserError(f"{config.prompts}, line {number:,}: {error}") from error
        if not prompts:
            raise UserError(f"{config.prompts} has no prompts; write one on each line")
    for number, (_, ids) in enumerate(prompts, start=1):
        if len(ids) > block_size:
            which = "the prompt" if config.prompts is None else f"the prompt in line {number:,}"
            print(
                f"note: {which} has {len(ids):,} tokens; the last {block_size:,} are read",
                file=sys.stderr,
            )
    return prompts


def read_start(start: str) -> str:
    """What --start says, or the content of what it names."""
    if start == "-":
        return read_text(start)
    if start.startswith("FILE:"):
        return read_text(check_path("start=FILE:", start[5:]))
    if os.path.isfile(start):
        file = shlex.quote(f"--start=FILE:{start}")
        print(
            f"note: the prompt is {start!r}; for the text in the file of this name write {file}",
            file=sys.stderr,
        )
    return start


def read_text(path: str) -> str:
    """The text in a file, or for "-" on standard input."""
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        near = nearest_path(path) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"cannot read the text {Path(path)}: {reason}{near}") from error


def start_prompt(tokenizer: Tokenizer) -> tuple[str, np.ndarray]:
    """The prompt where none is given, as encode_prompt() has it."""
    ids = tokenizer.start()
    return "" if tokenizer.eot is not None else tokenizer.decode(ids), ids


def encode_prompt(text: str, tokenizer: Tokenizer) -> tuple[str, np.ndarray]:
    """(the prompt as it is shown, its token ids). Raises UserError where it is empty or has unknown characters."""
    if not text:
        raise UserError("an empty prompt; give at least one character, or leave --start out")
    ids = np.array([] if tokenizer.bos is None else [tokenizer.bos], dtype=np.int64)
    if tokenizer.eot is not None and text.startswith(END_OF_TEXT):  # as nanoGPT's users write it
        ids, text = tokenizer.start(), text.removeprefix(END_OF_TEXT)
    return text, np.concatenate([ids, tokenizer.encode(text)]) if text else ids


# --------------------------------------------------------------------------------------
# Log-probabilities and scores

COLOURS = (
    (0.5, 32),
    (0.1, 36),
    (0.01, 33),
    (0.0, 31),
)  # from this probability on: green, cyan, yellow, red


def shown_logprobs(config: SampleConfig) -> tuple[bool, bool]:
    """(colours on a terminal, JSON lines elsewhere): how log-probabilities are shown, if at all."""
    if config.logprobs is None:
        return False, False
    if not sys.stdout.isatty():
        return False, True
    legend = ", ".join(f"\033[{code}m{at_least:.0%}\033[0m" for at_least, code in COLOURS)
    print(f"colours: the token's probability is at least {legend}", file=sys.stderr)
    return True, False


def coloured(text: str, logprob: float) -> str:
    """The text in the colour of its token's probability."""
    code = next(code for at_least, code in COLOURS if np.exp(logprob) >= at_least)
    return f"\033[{code}m{text}\033[0m" if text else ""


def json_line(
    text: tuple[int, int], token: int, logprobs: torch.Tensor, k: int, tokenizer: Tokenizer
) -> str:
    """One token of a text, (number of the prompt, number of the sample), and the k likeliest; logprobs: (V,)."""

    def entry(token: int) -> dict:
        piece = tokenizer.pieces[token].decode("utf-8", "replace")
        return {"token": token, "text": piece, "logprob": round(float(logprobs[token]), 6)}

    likeliest = logprobs.topk(min(k, len(logprobs))).indices.tolist() if k else []
    line = {
        "prompt": text[0],
        "sample": text[1],
        **entry(token),
        "top": [entry(other) for other in likeliest],
    }
    return json.dumps(line, ensure_ascii=False)


def print_score(config: SampleConfig, loaded: Pipeline) -> None:
    """Of the text in a file, from its second token on, or from its first where end-of-text can come before it."""
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
    nats = -log_probabilities(loaded.model, ids, stride, loaded.device).astype(np.float64)
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
    if loaded.task == "translation":
        for line in typed_lines():
            print(translate_lines([line], 1, config, loaded)[0], flush=True)
        return
    tokenizer, context = loaded.tokenizer, None
    first = [] if config.start is None else [read_start(config.start)]
    for turn, line in enumerate(chain(first, typed_lines())):
        try:
            ids = (
                encode_prompt(line, tokenizer)[1]
                if line
                else tokenizer.start()
                if context is None
                else None
            )
        except UserError as error:
            print(f"note: {error}", file=sys.stderr)
            continue
        if context is None:
            context = Context(loaded.model, to_batch(ids, loaded), exact=config.context == "exact")
        elif ids is not None:
            context.append(to_batch(ids, loaded))
        for text in stream_one(
            loaded, context, config.max_new_tokens, config.stop, turn, **config.sampling()
        ):
            print(text, end="", flush=True)
        print(flush=True)


def typed_lines() -> Iterator[str]:
    """Lines from standard input, after a prompt where a person types them."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


# --------------------------------------------------------------------------------------
# Translations


def print_translations(config: SampleConfig, loaded: Pipeline) -> None:
    """One line for each line of the text; an empty one stays empty."""
    if config.start is None:
        raise UserError(
            'nothing to translate; give a sentence, as --start="Wo wohnst du?", or --start=FILE:german.txt'
        )
    text = read_start(config.start)
    if not text:
        raise UserError("an empty text; give at least one character to translate")
    lines = [" ".join(line.split()) for line in text.removesuffix("\n").split("\n")]
    unit = f"{TRANSLATED_AT_ONCE} lines"
    for first in tqdm(range(0, len(lines), TRANSLATED_AT_ONCE), unit=unit, delay=2, disable=None):
        for translation in translate_lines(
            lines[first : first + TRANSLATED_AT_ONCE], first + 1, config, loaded
        ):
            print(translation, flush=True)


def translate_lines(
    lines: list[str], number: int, config: SampleConfig, loaded: Pipeline
) -> list[str]:
    """A translation for each line; number: of the first line, for notes."""
    model, tokenizer = loaded.model, loaded.tokenizer
    # without the end-of-text token; a source that shares the context with its translation has half of it
    room = (model.config.block_size if model.has_encoder else model.config.block_size // 2) - 1
    sources = {}
    for i, line in enumerate(lines):
        ids = tokenizer.encode(line)
        if len(ids) > room:
            print(
                f"note: line {number + i:,} has {len(ids):,} tokens; the first {room:,} are read",
                file=sys.stderr,
            )
        if len(ids):
            sources[i] = np.append(ids[:room], tokenizer.eot)
    check_texts_fit(loaded, "num_beams", config.num_beams, model.config.block_size)
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
        translations[i] = " ".join(
            tokenizer.decode(translation.ids).split()
        )  # on one line, whatever the model writes
        if not translation.ended:
            print(
                f"note: line {number + i:,} has no room for more of its translation",
                file=sys.stderr,
            )
    return translations


if __name__ == "__main__":
    configurator.run(main)
