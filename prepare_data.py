"""Text or sentence pairs -> data/<name>: train.bin and val.bin (token ids), meta.json (tokenizer, counts, checksums).

    python prepare_data.py shakespeare_char                                  a known text, found or downloaded
    python prepare_data.py --input=FILE_FOLDER_OR_PATTERN --name=mine        your own text
    zcat dump.gz | python prepare_data.py --input=- --name=mine              a text on standard input
    python prepare_data.py --input='corpus/*.jsonl.gz' --name=mine --tokenizer=gpt2 --val_fraction=0.001
    python prepare_data.py translate_de_en                                   sentence pairs, found or downloaded
    python prepare_data.py --input=pairs.tsv --name=mine                     your own: SOURCE, a tab, TARGET per line
    python prepare_data.py --source=a.de --target=a.en --name=mine           or two aligned files

Input is text, .jsonl, .parquet or .csv, optionally with .gz or .zst. A line of JSON, a row of Parquet or CSV and a
file of any other ending but .tsv are one document each; files of a folder that are no text are skipped and named, and
carriage returns become line breaks. An end-of-text token separates documents. A document's split, train or val,
depends only on its text, so that added files change nothing for the documents that were there; a single text file is
cut instead, and so are files of few documents. A pair's split, train, val or test, depends only on its source; both
sides share one vocabulary.
Files are streamed, never held in memory. A stopped preparation resumes when the same command is run again.
"""

import filecmp
import os
import re
import runpy
import shlex
import shutil
import sys
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

from humptygpt import machine

if __name__ == "__main__":
    machine.start()  # before numpy is loaded

import numpy as np

from humptygpt import config as configurator
from humptygpt.config import (
    UserError,
    as_written_here,
    check_choices,
    check_fraction,
    check_least,
    note,
    our_configs,
)
from humptygpt.convert.hub import repository
from humptygpt.files import Lock, cannot_write, remove
from humptygpt.prepare.corpus import (
    COMMANDS,
    VOCABULARY_BYTES,
    Documents,
    identity,
    read_from,
    vocabulary_texts,
)
from humptygpt.prepare.documents import file_format, find_files, write_if_changed
from humptygpt.prepare.encoding import Progress, encode, read_json, write_json
from humptygpt.prepare.sources import SOURCES, Source
from humptygpt.token_files import (
    COMMAND,
    META_FORMAT,
    is_whole,
    read_meta,
    sha256,
    token_dtype,
    verify,
)
from humptygpt.tokenizers import (
    TOKENIZERS,
    SentencePieceTokenizer,
    Tokenizer,
    VocabularyTooLarge,
    from_state,
)
from humptygpt.translation.pairs import PairFiles, Pairs

Corpus = Documents | Pairs
STREAM = "standard_input.txt"  # the copy of a stream, which is read more than once
RESUME = "run the same command again to resume"
OWN_TEXT = "python prepare_data.py --input=FILE_OR_FOLDER --name=NAME"
CHOICES = ("auto", *TOKENIZERS)
# tokenizer=auto: characters for small text, and from so many bytes on so many subwords; the last two are estimates
AUTO = ((500_000, 512), (2_000_000, 2048), (50_000_000, 8192), (500_000_000, 32_768))
# text that zlib compresses below this ratio, such as source code, takes the row before: with fewer subwords, a model
# sooner learns to copy
REPEATS_ITSELF = 0.33
MOST_CHARACTERS = 256  # of a small text; with more, its tokens are bytes
OF_PAIRS = ("test_fraction", "max_pair_tokens", "max_pair_ratio", "held_out")


