"""Generate text from a checkpoint and a prompt, or translate the prompt.

    python sample.py --out_dir=out/shakespeare_char
    python sample.py --out_dir=out/shakespeare_char --start="ROMEO:" --num_samples=1 --temperature=0
    python sample.py --out_dir=out/shakespeare_char --start=FILE:prompt.txt > text.txt
    echo "ROMEO:" | python sample.py --out_dir=out/shakespeare_char --start=-
    python sample.py --out_dir=out/shakespeare_char --prompts=prompts.txt --stop=X     one prompt per line
    python sample.py --out_dir=out/humpty_chat         a model to talk to
    python sample.py --init_from=FOLDER --start="..."     a model in Hugging Face's format
    python sample.py --out_dir=out/translate_de_en --start="Wo wohnst du?"
    python sample.py --out_dir=out/translate_de_en --start=FILE:german.txt > english.txt     line by line

Only the text goes to stdout; everything else goes to stderr.
"""

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from humptygpt import machine

if __name__ == "__main__":
    machine.start()  # before numpy and torch are loaded

from humptygpt import cli
from humptygpt.cli import (
    TEXTS,
    UserError,
    Vain,
    as_user_error,
    check_effects,
    check_least,
    note,
)
from humptygpt.generation import generator
from humptygpt.generation.chat import read_messages, reply
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
from humptygpt.tokenizers.chat import Turn

SEPARATOR = "---------------"
SAMPLING = "temperature top_k top_p min_p repetition_penalty seed max_new_tokens stop"
TALKS = 'this model talks; ask it with reply([{"role": "user", "content": "..."}])'
# task: that of the model
IN_VAIN: Vain = [
    *generator.IN_VAIN,
    ("system num_beams", "task", ("language modelling",)),
    ("prompts num_samples num_beams", "task", ("chat",)),
    ("prompts num_samples system seed stop", "task", ("translation",)),
    ("temperature top_k top_p min_p repetition_penalty", "task", ("translation",)),
]


@dataclass(frozen=True)
class SampleConfig(PipelineConfig):
    # input and output
    start: str | None = None  # prompt, FILE:path to read it from a file, or - for stdin
    prompts: str | None = None  # file with one prompt per line, or - for stdin
    system: str | None = None  # for a chat model: a message that comes before all others
    num_samples: int = 3  # texts for each prompt, generated together in one batch
    max_new_tokens: int = 500  # tokens to generate after each prompt
    stop: TEXTS = ()  # end a text just before this string; several may be given
    # beam search, for translations
    num_beams: int = 4  # hypotheses kept at each step; 1: greedy
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
        if self.prompts and self.start:
            raise ValueError("prompts cannot be combined with start")

    def select(self, keys: str) -> dict[str, object]:
        return {key: getattr(self, key) for key in keys.split()}


def main(argv: list[str]) -> None:
    given = cli.read(argv, SampleConfig)
    config = cli.make(SampleConfig, given)
    loaded = config.pipeline(chosen_source(config, given))
    settings = vars(config) | {"task": loaded.task}
    check_effects(given, cli.typed_keys(argv), settings, IN_VAIN)
    with machine.memory_advice("try a smaller --num_samples, --max_new_tokens or --num_beams"):
        if loaded.task == "translation":
            print_translations(config, loaded)
            return
        choose_threads(loaded)
        if loaded.task == "chat":
            converse(config, loaded)
        else:
            print_texts(config, loaded)


# --------------------------------------------------------------------------------------
# Generate


class Model(Pipeline):
    """A trained model, for programs. model is the module, tokenizer has encode() and decode().

    keys of the methods: temperature, max_new_tokens, seed, stop, num_beams or any other key of SampleConfig. All raise
    UserError, with one line that says what is wrong, and no other error of ours.
    """

    def complete(self, prompt: str, **keys) -> str:
        """Return the prompt with its continuation, or the translation of the prompt."""
        if self.task == "chat":
            raise UserError(TALKS)
        text = "".join(self.stream(prompt, **keys))
        return text if self.task == "translation" else prompt + text

    def reply(self, messages: list[dict], **keys) -> str:
        """Return a chat model's reply. messages: as OpenAI's, each with a "role" and a "content"."""
        if self.task != "chat":
            raise UserError("this model does not talk; use complete()")
        return "".join(self.stream(messages, **keys))

    def stream(self, prompt: str | list[dict], **keys) -> Iterator[str]:
        """Yield what complete() adds to a prompt, or the reply to messages, piece by piece."""
        config = cli.restore(SampleConfig, keys)
        check_effects(keys, keys, vars(config) | {"task": self.task}, IN_VAIN)
        if self.task == "chat" and isinstance(prompt, str):
            raise UserError(TALKS)
        if self.task == "translation":
            yield from translate([prompt], config, self)
        elif self.task == "chat":
            with as_user_error():
                turns = read_messages(prompt)
            yield from reply(self, turns, **config.select(SAMPLING))
        else:
            prompts = [encode_prompt(prompt, self.tokenizer)]
            for piece in write(prompts, [0], config, self):
                yield piece.text

    def logprobs(self, text: str) -> list[tuple[str, float]]:
        """Return each token of a text and its log-probability in nats. The first is left out if nothing precedes it."""
        from humptygpt.scoring.text import encode, score_windows

        if self.task == "translation":
            raise UserError("this model translates; logprobs() is for models of text")
        ids = encode(text, self.tokenizer)
        stride = max(1, self.model.config.block_size // 2)
        found = score_windows(self.model, ids, stride).tolist()
        tokens = [self.tokenizer.decode([i]) for i in ids[1:]]
        return [*zip(tokens, found, strict=True)]


def load(source: str | Path, which: str = "best", **keys) -> Model:
    """Load the model that init_from=source names: a run, a checkpoint, a folder of weights, or a name such as gpt2.

    which: best or latest. keys: device, dtype or quantize, as in SampleConfig. Raises UserError.
    """
    config = cli.restore(PipelineConfig, {"checkpoint": which, **keys})
    return Model(*config.pipeline(source))


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

    how = config.select("num_beams max_new_tokens")
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


def print_batch(texts: list[tuple[Prompt, int]], config: SampleConfig, loaded: Pipeline) -> None:
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
    """Print a translation of each line of --start or, without it, of what is typed. That of an empty line is empty."""
    texts = typed_lines() if config.start is None else [read_start(config.start)]
    if texts == [""]:
        raise UserError(f"nothing to translate in start={config.start}")
    for text in texts:
        lines = text.removesuffix("\n").split("\n")
        for translation in translate(lines, config, loaded):
            print(translation, flush=True)


# --------------------------------------------------------------------------------------
# Converse


def converse(config: SampleConfig, loaded: Pipeline) -> None:
    """Print the model's reply to --start or, without it, to each line that is typed."""
    turns = [] if config.system is None else [Turn("system", config.system.strip())]
    first = [] if config.start is None else [read_start(config.start)]
    for number, line in enumerate(first or typed_lines()):
        said = [*turns, Turn("user", line.strip())]
        text = ""
        try:
            if said[-1].content:
                for piece in reply(loaded, said, number, True, **config.select(SAMPLING)):
                    print(piece, end="", flush=True)
                    text += piece
                turns = [*said, Turn("assistant", text)]
            print(flush=True)
        except UserError as error:
            note(str(error))


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
