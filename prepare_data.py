"""Text or sentence pairs -> data/<name>: train.bin and val.bin (token ids), meta.json (tokenizer, counts, checksums).

    python prepare_data.py shakespeare_char                                  a known text, found or downloaded
    python prepare_data.py --input=FILE_FOLDER_OR_PATTERN --name=mine        your own text
    zcat dump.gz | python prepare_data.py --input=- --name=mine              a text on standard input
    python prepare_data.py --input='corpus/*.jsonl.gz' --name=mine --tokenizer=gpt2 --val_fraction=0.001
    python prepare_data.py translate_de_en                                   sentence pairs, found or downloaded
    python prepare_data.py --input=pairs.tsv --name=mine                     your own: SOURCE, a tab, TARGET per line
    python prepare_data.py --source=a.de --target=a.en --name=mine           or two aligned files

Input is text, .jsonl or .parquet, optionally with .gz or .zst. A line of JSON, a row of Parquet and a file of any other
ending but .tsv are one document each; binary and hidden files in a folder are skipped and named, and carriage returns
become line breaks. An end-of-text token separates documents. A document's split, train or val, depends on its text
alone, so that added files change nothing for the documents that were there; a single text file is cut instead. A pair's
split, train, val or test, depends on its source alone; both sides share one vocabulary.
Files are streamed, never held in memory. A stopped preparation resumes when the same command is run again.
"""

import hashlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path

from humptygpt.core import limits

if __name__ == "__main__":
    limits.start(limits.NUMPY)  # before numpy is loaded

import numpy as np

from humptygpt.core import settings as configurator
from humptygpt.core.errors import UserError
from humptygpt.core.files import being_moved, cannot_write, move_aside, write_whole
from humptygpt.core.locks import Lock
from humptygpt.core.settings import as_written_here, check, nearest, setting, without_effect
from humptygpt.data.corpus import (
    VOCABULARY_BYTES,
    Corpus,
    Encoder,
    Progress,
    progress_bar,
    units,
    vocabulary_texts,
)
from humptygpt.data.documents import STREAM, Found, check_readable, find_files, save_stream
from humptygpt.data.pairs import Pairs, is_tsv
from humptygpt.data.parts import (
    check_divisible,
    corpus_id,
    finish_part,
    join_parts,
    parse_part,
    part_folder,
    take_part,
)
from humptygpt.data.sources import KNOWN, Known, PairFiles
from humptygpt.data.token_files import (
    COMMAND,
    META_FORMAT,
    TokenWriter,
    checksums,
    is_whole,
    read_meta,
    token_dtype,
)
from humptygpt.interchange.hub import repository
from humptygpt.tokenizer.tokenizers import (
    TOKENIZERS,
    SentencePieceTokenizer,
    Tokenizer,
    VocabularyTooLarge,
    from_state,
)

SAVE_UNITS = 128  # units between two saves of the progress
SMALL = 8_000_000  # bytes of files below which starting worker processes takes longer than it saves
WORKER_MEMORY = 100_000_000  # bytes, about
CHANGES_NOTHING = ("workers", "part", "join")  # of what is written
RESUME = "run the same command again to resume"
SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}
PAIRS = {"only_with": {"task": "translation"}}


def taken_by(key: str) -> dict:
    """The rule of a key that only some tokenizers take."""
    return {
        "only_with": {
            "tokenizer": tuple(name for name, cls in TOKENIZERS.items() if key in cls.options)
        }
    }


