"""Prepare a data set: find the text or pairs, encode them, and write data/<name> whole or not at all."""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from types import ModuleType

from humptygpt.cli import UserError, note
from humptygpt.data import builtin
from humptygpt.data.conversations import Conversations, is_conversations
from humptygpt.data.corpus import Corpus, Documents
from humptygpt.data.dataset import COMMAND, TokenFile
from humptygpt.data.documents import (
    file_format,
    file_suffix,
    find_files,
    read_errors,
)
from humptygpt.data.encoding import encode
from humptygpt.data.pairs import PairFiles, Pairs
from humptygpt.data.settings import CHOICES, OPTIONS, PrepareConfig
from humptygpt.data.vocabulary import make_tokenizer
from humptygpt.files import locked, move, refuse_unwritable, remove, write_text
from humptygpt.tokenizers.basic import Tokenizer
from humptygpt.tokenizers.saved import from_state

OURS = re.compile(r"(train|val|test)\.bin")
PREPARING = "preparing"  # subfolder for data that is not complete
# keys that do not affect the output, and name, which is positional
NOT_IN_COMMAND = ("name", "overwrite")


def prepare(config: PrepareConfig, open_tokenizer: Callable[[str], Tokenizer]) -> dict:
    """Write data/<name>, print a summary and return meta.json, which is written last and marks the folder complete.

    open_tokenizer: loads the tokenizer of another model if config.tokenizer names one.
    """
    folder = Path("data") / config.name
    advice = "wait until it has finished, or choose another --name"
    with locked(folder, str(folder), advice), refuse_unwritable(folder):
        meta = read_old_meta(folder)
        filled = bool(meta) or (folder / "train.bin").exists()
        with empty_folder(folder / PREPARING) as preparing:
            corpus = find_corpus(config, folder)
            loaded = load_tokenizer(corpus, open_tokenizer)
            command = command_text(config)
            made_from = data_id(corpus, command, loaded)
            same = meta.get("made_from") == made_from
            if filled and not same and not config.overwrite:
                raise UserError(
                    f"{folder} already holds data from other files or settings; choose another name, or replace it:"
                    f" {command} --overwrite=True"
                )
            if same and is_whole(folder, corpus.splits, meta):
                note(f"{folder} already has this text with these settings; it is left unchanged")
            else:
                for each in corpus.parts:
                    each.survey()
                tokenizer = corpus.wrap(loaded or make_tokenizer(corpus))
                meta = encode(corpus, tokenizer, preparing)
                meta["made_from"] = made_from
                write_text(preparing / COMMAND, f"{command}\n")
                write_text(preparing / "meta.json", json.dumps(meta, indent=1))
                install(preparing, folder)
                for each in corpus.parts:
                    if each.flaws:
                        note(str(each.flaws))
    print(summary(folder, corpus, meta))
    return meta


@contextmanager
def empty_folder(path: Path) -> Iterator[Path]:
    """Create a folder for the block, and remove it at the end. A killed process may have left an earlier one."""
    remove(path)
    path.mkdir()
    try:
        yield path
    finally:
        remove(path)


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


def find_corpus(config: PrepareConfig, folder: Path) -> Corpus:
    """Find the documents, pairs or conversations that the config names. folder: the data set's, in data/."""
    source = built_in(config)
    preset = with_defaults(config, builtin.settings(source)) if source else config
    if config.val_input is not None:
        preset = replace(preset, val_fraction=0.0)
    elif config.val_fraction == 0:
        preset = replace(preset, val_fraction=None)
    files, name = find_input(preset, folder, source)
    skipped = []
    kind = Pairs
    if not isinstance(files, list):
        files, skipped = find_files(str(files))
        files = files[: preset.files]
        formats = set(map(file_format, files))
        # val_input, of which val_fraction is 1, may be of another format
        if config.text_key and formats <= {".txt"} and config.val_fraction != 1:
            raise UserError(
                f"text_key={config.text_key} has no effect, since {name} has no records with keys or columns"
            )
        if formats == {".tsv"} and not config.text_key:
            files = [(None, file) for file in files]
        elif chats := [file for file in files if is_conversations(file, config.text_key)]:
            kind = Conversations
            others = sorted({*files} - {*chats})
            skipped += [f"{file} has no conversations" for file in others]
            files = chats
        else:
            kind = Documents
            if exports := [file for file in files if file_suffix(file) == ".json"]:
                note(
                    f".json files in none of the forms of docs/chat.md, learned as they are written: {len(exports):,};"
                    f" the first: {exports[0]}"
                )
    corpus = kind(resolve(config, preset, kind), files, name, skipped)
    corpus.trains_on_all = config.val_fraction == 0
    if config.val_input is not None:
        unused = {"val_input": None, "files": None}
        own = replace(preset, **unused | {"input": config.val_input, "val_fraction": 1.0})
        val = find_corpus(own, folder / PREPARING)
        if val.task != corpus.task or {*val.paths} & {*corpus.paths}:
            raise UserError(
                f"val_input={config.val_input} must be for {corpus.task}, as the input is, and no part of it"
            )
        corpus.parts = (corpus, val)
    return corpus


def built_in(config: PrepareConfig) -> ModuleType | None:
    """Return the built-in data set that the config names; None if there is none."""
    return None if config.input else builtin.data_set(config.name)


