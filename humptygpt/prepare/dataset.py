"""Prepare a data set: find the input, encode it, and write data/<name> whole or not at all."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path

from humptygpt.chat.conversations import Conversations, is_conversations
from humptygpt.config import (
    UserError,
    check_above_0,
    check_choices,
    check_least,
    note,
    refuse_vain,
)
from humptygpt.convert.hub import repository
from humptygpt.files import (
    locked,
    refuse_unwritable,
    remove,
    remove_unfinished,
    whole,
    write_text,
    write_whole,
)
from humptygpt.prepare.corpus import Corpus, Documents
from humptygpt.prepare.documents import file_format, find_files
from humptygpt.prepare.encoding import encode
from humptygpt.prepare.folder import (
    check_splits,
    data_id,
    holds_other_data,
    install,
    is_whole,
    make_meta,
    read_json,
    refuse_to_replace,
)
from humptygpt.prepare.sources import SOURCES, Source
from humptygpt.prepare.vocabulary import CHOICES
from humptygpt.token_files import COMMAND, is_nanogpts
from humptygpt.tokenizers import TOKENIZERS, Tokenizer
from humptygpt.translation.pairs import PairFiles, Pairs

PREPARING = "preparing"  # folder of new data that is complete, but not yet installed
STREAM = "standard_input.txt"  # copy of stdin, made because the text is read several times
# keys that do not affect the output, and name, which is positional
NOT_IN_COMMAND = ("name", "workers", "verify", "overwrite")
TEXT_DEFAULTS = {
    "val_fraction": 0.1,
    "text_key": "text",
    "vocab_size": 4096,
    "model_type": "bpe",
    "split_digits": False,
}
PAIR_DEFAULTS = TEXT_DEFAULTS | {
    "val_fraction": 0.02,
    "tokenizer": "sentencepiece",
    "vocab_size": 8192,
    "max_pair_tokens": 128,
    "max_pair_ratio": 3.0,
}
# what the summary counts, apart from the size
ITEMS = ("documents", "pairs", "conversations", "turns")
ONLY_FOR_PAIRS = ("test_fraction", "max_pair_tokens", "max_pair_ratio", "held_out")


@dataclass(frozen=True)
class PrepareConfig:
    # data
    name: str | None = None  # name of the folder in data/; the --name= prefix is optional
    input: str | None = None  # file, folder, pattern, or - for stdin
    text_key: str | None = None  # field or column that holds the text; None: "text"
    encoding_errors: str = "strict"  # how to handle bytes that are not UTF-8
    skip_bad_lines: bool = False  # skip lines that have no text or, in a .tsv file, do not have exactly one tab
    val_fraction: float | None = None  # validation fraction; None: 0.1, or 0.02 for pairs
    files: int | None = None  # maximum number of files
    # sentence pairs; all but source and target also apply to a .tsv input
    source: str | None = None  # file with one sentence per line
    target: str | None = None  # file with their translations, aligned line by line
    test_fraction: float | None = None  # test fraction; None: same as val_fraction
    max_pair_tokens: int | None = None  # drop pairs with a side longer than this; None: 128
    max_pair_ratio: float | None = None  # drop pairs with a higher length ratio; None: 3
    held_out: str | None = None  # file of pairs or source lines to exclude from training
    # tokens
    tokenizer: str = "auto"  # auto: chosen to fit the text; or the tokenizer of a run, a model folder or owner/model
    vocab_size: int | None = None  # at most this many tokens; None: fits the text, or 4096
    model_type: str | None = None  # sentencepiece algorithm; None: bpe
    split_digits: bool | None = None  # bpe: each digit is a token, to learn sums; None: off
    shard_tokens: int | None = None  # tokens per file, train_0000.bin, ...; None: one file
    # existing data
    overwrite: bool = False  # replace a different dataset of the same name
    verify: bool = False  # only check the token files against their checksums
    # system
    workers: int | None = None  # encoding threads; None: one per usable core

    @classmethod
    def choices(cls) -> dict[str, Collection[str]]:
        return {
            "encoding_errors": ("strict", "replace", "ignore"),
            "tokenizer": CHOICES,
            "model_type": ("bpe", "unigram"),
        }

    def validate(self) -> None:
        check_choices(replace(self, tokenizer="auto"))  # tokenizer is checked below
        check_least(self, 1, "files", "max_pair_ratio", "shard_tokens", "workers")
        check_least(self, 2, "max_pair_tokens")
        check_least(self, 257, "vocab_size")  # 256 bytes and end-of-text
        check_least(self, 0, "val_fraction", "test_fraction", below=1)
        check_above_0(self, "val_fraction")
        tokenizer = self.tokenizer
        elsewhere = os.path.exists(tokenizer) or repository(tokenizer)
        if tokenizer not in CHOICES and not elsewhere:
            raise ValueError(
                f"tokenizer={tokenizer} is not one of: {', '.join(CHOICES)}, a folder or file with a tokenizer,"
                " or owner/model on the Hugging Face Hub"
            )
        if self.name is None:
            raise ValueError("the data set has no name; add one, such as --name=mine")
        if self.name == ".." or Path(self.name).name != self.name:
            raise ValueError(f"name={self.name!r} must be the name of a folder in data/")
        if (self.source is None) != (self.target is None) or (self.source and self.input):
            raise ValueError(
                "source and target must be given together, without input: two line-aligned files, as in"
                " --source=a.de --target=a.en"
            )


def prepare(config: PrepareConfig) -> dict:
    """Write data/<name>, print a summary and return meta.json, which is written last and marks the folder complete."""
    folder = Path("data") / config.name
    advice = "wait until it has finished, or choose another --name"
    with locked(folder, str(folder), advice), refuse_unwritable(folder):
        remove_unfinished(folder, [PREPARING, STREAM])
        corpus = find_corpus(config, folder)
        meta = make_data(corpus, folder, config)
        (folder / STREAM).unlink(missing_ok=True)
    print(summary(folder, meta, corpus.summary(meta)))
    return meta


def make_data(corpus: Corpus, folder: Path, config: PrepareConfig) -> dict:
    """Write the folder unless it already has this data. Returns its meta.json. config: as given by the user."""
    preparing = folder / PREPARING
    command = command_text(config)
    made_from = data_id(corpus, command)
    old = read_json(folder / "meta.json")
    if old.get("made_from") == made_from and is_whole(folder, old):
        note(f"{folder} already has this text with these settings; it is left unchanged")
        return old
    new = read_json(preparing / "meta.json")
    if new.get("made_from") != made_from:
        other = old.get("command", command) != command or is_nanogpts(folder)
        if other and not config.overwrite:  # refuse now rather than after hours of work
            refuse_to_replace(folder, command)
        corpus.survey()
        remove(preparing)
        with whole(preparing) as temporary:
            temporary.mkdir()
            encoded = encode(corpus, temporary)
            check_splits(encoded)
            new = make_meta(corpus, encoded, temporary)
            new |= {"command": command, "made_from": made_from}
            write_text(temporary / COMMAND, f"{command}\n")
            write_text(temporary / "meta.json", json.dumps(new, indent=1))
    if not config.overwrite and holds_other_data(folder, old, new):
        refuse_to_replace(folder, command)
    install(preparing, folder, new)
    return new


def command_text(config: PrepareConfig) -> str:
    """Command for this config, ready to paste into a shell, without keys that do not affect the output."""
    words = ["python", "prepare_data.py", config.name]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in NOT_IN_COMMAND:
            words.append(f"--{field.name}={value}")
    return shlex.join(words)


# --------------------------------------------------------------------------------------
# The input


def built_in(config: PrepareConfig) -> Source | None:
    own_files = config.input or config.source
    return None if own_files else SOURCES.get(config.name)


def find_corpus(config: PrepareConfig, folder: Path) -> Corpus:
    """Find the documents or pairs that the config names, and fill in the config's defaults."""
    source = built_in(config)
    preset = with_defaults(config, source.settings) if source else config
    where, name = find_input(preset, folder)
    if not isinstance(where, list):
        files, skipped = find_files(str(where))
        files = files[: preset.files]
        formats = set(map(file_format, files))
        if config.text_key and formats <= {".txt"}:
            raise UserError(
                f"text_key={config.text_key} has no effect, since {name} has no records with keys or columns"
            )
        if formats == {".jsonl"} and not config.text_key and is_conversations(files[0]):
            resolved = resolve(config, preset, Conversations.task)
            return Conversations(resolved, files, name)
        if config.text_key or formats != {".tsv"}:
            resolved = resolve(config, preset, Documents.task)
            return Documents(resolved, files, skipped, name)
        where = [(None, (file,)) for file in files]
    return Pairs(resolve(config, preset, Pairs.task), where, name)