@dataclass(frozen=True)
class PrepareConfig:
    name: str | None = setting(
        None, "folder in data/ to write; also the bare argument", group="data"
    )
    input: str | None = setting(
        None,
        "file, folder, pattern, or - for a stream; None: data/<name>/input.txt or .tsv, or a known text",
        path=True,
    )
    text_key: str = setting("text", "field with the text in .jsonl and .parquet files")
    encoding_errors: str = setting(
        "strict", "for bytes that are not UTF-8", choices=("strict", "replace", "ignore")
    )
    skip_bad_lines: bool = setting(
        False, "leave out lines and rows that have no text, or not one tab, and count them"
    )
    val_fraction: float | None = setting(
        None, "fraction for validation; None: 0.1, pairs 0.02", above=0, below=1
    )
    files: int | None = setting(None, "maximum number of files", at_least=1)

    source: str | None = setting(
        None,
        "file with a sentence per line",
        group="sentence pairs, also from a .tsv input",
        path=True,
    )
    target: str | None = setting(None, "file with their translations, line by line", path=True)
    test_fraction: float | None = setting(
        None, "fraction for test; None: val_fraction", at_least=0, below=1, **PAIRS
    )
    max_pair_tokens: int | None = setting(
        None, "drop pairs with a longer side; None: 128", at_least=2, **PAIRS
    )
    max_pair_ratio: float | None = setting(
        None, "drop pairs with a larger length ratio; None: 3", at_least=1, **PAIRS
    )
    held_out: str | None = setting(
        None, "file of pairs, or of a source per line, not to train on", path=True, **PAIRS
    )

    tokenizer: str | None = setting(
        None,
        "None: char, pairs sentencepiece; a model's folder or owner/model: its own",
        "tokens",
        choices=TOKENIZERS,
        path=True,
    )
    vocab_size: int | None = setting(
        None, "number of tokens; None: 4096, pairs 8192", at_least=2, **taken_by("vocab_size")
    )
    model_type: str | None = setting(
        None, "of sentencepiece; None: bpe", choices=("bpe", "unigram"), **taken_by("model_type")
    )
    shard_tokens: int | None = setting(
        None, "tokens per file, train_0000.bin and so on; None: one file", at_least=1
    )

    part: str | None = setting(
        None,
        "3/16: encode the third of 16 parts, here or on another machine",
        group="several machines",
    )
    join: bool = setting(False, "make one data set of all its parts, in data/<name>/parts")

    workers: int | None = setting(
        None,
        "processes that encode; None: one per core that it may use",
        group="system",
        at_least=1,
    )

    def __post_init__(self):
        check(self)
        elsewhere = self.tokenizer not in (None, *TOKENIZERS)
        if elsewhere and not os.path.exists(self.tokenizer) and not repository(self.tokenizer):
            near = (
                f"; did you mean {near}?" if (near := nearest(self.tokenizer, TOKENIZERS)) else ""
            )
            kinds = f"{', '.join(TOKENIZERS)}, nor a folder or file with a tokenizer, nor owner/model of the hub"
            raise ValueError(f"tokenizer={self.tokenizer} is not one of: {kinds}{near}")
        self.check_name()
        if self.part is not None:
            parse_part(self.part)
            if self.join or self.shard_tokens or self.input == "-":
                raise ValueError(
                    f"part={self.part} goes without join, shard_tokens and --input=-; join takes the shards"
                )
        if (self.source is None) != (self.target is None):
            raise ValueError(
                "source and target go together: --source=a.de --target=a.en, line by line translations"
            )
        if self.source is not None and self.input is not None:
            raise ValueError(f"input={self.input} and source={self.source} exclude each other")
        for key in ("source", "target", "held_out"):
            if getattr(self, key) == "-":
                raise ValueError(
                    f"{key}=-: only --input=- reads a stream, which is a text; write a file for {key}"
                )

    def check_name(self) -> None:
        if not self.name:
            if text := self.input or self.source:
                own = replace(self, name=name_from(text))
                raise ValueError(
                    f"no name for the data set; write: {as_written_here(command_text(own))}"
                )
            command = as_written_here("python prepare_data.py shakespeare_char")
            raise ValueError(f"no name for the data set; try: {command}")
        if self.name in (".", "..") or any(char in self.name for char in "/\\\0"):
            own = (
                {}
                if self.input or self.source or not os.path.exists(self.name)
                else {"input": self.name}
            )
            way_out = as_written_here(command_text(replace(self, name=name_from(self.name), **own)))
            raise ValueError(
                f"name={self.name!r} must be the name of a folder in data/, not a path; write: {way_out}"
            )


