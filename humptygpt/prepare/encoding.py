"""Encode a corpus as token files, in order and on all cores, and describe them in meta.json."""

import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from humptygpt import machine
from humptygpt.config import UserError
from humptygpt.prepare.corpus import Corpus, units
from humptygpt.token_files import META_FORMAT, sha256
from humptygpt.tokenizers import SentencePieceTokenizer, Tokenizer

UNITS_AT_ONCE = 32  # units that are encoded before their tokens are written


def encode(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> dict:
    """Write the token files of a corpus to an empty folder. Returns the content of meta.json.

    Raises UserError if a split has too few tokens.
    """
    splits = {split: Counter() for split in corpus.splits}
    counts = np.zeros(tokenizer.vocab_size, np.int64)  # occurrences of each token
    todo = units(corpus)
    # threads use all cores, because the tokenizer libraries release Python's global lock while they encode
    with ThreadPoolExecutor(corpus.config.workers or machine.usable_cores()) as pool:
        while batch := list(islice(todo, UNITS_AT_ONCE)):
            encoded = pool.map(partial(corpus.encode, tokenizer), *zip(*batch, strict=True))
            for (split, _), (parts, counted) in zip(batch, encoded, strict=True):
                total = splits[split]
                total.update(counted)
                # of the sides of pairs or the pieces of documents, in tokens
                total["longest"] = max([total["longest"], *map(len, parts)])
                ids = np.concatenate([np.empty(0, np.int64), *parts])
                counts += np.bincount(ids, minlength=len(counts))
                ids = ids.astype(token_dtype(tokenizer))
                append_tokens(
                    folder, split, ids, corpus.config.shard_tokens, total["tokens"]
                )
                total["tokens"] += len(ids)
    for split, total in splits.items():
        if total["tokens"] < 2:
            raise UserError(
                f"{split}.bin would have {total['tokens']} tokens, but needs at least 2; change --val_fraction"
                f" or add text; counted: {dict(total)}"
            )
    return make_meta(corpus, tokenizer, splits, counts.tolist(), folder)


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


def make_meta(
    corpus: Corpus,
    tokenizer: Tokenizer,
    counted_splits: dict[str, Counter],
    counts: list[int],
    folder: Path,
) -> dict:
    """Build the content of meta.json, which describes the token files in a folder. Long entries come last.

    counts: occurrences of each token.
    """
    dtype = token_dtype(tokenizer)
    splits = {}
    for split, counted in counted_splits.items():
        paths = sorted(folder.glob(f"{split}*.bin"))
        splits[split] = {key: counted[key] for key in corpus.counts} | {
            "files": [
                {"name": path.name, "tokens": path.stat().st_size // dtype.itemsize}
                for path in paths
            ],
            "sha256": {path.name: sha256(path) for path in paths},
        }
    total = {key: sum(counted[key] for counted in splits.values()) for key in corpus.counts}
    commonest = [
        {
            "token": i,
            "text": tokenizer.decode([i]),
            "share": round(count / total["tokens"], 4),
        }
        for i, count in Counter(dict(enumerate(counts))).most_common(10)
    ]
    spelled = {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        spelled = {"characters_spelled_in_bytes": tokenizer.spelled(counts)}
    first_file = folder / splits["train"]["files"][0]["name"]
    first_text = tokenizer.decode(np.fromfile(first_file, dtype, count=1000))
    return {
        "format": META_FORMAT,
        "task": corpus.task,
        "source": corpus.source,
        "dtype": dtype.name,
        **total,
        "bytes_per_token": round(total["bytes"] / total["tokens"], 4),
        "vocab_size": tokenizer.vocab_size,
        "vocabulary_used": sum(count > 0 for count in counts),
        **spelled,
        **corpus.extra_meta(counted_splits, first_text),
        "commonest": commonest,
        "splits": splits,
        "tokenizer": tokenizer.state(),
    }
