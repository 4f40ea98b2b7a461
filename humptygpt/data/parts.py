"""A corpus prepared in parts, on as many machines as one likes, and joined into the folder that one machine makes.

A part is some of the files, encoded: data/<name>/parts/3_of_16 has its token files and part.json, written last.
"""

import copy
import hashlib
import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np

from humptygpt.core.errors import UserError
from humptygpt.core.files import write_whole
from humptygpt.core.schema import parse_json
from humptygpt.data.corpus import Corpus, Progress
from humptygpt.data.documents import Found
from humptygpt.data.token_files import TokenWriter, checksums, token_dtype
from humptygpt.tokenizer.tokenizers import from_state

COUNT = range(2**53)
PART = {"corpus": str, "tokenizer": dict, "splits": {str: {str: COUNT}}, "counts": [COUNT]}
PART |= {"found": {str: list}, "checksums": {str: str}}
COPIED = 1 << 22  # bytes that are copied at once


def parse_part(text: str) -> tuple[int, int]:
    """ "3/16" -> (3, 16). Raises ValueError."""
    numbers = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text)
    if not numbers or int(numbers[1]) > int(numbers[2]):
        raise ValueError(f"part={text} must be NUMBER/COUNT, the first being 1: --part=3/16")
    return int(numbers[1]), int(numbers[2])


def check_divisible(corpus) -> None:
    """Raise UserError where the corpus is no set of files with documents."""
    if not isinstance(corpus, Corpus) or not corpus.separated:
        what = (
            "a single text, which is cut in two" if isinstance(corpus, Corpus) else "sentence pairs"
        )
        raise UserError(
            f"parts are of files with documents, and {corpus.source} is {what}; leave out --part and --join"
        )


def part_folder(folder: Path, number: int, count: int) -> Path:
    return folder / "parts" / f"{number}_of_{count}"


def take_part(corpus: Corpus, number: int, count: int) -> Corpus:
    """The same corpus with the files of this part alone: neighbours, about as many bytes in each part."""
    total, start, taken = sum(corpus.sizes), 0, []
    for index, size in enumerate(corpus.sizes):
        if min(count - 1, start * count // max(1, total)) == number - 1:
            taken.append(index)
        start += size
    part = copy.copy(corpus)
    part.files, part.sizes = [corpus.files[i] for i in taken], [corpus.sizes[i] for i in taken]
    part.found = {}
    return part


def corpus_id(corpus: Corpus) -> str:
    """What the parts of one corpus have in common, on other machines, too: names and sizes of files, and settings."""
    changes_nothing = (
        "name",
        "input",
        "source",
        "target",
        "files",
        "workers",
        "part",
        "join",
        "shard_tokens",
    )
    settings = {
        key: value for key, value in asdict(corpus.config).items() if key not in changes_nothing
    }
    content = [[file.name for file in corpus.files], corpus.sizes, settings]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def finish_part(corpus: Corpus, progress: Progress, encoded: Path) -> None:
    """Write part.json, which makes a part complete; encoded: its folder; corpus: all of it."""
    content = {
        "corpus": corpus_id(corpus),
        "tokenizer": progress.tokenizer,
        "splits": progress.splits,
    }
    content |= {"counts": progress.counts, "found": progress.found}
    content["checksums"] = {path.name: checksums(path) for path in sorted(encoded.glob("*.bin"))}
    write_whole(encoded / "part.json", lambda file: file.write(json.dumps(content).encode()))


def read_part(corpus: Corpus, folder: Path, number: int, count: int, command: str) -> dict:
    """The content of a part.json, its files checked. Raises UserError, which names the part."""
    path, again = (
        part_folder(folder, number, count),
        f"prepare it: {command} {shlex.quote(f'--part={number}/{count}')}",
    )
    try:
        part = parse_json((path / "part.json").read_bytes(), PART)
        whole = all(
            checksums(path / f"{split}.bin") == part["checksums"].get(f"{split}.bin")
            for split in corpus.splits
        )
    except FileNotFoundError as error:
        raise UserError(f"part {number}/{count} is missing in {path}; {again}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"part {number}/{count} in {path} is damaged: {error}; {again}") from error
    if not whole:
        raise UserError(
            f"part {number}/{count} in {path} is damaged: its checksums differ; {again}"
        )
    if part["corpus"] != corpus_id(corpus):
        raise UserError(f"part {number}/{count} in {path} is of other files or settings; {again}")
    return part


def join_parts(
    corpus: Corpus, folder: Path, encoded: Path, made_from: str, command: str
) -> Progress:
    """Write the token files of all parts, one after another, to the folder `encoded`, as if one machine had."""
    counts = {
        int(found[1])
        for path in folder.glob("parts/*_of_*")
        if (found := re.search(r"_of_(\d+)$", path.name))
    }
    if len(counts) != 1:
        found = f"parts of {' and of '.join(map(str, sorted(counts)))}" if counts else "no parts"
        raise UserError(
            f"{folder}/parts has {found}; prepare all parts of one count: {command} --part=1/COUNT"
        )
    (count,) = counts
    parts = [read_part(corpus, folder, number, count, command) for number in range(1, count + 1)]
    tokenizer = from_state(parts[0]["tokenizer"])
    splits = {split: dict.fromkeys(parts[0]["splits"][split], 0) for split in corpus.splits}
    total, first = np.zeros(tokenizer.vocab_size, np.int64), 0
    encoded.mkdir(parents=True, exist_ok=True)
    writers = {
        split: TokenWriter(encoded, split, token_dtype(tokenizer), corpus.config.shard_tokens, 0)
        for split in splits
    }
    for number, part in enumerate(parts, start=1):
        if part["tokenizer"] != parts[0]["tokenizer"]:
            raise UserError(
                f"part {number}/{count} has another vocabulary than part 1/{count}; prepare both again"
            )
        total += np.array(part["counts"])
        corpus.found |= {first + int(file): Found(*entry) for file, entry in part["found"].items()}
        first += len(take_part(corpus, number, count).files)
        for split, writer in writers.items():
            for key, value in part["splits"][split].items():
                splits[split][key] += value
            with (part_folder(folder, number, count) / f"{split}.bin").open("rb") as file:
                for block in iter(lambda file=file: file.read(COPIED), b""):
                    writer.write(np.frombuffer(block, token_dtype(tokenizer)))
    for writer in writers.values():
        writer.flush()
        writer.close()
    return Progress(made_from, command, tokenizer.state(), splits, counts=total.tolist())