def name_from(path: str) -> str:
    """A name for a data set, made from the name of a file, folder or pattern."""
    stem = os.path.basename(path.rstrip("/")).partition(".")[0]  # noqa: PTH119, since "a/" and "-" are allowed
    return re.sub(r"\W+", "_", stem).strip("_") or "mine"


def main(argv: list[str]) -> None:
    config = configurator.make(
        PrepareConfig, configurator.read(argv, PrepareConfig, positional="name")
    )
    if config.part:
        print(prepare_part(config))
        return
    meta = prepare(config)
    name, out_dir = shlex.quote(config.name), shlex.quote(f"out/{config.name}")
    arguments = f"--dataset={name} --out_dir={out_dir}"
    if (
        known_text(config)
        and Path(__file__).with_name("config").joinpath(f"{config.name}.py").exists()
    ):
        arguments = f"config/{config.name}.py"
    elif meta["task"] == Pairs.task:
        arguments = f"config/translate_de_en.py {arguments} --block_size={meta['longest']}"
    print("\ntrain on it: " + as_written_here(f"python train.py {arguments}"))


def prepare(config: PrepareConfig) -> dict:
    """Write data/<name>, print a summary and return meta.json, which is written last and makes the folder complete."""
    folder = Path("data") / config.name
    try:
        with (
            limits.memory_advice("try --workers=1, or --tokenizer=byte"),
            Lock(
                folder / ".lock", str(folder), "wait until that has ended, or take another --name"
            ),
        ):
            try:
                corpus = open_corpus(config, folder)
                meta = make_data(
                    corpus, folder, command_text(config), fit=config.vocab_size is None
                )
            finally:
                if config.input == "-" and not (folder / "preparing").exists():  # nothing to resume
                    (folder / STREAM).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(error.filename or folder, error, f"; {RESUME}") from error
    except KeyboardInterrupt:
        print(RESUME, file=sys.stderr)
        raise
    if corpus.separated and from_state(meta["tokenizer"]).eot is None:
        print(
            "note: this tokenizer has no end-of-text token; nothing separates the documents",
            file=sys.stderr,
        )
    print(summary(folder, meta, corpus.summary(meta)))
    for note in corpus.notes():
        print(f"note: {note}", file=sys.stderr)
    return meta


def prepare_part(config: PrepareConfig) -> str:
    """Encode one part of a data set into data/<name>/parts and return what to do next."""
    (number, count), folder = parse_part(config.part), Path("data") / config.name
    target = part_folder(folder, number, count)
    command, fit = command_text(config), config.vocab_size is None
    try:
        with Lock(target.with_suffix(".lock"), str(target), "wait until that has ended"):
            corpus = open_corpus(config, folder)
            check_divisible(corpus)
            mine, made_from = take_part(corpus, number, count), f"{config.part} {corpus_id(corpus)}"
            (target / "part.json").unlink(missing_ok=True)
            tokenizer, progress = start_or_resume(
                mine, target, made_from, command, fit=fit, whole=corpus
            )
            encode(mine, tokenizer, progress, target)
            finish_part(corpus, progress, target)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or target}: {error.strerror}; {RESUME}"
        ) from error
    tokens = sum(counted["tokens"] for counted in progress.splits.values())
    join = f"{as_written_here(command)} --join=True"
    return f"{target}: {len(mine.files):,} of {len(corpus.files):,} files, {tokens:,} tokens\nwith all parts: {join}"


