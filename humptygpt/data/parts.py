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
from humptygpt.core.settings import parse_json
from humptygpt.data.corpus import Documents
from humptygpt.data.encoding import (
    Progress,
    add_counts,
    start_folder,
    write_json,
    zero_counts,
)
from humptygpt.data.token_files import TokenWriter, checksums, token_dtype
from humptygpt.tokenizer.tokenizers import from_state

COUNT = range(2**53)
PART = {
    "corpus": str,
    "tokenizer": dict,
    "splits": {str: {str: COUNT}},
    "counts": [COUNT],
    "checksums": {str: str},
}
COPIED = 1 << 22  # bytes that are copied at once
CHANGES_NOTHING = (
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


def parse_part(text: str) -> tuple[int, int]:
    """ "3/16" -> (3, 16). Raises ValueError."""
    numbers = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text)
    if not numbers or int(numbers[1]) > int(numbers[2]):
        raise ValueError(
            f"part={text!r} must be NUMBER/COUNT, the first being 1: --part=3/16"
        )
    return int(numbers[1]), int(numbers[2])


def check_divisible(corpus) -> None:
    """Raise UserError where the corpus is no set of files with documents."""
    if not isinstance(corpus, Documents) or not corpus.separated:
        problem = f"{corpus.source} is not files of documents, but one text or pairs"
        raise UserError(f"{problem}, which have no parts; leave out --part and --join")


def part_folder(folder: Path, number: int, count: int) -> Path:
    return folder / "parts" / f"{number}_of_{count}"


def take_part(corpus: Documents, number: int, count: int) -> Documents:
    """Return the same corpus with the files of this part alone: neighbours, about as many bytes in each part."""
    total = max(1, sum(corpus.sizes))
    start = 0
    part = copy.copy(corpus)
    part.files = []
    part.sizes = []
    for file, size in zip(corpus.files, corpus.sizes, strict=True):
        if min(count - 1, start * count // total) == number - 1:
            part.files.append(file)
            part.sizes.append(size)
        start += size
    return part


def corpus_id(corpus: Documents) -> str:
    """Hash what the parts of a corpus have in common on all machines: names and sizes of files, and settings."""
    settings = {
        key: value
        for key, value in asdict(corpus.config).items()
        if key not in CHANGES_NOTHING
    }
    content = [[file.name for file in corpus.files], corpus.sizes, settings]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def finish_part(corpus: Documents, progress: Progress, folder: Path) -> None:
    """Write part.json into the folder of a part, which makes it complete. corpus: all of it."""
    part = {"corpus": corpus_id(corpus), "tokenizer": progress.tokenizer}
    part |= {"splits": progress.splits, "counts": progress.counts}
    part["checksums"] = {
        path.name: checksums(path) for path in sorted(folder.glob("*.bin"))
    }
    write_json(folder / "part.json", part)


def read_part(corpus: Documents, folder: Path) -> dict:
    """Read the part.json in the folder of a part, its files checked. Raises ValueError or OSError."""
    part = parse_json((folder / "part.json").read_bytes(), PART)
    for split in corpus.splits:
        if checksums(folder / f"{split}.bin") != part["checksums"].get(f"{split}.bin"):
            raise ValueError(f"{split}.bin is damaged")
    if part["corpus"] != corpus_id(corpus):
        raise ValueError("it is of other files or settings")
    return part


def join_parts(
    corpus: Documents, folder: Path, joined: Path, made_from: str, command: str
) -> Progress:
    """Write the token files of all parts, one after another, to the folder `joined`, as if one machine had."""
    counts = {
        int(path.name.rpartition("_")[2]) for path in folder.glob("parts/[1-9]*_of_*[0-9]")
    }
    if len(counts) != 1:
        rule = f"must have all parts of one count: {command} --part=1/COUNT"
        raise UserError(f"{folder}/parts {rule}")
    (count,) = counts
    parts = {}
    for number in range(1, count + 1):
        path = part_folder(folder, number, count)
        try:
            parts[path] = read_part(corpus, path)
            if parts[path]["tokenizer"] != next(iter(parts.values()))["tokenizer"]:
                raise ValueError("it has another vocabulary than the first part")
        except (OSError, ValueError) as error:
            again = f"prepare it: {command} {shlex.quote(f'--part={number}/{count}')}"
            raise UserError(
                f"part {number}/{count} in {path} cannot be joined: {error}; {again}"
            ) from error
    state = next(iter(parts.values()))["tokenizer"]
    dtype = token_dtype(from_state(state))
    totals = zero_counts(corpus)
    start_folder(joined, command)
    for split, total in totals.items():
        writer = TokenWriter(joined, split, dtype, corpus.config.shard_tokens, 0)
        for path, part in parts.items():
            add_counts(total, part["splits"][split])
            with (path / f"{split}.bin").open("rb") as file:
                while block := file.read(COPIED):
                    writer.write(np.frombuffer(block, dtype))
        writer.flush()
        writer.close()
    occurrences = np.sum([part["counts"] for part in parts.values()], axis=0)
    return Progress(made_from, state, totals, occurrences.tolist())
