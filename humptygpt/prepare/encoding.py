"""A corpus -> token files: in order, on all cores, and resumable after an interruption."""

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np

from humptygpt import machine
from humptygpt.config import UserError, note
from humptygpt.files import remove, write_whole
from humptygpt.prepare.corpus import START, Position, Unit, units
from humptygpt.token_files import COMMAND
from humptygpt.tokenizers import Tokenizer, from_state

SAVE_UNITS = 16  # units between progress saves
SMALL = 8_000_000  # bytes of files below which starting worker processes is not worth it
WORKER_MEMORY = 100_000_000  # rough number of bytes per worker

# {split: (token ids, counts)} for a unit
Encoded = dict[str, tuple[np.ndarray, Counter]]


@dataclass
class Progress:
    """Progress of the encoding, saved regularly so that an interrupted preparation can be resumed."""

    made_from: str  # identifies the files and settings
    tokenizer: dict  # state of the tokenizer
    splits: dict[str, Counter]  # {split: counts of documents or pairs, tokens and so on}
    counts: list[int]  # occurrences of each token
    position: Position = START


def encode(
    corpus, folder: Path, made_from: str, command: str, train: Callable[[], Tokenizer]
) -> Progress:
    """Write token files to a folder. If an earlier call with the same files and settings was interrupted, resume it.

    made_from: identifies the files and settings. train: makes the tokenizer; not called if the earlier call made it.
    """
    saved = read_json(folder / "progress.json")
    if saved.get("made_from") == made_from:
        splits = {split: Counter(counted) for split, counted in saved["splits"].items()}
        position = Position(*saved["position"])
        progress = Progress(**saved | {"splits": splits, "position": position})
        read = f"{position.read:,} of {sum(corpus.sizes):,} bytes"
        print(f"resuming after {read}", file=sys.stderr)
    else:
        if saved:
            changed = "the files or settings have changed since the interrupted preparation"
            note(f"{changed}; starting over")
        tokenizer = train()  # before the folder is created, because it may reject the text
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
    """Append the remaining units to the token files. Progress is saved every SAVE_UNITS units."""
    counts = np.array(progress.counts)
    encoded = in_order(corpus, progress)
    while batch := list(islice(encoded, SAVE_UNITS)):
        for split, total in progress.splits.items():
            parts = [unit[split] for unit, _ in batch if split in unit]
            for _, counted in parts:
                add_counts(total, counted)
            if parts:
                ids = np.concatenate([ids for ids, _ in parts])
                append_tokens(
                    folder, split, ids, corpus.config.shard_tokens, total["tokens"]
                )
                counts += np.bincount(ids, minlength=len(counts))
                total["tokens"] += len(ids)
        progress.counts = counts.tolist()
        _, progress.position = batch[-1]
        write_json(folder / "progress.json", vars(progress))


def add_counts(total: Counter, counted: Counter) -> None:
    longest = max(total["longest"], counted["longest"])
    total.update(counted)
    total["longest"] = longest


def append_tokens(
    folder: Path, split: str, ids: np.ndarray, shard_tokens: int | None, tokens: int
) -> None:
    """Write token ids after the first `tokens` tokens of a split. Drops anything that an interruption left there."""
    limit = shard_tokens or sys.maxsize
    while len(ids):
        number, start = divmod(tokens, limit)
        name = f"{split}_{number:04d}.bin" if shard_tokens else f"{split}.bin"
        some = ids[: limit - start]
        with (folder / name).open("ab") as file:
            file.truncate(start * ids.itemsize)
            file.write(some.tobytes())
            file.flush()
            os.fsync(file.fileno())
        tokens += len(some)
        ids = ids[len(some) :]


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


# --------------------------------------------------------------------------------------
# Worker processes


def usable_workers(corpus) -> int:
    """Number of worker processes worth starting; 1 for a small corpus."""
    if sum(corpus.sizes) < SMALL:
        return 1
    most = min(machine.usable_cores(), machine.available_memory() // WORKER_MEMORY)
    return corpus.config.workers or max(1, most)


def in_order(corpus, progress: Progress) -> Iterator[tuple[Encoded, Position]]:
    """Encode the remaining units, in order. About 4 units per worker are in memory at a time."""
    todo = units(corpus, "encoding", progress.position)
    workers = usable_workers(corpus)
    if workers == 1:
        tokenizer = from_state(progress.tokenizer)
        yield from map(partial(encode_unit, corpus.encoder, tokenizer), todo)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, context, start_worker, (corpus.encoder, progress.tokenizer)
    )
    waiting = deque()
    try:
        for unit in todo:
            with hidden_script():
                waiting.append(pool.submit(encode_in_worker, unit))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, possibly for lack of memory; use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def hidden_script() -> Iterator[None]:
    """Keep processes started in this block from importing the running script, such as train.py with torch."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def encode_unit(
    encoder: Callable, tokenizer: Tokenizer, unit: Unit
) -> tuple[Encoded, Position]:
    """Encode a unit with the encoder of its corpus."""
    entries, position = unit
    encoded = {}
    for split, items in entries.items():
        ids, counted = encoder(tokenizer, split, items)
        ids = np.concatenate([np.empty(0, np.int64), *ids]).astype(token_dtype(tokenizer))
        encoded[split] = (ids, counted)
    return encoded, position


encode_in_this_worker: Callable[[Unit], tuple[Encoded, Position]]  # set by start_worker


def start_worker(encoder: Callable, state: dict) -> None:
    global encode_in_this_worker
    encode_in_this_worker = partial(encode_unit, encoder, from_state(state))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C

    # otherwise, a worker whose parent was killed would wait for work forever
    def end_with_parent() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def encode_in_worker(unit: Unit) -> tuple[Encoded, Position]:
    return encode_in_this_worker(unit)


def read_json(path: Path) -> dict:
    """Read a JSON file written by us; {} if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def write_json(path: Path, content: dict) -> None:
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode()))