def make_data(corpus: Corpus | Pairs, folder: Path, command: str, fit: bool) -> dict:
    """Write the folder, unless it has the same already, and return its meta.json. fit: see make_tokenizer."""
    parts = folder / "preparing"  # incomplete files
    changes_nothing = dict.fromkeys(("input", "source", "target", "files", "workers"))
    settings = asdict(replace(corpus.config, **changes_nothing))
    del settings["part"], settings["join"]
    content = [corpus.fingerprint(), settings, fit]
    if settings["tokenizer"] not in TOKENIZERS:
        content.append(pretrained_tokenizer(settings["tokenizer"], corpus).state())
    made_from = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    if read_json(folder / "meta.json").get("made_from") == made_from and is_whole(folder):
        print(
            f"note: {folder} has this text with these settings already; it stays as it is",
            file=sys.stderr,
        )
        if parts.exists() and not read_json(
            parts / "progress.json"
        ):  # else it can be resumed, with other settings
            shutil.rmtree(parts)
        return read_meta(folder)
    meta = read_json(parts / "meta.json")
    if meta.get("made_from") != made_from:
        if corpus.config.join:
            check_divisible(corpus)
            progress = join_parts(corpus, folder, parts, made_from, command)
            tokenizer = from_state(progress.tokenizer)
        else:
            tokenizer, progress = start_or_resume(corpus, parts, made_from, command, fit=fit)
            encode(corpus, tokenizer, progress, parts)
        check_splits(corpus, progress, parts)
        meta = describe(corpus, tokenizer, progress, parts) | {
            "command": command,
            "made_from": made_from,
        }
        write_whole(
            parts / COMMAND, lambda file: file.write(f"{command}\n".encode())
        )  # in case meta.json is lost
        write_json(parts / "meta.json", meta)
        meta = read_json(
            parts / "meta.json"
        )  # lists for tuples, as in the one that it may be compared with
    install(parts, folder, meta)
    return meta


def command_text(config: PrepareConfig) -> str:
    """The command of this config, to be pasted into a shell; without the keys that change no byte."""
    changed = {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if getattr(config, f.name) != f.default
    }
    bare = changed["name"] if not changed["name"].startswith("-") else f"--name={changed['name']}"
    rest = [
        f"--{key}={value}"
        for key, value in changed.items()
        if key not in ("name", *CHANGES_NOTHING)
    ]
    return shlex.join(["python", "prepare_data.py", bare, *rest])


def with_defaults(config: PrepareConfig, defaults: dict) -> PrepareConfig:
    return replace(
        config, **{key: value for key, value in defaults.items() if getattr(config, key) is None}
    )


def resolve(config: PrepareConfig, pairs: bool = False) -> PrepareConfig:
    """Replace None by defaults. Raises UserError for a key that has no effect on this data or with this tokenizer."""
    config = with_defaults(config, {"val_fraction": 0.02 if pairs else 0.1})
    config = with_defaults(config, {"tokenizer": "sentencepiece" if pairs else "char"})
    idle = without_effect(vars(config) | {"task": (Pairs if pairs else Corpus).task}, PrepareConfig)
    for key, why in idle.items():
        if getattr(config, key) is not None:
            if "task=" in why:
                why = (
                    "without sentence pairs, from --input=PAIRS.tsv or --source=FILE --target=FILE"
                )
            raise UserError(f"{key}={getattr(config, key)} has no effect {why}")
    defaults = {
        "vocab_size": 8192 if pairs else 4096,
        "model_type": "bpe",
        "test_fraction": config.val_fraction,
    }
    defaults |= {"max_pair_tokens": 128, "max_pair_ratio": 3.0}
    return with_defaults(config, {key: value for key, value in defaults.items() if key not in idle})


# --------------------------------------------------------------------------------------
# The input


def known_text(config: PrepareConfig) -> Known | None:
    return KNOWN.get(config.name) if config.input is None and config.source is None else None