@dataclass(frozen=True)
class PrepareConfig:
    # data
    name: str | None = None  # folder in data/ to write; also the bare argument
    input: str | None = None  # file, folder, pattern, or - for a stream
    text_key: str | None = None  # field or column with the text; None: text
    encoding_errors: str = "strict"  # for bytes that are not UTF-8
    skip_bad_lines: bool = False  # leave out lines that have no text, or not one tab
    val_fraction: float | None = None  # fraction for validation; None: 0.1, pairs 0.02
    files: int | None = None  # maximum number of files
    # sentence pairs, also from a .tsv input
    source: str | None = None  # file with a sentence per line
    target: str | None = None  # file with their translations, line by line
    test_fraction: float | None = None  # fraction for test; None: val_fraction
    max_pair_tokens: int | None = None  # drop pairs with a longer side; None: 128
    max_pair_ratio: float | None = None  # drop pairs with a larger length ratio; None: 3
    held_out: str | None = None  # file of pairs, or of a source per line, not to train on
    # tokens
    tokenizer: str = "auto"  # auto: by the text; or that of a model's folder or owner/model
    vocab_size: int | None = None  # number of tokens; None: by the text, or 4096
    model_type: str | None = None  # of sentencepiece; None: bpe
    shard_tokens: int | None = None  # tokens per file, train_0000.bin, ...; None: one file
    # existing data
    overwrite: bool = False  # replace another data set of this name
    verify: bool = False  # compare the token files with their checksums, and stop
    # system
    workers: int | None = None  # processes that encode; None: one per core that it may use

    @classmethod
    def choices(cls) -> dict[str, Collection[str]]:
        return {
            "encoding_errors": ("strict", "replace", "ignore"),
            "tokenizer": CHOICES,
            "model_type": ("bpe", "unigram"),
        }

    def validate(self) -> None:
        check_choices(replace(self, tokenizer="auto"))  # it may be none of them
        check_least(self, 1, "files", "max_pair_ratio", "shard_tokens", "workers")
        check_least(self, 2, "vocab_size", "max_pair_tokens")
        check_fraction(self, "val_fraction", "test_fraction")
        if self.val_fraction == 0:
            raise ValueError("val_fraction=0.0 must be above 0")
        tokenizer = self.tokenizer
        elsewhere = tokenizer not in CHOICES
        if elsewhere and not os.path.exists(tokenizer) and not repository(tokenizer):
            kinds = f"{', '.join(CHOICES)}, a folder or file with a tokenizer, or owner/model of the hub"
            raise ValueError(f"tokenizer={tokenizer} is not one of: {kinds}")
        if not self.name or self.name in (".", "..") or set(self.name) & set("/\\\0"):
            rule = "must be the name of a folder in data/, such as shakespeare_char"
            raise ValueError(
                f"name={self.name!r} {rule}; for your own text: {as_written_here(OWN_TEXT)}"
            )
        if (self.source is None) != (self.target is None) or (self.source and self.input):
            rule = "go together, and without input: --source=a.de --target=a.en, line by line translations"
            raise ValueError(f"source and target {rule}")


def main(argv: list[str]) -> None:
    given = configurator.read(argv, PrepareConfig, positional="name")
    config = configurator.make(PrepareConfig, given)
    if config.verify:
        if others := given.keys() - {"name", "verify"}:
            raise UserError(f"verify takes only a name; leave out {', '.join(others)}")
        folder = Path("data") / config.name
        if not (count := verify(folder)):
            raise UserError(
                f"{folder} has no checksums; another version or program wrote it"
            )
        print(f"{folder}: {count} token files are as they were written")
        return
    meta = prepare(config)
    command = f"python train.py {shlex.join(training_arguments(config, meta))}"
    print("\ntrain on it: " + as_written_here(command))


def training_arguments(config: PrepareConfig, meta: dict) -> list[str]:
    """Return what train.py takes to train on this data: the model whose tokens it has, a config, or the defaults."""
    arguments = [f"--dataset={config.name}", f"--out_dir=out/{config.name}"]
    if config.tokenizer not in CHOICES:
        return [f"--init_from={config.tokenizer}", *arguments]
    configs = our_configs()
    if built_in(config) and config.name in configs:
        arguments = [configs[config.name]]
    elif meta["task"] == Pairs.task:
        arguments = [configs["translate_de_en"], *arguments]
    if meta["task"] == Pairs.task:
        longest = meta["longest"]
        if longest > runpy.run_path(arguments[0])["block_size"]:
            arguments.append(f"--block_size={longest}")
    return arguments


