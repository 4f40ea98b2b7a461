"""Encode a corpus as token files: in order, on all cores, and resumable after an interruption."""

import json
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from humptygpt import machine
from humptygpt.config import note
from humptygpt.files import remove, write_whole
from humptygpt.prepare.corpus import units
from humptygpt.prepare.vocabulary import make_tokenizer
from humptygpt.token_files import COMMAND
from humptygpt.tokenizers import Tokenizer, from_state

SAVE_UNITS = 32  # units that are encoded between progress saves


@dataclass
class Progress:
    """How far the encoding is. It is saved regularly, so that an interrupted preparation can be resumed."""

    made_from: str  # hash of the files and settings, from folder.data_id()
    tokenizer: dict  # from Tokenizer.state()
    splits: dict[str, Counter]  # {split: counts of documents or pairs, tokens and so on}
    counts: list[int]  # occurrences of each token
    position: int = 0  # number of pieces or pairs encoded so far


def encode(corpus, folder: Path, made_from: str, command: str) -> Progress:
    """Write token files to a folder. If an earlier call with the same files and settings was interrupted, resume it.

    made_from: hash of the files and settings, from data_id() in folder.py. command: the command line that prepares the
    data, which is saved in command.txt.
    """
    saved = read_json(folder / "progress.json")
    if saved.get("made_from") == made_from:
        splits = {split: Counter(counted) for split, counted in saved["splits"].items()}
        progress = Progress(**saved | {"splits": splits})
        print("resuming after an interruption", file=sys.stderr)
    else:
        if saved:
            note(
                "the files or settings have changed since the interrupted preparation; starting over"
            )
        # before the folder is created, because training the tokenizer may fail
        tokenizer = corpus.wrap(make_tokenizer(corpus))
        remove(folder)
        folder.mkdir(parents=True)
        write_whole(folder / COMMAND, lambda file: file.write(f"{command}\n".encode()))
        splits = {split: Counter() for split in corpus.splits}
        counts = [0] * tokenizer.vocab_size
        progress = Progress(made_from, tokenizer.state(), splits, counts)
        write_json(folder / "progress.json", vars(progress))
    write_tokens(corpus, folder, progress)
    return progress


def write_tokens(corpus, folder: Path, progress: Progress) -> None:
    """Encode the remaining units, and append them to the token files. Progress is saved every SAVE_UNITS units."""
    tokenizer = from_state(progress.tokenizer)
    counts = np.array(progress.counts)
    todo = units(corpus, "encoding", progress.position)
    # threads use all cores, because the tokenizer libraries release Python's global lock while they encode
    with ThreadPoolExecutor(corpus.config.workers or machine.usable_cores()) as pool:
        while batch := list(islice(todo, SAVE_UNITS)):
            for split, total in progress.splits.items():
                parts = [entries[split] for entries, _ in batch if split in entries]
                encoded = pool.map(partial(corpus.encode, tokenizer, split), parts)
                ids = [np.empty(0, np.int64)]
                for more, counted in encoded:
                    ids += more
                    total.update(counted)
                # of the sides of pairs or the pieces of documents, in tokens
                total["longest"] = max(total["longest"], max(map(len, ids)))
                ids = np.concatenate(ids)
                counts += np.bincount(ids, minlength=len(counts))
                ids = ids.astype(token_dtype(tokenizer))
                append_tokens(
                    folder, split, ids, corpus.config.shard_tokens, total["tokens"]
                )
                total["tokens"] += len(ids)
            progress.counts = counts.tolist()
            _, progress.position = batch[-1]
            write_json(folder / "progress.json", vars(progress))


def append_tokens(
    folder: Path, split: str, ids: np.ndarray, shard_tokens: int | None, tokens: int
) -> None:
    """Append token ids to the first `tokens` tokens of a split. Anything that an interrupted call wrote is replaced."""
    limit = shard_tokens or sys.maxsize
    while len(ids):
        number, start = divmod(tokens, limit)
        name = f"{split}_{number:04d}.bin" if shard_tokens else f"{split}.bin"
        some = ids[: limit - start]
        with (folder / name).open("ab") as file:
            file.truncate(start * ids.itemsize)
            file.write(some)
            file.flush()
            os.fsync(file.fileno())
        tokens += len(some)
        ids = ids[len(some) :]


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def read_json(path: Path) -> dict:
    """Read a JSON file that we have written. Returns {} if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def write_json(path: Path, content: dict) -> None:
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode()))