def open_corpus(config: PrepareConfig, folder: Path) -> Corpus | Pairs:
    """The documents or the pairs that the config names, with the resolved config."""
    defaults = dict(known.settings) if (known := known_text(config)) else {}
    if config.tokenizer not in (None, defaults.get("tokenizer")):
        defaults.pop("vocab_size", None)  # is meant for the usual tokenizer
    preset = with_defaults(config, defaults)
    where, source = find_input(preset, folder)
    if isinstance(where, str):
        files = find_files(where)[: preset.files]
        if not any(map(is_tsv, files)):
            return Corpus(resolve(preset), files, source or where)
        if not all(map(is_tsv, files)):
            pair, text = (
                next(file for file in files if is_tsv(file) == pairs) for pairs in (True, False)
            )
            pattern = shlex.quote(f"--input={pair.with_name('*' + pair.suffix)}")
            found = f"sentence pairs ({pair}) and text ({text})"
            raise UserError(
                f"{where} has {found}; name one kind only, by a pattern such as {pattern}"
            )
        parts = [(None, (file,)) for file in files]
        source = source or (where if len(files) == 1 else f"{len(files):,} files: {where}")
    else:
        parts = where
        drawn = any(split is None for split, _ in parts)
        for key in ("files",) if drawn else ("files", "val_fraction", "test_fraction"):
            if getattr(config, key) is not None:
                print(
                    f"note: {key}={getattr(config, key)} has no effect on these files",
                    file=sys.stderr,
                )
        for file in chain.from_iterable(files for _, files in parts):
            check_readable(file)
    return Pairs(resolve(preset, pairs=True), parts, source)


def find_input(config: PrepareConfig, folder: Path) -> tuple[str | PairFiles, str | None]:
    """(a path or files of pairs, the source for meta.json; None: the path)."""
    if config.source is not None:
        return [
            (None, (Path(config.source), Path(config.target)))
        ], f"{config.source} and {config.target}"
    if config.input == "-":
        if sys.stdin.isatty():
            print("reading the text from the terminal; Ctrl-D ends it", file=sys.stderr)
        save_stream(sys.stdin.buffer, folder / STREAM)
        return str(folder / STREAM), "standard input"
    if config.input is not None:
        return config.input, None
    for path in (folder / "input.txt", folder / "input.tsv"):
        if os.path.exists(path):
            return str(path), None
    if known := known_text(config):
        return known.fetch(config.name, config.files)
    prepared = [path.parent.name for path in Path("data").glob("*/meta.*")]
    near, where, name = nearest(config.name, [*prepared, *KNOWN]), "FILE_OR_FOLDER", config.name
    if os.path.exists(config.name):  # meant as the input
        where, name = shlex.quote(config.name), name_from(config.name)
    raise UserError(
        f"no data set {config.name}: it is not one of: {', '.join(KNOWN)}, and there is no {folder / 'input.txt'};"
        + (f" did you mean {near}?" if near else "")
        + " for your own text: "
        + as_written_here(f"python prepare_data.py --input={where} --name={shlex.quote(name)}")
    )


# --------------------------------------------------------------------------------------
# Text -> tokens


def start_or_resume(
    corpus: Corpus | Pairs,
    parts: Path,
    made_from: str,
    command: str,
    *,
    fit: bool,
    whole: Corpus | None = None,
) -> tuple[Tokenizer, Progress]:
    """The tokenizer, and how far the encoding is; fit: see make_tokenizer; whole: of which this corpus is a part."""
    saved = read_json(parts / "progress.json")
    if saved.get("made_from") == made_from:
        progress = Progress(**saved)
        corpus.found = {int(number): Found(*entry) for number, entry in progress.found.items()}
        print(f"resuming after {progress.read:,} of {sum(corpus.sizes):,} bytes", file=sys.stderr)
        return from_state(progress.tokenizer), progress
    if saved:
        print(
            "note: the files or settings changed since the stopped preparation; starting over",
            file=sys.stderr,
        )
    tokenizer = make_tokenizer(
        whole or corpus, fit
    )  # before the folder is made, as it may refuse the text
    if parts.exists():
        shutil.rmtree(parts)
    parts.mkdir(parents=True)
    splits = {
        split: dict.fromkeys((*corpus.counts, *corpus.other_counts), 0) for split in corpus.splits
    }
    progress = Progress(
        made_from, command, tokenizer.state(), splits, counts=[0] * tokenizer.vocab_size
    )
    write_json(parts / "progress.json", vars(progress))
    return tokenizer, progress


