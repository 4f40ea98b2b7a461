"""Text -> data/<name>: train.bin and val.bin (token ids), meta.json (tokenizer, source, counts, checksums).

    python prepare_data.py shakespeare_char                                  a known text, found or downloaded
    python prepare_data.py --input=FILE_FOLDER_OR_PATTERN --name=mine        your own text
    python prepare_data.py --input='corpus/*.jsonl.gz' --name=mine --tokenizer=gpt2 --val_fraction=0.001

It reads .txt, .jsonl and .parquet, also with .gz or .zst behind that. A text file, a line of JSON and a row of Parquet
are a document each; between documents stands an end-of-text token. Documents are drawn for validation by their text
alone, so that more files change nothing for those that were there; a corpus of one text file is cut at its end instead.
Nothing is ever whole in memory. Stopped at any moment, the same command goes on where it was.
"""

import hashlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import configurator
import tokenizer as tokenizers
from configurator import UserError
from documents import Piece, find_files, kind_of, read_documents
from download import file_sha256
from files import write_whole
from known_texts import KNOWN, TINY_SHAKESPEARE_SHA256
from token_files import META_FORMAT, TokenWriter, checksums
from tokenizer import (
    TOKENIZERS,
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

UNIT = 1 << 19  # characters that are encoded at once
SAVED = 128  # units after which progress is saved
SMALL = 8_000_000  # bytes of files below which more processes do not pay
DRAWN_BY = 4096  # characters of a document that decide where it goes; fewer than the first piece of it has
LEARNED_FROM = 100_000_000  # bytes of text that a vocabulary is learnt from, drawn evenly from a longer corpus


@dataclass(frozen=True)
class PrepareConfig:
    # --- data
    name: str | None = None  # the folder in data/ to write; a bare argument is the name, too
    input: str | None = None  # a file, a folder or a pattern; None: data/<name>/input.txt, or a known text
    text_key: str = "text"  # what holds the text in .jsonl and .parquet files
    encoding_errors: str = "strict"  # bytes that are not UTF-8: strict refuses, replace writes U+FFFD, ignore drops
    val_fraction: float | None = None  # share of the documents, or of a single one, for validation; None: 0.1
    files: int | None = None  # take only so many of the files, the first in their order
    # --- tokens
    tokenizer: str | None = None  # char, byte, sentencepiece, gpt2 or bpe (both byte pairs); None: char
    vocab_size: int | None = None  # tokenizer=sentencepiece or bpe: tokens to learn; None: 4096
    model_type: str | None = None  # tokenizer=sentencepiece: bpe or unigram; None: bpe
    shard_tokens: int | None = None  # tokens in a file, more go into train_0001.bin and so on; None: one file
    # --- system
    workers: int | None = None  # processes that encode; None: one for each core

    def __post_init__(self):
        if not self.name:
            raise ValueError("no name for the data set; try: python prepare_data.py shakespeare_char")
        if self.name in (".", "..") or "/" in self.name or "\\" in self.name:
            raise ValueError(f"name={self.name} must be the name of a folder in data/, not a path")
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must be above 0 and below 1")
        for key, least in {"files": 1, "vocab_size": 2, "shard_tokens": 1, "workers": 1}.items():
            if getattr(self, key) is not None and getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)} must be at least {least}")
        choices = {"tokenizer": (*TOKENIZERS, None), "encoding_errors": ("strict", "replace", "ignore")}
        choices |= {"model_type": ("bpe", "unigram", None)}
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise ValueError(f"{key}={getattr(self, key)} is not one of: {', '.join(filter(None, known))}")


def main(argv: list[str]) -> None:
    config = configurator.make(PrepareConfig, configurator.read(argv, PrepareConfig, positional="name"))
    prepare(config)
    print(f"\ntrain on it: python train.py --dataset={config.name} --out_dir=out/{config.name}")