def prepare(config: PrepareConfig) -> dict:
    """Write data/<name>, print a summary and return meta.json, which is written last and makes the folder complete."""
    folder = Path("data") / config.name
    with one_writer(folder):
        try:
            corpus = open_corpus(config, folder)
            meta = make_data(corpus, folder, config)
        finally:
            # nothing to resume
            if config.input == "-" and not (folder / "preparing").exists():
                (folder / STREAM).unlink(missing_ok=True)
    print(summary(folder, meta, corpus.summary(meta)))
    return meta


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Lock a folder; turn a full disk into a UserError, and say of it and of Ctrl-C how to resume."""
    advice = "wait until that has ended, or take another --name"
    try:
        with (
            machine.memory_advice("try --workers=1, or --tokenizer=byte"),
            Lock(folder / ".lock", str(folder), advice),
        ):
            yield
    except OSError as error:
        raise cannot_write(error.filename or folder, error, f"; {RESUME}") from error
    except KeyboardInterrupt:
        print(RESUME, file=sys.stderr)
        raise


def make_data(corpus: Corpus, folder: Path, config: PrepareConfig) -> dict:
    """Write the folder, unless it has the same already, and return its meta.json. config: as the user gave it."""
    preparing = folder / "preparing"
    command = command_text(config)
    made_from = data_id(corpus, config)
    old = read_json(folder / "meta.json")
    if old.get("made_from") == made_from and is_whole(folder):
        note(f"{folder} has this text with these settings already; it stays as it is")
        # with its progress, it can be resumed with other settings
        if not (preparing / "progress.json").exists():
            remove(preparing)
        return read_meta(folder)
    if read_json(preparing / "meta.json").get("made_from") != made_from:
        if old.get("command", command) != command:  # now, not after hours
            check_overwrite(folder, config)
        train = partial(make_tokenizer, corpus, config)
        # an earlier version may have begun to split the same files otherwise
        begun_from = f"{made_from} {corpus.cuts}"
        progress = encode(corpus, preparing, begun_from, command, train)
        check_splits(progress, preparing)
        meta = make_meta(corpus, progress, preparing) | {
            "command": command,
            "made_from": made_from,
        }
        write_json(preparing / "meta.json", meta)
    install(preparing, folder, config)
    return read_json(folder / "meta.json")


def data_id(corpus: Corpus, config: PrepareConfig) -> str:
    """Hash what the data is made from: the files' paths, sizes and times, settings, and a tokenizer from elsewhere."""
    files = []
    for path in corpus.paths:
        stat = path.stat()
        files.append([path.as_posix(), stat.st_mtime_ns, stat.st_size])
    elsewhere = []
    if corpus.config.tokenizer not in TOKENIZERS:
        elsewhere.append(pretrained_tokenizer(corpus.config.tokenizer, corpus).state())
    fitted = config.vocab_size is None
    return identity(corpus.config, files, fitted, *elsewhere)


def command_text(config: PrepareConfig) -> str:
    """Return the command of this config, to be pasted into a shell; without the keys that change no byte."""
    words = ["python", "prepare_data.py", config.name]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in ("name", "workers", *COMMANDS):
            words.append(f"--{field.name}={value}")
    return shlex.join(words)


# --------------------------------------------------------------------------------------
# The input


def built_in(config: PrepareConfig) -> Source | None:
    return (
        SOURCES.get(config.name) if config.input is None and config.source is None else None
    )


