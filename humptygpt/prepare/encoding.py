"""Encode a corpus as token files, in order and on all cores."""

import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from humptygpt import machine
from humptygpt.prepare.corpus import units
from humptygpt.prepare.vocabulary import make_tokenizer
from humptygpt.tokenizers import Tokenizer

UNITS_AT_ONCE = 32  # units that are encoded before their tokens are written


class Encoded(NamedTuple):
    """What encoding a corpus tells about it."""

    tokenizer: Tokenizer
    splits: dict[str, Counter]  # {split: counts of documents or pairs, tokens and so on}
    counts: np.ndarray  # occurrences of each token


def encode(corpus, folder: Path) -> Encoded:
    """Write the token files of a corpus to a folder that has none yet."""
    tokenizer = corpus.wrap(make_tokenizer(corpus))
    splits = {split: Counter() for split in corpus.splits}
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    todo = units(corpus)
    # threads use all cores, because the tokenizer libraries release Python's global lock while they encode
    with ThreadPoolExecutor(corpus.config.workers or machine.usable_cores()) as pool:
        while batch := list(islice(todo, UNITS_AT_ONCE)):
            for split, total in splits.items():
                parts = [entries[split] for entries in batch if split in entries]
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
    return Encoded(tokenizer, splits, counts)


def append_tokens(
    folder: Path, split: str, ids: np.ndarray, shard_tokens: int | None, tokens: int
) -> None:
    """Append token ids to a split, which has `tokens` tokens so far."""
    limit = shard_tokens or sys.maxsize
    while len(ids):
        number, start = divmod(tokens, limit)
        name = f"{split}_{number:04d}.bin" if shard_tokens else f"{split}.bin"
        some = ids[: limit - start]
        with (folder / name).open("ab") as file:
            file.write(some)
            file.flush()
            os.fsync(file.fileno())
        tokens += len(some)
        ids = ids[len(some) :]


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