def prepare(config: PrepareConfig) -> None:
    """Write data/<name>. The folder counts as prepared when meta.json is there, and that is written last."""
    folder = Path("data") / config.name
    parts = folder / "preparing"  # what is not whole yet
    command = "python prepare_data.py " + shlex.join(arguments(config))
    config, where, source = find_text(config, folder)
    config = settle(config)
    corpus = Corpus(config, find_files(where)[: config.files], source or where)
    made_from = digest([corpus.description(), asdict(replace(config, input=None, files=None, workers=None))])
    try:
        parts.mkdir(parents=True, exist_ok=True)
        meta = read_json(parts / "meta.json")
        if meta.get("made_from") != made_from:
            tokenizer, progress = start_or_go_on(config, corpus, parts, made_from, command)
            encode(config, corpus, tokenizer, progress, parts)
            check_splits(progress, config)
            meta = describe(config, corpus, tokenizer, progress, parts) | {"command": command, "made_from": made_from}
            write_json(parts / "meta.json", meta)
        install(parts, folder, meta)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or folder}: {error.strerror}; the same command goes on from here"
        ) from error
    except KeyboardInterrupt:
        print("the same command goes on from here", file=sys.stderr)
        raise
    print(summary(folder, meta))


def settle(config: PrepareConfig) -> PrepareConfig:
    """Defaults for what is still open; refuses what the tokenizer would not obey."""
    config = with_defaults(config, {"val_fraction": 0.1, "tokenizer": "char"})
    for key, obeyed_by, default in (
        ("vocab_size", ("sentencepiece", "bpe"), 4096),
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


def find_text(config: PrepareConfig, folder: Path) -> tuple[PrepareConfig, str, str | None]:
    """(the config with what is usual for this text, its path, its source in words where that is not the path)."""
    own = folder / "input.txt"
    known = KNOWN.get(config.name)
    if known and config.input is None:
        another = config.tokenizer not in (None, known.settings["tokenizer"])
        usual = {key: value for key, value in known.settings.items() if not (another and key == "vocab_size")}
        config = with_defaults(config, usual)
    if config.input is not None:
        return config, config.input, None
    if os.path.exists(own):
        return config, str(own), None
    if known:
        return config, *known.fetch(config.name, config.files)
    raise UserError(
        f"no data set {config.name}: it is not one of: {', '.join(KNOWN)}, and there is no {own};"
        f" for your own text: python prepare_data.py --input=FILE_OR_FOLDER --name={config.name}"
    )


class Corpus:
    """The files, and which of their documents are for training and which for validation."""

    def __init__(self, config: PrepareConfig, files: list[Path], source: str):
        self.config, self.files, self.source = config, files, source
        self.sizes = [file.stat().st_size for file in files]
        self.separated = len(files) > 1 or kind_of(files[0]) != ".txt"
        if not any(self.sizes):
            raise UserError(f"{source} is empty; there is nothing to learn from")
        if config.text_key != "text" and all(kind_of(file) == ".txt" for file in files):
            print(f"note: text_key={config.text_key} has no effect on text files", file=sys.stderr)
        if source == str(files[0]) and not self.separated and file_sha256(files[0]) == TINY_SHAKESPEARE_SHA256:
            self.source = "tiny Shakespeare"
        elif len(files) > 1:
            self.source = f"{len(files):,} files: {source}"
        # One document is cut: the last tenth of its characters is for validation. Of several, each goes where its draw
        # says; if that leaves none for validation, the one with the lowest draw.
        self.cut = None if self.separated else int(sum(len(p.text) for p in self.read(0)) * (1 - config.val_fraction))
        self.highest = max(config.val_fraction, self.lowest_draw()) if self.separated else None

    def description(self) -> list:
        return [[file.as_posix(), file.stat().st_mtime_ns, file.stat().st_size] for file in self.files]

    def read(self, number: int) -> Iterator[Piece]:
        """The documents of file number, in pieces."""
        return read_documents(self.files[number], self.config.text_key, self.config.encoding_errors)

    def lowest_draw(self) -> float:
        """Of all documents, where they are so few that it matters; else 0."""
        texts = len(self.files) < 1000 and all(kind_of(file) == ".txt" for file in self.files)
        if not texts and sum(self.sizes) > 64_000_000:
            return 0.0
        first_pieces = (
            piece.text
            for number in range(len(self.files))
            for piece in (islice(self.read(number), 1) if texts else self.read(number))
            if piece.first
        )
        return min(map(draw, first_pieces), default=0.0)

    def units(self, progress: "Progress") -> Iterator["Unit"]:
        """The texts with their splits, about UNIT characters at a time, from where progress stands."""
        split, at = progress.split, sum(counted["characters"] for counted in progress.splits.values())
        texts, length = [], 0
        skip = progress.piece
        for number in range(progress.file, len(self.files)):
            before, count = sum(self.sizes[:number]), skip
            for count, piece in enumerate(islice(self.read(number), skip, None), start=skip + 1):
                if self.separated:
                    if piece.first:
                        split = "val" if draw(piece.text) <= self.highest else "train"
                    texts.append((split, piece.text, piece.last))
                else:
                    train_part = piece.text[: max(0, self.cut - at)]
                    texts += [("train", train_part, False), ("val", piece.text[len(train_part) :], piece.last)]
                at += len(piece.text)
                length += len(piece.text)
                if length >= UNIT:
                    yield Unit(texts, split, number, count, before + piece.read)
                    texts, length = [], 0
            skip = 0
        if texts:
            yield Unit(texts, split, number, count, sum(self.sizes))

    def texts_to_learn_from(self, everything: bool) -> Iterator[str]:
        """Pieces for a tokenizer to learn from: everything, or a part of the training split, evenly drawn."""
        share = min(1.0, LEARNED_FROM / sum(self.sizes))
        start = Progress(made_from="", command="", tokenizer={})
        with progress_bar(self, "learning the vocabulary") as bar:
            for unit in self.units(start):
                bar.update(unit.read - bar.n)
                for split, text, _ in unit.texts:
                    if everything or (split == "train" and draw(text, "vocabulary") < share):
                        yield text


class Unit(NamedTuple):
    """Some text, and where reading goes on after it."""

    texts: list[tuple[str, str, bool]]  # (split, text, whether it ends its document)
    split: str  # of the document that is open
    file: int  # number of the file that is open
    piece: int  # pieces read of that file
    read: int  # bytes read of all files


def draw(text: str, salt: str = "split") -> float:
    """A number in [0, 1) that depends on the beginning of the text alone."""
    beginning = f"{salt}\n{text[:DRAWN_BY]}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(beginning, digest_size=6).digest(), "little") / 2**48


def progress_bar(corpus: Corpus, what: str, start: int = 0) -> tqdm:
    """Bytes of the files, with MB/s and time left; what is over in two seconds needs none."""
    often = 0.1 if sys.stderr.isatty() else 30  # seconds
    total = sum(corpus.sizes)
    return tqdm(desc=what, total=total, initial=start, unit="B", unit_scale=True, mininterval=often, delay=2)


# --------------------------------------------------------------------------------------
# Text -> tokens


@dataclass
class Progress:
    """How far the encoding has come. Saved every now and then, so that a stopped preparation goes on from there."""

    made_from: str  # tells the files and settings that this belongs to from others
    command: str  # the one to go on with
    tokenizer: dict  # its state
    file: int = 0  # as in Unit
    piece: int = 0
    read: int = 0
    split: str = "train"
    splits: dict[str, dict[str, int]] = field(
        default_factory=lambda: {"train": nothing_counted(), "val": nothing_counted()}
    )
    counts: list[int] = field(default_factory=list)  # how often each token occurs


def nothing_counted() -> dict[str, int]:
    return dict.fromkeys(("documents", "characters", "bytes", "tokens"), 0)


def start_or_go_on(
    config: PrepareConfig, corpus: Corpus, parts: Path, made_from: str, command: str
) -> tuple[Tokenizer, Progress]:
    saved = read_json(parts / "progress.json")
    if saved.get("made_from") == made_from:
        progress = Progress(**saved)
        print(f"going on after {progress.read:,} of {sum(corpus.sizes):,} bytes", file=sys.stderr)
        return tokenizers.from_state(progress.tokenizer), progress
    if saved:
        print("note: the files or settings are others than when this was stopped; starting anew", file=sys.stderr)
    shutil.rmtree(parts)
    parts.mkdir()
    tokenizer = make_tokenizer(config, corpus)
    progress = Progress(made_from, command, tokenizer.state(), counts=[0] * tokenizer.vocab_size)
    write_json(parts / "progress.json", vars(progress))
    return tokenizer, progress


def make_tokenizer(config: PrepareConfig, corpus: Corpus) -> Tokenizer:
    separated = corpus.separated
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


def encode(config: PrepareConfig, corpus: Corpus, tokenizer: Tokenizer, progress: Progress, parts: Path) -> None:
    """Write the token files into parts, on all cores and in order."""
    writers = {
        split: TokenWriter(parts, split, token_dtype(tokenizer), config.shard_tokens, counted["tokens"])
        for split, counted in progress.splits.items()
    }
    workers = config.workers or os.cpu_count() or 1
    if sum(corpus.sizes) < SMALL:
        workers = 1
    counts = np.array(progress.counts)

    def save() -> None:
        for writer in writers.values():
            writer.flush()
        progress.counts = counts.tolist()
        write_json(parts / "progress.json", vars(progress))

    with closing(writers["train"]), closing(writers["val"]), progress_bar(corpus, "encoding", progress.read) as bar:
        for number, (unit, encoded) in enumerate(in_order(corpus.units(progress), tokenizer, workers), start=1):
            for split, (ids, counted) in encoded.items():
                writers[split].write(ids)
                if len(ids):
                    counts += np.bincount(ids, minlength=len(counts))
                for key, value in counted.items():
                    progress.splits[split][key] += value
            bar.update(unit.read - progress.read)
            progress.file, progress.piece, progress.read, progress.split = unit.file, unit.piece, unit.read, unit.split
            if number % SAVED == 0:
                save()
        save()


def in_order(units: Iterator[Unit], tokenizer: Tokenizer, workers: int) -> Iterator[tuple[Unit, dict]]:
    """Each unit with what encode_unit makes of it. Few units are in memory at once."""
    if workers == 1:
        for unit in units:
            yield unit, encode_unit(tokenizer, unit.texts)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(tokenizer.state(),))
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