def find_input(config: PrepareConfig, folder: Path) -> tuple[str | Path | PairFiles, str]:
    """Find the input: a path, or files of pairs. Returns the input and its name in meta.json."""
    if config.source is not None:
        paths = (Path(config.source), Path(config.target))
        return [(None, paths)], f"{config.source} and {config.target}"
    if config.input == "-":
        write_whole(
            folder / STREAM, lambda file: shutil.copyfileobj(sys.stdin.buffer, file)
        )
        return folder / STREAM, "standard input"
    if config.input is not None:
        return config.input, config.input
    for path in (folder / "input.txt", folder / "input.tsv"):
        if os.path.exists(path):
            return path, str(path)
    if source := built_in(config):
        try:
            return source.fetch(config)
        except UserError as error:
            raise UserError(
                f"{error}; to use your own files, put them into {folder}, as described in data/README.md"
            ) from error
    raise UserError(
        f"no data set {config.name}: it is not one of {', '.join(SOURCES)}, and {folder.absolute()} has no input.txt;"
        f" start the script where {folder} is, or prepare your own text with --input=FILE_OR_FOLDER"
    )


def with_defaults(config: PrepareConfig, defaults: dict) -> PrepareConfig:
    """Fill in the keys that the config leaves unset."""
    unset = {
        key: default
        for key, default in defaults.items()
        if getattr(config, key) in (None, "auto")
    }
    return replace(config, **unset)


