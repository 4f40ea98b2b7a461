"""Generate text from a checkpoint and a prompt, or translate the prompt.

    python sample.py --out_dir=out/shakespeare_char
    python sample.py --out_dir=out/shakespeare_char --start="ROMEO:" --num_samples=1 --temperature=0
    python sample.py --out_dir=out/shakespeare_char --start=FILE:prompt.txt > text.txt
    echo "ROMEO:" | python sample.py --out_dir=out/shakespeare_char --start=-
    python sample.py --out_dir=out/shakespeare_char --prompts=prompts.txt --stop=X     one prompt per line
    python sample.py --out_dir=out/shakespeare_char --interactive=True
    python sample.py --init_from=FOLDER --start="..."     a model in Hugging Face's format, or nanoGPT's ckpt.pt
    python sample.py --out_dir=out/translate_de_en --start="Wo wohnst du?"
    python sample.py --out_dir=out/translate_de_en --start=FILE:german.txt > english.txt     line by line

Only the text goes to stdout; everything else goes to stderr.
"""

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

from humptygpt import machine

if __name__ == "__main__":
    machine.start()  # before numpy and torch are loaded

from humptygpt import cli
from humptygpt.cli import TEXTS, UserError, check_effects, check_least, note
from humptygpt.generation.generator import IN_VAIN as PIPELINE_VAIN
from humptygpt.generation.generator import (
    Pipeline,
    PipelineConfig,
    choose_threads,
    chosen_source,
)
from humptygpt.generation.sampling import (
    Context,
    Piece,
    Prompt,
    check_sampling,
    encode_prompt,
    read_prompts,
    read_start,
    stream_texts,
    texts_at_once,
)

SEPARATOR = "---------------"
SAMPLING = "temperature top_k top_p min_p repetition_penalty seed max_new_tokens stop"
# {task of the model: the keys that have no effect on it}
NOT_FOR = {
    "language modelling": "system num_beams length_penalty",
    "chat": "prompts num_samples num_beams length_penalty",
    "translation": "prompts num_samples system seed stop temperature top_k top_p min_p"
    " repetition_penalty",
}
# [(keys, another setting, the values of that setting for which the keys have no effect)]
IN_VAIN = [*PIPELINE_VAIN, ("num_samples", "interactive", (True,))]


@dataclass(frozen=True)
class SampleConfig(PipelineConfig):
    # input and output
    start: str | None = None  # prompt, FILE:path to read it from a file, or - for stdin
    prompts: str | None = None  # file with one prompt per line, or - for stdin
    interactive: bool = False  # read lines from the terminal; an empty one goes on
    system: str | None = None  # for a chat model: a message that comes before all others
    num_samples: int = 3  # texts for each prompt, generated together in one batch
    max_new_tokens: int = 500  # tokens to generate after each prompt
    stop: TEXTS = ()  # end a text just before this string; several may be given
    # beam search, for translations
    num_beams: int = 4  # hypotheses kept at each step; 1: greedy
    length_penalty: float = 1.0  # rank by log-probability / length^length_penalty
    # sampling, for text
    temperature: float = 0.8  # below 1: sharper; above 1: more random; 0: greedy
    top_k: int | None = 200  # sample only from the k most probable tokens
    top_p: float | None = None  # nucleus sampling: total probability of the tokens kept
    min_p: float | None = None  # drop tokens below this fraction of the top probability
    repetition_penalty: float = 1.0  # above 1: makes tokens already in the text less likely
    seed: int = 1337  # the same seed gives the same text

    def validate(self) -> None:
        super().validate()
        check_sampling(self)
        check_least(self, 1, "num_samples", "max_new_tokens", "num_beams")
        check_least(self, 0, "seed")
        if self.prompts and (self.start or self.interactive):
            raise ValueError("prompts cannot be combined with start or interactive")

    def select(self, keys: str) -> dict[str, object]:
        return {key: getattr(self, key) for key in keys.split()}


def main(argv: list[str]) -> None:
    given = cli.read(argv, SampleConfig)
    config = cli.make(SampleConfig, given)
    check_effects(given, vars(config), IN_VAIN)
    loaded = config.pipeline(chosen_source(config, given))
    for key in NOT_FOR[loaded.task].split():
        if key in given:
            raise UserError(f"{key}={given[key]} has no effect with task={loaded.task}")
    with machine.memory_advice(
        "try a smaller --num_samples, --max_new_tokens or --num_beams"
    ):
        if loaded.task == "translation":
            print_translations(config, loaded)
            return
        choose_threads(loaded)
        if config.interactive or loaded.task == "chat":
            converse(config, loaded)
        else:
            print_texts(config, loaded)


# --------------------------------------------------------------------------------------
# Generate


def load(source: str | Path, which: str = "best", **keys) -> Pipeline:
    """Load the model that init_from=source names, for complete(). For use in notebooks.

    which: best or latest. keys: device, dtype or quantize, as in SampleConfig.
    """
    config = cli.restore(PipelineConfig, {"checkpoint": which, **keys})
    return config.pipeline(source)