def make_tokenizer(corpus: Corpus | Pairs, fit: bool) -> Tokenizer:
    """fit: of a small text, take as many tokens as there are, since the user named no vocab_size."""
    if corpus.config.tokenizer not in TOKENIZERS:
        return pretrained_tokenizer(corpus.config.tokenizer, corpus)
    kind = TOKENIZERS[corpus.config.tokenizer]
    options = {key: getattr(corpus.config, key) for key in kind.options}
    train = partial(kind.train, separated=corpus.separated)
    base, each = kind.training_memory
    size, free = base + each * min(sum(corpus.sizes), VOCABULARY_BYTES), limits.available_memory()
    if base and size > free:
        needed = f"takes {limits.gigabytes(size)} of memory, and {limits.gigabytes(free)} are free"
        raise UserError(
            f"training tokenizer={kind.name} on this text {needed}; --tokenizer=byte takes none"
        )
    try:
        return train(vocabulary_texts(corpus, kind.needs_all_texts), **options)
    except VocabularyTooLarge as error:
        if not fit:
            raise
        print(f"note: {error}; vocab_size={error.most} is taken", file=sys.stderr)
        options["vocab_size"] = error.most
        return train(vocabulary_texts(corpus, kind.needs_all_texts), **options)


def pretrained_tokenizer(path: str, corpus: Corpus | Pairs) -> Tokenizer:
    """Of a model's folder, of a run, an adapter or nanoGPT's ckpt.pt, or of a model of the hub. Raises UserError."""
    from humptygpt.interchange.load import load_tokenizer  # here, since it loads torch

    tokenizer = separate(load_tokenizer(path), corpus.separated)
    if tokenizer.eot is None and corpus.task == Pairs.task:
        raise UserError(
            f"tokenizer={path} has no end-of-text token, which sentence pairs need; take another --tokenizer"
        )
    return tokenizer


def separate(tokenizer: Tokenizer, separated: bool) -> Tokenizer:
    """The same with an end-of-text token, if documents need one and the model it is for has one."""
    state = tokenizer.state()
    if not separated or tokenizer.eot is not None or "separated" not in state:
        return tokenizer
    separate = from_state(state | {"separated": True})
    return separate if separate.vocab_size == tokenizer.vocab_size else tokenizer


def encode(corpus: Corpus | Pairs, tokenizer: Tokenizer, progress: Progress, parts: Path) -> None:
    """Write the token files into parts, in order and on all cores; saves the progress regularly."""
    writers = {
        split: TokenWriter(
            parts, split, token_dtype(tokenizer), corpus.config.shard_tokens, counted["tokens"]
        )
        for split, counted in progress.splits.items()
    }
    most = min(limits.usable_cores(), limits.available_memory() // WORKER_MEMORY)
    large = sum(corpus.sizes) >= SMALL
    workers = (corpus.config.workers or max(1, most)) if large else 1
    if large and (busy := limits.load_note()):
        print(f"note: {busy}", file=sys.stderr)
    counts = np.array(progress.counts)

    def save() -> None:
        for writer in writers.values():
            writer.flush()
        progress.counts = counts.tolist()
        progress.found = {
            str(number): list(vars(entry).values()) for number, entry in corpus.found.items()
        }
        write_json(parts / "progress.json", vars(progress))

    with ExitStack() as stack, progress_bar(sum(corpus.sizes), "encoding", progress.read) as bar:
        for writer in writers.values():
            stack.callback(writer.close)
        for number, (unit, encoded) in enumerate(
            in_order(corpus, tokenizer, progress, workers), start=1
        ):
            for split, (ids, counted) in encoded.items():
                writers[split].write(ids)
                if len(ids):
                    counts += np.bincount(ids, minlength=len(counts))
                total = progress.splits[split]
                for key, value in counted.items():
                    total[key] = max(total[key], value) if key == "longest" else total[key] + value
            bar.update(unit.read - progress.read)
            progress.file, progress.piece, progress.read, progress.split = (
                unit.file,
                unit.piece,
                unit.read,
                unit.split,
            )
            if number % SAVE_UNITS == 0:
                save()
        save()


def in_order(
    corpus: Corpus | Pairs, tokenizer: Tokenizer, progress: Progress, workers: int
) -> Iterator[tuple]:
    """(unit, its encoding) for the units after progress, in order; about 4 units per worker are in memory."""
    encoder = corpus.encoder
    if workers == 1:
        yield from ((unit, encoder(tokenizer, unit.entries)) for unit in units(corpus, progress))
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, context, initializer=start_worker, initargs=(tokenizer.state(), encoder)
    )
    waiting: deque = deque()
    try:
        for unit in units(corpus, progress):
            waiting.append((unit, pool.submit(encode_in_worker, unit.entries)))
            if len(waiting) > 4 * workers:
                first, encoded = waiting.popleft()
                yield first, encoded.result()
        for first, encoded in waiting:
            yield first, encoded.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, maybe for lack of memory; use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