def open_corpus(config: PrepareConfig, folder: Path) -> Corpus:
    """Open the documents or the pairs that the config names, with the resolved config."""
    source = built_in(config)
    preset = with_defaults(config, source.settings) if source else config
    where, name = find_input(preset, folder)
    formats = set()
    if isinstance(where, str):
        text_key = preset.text_key or "text"
        files, skipped = find_files(where, preset.encoding_errors, text_key)
        files = files[: preset.files]
        name = f"{len(files):,} files: {name}" if len(files) > 1 else name
        formats = set(map(file_format, files))
    if config.text_key and formats <= {".txt"}:
        rule = f"has no effect, since {name} has no records with keys or columns"
        raise UserError(f"text_key={config.text_key} {rule}")
    if formats and (config.text_key or ".tsv" not in formats):
        resolved = resolve(config, preset, Documents.task)
        corpus = Documents(resolved, files, skipped, name)
        if resolved.tokenizer == "auto":
            chosen, corpus.chosen_for = choose_tokenizer(corpus)
            corpus.config = replace(resolved, **chosen)
        return corpus
    if formats - {".tsv"}:
        problem = f"{where} has text and sentence pairs"
        raise UserError(f"{problem}; name one kind only, by a pattern such as '*.tsv'")
    if formats:
        where = [(None, (file,)) for file in files]
    return Pairs(resolve(config, preset, Pairs.task), where, name)


def find_input(config: PrepareConfig, folder: Path) -> tuple[str | PairFiles, str]:
    """Return (a path or files of pairs, the source for meta.json)."""
    if config.source is not None:
        paths = (Path(config.source), Path(config.target))
        return [(None, paths)], f"{config.source} and {config.target}"
    if config.input == "-":
        write_if_changed(
            folder / STREAM, lambda file: shutil.copyfileobj(sys.stdin.buffer, file)
        )
        return str(folder / STREAM), "standard input"
    if config.input is not None:
        return config.input, config.input
    for path in (folder / "input.txt", folder / "input.tsv"):
        if os.path.exists(path):
            return str(path), str(path)
    if source := built_in(config):
        return source.fetch(config)
    raise UserError(
        f"no data set {config.name}: it is not one of: {', '.join(SOURCES)}, and there is no {folder}/input.txt;"
        f" for your own text: {as_written_here(OWN_TEXT)}"
    )


def with_defaults(config: PrepareConfig, defaults: dict) -> PrepareConfig:
    return replace(
        config,
        **{
            key: value
            for key, value in defaults.items()
            if getattr(config, key) in (None, "auto")
        },
    )


def resolve(config: PrepareConfig, preset: PrepareConfig, task: str) -> PrepareConfig:
    """Replace None by defaults, in preset: the config with those of a built-in data set.

    Raises UserError for a key of the config that has no effect on this data or with this tokenizer.
    """
    pairs = task == Pairs.task
    tokenizer = "bpe" if preset.vocab_size else "auto"
    preset = with_defaults(
        preset,
        {
            "val_fraction": 0.02 if pairs else 0.1,
            "tokenizer": "sentencepiece" if pairs else tokenizer,
        },
    )
    idle = {} if pairs else dict.fromkeys(OF_PAIRS, f"without task={Pairs.task}")
    for key in ("vocab_size", "model_type"):
        takers = [name for name, cls in TOKENIZERS.items() if key in cls.options]
        if preset.tokenizer not in takers:
            idle[key] = f"without tokenizer={' or '.join(takers)}"
    for key, why in idle.items():
        if getattr(config, key) is not None:
            raise UserError(f"{key}={getattr(config, key)} has no effect {why}")
    defaults = {
        "text_key": "text",
        "vocab_size": 8192 if pairs else 4096,
        "model_type": "bpe",
        "test_fraction": preset.val_fraction,
        "max_pair_tokens": 128,
        "max_pair_ratio": 3.0,
    }
    return replace(with_defaults(preset, defaults), **dict.fromkeys(idle))


