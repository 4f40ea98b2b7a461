"""A data folder: its meta.json, the checksums of its token files, and how new data replaces old data."""

import hashlib
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np

from humptygpt.config import UserError, as_written_here
from humptygpt.prepare.encoding import Progress, read_json, token_dtype
from humptygpt.prepare.vocabulary import load_tokenizer
from humptygpt.token_files import COMMAND, META_FORMAT, TokenFiles, read_meta, sha256
from humptygpt.tokenizers import TOKENIZERS, SentencePieceTokenizer, from_state

# keys of prepare_data.py that do not affect which bytes are written
COMMANDS = ("verify", "overwrite")
CHANGES_NOTHING = ("input", "source", "target", "files", "workers")
OURS = re.compile(r"meta\.(json|pkl)|command\.txt|(train|val|test)(_\d+)?\.bin")


def verify(folder: Path) -> int:
    """Check all token files of a folder. Returns how many files have a checksum. Raises UserError if one is damaged."""
    meta = read_meta(folder)
    return sum(TokenFiles(folder, split, meta).verify() for split in meta["splits"])


def is_whole(folder: Path) -> bool:
    """True if all token files of a folder match its meta.json."""
    try:
        return verify(folder) >= 0
    except (OSError, UserError):
        return False


def data_id(corpus, fitted: bool) -> str:
    """Hash all that affects the output: paths, sizes and times of the files, settings, and any external tokenizer.

    fitted: vocab_size may shrink to fit the text.
    """
    files = [
        [path.as_posix(), path.stat().st_mtime_ns, path.stat().st_size]
        for path in corpus.paths
    ]
    settings = asdict(corpus.config) | dict.fromkeys(CHANGES_NOTHING)
    for key in COMMANDS:
        del settings[key]
    made_from = [files, settings, fitted]
    if corpus.config.tokenizer not in TOKENIZERS:
        made_from.append(load_tokenizer(corpus).state())
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def check_splits(progress: Progress, preparing: Path) -> None:
    """Raise UserError if a split has too few tokens. Removes the incomplete files, since resuming would not help."""
    for split, counted in progress.splits.items():
        if counted["tokens"] < 2:
            shutil.rmtree(preparing)
            rule = (
                f"{split}.bin would have {counted['tokens']} tokens, but needs at least 2"
            )
            advice = f"change --val_fraction or add text; counted: {dict(counted)}"
            raise UserError(f"{rule}; {advice}")


def make_meta(corpus, progress: Progress, preparing: Path) -> dict:
    """Describe the token files. Long entries come last."""
    tokenizer = from_state(progress.tokenizer)
    dtype = token_dtype(tokenizer)
    splits = {}
    for split, counted in progress.splits.items():
        paths = sorted(preparing.glob(f"{split}*.bin"))
        sizes = {path.name: path.stat().st_size // dtype.itemsize for path in paths}
        splits[split] = {key: counted[key] for key in corpus.counts} | {
            "files": [{"name": name, "tokens": size} for name, size in sizes.items()],
            "sha256": {path.name: sha256(path) for path in paths},
        }
    total = {key: sum(counted[key] for counted in splits.values()) for key in corpus.counts}
    counts = np.array(progress.counts)
    commonest = [
        {
            "token": i,
            "text": tokenizer.decode([i]),
            "share": round(progress.counts[i] / total["tokens"], 4),
        }
        for i in np.argsort(-counts, kind="stable")[:10].tolist()
        if counts[i]
    ]
    spelled = {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        spelled = {"characters_spelled_in_bytes": tokenizer.spelled(counts)}
    first_file = preparing / splits["train"]["files"][0]["name"]
    first_text = tokenizer.decode(np.fromfile(first_file, dtype, count=1000))
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
        **corpus.extra_meta(progress.splits, first_text),
        "commonest": commonest,
        "splits": splits,
        "tokenizer": progress.tokenizer,
    }


def holds_other_data(folder: Path, new: dict) -> bool:
    """True if the folder holds a data set other than the one that the new meta describes."""
    old = read_json(folder / "meta.json")
    if not old:  # data prepared by nanoGPT has no command.txt
        return (folder / "train.bin").exists() and not (folder / COMMAND).exists()
    same = all(old.get(key) == new[key] for key in ("task", "tokenizer", "splits"))
    return not same and old.get("made_from") != new["made_from"]


def refuse_to_replace(folder: Path, command: str) -> None:
    ways = f"use another name, or replace it: {as_written_here(command)} --overwrite=True"
    raise UserError(f"{folder} holds another data set; {ways}")


def install(preparing: Path, folder: Path, meta: dict) -> None:
    """Move the complete files into the folder. If this is interrupted, the same command moves the rest."""
    (preparing / "progress.json").unlink(missing_ok=True)  # meta.json takes its place
    if (preparing / COMMAND).exists():  # nothing has been moved yet
        # meta.json is removed before the tokens, so that a half-deleted data set never looks complete
        for path in sorted(folder.iterdir()):
            if OURS.fullmatch(path.name):
                path.unlink()
    names = [file["name"] for split in meta["splits"].values() for file in split["files"]]
    # the command comes first, since everything in the folder is new from then on; meta.json comes last
    for name in (COMMAND, *names, "meta.json"):
        if (preparing / name).exists():
            (preparing / name).replace(folder / name)
    shutil.rmtree(preparing)