def start_worker(state: dict) -> None:
    global worker_tokenizer
    worker_tokenizer = tokenizers.from_state(state)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle

    def end_with_parent() -> None:  # or a worker whose parent was killed would wait for work for ever
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def work(texts: list[tuple[str, str, bool]]) -> dict:
    return encode_unit(worker_tokenizer, texts)


def encode_unit(tokenizer: Tokenizer, texts: list[tuple[str, str, bool]]) -> dict[str, tuple[np.ndarray, dict]]:
    """{split: (token ids, what was counted)}; texts as in Unit."""
    encoded = {}
    for split in ("train", "val"):
        ids, counted = [np.empty(0, np.int64)], nothing_counted()
        for _, text, ends in (entry for entry in texts if entry[0] == split):
            ids.append(tokenizer.encode(text))
            if ends and tokenizer.eot is not None:
                ids.append(np.array([tokenizer.eot]))
            counted["documents"] += ends
            counted["characters"] += len(text)
            counted["bytes"] += len(text.encode())
        ids = np.concatenate(ids).astype(token_dtype(tokenizer))
        encoded[split] = ids, counted | {"tokens": len(ids)}
    return encoded


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


# --------------------------------------------------------------------------------------
# The folder


def check_splits(progress: Progress, config: PrepareConfig) -> None:
    documents = sum(counted["documents"] for counted in progress.splits.values())
    for split, counted in progress.splits.items():
        if not counted["tokens"]:
            raise UserError(
                f"{split}.bin would be empty, with val_fraction={config.val_fraction} and documents: {documents:,};"
                " take another --val_fraction, or more documents; a corpus of one document has to be a .txt file"
            )