# --------------------------------------------------------------------------------------
# The tokenizer


def choose_tokenizer(corpus: Documents) -> tuple[dict, str]:
    """Return the settings that tokenizer=auto stands for, and what of the text decides; the same for the same text."""
    size = packed = 0
    characters = set()
    packer = zlib.compressobj(1)
    for _, piece in read_from(corpus, "measuring the text"):
        text = piece.text.encode()
        size += len(text)
        packed += len(packer.compress(text))
        if size < AUTO[0][0]:
            characters.update(piece.text)
        if size >= AUTO[-1][0]:
            break
    packed += len(packer.flush())
    measured = f"{size:,} bytes of text"
    fitting = [vocab_size for least, vocab_size in AUTO if size >= least]
    if len(fitting) > 1 and packed < REPEATS_ITSELF * size:
        fitting.pop()
        measured += " that repeats itself"
    if fitting:
        return {"tokenizer": "bpe", "vocab_size": fitting[-1]}, measured
    kind = "char" if len(characters) <= MOST_CHARACTERS else "byte"
    return {"tokenizer": kind}, f"{measured} with {len(characters):,} different characters"


def make_tokenizer(corpus: Corpus, config: PrepareConfig) -> Tokenizer:
    """Train or load it. A small text gives as many tokens as it can where the user's config names no vocab_size."""
    if corpus.config.tokenizer not in TOKENIZERS:
        return pretrained_tokenizer(corpus.config.tokenizer, corpus)
    kind = TOKENIZERS[corpus.config.tokenizer]
    options = {key: getattr(corpus.config, key) for key in kind.options}
    base, each = kind.training_memory
    size = base + each * min(corpus.text_size, VOCABULARY_BYTES)
    training = f"training tokenizer={kind.name} on this text takes"
    machine.check_fits(
        training, size, machine.available_memory(), "--tokenizer=byte takes none"
    )
    while True:
        texts = vocabulary_texts(corpus, kind.needs_all_texts)
        try:
            return kind.train(texts, separated=corpus.separated, **options)
        except VocabularyTooLarge as error:
            if config.vocab_size is not None:
                raise
            note(f"{error}; vocab_size={error.most} is taken")
            options["vocab_size"] = error.most


def pretrained_tokenizer(path: str, corpus: Corpus) -> Tokenizer:
    """Load the tokenizer of a run, of a folder, or of a model of the hub. Raises UserError."""
    from humptygpt.convert.sources import load_tokenizer  # here, since it loads torch

    tokenizer = load_tokenizer(path)
    state = tokenizer.state()
    if corpus.separated and tokenizer.eot is None and "separated" in state:
        separated = from_state(state | {"separated": True})
        # the model that it is for has the token
        if separated.vocab_size == tokenizer.vocab_size:
            tokenizer = separated
    if tokenizer.eot is None and corpus.task == Pairs.task:
        raise UserError(
            f"tokenizer={path} has no end-of-text token, which sentence pairs need; take another --tokenizer"
        )
    return tokenizer


# --------------------------------------------------------------------------------------
# The folder


def check_splits(progress: Progress, preparing: Path) -> None:
    """Raise UserError where a split has too few tokens, and remove the incomplete files: resuming would not help."""
    for split, counted in progress.splits.items():
        if counted["tokens"] < 2:
            shutil.rmtree(preparing)
            rule = (
                f"{split}.bin would have {counted['tokens']} tokens, but needs at least 2"
            )
            advice = f"change --val_fraction or add text; counted: {dict(counted)}"
            raise UserError(f"{rule}; {advice}")


