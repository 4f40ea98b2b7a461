"""Measure how well a model predicts a text, and which of two texts it finds likelier.

    python score.py --out_dir=out/mine --text=FILE
    python score.py --out_dir=out/mine --pairs=FILE.jsonl      one object per line: {"good": "a cat", "bad": "an cat"}
    python score.py --out_dir=out/mine --pairs=english
    python score.py --out_dir=out/bot --chats=FILE.jsonl       questions of your own, with their answers
    python score.py --init_from=out/mine --init_from=gpt2 --pairs=python      the models side by side

--text: nats per token, bits per byte and perplexity over the whole file.
--pairs: a test is passed if the model finds the good text likelier. A line may instead have "context", "choices" and
"answer", the index of the right choice. The lines of each "group" are also counted separately. With several models, the
difference from the first is shown with its standard error. Instead of a file it may be english (200 pairs of agreement,
articles, word order and so on) or python, both written for this project. A model that guesses passes half of them.
--chats: conversations in any form of docs/chat.md. The model writes the last reply of each, and a lookup of the nearest
question that it was taught answers, too. Each wrong reply is shown.
"""

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from humptygpt import machine

if __name__ == "__main__":
    machine.start()  # before numpy and torch are loaded

import numpy as np

from humptygpt import cli
from humptygpt.cli import TEXTS, UserError, Vain, check_effects, note
from humptygpt.formats.checkpoint import find_checkpoint
from humptygpt.generation import generator
from humptygpt.generation.generator import Pipeline, PipelineConfig
from humptygpt.generation.sampling import read_text
from humptygpt.scoring.pairs import Test, by_group, read_tests, run_tests
from humptygpt.scoring.text import score_text

IN_VAIN: Vain = [*generator.IN_VAIN, ("text_key", "chats", (None,))]


@dataclass(frozen=True)
class ScoreConfig(PipelineConfig):
    # model
    init_from: TEXTS = ()  # instead of out_dir: runs, checkpoints, model folders or names such as gpt2
    # what to score
    text: str | None = None  # a text file, or - for stdin
    pairs: str | None = None  # english, python, a file of pairs, or - for stdin
    chats: str | None = None  # a file of conversations
    text_key: str | None = None  # with chats: the keys of a question and its answer: q,a
    json: bool = False  # print JSON instead of a table

    def validate(self) -> None:
        super().validate()
        given = sum(map(bool, (self.text, self.pairs, self.chats)))
        if given != 1:
            raise ValueError(f"choose one of --text, --pairs and --chats; {given} are given")


def main(argv: list[str]) -> None:
    given = cli.read(argv, ScoreConfig)
    config = cli.make(ScoreConfig, given)
    check_effects(given, cli.typed_keys(argv), vars(config), IN_VAIN)
    sources = {source: source for source in config.init_from}
    if not sources:
        folder = config.out_dir
        sources = {folder: find_checkpoint(Path(folder), config.checkpoint)}
    elif "out_dir" in given:
        note(f"out_dir={config.out_dir} has no effect with init_from")
    with machine.memory_advice("score a smaller file, or use --quantize=int8"):
        if config.chats:
            print_chats(config, sources)
        elif config.text:
            print_texts(config, sources)
        else:
            print_tests(config, sources)


def load(config: ScoreConfig, source: str | Path) -> Pipeline:
    loaded = config.pipeline(source)
    if loaded.task == "translation":
        raise UserError(f"{source} translates; score.py is for models that continue a text")
    return loaded


def print_texts(config: ScoreConfig, sources: dict[str, str | Path]) -> None:
    text = read_text(config.text)
    rows = {}
    for name, source in sources.items():
        loaded = load(config, source)
        row = rows[name] = score_text(loaded.model, loaded.tokenizer, text)
        if not config.json:
            print(
                f"{row['nats_per_token']:.4f} ± {row['standard_error']:.4f} nats per token,"
                f" {row['bits_per_byte']:.4f} bits per byte, perplexity {row['perplexity']:.2f},"
                f" {row['nats']:.2f} nats in all; {row['tokens']:,} tokens, {row['bytes']:,} bytes,"
                f" windows of {row['window']:,} tokens, stride {row['stride']:,}"
            )
    if config.json:
        print(json.dumps(rows))


def print_chats(config: ScoreConfig, sources: dict[str, str | Path]) -> None:
    from humptygpt.scoring.chats import read_chats, taught
    from humptygpt.training.chat import answer, compare, show

    tables = {}
    for name, source in sources.items():
        loaded = load(config, source)
        if loaded.task != "chat":
            raise UserError(f"{source} is not a chat model")
        block_size = loaded.model.config.block_size
        asked = read_chats(config.chats, config.text_key, loaded.tokenizer, block_size)
        replies = answer(loaded.model, loaded.tokenizer, asked)
        text, tables[name] = compare(asked, replies, taught(loaded.run))
        if not config.json:
            wrong = [row for row in tables[name] if row["reply"] != row["expected"]]
            print(f"{name}: answered word for word: {text}\n{show(wrong)}")
    if config.json:
        print(json.dumps(tables))


def print_tests(config: ScoreConfig, sources: dict[str, str | Path]) -> None:
    tests = read_tests(config.pairs)
    passed = {}
    for name, source in sources.items():
        loaded = load(config, source)
        passed[name] = run_tests(loaded.model, loaded.tokenizer, tests)
        if missing := np.isnan(passed[name]).sum():
            note(f"{missing} of {len(tests)} tests have characters that the tokenizer lacks; they are left out")
    table = make_table(tests, passed)
    if config.json:
        print(json.dumps(table))
        return
    width = max(len(row["group"]) for row in table)
    for model, rows in groupby(table, lambda row: row["model"]):
        more = "" if model == next(iter(sources)) else "      difference"
        print(f"\n{model}\n{'':{width}} {'tests':>6}  {'passed':>14}{more}")
        for row in rows:
            cells = [
                f"  {100 * row[key]:5.1f} ± {100 * row[f'{key}_error']:4.1f} %"
                for key in ("sum", "difference")
                if key in row
            ]
            print(f"{row['group']:{width}} {row['tests']:6,}{''.join(cells)}")


def make_table(tests: list[Test], passed: dict[str, np.ndarray]) -> list[dict[str, object]]:
    """Make one row per model and group. The difference is over the tests that both models can read.

    passed: {model: what run_tests() returns}.
    """
    first, *_ = passed
    table = []
    for model, values in passed.items():
        differences = by_group(tests, values - passed[first]) if model != first else {}
        for group, results in by_group(tests, values).items():
            row = {"model": model, "group": group}
            row["tests"], row["sum"], row["sum_error"] = results
            if group in differences:
                _, row["difference"], row["difference_error"] = differences[group]
            table.append(row)
    return table


if __name__ == "__main__":
    machine.run(main)