def find_input(config: PrepareConfig, folder: Path, source: ModuleType | None) -> tuple[str | Path | PairFiles, str]:
    """Find the input: a path, or files of pairs. Returns the input and its name in meta.json.

    source: the built-in data set that the config names, if there is one.
    """
    if config.input is not None:
        return config.input, config.input
    for path in (folder / "input.txt", folder / "input.tsv"):
        if os.path.exists(path):
            return path, str(path)
    if source:
        return source.fetch(config)
    raise UserError(
        f"no data set {config.name}: it is not one of {', '.join(builtin.names())}, and {folder.absolute()} has no"
        " input.txt; prepare your own text with --input=FILE_OR_FOLDER"
    )


def with_defaults(config: PrepareConfig, defaults: dict) -> PrepareConfig:
    """Fill in the keys that the config leaves unset."""
    unset = [key for key, value in vars(config).items() if value in (None, "auto")]
    return replace(config, **{key: defaults[key] for key in unset if key in defaults})


def resolve(config: PrepareConfig, preset: PrepareConfig, kind: type[Corpus]) -> PrepareConfig:
    """Fill in all remaining defaults. config: as the user gave it. preset: with the settings of a built-in data set.

    Raises UserError if config sets a key that has no effect on this data or with this tokenizer.
    """
    tokenizer = "bpe" if preset.vocab_size else "auto"
    resolved = with_defaults(preset, {"tokenizer": tokenizer} | kind.defaults)
    others = [key for key, users in OPTIONS.items() if resolved.tokenizer not in users]
    vain = dict.fromkeys(others, f"tokenizer={resolved.tokenizer}")
    if kind is not Pairs:
        vain["max_pair_tokens"] = f"task={kind.task}"
    if kind is not Documents:
        vain["lines"] = f"task={kind.task}"
    if config.val_input is not None:
        vain["val_fraction"] = f"val_input={config.val_input}"
    for key, setting in vain.items():
        if (value := getattr(config, key)) is not None:
            raise UserError(f"{key}={value} has no effect with {setting}; leave it out")
    return resolved


def load_tokenizer(corpus: Corpus, open_tokenizer: Callable[[str], Tokenizer]) -> Tokenizer | None:
    """Load the tokenizer of a run, a folder or a model on the Hub. Returns None if one is to be made.

    Raises UserError if it is missing or unsuitable.
    """
    if corpus.config.tokenizer in CHOICES:
        return None
    tokenizer = open_tokenizer(corpus.config.tokenizer)
    state = tokenizer.state()
    if corpus.separated and tokenizer.eot is None and "separated" in state:
        separated = from_state(state | {"separated": True})
        # add end-of-text to a vocabulary only if that grows anyway; otherwise it would not fit the tokenizer's model
        if separated.vocab_size == tokenizer.vocab_size or corpus.task == "chat":
            tokenizer = separated
    if tokenizer.eot is None and corpus.task != "language modelling":
        raise UserError(
            f"tokenizer={corpus.config.tokenizer} has no end-of-text token, which {corpus.task} needs;"
            " choose another --tokenizer"
        )
    return tokenizer


# --------------------------------------------------------------------------------------
# The folder


def read_old_meta(folder: Path) -> dict:
    """Read the meta.json of a folder. Returns {} if it is missing or damaged."""
    with suppress(OSError, ValueError, TypeError, RecursionError):
        return dict(json.loads((folder / "meta.json").read_bytes()))
    return {}


def is_whole(folder: Path, splits: Iterable[str], meta: dict) -> bool:
    """Return True if the token files in a folder are complete and match their checksums."""
    with suppress(UserError, ValueError):
        for split in splits:
            TokenFile(folder, split, meta).verify()
        return True
    return False


def data_id(corpus: Corpus, command: str, loaded: Tokenizer | None) -> str:
    """Hash what determines the data: the command, the files (path, size and modification time), a loaded tokenizer."""
    made_from = [command]
    for path in chain.from_iterable(each.paths for each in corpus.parts):
        with read_errors(path):
            status = path.stat()
        made_from.append([path.as_posix(), status.st_mtime_ns, status.st_size])
    if loaded:
        made_from.append(loaded.state())
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def install(preparing: Path, folder: Path) -> None:
    """Replace the data in a folder by the prepared files. The folder is incomplete until it has the new meta.json."""
    (folder / "meta.json").unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        if OURS.fullmatch(path.name):
            path.unlink()
    files = [path.name for path in preparing.glob("*.bin")]
    for name in (COMMAND, *files, "meta.json"):
        move(preparing / name, folder / name)


# --------------------------------------------------------------------------------------
# The report


def summary(folder: Path, corpus: Corpus, meta: dict) -> str:
    """Summarize the data: how much each split has, what was dropped, and an example of conversations."""
    columns = {"total": meta} | meta["splits"]
    lines = [
        f"{folder}: {meta['source']}",
        15 * " " + "".join(f"{name:>14}" for name in columns),
    ]
    for key in (corpus.counts[0], "tokens"):
        if meta[key] > 1:  # a single document is cut in two
            counts = "".join(f"{column[key]:>14,}" for column in columns.values())
            lines.append(f"  {key:<13}{counts}")
    if "dropped" in meta:
        dropped = ", ".join(f"{why} {count:,}" for why, count in meta["dropped"].items())
        lines.append(f"  dropped: {dropped}")
    if "example" in meta:
        lines += ["the model learns what is in brackets:", "", meta["example"]]
    return "\n".join(lines)