def make_meta(corpus: Corpus, progress: Progress, preparing: Path) -> dict:
    """Return the content of meta.json; long entries come last."""
    tokenizer = from_state(progress.tokenizer)
    dtype = token_dtype(tokenizer)
    splits = {}
    for split, counted in progress.splits.items():
        paths = [
            path for path in sorted(preparing.glob(f"{split}*.bin")) if path.stat().st_size
        ]
        splits[split] = {key: counted[key] for key in corpus.counts} | {
            "files": [
                {"name": path.name, "tokens": path.stat().st_size // dtype.itemsize}
                for path in paths
            ],
            "sha256": {path.name: sha256(path) for path in paths},
        }
    total = {key: sum(counted[key] for counted in splits.values()) for key in corpus.counts}
    counts = np.array(progress.counts)
    commonest = [
        {
            "token": int(i),
            "text": tokenizer.decode([i]),
            "share": round(int(counts[i]) / total["tokens"], 4),
        }
        for i in np.argsort(-counts, kind="stable")[:10]
        if counts[i]
    ]
    spelled = {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        spelled = {"characters_spelled_in_bytes": tokenizer.spelled(counts)}
    first_ids = np.fromfile(
        preparing / splits["train"]["files"][0]["name"], dtype, count=1000
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
        **spelled,
        **corpus.extra_meta(progress.splits, tokenizer.decode(first_ids)),
        "commonest": commonest,
        "splits": splits,
        "tokenizer": progress.tokenizer,
    }


def install(preparing: Path, folder: Path, config: PrepareConfig) -> None:
    """Move the complete files into the folder; if this is interrupted, the same command moves the rest."""
    meta = read_json(preparing / "meta.json")
    (preparing / "progress.json").unlink(missing_ok=True)  # meta.json is the progress now
    names = [file["name"] for split in meta["splits"].values() for file in split["files"]]
    if (preparing / COMMAND).exists():  # nothing has been moved yet
        if has_other_data(folder, meta, preparing, names):
            check_overwrite(folder, config)
        ours = re.compile(r"meta\.(json|pkl)|command\.txt|(train|val|test)(_\d+)?\.bin")
        # meta.json comes before the tokens, so that no half of them is taken for the whole
        for path in sorted(folder.iterdir()):
            if ours.fullmatch(path.name):
                path.unlink()
    # the command first, since from then on all that the folder holds is new; meta.json last
    for name in (COMMAND, *names, "meta.json"):
        if (preparing / name).exists():
            (preparing / name).replace(folder / name)
    shutil.rmtree(preparing)


def has_other_data(folder: Path, meta: dict, preparing: Path, names: list[str]) -> bool:
    """Whether the folder has a data set, and not the one in preparing; names: the token files of that."""
    old = read_json(folder / "meta.json")
    if not old:  # nanoGPT's has no command
        return (folder / "train.bin").exists() and not (folder / COMMAND).exists()
    if old.get("made_from") == meta["made_from"]:  # damaged
        return False
    equal, _, _ = filecmp.cmpfiles(preparing, folder, names, shallow=False)
    return equal != names or any(old.get(key) != meta[key] for key in ("task", "tokenizer"))


def check_overwrite(folder: Path, config: PrepareConfig) -> None:
    """Raise UserError unless the user wants to replace the folder's data set."""
    if not config.overwrite:
        command = as_written_here(command_text(config))
        ways = f"take another name, or replace it: {command} --overwrite=True"
        raise UserError(f"{folder} holds another data set; {ways}")


def summary(folder: Path, meta: dict, other: dict[str, str]) -> str:
    """Return the data at a glance: a table of counts, then lines of text; other: those of this kind of data."""
    columns = [meta, *meta["splits"].values()]
    names = ("total", "training", "validation", "test")[: len(columns)]
    table = [
        f"{folder}: {meta['source']}",
        12 * " " + "".join(f"{name:>14}" for name in names),
    ]
    for key in ("documents", "pairs", "characters", "bytes", "tokens"):
        if meta.get(key, 1) > 1:  # a single document is cut in two
            table.append(
                f"  {key:<10}" + "".join(f"{column[key]:>14,}" for column in columns)
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


if __name__ == "__main__":
    machine.run(main)