def complete(loaded: Pipeline, prompt: str, max_new_tokens: int = 500, **keys) -> str:
    """Return the prompt with its continuation, or the translation of the prompt. For use in notebooks.

    keys: temperature, stop, num_beams or any other key of SampleConfig. Raises UserError if a key is not valid.
    """
    config = cli.restore(SampleConfig, {"max_new_tokens": max_new_tokens, **keys})
    if loaded.task == "translation":
        return next(translate([prompt], config, loaded))
    pieces = write([encode_prompt(prompt, loaded.tokenizer)], [0], config, loaded)
    return prompt + "".join(piece.text for piece in pieces)


def write(
    prompts: list[list[int]],
    samples: Collection[int],
    config: SampleConfig,
    loaded: Pipeline,
) -> Iterator[Piece]:
    """Continue prompts, given as token ids, in one batch. samples: one number per text, which seeds its sampling."""
    size = max(map(len, prompts)) + config.max_new_tokens
    context = Context(loaded.model, prompts, size, device=loaded.device)
    return stream_texts(context, loaded.tokenizer, samples, **config.select(SAMPLING))


def translate(lines: list[str], config: SampleConfig, loaded: Pipeline) -> Iterator[str]:
    from humptygpt.generation.translation import translate_lines

    how = config.select("num_beams length_penalty max_new_tokens")
    return translate_lines(loaded.model, loaded.tokenizer, lines, **how)


# --------------------------------------------------------------------------------------
# Print


def print_texts(config: SampleConfig, loaded: Pipeline) -> None:
    """Print the samples for all prompts, in batches that fit in memory."""
    num_samples = config.num_samples if config.temperature else 1
    if num_samples < config.num_samples:
        note("at temperature=0 all samples are the same, so only one is printed")
    room = loaded.model.config.block_size
    prompts = read_prompts(config.start, config.prompts, loaded.tokenizer, room)
    size = max(len(prompt.ids) for prompt in prompts) + config.max_new_tokens
    at_once = texts_at_once(loaded.model, loaded.device, size)
    texts = list(product(prompts, range(num_samples)))
    for first in range(0, len(texts), at_once):
        if first:
            print(SEPARATOR, file=sys.stderr, flush=True)
        print_batch(texts[first : first + at_once], config, loaded)


def print_batch(
    texts: list[tuple[Prompt, int]], config: SampleConfig, loaded: Pipeline
) -> None:
    """Print the first text as it is generated, then the others. texts: (prompt, sample number)."""
    prompts, samples = zip(*texts, strict=True)
    pieces = write([prompt.ids for prompt in prompts], samples, config, loaded)
    first, *others = [prompt.text for prompt in prompts]
    print(first, end="", flush=True)
    for piece in pieces:
        if piece.row:
            others[piece.row - 1] += piece.text
        else:
            print(piece.text, end="", flush=True)
    print(flush=True)
    for text in others:
        print(SEPARATOR, file=sys.stderr, flush=True)
        print(text, flush=True)


def print_translations(config: SampleConfig, loaded: Pipeline) -> None:
    """Print a translation of each line. The translation of an empty line is empty."""
    texts = typed_lines() if config.interactive else [read_start(config.start or "")]
    if texts == [""]:
        raise UserError(
            'nothing to translate; give a sentence, such as --start="Wo wohnst du?", or --start=FILE:german.txt'
        )
    for text in texts:
        lines = text.removesuffix("\n").split("\n")
        for translation in translate(lines, config, loaded):
            print(translation, flush=True)


# --------------------------------------------------------------------------------------
# Converse


def converse(config: SampleConfig, loaded: Pipeline) -> None:
    """Read a line, print what the model writes after it, and repeat. Without --interactive, answer only --start."""
    partner = Text(loaded)
    if loaded.task == "chat":
        from humptygpt.generation.chat import Talk

        partner = Talk(loaded, config.system)
    first = [] if config.start is None else [read_start(config.start)]
    lines = typed_lines() if config.interactive or not first else []
    for turn, line in enumerate(chain(first, lines)):
        try:
            for text in partner.reply(line, turn, **config.select(SAMPLING)):
                print(text, end="", flush=True)
            print(flush=True)
        except UserError as error:
            note(str(error))


class Text:
    """A text that is continued by turns. Everything that was read and written stays in the context."""

    def __init__(self, loaded: Pipeline):
        self.loaded = loaded
        self.context = None

    def reply(self, line: str, sample: int, **sampling) -> Iterator[str]:
        """Yield the continuation in pieces. sample: seeds it. Raises UserError if the line cannot be encoded."""
        tokenizer = self.loaded.tokenizer
        if self.context is None:  # the text starts with this line
            ids = encode_prompt(line, tokenizer) if line else tokenizer.start().tolist()
            self.context = Context(self.loaded.model, [ids], device=self.loaded.device)
        elif line:
            self.context.append([tokenizer.encode_rest(line).tolist()])
        for piece in stream_texts(self.context, tokenizer, [sample], **sampling):
            yield piece.text


def typed_lines() -> Iterator[str]:
    """Say how to quit, and yield lines from standard input, with "> " as the prompt if it is a terminal."""
    print(f"Ctrl-{'Z' if machine.ON_WINDOWS else 'D'} quits", file=sys.stderr)
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


if __name__ == "__main__":
    machine.run(main)
