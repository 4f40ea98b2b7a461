"""A corpus prepared in parts, on as many machines as one likes, and joined into the folder that one machine makes.

A part is some of the files, encoded: data/<name>/parts/3_of_16 has its token files and part.json, written last.
"""

import copy
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from humptygpt.core.errors import UserError
from humptygpt.core.settings import parse_json
from humptygpt.data.corpus import START, Documents, Position, identity
from humptygpt.data.encoding import (
    Encoded,
    Progress,
    start_folder,
    start_progress,
    write_json,
    write_tokens,
)
from humptygpt.data.token_files import sha256, token_dtype
from humptygpt.tokenizer.tokenizers import from_state

COUNT = range(2**53)
PART = {
    "corpus": str,
    "tokenizer": dict,
    "splits": {str: {str: COUNT}},
    "sha256": {str: str},
}
COPIED = 1 << 20  # bytes that are copied at once


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
    """Return the same corpus with the files of this part alone, which are neighbours; shards are made by the join."""
    files = len(corpus.files)
    taken = slice(files * (number - 1) // count, files * number // count)
    part = copy.copy(corpus)
    part.config = replace(corpus.config, shard_tokens=None)
    part.files = corpus.files[taken]
    part.sizes = corpus.sizes[taken]
    part.cuts = corpus.cuts and corpus.cuts[taken]
    return part


def corpus_id(corpus: Documents) -> str:
    """Hash what the parts of a corpus have in common on all machines: names and sizes of files, and settings."""
    files = [[file.name for file in corpus.files], corpus.sizes]
    return identity(corpus.config, files, corpus.cuts, without=("name", "shard_tokens"))


def finish_part(corpus: Documents, progress: Progress, folder: Path) -> None:
    """Write part.json into the folder of a part, which makes it complete. corpus: all of it."""
    sums = {path.name: sha256(path) for path in sorted(folder.glob("*.bin"))}
    part = vars(progress) | {"corpus": corpus_id(corpus), "sha256": sums}
    write_json(folder / "part.json", part)


def read_part(corpus: Documents, folder: Path) -> dict:
    """Read the part.json in the folder of a part, its files checked. Raises ValueError or OSError."""
    part = parse_json((folder / "part.json").read_bytes(), PART)
    for split in corpus.splits:
        if sha256(folder / f"{split}.bin") != part["sha256"].get(f"{split}.bin"):
            raise ValueError(f"{split}.bin is damaged")
    if part["corpus"] != corpus_id(corpus):
        raise ValueError("it is of other files or settings")
    return part


def join_parts(corpus: Documents, folder: Path, joined: Path, command: str) -> Progress:
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
        except (OSError, ValueError) as error:
            again = f"prepare it: {command} {shlex.quote(f'--part={number}/{count}')}"
            raise UserError(
                f"part {number}/{count} in {path} cannot be joined: {error}; {again}"
            ) from error
    state, *others = (part["tokenizer"] for part in parts.values())
    if any(other != state for other in others):
        raise UserError(f"the parts in {folder}/parts have different vocabularies")
    start_folder(joined, command)
    progress = start_progress(corpus, "parts", from_state(state))
    write_tokens(corpus, joined, progress, read_tokens(corpus, parts))
    return progress


def read_tokens(
    corpus: Documents, parts: dict[Path, dict]
) -> Iterator[tuple[Encoded, Position]]:
    """Read the token files of all parts in blocks. A join that is stopped starts over, so the position is unused."""
    for path, part in parts.items():
        dtype = token_dtype(from_state(part["tokenizer"]))
        for split in corpus.splits:
            counted = part["splits"][split] | {"tokens": 0}  # they are counted as written
            yield {split: (np.empty(0, dtype), counted)}, START
            with (path / f"{split}.bin").open("rb") as file:
                while block := file.read(COPIED):
                    yield {split: (np.frombuffer(block, dtype), {})}, START