def describe(config: PrepareConfig, corpus: Corpus, tokenizer: Tokenizer, progress: Progress, parts: Path) -> dict:
    """What meta.json says. Long and unreadable things come last."""
    dtype = token_dtype(tokenizer)
    splits = {}
    for split, counted in progress.splits.items():
        paths = [path for path in sorted(parts.glob(f"{split}*.bin")) if path.stat().st_size]
        files = [{"name": path.name, "tokens": path.stat().st_size // dtype.itemsize} for path in paths]
        splits[split] = counted | {"files": files, "checksums": {path.name: checksums(path) for path in paths}}
    total = {key: sum(counted[key] for counted in splits.values()) for key in nothing_counted()}
    counts = np.array(progress.counts)
    commonest = [
        {"token": int(i), "text": tokenizer.decode([i]), "share": round(int(counts[i]) / total["tokens"], 4)}
        for i in np.argsort(-counts, kind="stable")[:10]
        if counts[i]
    ]
    unknown = {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        unknown = {"characters_spelled_in_bytes": tokenizer.spelled(counts)}
    return {
        "format": META_FORMAT,
        "task": "language modelling",
        "source": corpus.source,
        "dtype": dtype.name,
        **total,
        "bytes_per_token": round(total["bytes"] / total["tokens"], 4),
        "vocab_size": tokenizer.vocab_size,
        "vocabulary_used": int((counts > 0).sum()),
        **unknown,
        "commonest": commonest,
        "splits": splits,
        "tokenizer": tokenizer.state(),
    }


def install(parts: Path, folder: Path, meta: dict) -> None:
    """Put the finished files into the folder; killed in between, the same command moves the rest."""
    names = {file["name"] for split in meta["splits"].values() for file in split["files"]}
    (parts / "progress.json").unlink(missing_ok=True)  # from here on, parts/meta.json tells where this stands
    (folder / "meta.json").unlink(missing_ok=True)
    for old in [*folder.glob("train*.bin"), *folder.glob("val*.bin")]:
        if old.name not in names:
            old.unlink()
    for name in names:
        if (parts / name).exists():
            (parts / name).replace(folder / name)
    (parts / "meta.json").replace(folder / "meta.json")
    shutil.rmtree(parts)


def summary(folder: Path, meta: dict) -> str:
    """The data at a glance."""
    train, val = (meta["splits"][split] for split in ("train", "val"))
    commonest = ", ".join(f"{entry['text']!r} {100 * entry['share']:.1f} %" for entry in meta["commonest"][:6])
    rows = {
        key: f"{meta[key]:>15,}   for training {train[key]:,}, for validation {val[key]:,}"
        for key in ("documents", "characters", "bytes", "tokens")
    }
    if meta["documents"] == 1:
        rows["documents"] = f"{1:>15,}   cut in two: its end is for validation"
    rows["tokens"] += f"; {meta['bytes_per_token']:.2f} bytes each, {meta['dtype']}"
    kind = meta["tokenizer"]["tokenizer"]
    rows["vocabulary"] = f"{meta['vocab_size']:>15,}   {kind}; {meta['vocabulary_used']:,} of them occur"
    if "characters_spelled_in_bytes" in meta:
        rows["unknown"] = f"{meta['characters_spelled_in_bytes']:>15,}   characters without a piece, spelled in bytes"
    rows["commonest"] = f"    {commonest}"
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
