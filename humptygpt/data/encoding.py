"""Encode a corpus as token files, in order and on all cores, and describe them in meta.json."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from humptygpt import machine
from humptygpt.cli import UserError
from humptygpt.data.corpus import Corpus, units
from humptygpt.data.dataset import META_FORMAT, sha256
from humptygpt.tokenizers.basic import Tokenizer

UNITS_AT_ONCE = 32  # units that are encoded before their tokens are written


def encode(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> dict:
    """Write the token files of a corpus to an empty folder. Returns the content of meta.json."""
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    splits = {split: Counter() for split in corpus.splits}
    todo = units(corpus)
    # threads use all cores, because the tokenizer libraries release Python's global lock while they encode
    with ThreadPoolExecutor(machine.usable_cores()) as pool:
        while batch := list(islice(todo, UNITS_AT_ONCE)):
            encoded = pool.map(partial(corpus.encode, tokenizer), *zip(*batch, strict=True))
            for (split, _), (parts, counted) in zip(batch, encoded, strict=True):
                ids = np.concatenate([np.empty(0, np.int64), *parts])
                append(folder / f"{split}.bin", ids.astype(dtype))
                total = splits[split]
                total.update(counted)
                total["tokens"] += len(ids)
                # of the sides of pairs or the pieces of documents, in tokens
                total["longest"] = max([total["longest"], *map(len, parts)])
    return describe(corpus, tokenizer, folder, dtype, splits)


def append(path: Path, ids: np.ndarray) -> None:
    """Append token ids to a file, and wait until they are on the disk."""
    with path.open("ab") as file:
        file.write(ids)
        file.flush()
        os.fsync(file.fileno())


def describe(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    dtype: str,
    counted: dict[str, Counter],
) -> dict:
    """Build the content of meta.json, which describes the token files in a folder. Long entries come last.

    counted: the counts of each split. Raises UserError if one has too few tokens.
    """
    splits = {}
    for split, total in counted.items():
        name = f"{split}.bin"
        if total["tokens"] < 2:
            raise UserError(
                f"{name} would have {total['tokens']} tokens, but needs at least 2; add text, or change the"
                " --val_fraction of prepare_data.py"
            )
        splits[split] = {key: total[key] for key in corpus.counts} | {
            "sha256": sha256(folder / name),
        }
    once = splits.keys() - ({"val"} if corpus.trains_on_all else set())
    total = {key: sum(splits[split][key] for split in once) for key in corpus.counts}
    first_text = tokenizer.decode(np.fromfile(folder / "train.bin", dtype, count=1000))
    return {
        "format": META_FORMAT,
        "task": corpus.task,
        "source": corpus.source,
        "dtype": dtype,
        "trains_on_all": corpus.trains_on_all,
        **total,
        "vocab_size": tokenizer.vocab_size,
        **corpus.extra_meta(counted, first_text),
        "splits": splits,
        "tokenizer": tokenizer.state(),
    }
