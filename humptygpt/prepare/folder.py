"""Data folders: write meta.json, verify the checksums of token files, and replace old data with new data."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from humptygpt.cli import UserError
from humptygpt.data import (
    COMMAND,
    META_FORMAT,
    TokenFiles,
    sha256,
)
from humptygpt.prepare.documents import read_errors
from humptygpt.prepare.encoding import Encoded, token_dtype
from humptygpt.prepare.vocabulary import CHOICES, load_tokenizer
from humptygpt.tokenizers import SentencePieceTokenizer, from_state

OURS = re.compile(r"meta\.pkl|(train|val|test)(_\d+)?\.bin")


def read_json(path: Path) -> dict:
    """Read a JSON file that we have written. Returns {} if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def verify(folder: Path, meta: dict) -> int:
    """Verify the checksums in meta. Returns how many there are. Raises UserError if a token file does not match."""
    return sum(TokenFiles(folder, split, meta).verify() for split in meta["splits"])


def is_whole(folder: Path, meta: dict) -> bool:
    """Return True if the token files in a folder are complete and match the checksums in meta."""
    try:
        verify(folder, meta)
    except UserError:
        return False
    return True


def data_id(corpus, command: str) -> str:
    """Hash everything that determines the data: the command, the files (path, size, modification time), and a tokenizer
    that already existed.
    """
    made_from = [command]
    for path in corpus.paths:
        with read_errors(path):
            status = path.stat()
        made_from.append([path.as_posix(), status.st_mtime_ns, status.st_size])
    if corpus.config.tokenizer not in CHOICES:
        made_from.append(load_tokenizer(corpus).state())
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def check_splits(encoded: Encoded) -> None:
    """Raise UserError if a split has too few tokens."""
    for split, counted in encoded.splits.items():
        if counted["tokens"] < 2:
            raise UserError(
                f"{split}.bin would have {counted['tokens']} tokens, but needs at least 2; change --val_fraction"
                f" or add text; counted: {dict(counted)}"
            )


def make_meta(corpus, encoded: Encoded, folder: Path) -> dict:
    """Build the content of meta.json, which describes the token files in a folder. Long entries come last."""
    tokenizer = encoded.tokenizer
    dtype = token_dtype(tokenizer)
    counts = encoded.counts.tolist()
    splits = {}
    for split, counted in encoded.splits.items():
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
        **corpus.extra_meta(encoded.splits, first_text),
        "commonest": commonest,
        "splits": splits,
        "tokenizer": tokenizer.state(),
    }


def holds_other_data(folder: Path, old: dict, new: dict) -> bool:
    """Return True if a folder holds data that differs from the data that `new` describes.

    old, new: the folder's meta.json, or {} if it has none, and the one that is to replace it.
    """
    if not old or old.get("made_from") == new["made_from"]:
        return False
    pieces, new_pieces = (from_state(meta["tokenizer"]).pieces for meta in (old, new))
    return pieces != new_pieces or not is_whole(folder, new)


def refuse_to_replace(folder: Path, command: str) -> None:
    raise UserError(
        f"{folder} already holds a different data set; choose another name, or replace it:"
        f" {command} --overwrite=True"
    )


def install(preparing: Path, folder: Path, meta: dict) -> None:
    """Move the prepared files into the data folder. If this is interrupted, repeating the command moves the rest."""
    # without meta.json the folder counts as incomplete; the new one is moved last
    (folder / "meta.json").unlink(missing_ok=True)
    files = [file["name"] for split in meta["splits"].values() for file in split["files"]]
    for path in list(folder.iterdir()):
        if OURS.fullmatch(path.name) and path.name not in files:
            path.unlink()
    for name in (COMMAND, *files, "meta.json"):
        if (preparing / name).exists():
            (preparing / name).replace(folder / name)
    preparing.rmdir()