worker_encoder: Callable[[list[tuple]], dict]  # set in worker processes only


def start_worker(state: dict, encoder: Encoder) -> None:
    global worker_encoder
    worker_encoder = partial(encoder, from_state(state))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C

    def end_with_parent() -> None:  # a worker whose parent was killed would wait for work forever
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def encode_in_worker(entries: list[tuple]) -> dict:
    return worker_encoder(entries)


# --------------------------------------------------------------------------------------
# The folder


def check_splits(corpus: Corpus | Pairs, progress: Progress, parts: Path) -> None:
    """Raise UserError where a split has too few tokens, and remove the incomplete files: resuming would not help."""
    for split, counted in progress.splits.items():
        if counted["tokens"] < 2:
            shutil.rmtree(parts)
            with suppress(OSError):  # not empty
                parts.parent.rmdir()
            rule = f"{split}.bin would have {counted['tokens']} tokens, but needs at least 2"
            raise UserError(f"{rule}: {corpus.why_short(progress.splits)}")


def describe(corpus: Corpus | Pairs, tokenizer: Tokenizer, progress: Progress, parts: Path) -> dict:
    """The content of meta.json; long entries come last."""
    dtype, counts, splits = token_dtype(tokenizer), np.array(progress.counts), {}
    for split, counted in progress.splits.items():
        paths = [path for path in sorted(parts.glob(f"{split}*.bin")) if path.stat().st_size]
        splits[split] = {key: counted[key] for key in corpus.counts} | {
            "files": [
                {"name": path.name, "tokens": path.stat().st_size // dtype.itemsize}
                for path in paths
            ],
            "checksums": {path.name: checksums(path) for path in paths},
        }
    total = {key: sum(counted[key] for counted in splits.values()) for key in corpus.counts}
    commonest = [
        {
            "token": int(i),
            "text": tokenizer.decode([i]),
            "share": round(int(counts[i]) / total["tokens"], 4),
        }
        for i in np.argsort(-counts, kind="stable")[:10]
        if counts[i]
    ]
    spelled = isinstance(tokenizer, SentencePieceTokenizer)
    first_text = tokenizer.decode(
        np.fromfile(parts / splits["train"]["files"][0]["name"], dtype, count=1000)
    )
    return {
        "format": META_FORMAT,
        "task": corpus.task,
        "source": corpus.source,
        "dtype": dtype.name,
        **total,
        "bytes_per_token": round(total["bytes"] / total["tokens"], 4),
        "vocab_size": tokenizer.vocab_size,
        "vocabulary_used": int((counts > 0).sum()),
        **({"characters_spelled_in_bytes": tokenizer.spelled(counts)} if spelled else {}),
        **corpus.extra_meta(progress.splits, first_text),
        "commonest": commonest,
        "splits": splits,
        "tokenizer": tokenizer.state(),
    }


def install(parts: Path, folder: Path, meta: dict) -> None:
    """Move the complete files into the folder; if this is interrupted, the same command moves the rest."""
    names = {COMMAND} | {
        file["name"] for split in meta["splits"].values() for file in split["files"]
    }
    (parts / "progress.json").unlink(
        missing_ok=True
    )  # from here on, parts/meta.json is the progress
    old = read_json(folder / "meta.json")
    if any(old.get(key) != meta[key] for key in ("task", "dtype", "tokenizer", "splits")):
        moved = {
            name for name in names if not (parts / name).exists()
        }  # new ones, by a call that was interrupted
        keep_earlier_data(
            folder, moved
        )  # of the same data the files, which may be damaged, are replaced
    for name in names:
        if (parts / name).exists():
            (parts / name).replace(folder / name)
    (parts / "meta.json").replace(folder / "meta.json")
    shutil.rmtree(parts)


def keep_earlier_data(folder: Path, new: set[str]) -> None:
    """Move another data set aside, as runs may have been trained on it; killed in between, the next call continues.

    new: names of files in the folder that are not of that one.
    """
    ours = re.compile(r"meta\.(json|pkl)|command\.txt|(train|val|test)(_\d+)?\.bin")
    found = [
        path.name for path in folder.iterdir() if ours.fullmatch(path.name) and path.name not in new
    ]
    if not found and not being_moved(folder):
        return
    # what describes the data first, so that no half of it is taken for the whole
    kept = move_aside(folder, sorted(found, key=lambda name: not name.startswith("meta")))
    size = sum(path.stat().st_size for path in kept.iterdir())
    print(
        f"note: {folder} held another data set; it is now in {kept}, {size / 1e6:,.1f} MB, and a run that was trained"
        f" on it resumes with --dataset={shlex.quote(f'{folder.name}/{kept.name}')}",
        file=sys.stderr,
    )


def summary(folder: Path, meta: dict, other: dict[str, str]) -> str:
    """The data at a glance: a table of counts, then lines of text; other: those of this kind of data."""
    splits = {"total": meta} | {
        SPLIT_NAMES[split]: counted for split, counted in meta["splits"].items()
    }
    table = [f"{folder}: {meta['source']}", 12 * " " + "".join(f"{name:>14}" for name in splits)]
    for key in ("documents", "pairs", "characters", "bytes", "tokens"):
        if meta.get(key, 1) > 1:  # a single document is cut in two
            table.append(
                f"  {key:<10}" + "".join(f"{counted[key]:>14,}" for counted in splits.values())
            )
    kind, unused = meta["tokenizer"]["tokenizer"], meta["vocab_size"] - meta["vocabulary_used"]
    lines = {
        "tokenizer": f"{kind}, {meta['bytes_per_token']:.2f} bytes per token, stored as {meta['dtype']}",
        "vocabulary": f"{meta['vocab_size']:,} tokens, {f'{unused:,} unused' if unused else 'all used'}",
    }
    if unknown := meta.get("characters_spelled_in_bytes"):
        lines["byte fallback"] = (
            f"{unknown:,} characters are not in the vocabulary and are encoded as bytes"
        )
    frequent = [f"{entry['text']!r} {100 * entry['share']:.1f}%" for entry in meta["commonest"][:6]]
    lines["most frequent"] = ", ".join(frequent)
    return "\n".join([*table, *(f"  {key:<15}{line}" for key, line in (lines | other).items())])


def read_json(path: Path) -> dict:
    """The content of the file; empty where there is no file, or no JSON object in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except (FileNotFoundError, ValueError):
        return {}


def write_json(path: Path, content: dict) -> None:
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


if __name__ == "__main__":
    configurator.run(main)
