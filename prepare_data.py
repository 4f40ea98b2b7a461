"""Text, or sentence pairs -> data/<name>: train.bin and val.bin (token ids), meta.json (tokenizer, counts, checksums).

    python prepare_data.py shakespeare_char                                  a known text, found or downloaded
    python prepare_data.py --input=FILE_FOLDER_OR_PATTERN --name=mine        your own text
    python prepare_data.py --input='corpus/*.jsonl.gz' --name=mine --tokenizer=gpt2 --val_fraction=0.001
    python prepare_data.py translate_de_en                                   sentence pairs, found or downloaded
    python prepare_data.py --input=pairs.tsv --name=mine                     your own: SOURCE, a tab, TARGET on a line
    python prepare_data.py --source=a.de --target=a.en --name=mine           or two files that go line by line

It reads .txt, .jsonl and .parquet, also with .gz or .zst behind that. A text file, a line of JSON and a row of Parquet
are a document each; between documents stands an end-of-text token. Documents are drawn for validation by their text
alone, so that more files change nothing for those that were there; a corpus of one text file is cut at its end instead.
Pairs are drawn by their source alone, for validation and for test.bin; both sides share one vocabulary.
Nothing is ever whole in memory. Stopped at any moment, the same command goes on where it was.
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
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path

import numpy as np

from humptygpt import configurator
from humptygpt import tokenizer as tokenizers
from humptygpt.configurator import UserError, check, setting
from humptygpt.corpus import Corpus, Encoder, Progress, Unit, progress_bar
from humptygpt.documents import check_readable, find_files
from humptygpt.files import write_whole
from humptygpt.known_texts import KNOWN, PairFiles
from humptygpt.pairs import Pairs, is_tsv
from humptygpt.token_files import META_FORMAT, TokenWriter, checksums, token_dtype
from humptygpt.tokenizer import (
    TOKENIZERS,
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

SAVED = 128  # units after which progress is saved
SMALL = 8_000_000  # bytes of files below which more processes do not pay


@dataclass(frozen=True)
class PrepareConfig:
    name: str | None = setting(None, "the folder in data/ to write; a bare argument is the name, too", group="data")
    input: str | None = setting(
        None, "a file, a folder or a pattern; None: data/<name>/input.txt or input.tsv, or a known text"
    )
    text_key: str = setting("text", "the field that holds the text in .jsonl and .parquet files")
    encoding_errors: str = setting(
        "strict",
        "bytes that are not UTF-8: strict refuses, replace writes U+FFFD, ignore drops",
        choices=("strict", "replace", "ignore"),
    )
    val_fraction: float | None = setting(
        None, "fraction of documents, or of a single one, for validation; None: 0.1, pairs 0.02", above=0, below=1
    )
    files: int | None = setting(None, "take only the first so many files", at_least=1)

    source: str | None = setting(
        None, "a file with one sentence to translate per line", group="sentence pairs; a .tsv file holds both sides"
    )
    target: str | None = setting(None, "the file with their translations, line by line")
    test_fraction: float | None = setting(
        None, "fraction of pairs for a test split, 0: none; None: as val_fraction", at_least=0, below=1
    )
    max_pair_tokens: int | None = setting(
        None, "pairs with more tokens on a side, end-of-text included, are dropped; None: 128", at_least=2
    )
    max_pair_ratio: float | None = setting(
        None, "pairs are dropped whose sides differ by more than this factor and 8 tokens; None: 3", at_least=1
    )

    tokenizer: str | None = setting(
        None,
        "char, byte, sentencepiece, gpt2 or bpe; None: char, pairs sentencepiece",
        group="tokens",
        choices=TOKENIZERS,
    )
    vocab_size: int | None = setting(None, "tokenizer=sentencepiece or bpe: tokens; None: 4096, pairs 8192", at_least=2)
    model_type: str | None = setting(
        None, "tokenizer=sentencepiece: bpe or unigram; None: bpe", choices=("bpe", "unigram")
    )
    shard_tokens: int | None = setting(
        None, "tokens per file, the rest goes into train_0001.bin and so on; None: one file", at_least=1
    )

    workers: int | None = setting(None, "processes that encode; None: one per core", group="system", at_least=1)

    def __post_init__(self):
        check(self)
        if not self.name:
            raise ValueError("no name for the data set; try: python prepare_data.py shakespeare_char")
        if self.name in (".", "..") or "/" in self.name or "\\" in self.name:
            raise ValueError(f"name={self.name} must be the name of a folder in data/, not a path")
        if (self.source is None) != (self.target is None):
            raise ValueError("source and target go together: --source=a.de --target=a.en, line by line translations")
        if self.source is not None and self.input is not None:
            raise ValueError(f"input={self.input} and source={self.source}: take one of them")


def main(argv: list[str]) -> None:
    config = configurator.make(PrepareConfig, configurator.read(argv, PrepareConfig, positional="name"))
    prepare(config)
    meta = read_json(Path("data") / config.name / "meta.json")
    out_dir = f"out/{config.name}"
    command = f"python train.py --dataset={shlex.quote(config.name)} --out_dir={shlex.quote(out_dir)}"
    known = config.name in KNOWN and not (config.input or config.source)
    if known and Path(__file__).with_name("config").joinpath(f"{config.name}.py").exists():
        command = f"python train.py config/{config.name}.py"
    elif meta["task"] == "translation":
        command = command.replace("train.py", "train.py config/translate_de_en.py") + f" --block_size={meta['longest']}"
    print(f"\ntrain on it: {command}")


def prepare(config: PrepareConfig) -> None:
    """Write data/<name>. The folder counts as prepared when meta.json is there, and that is written last."""
    folder = Path("data") / config.name
    parts = folder / "preparing"  # what is not whole yet
    command = "python prepare_data.py " + shlex.join(arguments(config))
    corpus = find_corpus(config, folder)
    settings = replace(corpus.config, input=None, source=None, target=None, files=None, workers=None)
    made_from = digest([corpus.description(), asdict(settings)])
    try:
        meta = read_json(parts / "meta.json")
        if meta.get("made_from") != made_from:
            tokenizer, progress = start_or_go_on(corpus, parts, made_from, command)
            encode(corpus, tokenizer, progress, parts)
            check_splits(corpus, progress, parts)
            meta = describe(corpus, tokenizer, progress, parts) | {"command": command, "made_from": made_from}
            write_json(parts / "meta.json", meta)
        install(parts, folder, meta)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or folder}: {error.strerror}; the same command goes on from here"
        ) from error
    except KeyboardInterrupt:
        print("the same command goes on from here", file=sys.stderr)
        raise
    print(summary(folder, meta, corpus.rows(meta)))


def settle(config: PrepareConfig, pairs: bool = False) -> PrepareConfig:
    """Defaults for what is still open; refuses what the kind of data or the tokenizer would not obey."""
    if pairs:
        config = with_defaults(config, {"val_fraction": 0.02, "tokenizer": "sentencepiece"})
        config = with_defaults(config, {"test_fraction": config.val_fraction})
        config = with_defaults(config, {"max_pair_tokens": 128, "max_pair_ratio": 3.0})
    else:
        config = with_defaults(config, {"val_fraction": 0.1, "tokenizer": "char"})
        for key in ("test_fraction", "max_pair_tokens", "max_pair_ratio"):
            if getattr(config, key) is not None:
                raise UserError(
                    f"{key}={getattr(config, key)} goes with sentence pairs only: --input=PAIRS.tsv, or --source=FILE"
                    " --target=FILE"
                )
    for key, obeyed_by, default in (
        ("vocab_size", ("sentencepiece", "bpe"), 8192 if pairs else 4096),
        ("model_type", ("sentencepiece",), "bpe"),
    ):
        if config.tokenizer in obeyed_by:
            config = with_defaults(config, {key: default})
        elif getattr(config, key) is not None:
            raise UserError(f"{key}={getattr(config, key)} goes with --tokenizer={' or '.join(obeyed_by)} only")
    return config


def with_defaults(config: PrepareConfig, settings: dict) -> PrepareConfig:
    """The config with these settings for those keys that are None."""
    return replace(config, **{key: value for key, value in settings.items() if getattr(config, key) is None})


def arguments(config: PrepareConfig) -> list[str]:
    """The command line that gives this config, but for the number of workers, which changes no byte."""
    changed = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    return [f"--{key}={value}" if key != "name" else value for key, value in changed.items() if key != "workers"]


# --------------------------------------------------------------------------------------
# The text


def find_corpus(config: PrepareConfig, folder: Path) -> Corpus | Pairs:
    """What the config names, of the kind that it is, with the config that has no open ends."""
    asked = config
    config, where, source = find_text(config, folder)
    if isinstance(where, str):
        files = find_files(where)[: config.files]
        if not any(map(is_tsv, files)):
            return Corpus(settle(config), files, source or where)
        if not all(map(is_tsv, files)):
            raise UserError(f"{where} is .tsv, which are sentence pairs, and others; take one kind")
        parts = [(None, (file,)) for file in files]
        source = source or (where if len(files) == 1 else f"{len(files):,} files: {where}")
    else:
        parts = list(where.items())
        without_effect = ("files",) if None in where else ("files", "val_fraction", "test_fraction")
        for key in without_effect:
            if getattr(asked, key) is not None:
                print(f"note: {key}={getattr(asked, key)} has no effect on these files", file=sys.stderr)
        for file in chain.from_iterable(where.values()):
            check_readable(file)
    return Pairs(settle(config, pairs=True), parts, source)


def find_text(config: PrepareConfig, folder: Path) -> tuple[PrepareConfig, str | PairFiles, str | None]:
    """(the config with what is usual for this text, where it is, its source in words where that is not the path).

    Where: a path, or what is known of pairs of files.
    """
    if config.source is not None:
        files = (Path(config.source), Path(config.target))
        return config, {None: files}, f"{config.source} and {config.target}"
    if config.input is not None:
        return config, config.input, None
    if known := KNOWN.get(config.name):
        another = config.tokenizer not in (None, known.settings["tokenizer"])
        usual = {key: value for key, value in known.settings.items() if not (another and key == "vocab_size")}
        config = with_defaults(config, usual)
    own = [folder / "input.txt", folder / "input.tsv"]
    for path in own:
        if os.path.exists(path):
            return config, str(path), None
    if known:
        return config, *known.fetch(config.name, config.files)
    raise UserError(
        f"no data set {config.name}: it is not one of: {', '.join(KNOWN)}, and there is no {own[0]};"
        f" for your own text: python prepare_data.py --input=FILE_OR_FOLDER --name={config.name}"
    )


# --------------------------------------------------------------------------------------
# Text -> tokens


def start_or_go_on(corpus: Corpus | Pairs, parts: Path, made_from: str, command: str) -> tuple[Tokenizer, Progress]:
    saved = read_json(parts / "progress.json")
    if saved.get("made_from") == made_from:
        progress = Progress(**saved)
        print(f"going on after {progress.read:,} of {sum(corpus.sizes):,} bytes", file=sys.stderr)
        return tokenizers.from_state(progress.tokenizer), progress
    if saved:
        print("note: the files or settings are others than when this was stopped; starting anew", file=sys.stderr)
    tokenizer = make_tokenizer(corpus)  # a text that it refuses leaves no folder behind
    if parts.exists():
        shutil.rmtree(parts)
    parts.mkdir(parents=True)
    counted = corpus.nothing_counted()
    progress = Progress(made_from, command, tokenizer.state(), counted, counts=[0] * tokenizer.vocab_size)
    write_json(parts / "progress.json", vars(progress))
    return tokenizer, progress


def make_tokenizer(corpus: Corpus | Pairs) -> Tokenizer:
    config, separated = corpus.config, corpus.separated
    if config.tokenizer == "char":
        return CharTokenizer.train(corpus.texts_to_learn_from(everything=True), separated)
    if config.tokenizer == "byte":
        return ByteTokenizer(separated)
    if config.tokenizer == "gpt2":
        return BytePairTokenizer.gpt2(separated)
    texts = corpus.texts_to_learn_from(everything=False)
    if config.tokenizer == "sentencepiece":
        return SentencePieceTokenizer.train(texts, config.vocab_size, config.model_type, separated)
    return BytePairTokenizer.train(texts, config.vocab_size, separated)


def encode(corpus: Corpus | Pairs, tokenizer: Tokenizer, progress: Progress, parts: Path) -> None:
    """Write the token files into parts, on all cores and in order."""
    writers = {
        split: TokenWriter(parts, split, token_dtype(tokenizer), corpus.config.shard_tokens, counted["tokens"])
        for split, counted in progress.splits.items()
    }
    workers = corpus.config.workers or os.cpu_count() or 1
    if sum(corpus.sizes) < SMALL:
        workers = 1
    counts = np.array(progress.counts)

    def save() -> None:
        for writer in writers.values():
            writer.flush()
        progress.counts = counts.tolist()
        write_json(parts / "progress.json", vars(progress))

    with ExitStack() as stack, progress_bar(sum(corpus.sizes), "encoding", progress.read) as bar:
        for writer in writers.values():
            stack.callback(writer.close)
        units = in_order(corpus.units(progress), tokenizer, corpus.encoder(), workers)
        for number, (unit, encoded) in enumerate(units, start=1):
            for split, (ids, counted) in encoded.items():
                writers[split].write(ids)
                if len(ids):
                    counts += np.bincount(ids, minlength=len(counts))
                so_far = progress.splits[split]
                for key, value in counted.items():
                    so_far[key] = max(so_far[key], value) if key == "longest" else so_far[key] + value
            bar.update(unit.read - progress.read)
            progress.file, progress.piece, progress.read, progress.split = unit.file, unit.piece, unit.read, unit.split
            if number % SAVED == 0:
                save()
        save()


def in_order(
    units: Iterator[Unit], tokenizer: Tokenizer, encoder: Encoder, workers: int
) -> Iterator[tuple[Unit, dict]]:
    """Each unit with what the encoder makes of it. Few units are in memory at once."""
    if workers == 1:
        for unit in units:
            yield unit, encoder(tokenizer, unit.texts)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(tokenizer.state(), encoder))
    waiting: deque = deque()
    try:
        for unit in units:
            waiting.append((unit, pool.submit(work, unit.texts)))
            if len(waiting) > 4 * workers:
                unit, encoded = waiting.popleft()
                yield unit, encoded.result()
        for unit, encoded in waiting:
            yield unit, encoded.result()
    except BrokenProcessPool as error:
        raise UserError("a process that encodes was killed, perhaps for memory; try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


worker_tokenizer: Tokenizer  # in a worker process: the one that it encodes with
worker_encoder: Encoder


def start_worker(state: dict, encoder: Encoder) -> None:
    global worker_tokenizer, worker_encoder
    worker_tokenizer, worker_encoder = tokenizers.from_state(state), encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle

    def end_with_parent() -> None:  # or a worker whose parent was killed would wait for work for ever
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def work(texts: list[tuple]) -> dict:
    return worker_encoder(worker_tokenizer, texts)


# --------------------------------------------------------------------------------------
# The folder


def check_splits(corpus: Corpus | Pairs, progress: Progress, parts: Path) -> None:
    """Raises UserError where a split has too little, and leaves nothing to go on with, since that would not help."""
    try:
        corpus.check(progress.splits)
    except UserError:
        shutil.rmtree(parts)
        with suppress(OSError):  # it holds something else
            parts.parent.rmdir()
        raise


def describe(corpus: Corpus | Pairs, tokenizer: Tokenizer, progress: Progress, parts: Path) -> dict:
    """What meta.json says. Long and unreadable things come last."""
    dtype = token_dtype(tokenizer)
    splits = {}
    for split, counted in progress.splits.items():
        paths = [path for path in sorted(parts.glob(f"{split}*.bin")) if path.stat().st_size]
        files = [{"name": path.name, "tokens": path.stat().st_size // dtype.itemsize} for path in paths]
        splits[split] = {key: counted[key] for key in corpus.counts}
        splits[split] |= {"files": files, "checksums": {path.name: checksums(path) for path in paths}}
    total = {key: sum(counted[key] for counted in splits.values()) for key in corpus.counts}
    counts = np.array(progress.counts)
    commonest = [
        {"token": int(i), "text": tokenizer.decode([i]), "share": round(int(counts[i]) / total["tokens"], 4)}
        for i in np.argsort(-counts, kind="stable")[:10]
        if counts[i]
    ]
    first = splits["train"]["files"][0]["name"]
    beginning = tokenizer.decode(np.fromfile(parts / first, dtype, count=1000))
    unknown = {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        unknown = {"characters_spelled_in_bytes": tokenizer.spelled(counts)}
    return {
        "format": META_FORMAT,
        "task": corpus.task,
        "source": corpus.source,
        "dtype": dtype.name,
        **total,
        "bytes_per_token": round(total["bytes"] / total["tokens"], 4),
        "vocab_size": tokenizer.vocab_size,
        "vocabulary_used": int((counts > 0).sum()),
        **unknown,
        **corpus.about(progress.splits, beginning),
        "commonest": commonest,
        "splits": splits,
        "tokenizer": tokenizer.state(),
    }


def install(parts: Path, folder: Path, meta: dict) -> None:
    """Put the finished files into the folder; killed in between, the same command moves the rest."""
    names = {file["name"] for split in meta["splits"].values() for file in split["files"]}
    (parts / "progress.json").unlink(missing_ok=True)  # from here on, parts/meta.json tells where this stands
    (folder / "meta.json").unlink(missing_ok=True)
    for old in folder.glob("*.bin"):
        if re.fullmatch(r"(train|val|test)(_\d+)?\.bin", old.name) and old.name not in names:
            old.unlink()
    for name in names:
        if (parts / name).exists():
            (parts / name).replace(folder / name)
    (parts / "meta.json").replace(folder / "meta.json")
    shutil.rmtree(parts)


def summary(folder: Path, meta: dict, rows: dict[str, str]) -> str:
    """The data at a glance; rows: what stands first, with one for tokens."""
    rows["tokens"] += f"; {meta['bytes_per_token']:.2f} bytes each, {meta['dtype']}"
    kind = meta["tokenizer"]["tokenizer"]
    rows["vocabulary"] = f"{meta['vocab_size']:>15,}   {kind}; {meta['vocabulary_used']:,} of them occur"
    if "characters_spelled_in_bytes" in meta:
        rows["unknown"] = f"{meta['characters_spelled_in_bytes']:>15,}   characters without a piece, spelled in bytes"
    commonest = ", ".join(f"{entry['text']!r} {100 * entry['share']:.1f} %" for entry in meta["commonest"][:6])
    rows["commonest"] = f"    {commonest}"
    if "examples" in meta:
        rows["such as"] = "    " + f"\n{16 * ' '}".join(f"{source} -> {target}" for source, target in meta["examples"])
    return "\n".join([f"{folder}: {meta['source']}", *(f"  {key:<10}{row}" for key, row in rows.items())])


def read_json(path: Path) -> dict:
    """What the file holds; nothing where there is none, or none of ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except (FileNotFoundError, ValueError):
        return {}


def write_json(path: Path, content: dict) -> None:
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


if __name__ == "__main__":
    configurator.run(main)