def resolve(config: PrepareConfig, preset: PrepareConfig, task: str) -> PrepareConfig:
    """Fill in all remaining defaults. config: as the user gave it. preset: with the settings of a built-in dataset.

    Raises UserError if config sets a key that has no effect on this data or with this tokenizer.
    """
    resolved = with_defaults(preset, PAIR_DEFAULTS if task == Pairs.task else TEXT_DEFAULTS)
    tokenizer = "bpe" if preset.vocab_size else "auto"
    more = {"tokenizer": tokenizer, "test_fraction": resolved.val_fraction}
    resolved = with_defaults(resolved, more)
    in_vain = dict.fromkeys(ONLY_FOR_PAIRS, ("task", (Documents.task, Conversations.task)))
    kind = TOKENIZERS.get(resolved.tokenizer, Tokenizer)
    for key in ("vocab_size", "model_type", "split_digits"):
        if key not in kind.options:
            in_vain[key] = ("tokenizer", (resolved.tokenizer,))
    given = [key for key in in_vain if getattr(config, key) is not None]
    refuse_vain(given, vars(resolved) | {"task": task}, in_vain)
    return resolved


# --------------------------------------------------------------------------------------
# The report


def summary(folder: Path, meta: dict, other: dict[str, str]) -> str:
    """Summarize the data: a table of counts, then lines of text. other: further lines, {label: text}."""
    columns = {"total": meta} | meta["splits"]
    table = [
        f"{folder}: {meta['source']}",
        12 * " " + "".join(f"{name:>14}" for name in columns),
    ]
    for key in (*ITEMS, "characters", "bytes", "tokens"):
        if meta.get(key, 1) > 1:  # leave out a count of 1: a single document, cut in two
            table.append(
                f"  {key:<10}"
                + "".join(f"{column[key]:>14,}" for column in columns.values())
            )
    kind = meta["tokenizer"]["tokenizer"]
    unused = meta["vocab_size"] - meta["vocabulary_used"]
    lines = {
        "tokenizer": f"{kind}, {meta['bytes_per_token']:.2f} bytes per token, stored as {meta['dtype']}",
        "vocabulary": f"{meta['vocab_size']:,} tokens, {f'{unused:,} unused' if unused else 'all used'}",
    }
    if unknown := meta.get("characters_spelled_in_bytes"):
        lines["byte fallback"] = (
            f"{unknown:,} characters are not in the vocabulary and are encoded as bytes"
        )
    frequent = [
        f"{entry['text']!r} {100 * entry['share']:.1f}%" for entry in meta["commonest"][:6]
    ]
    lines |= {"most frequent": ", ".join(frequent)} | other
    return "\n".join([*table, *(f"  {key:<15}{line}" for key, line in lines.items())])
