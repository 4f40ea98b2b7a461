"""A data folder: what meta.json says of its token files, their checksums, how new data replaces old."""

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

# keys of prepare_data.py that do not decide which bytes are written
COMMANDS = ("verify", "overwrite")
CHANGES_NOTHING = ("input", "source", "target", "files", "workers")
OURS = re.compile(r"meta\.(json|pkl)|command\.txt|(train|val|test)(_\d+)?\.bin")


def verify(folder: Path) -> int:
    """Check all token files of a folder. Returns how many have a checksum. Raises UserError if one is damaged."""
    meta = read_meta(folder)
    return sum(TokenFiles(folder, split, meta).verify() for split in meta["splits"])


def is_whole(folder: Path) -> bool:
    """True if all token files of a folder are as its meta.json says."""
    try:
        return verify(folder) >= 0
    except (OSError, UserError):
        return False


def data_id(corpus, fitted: bool) -> str:
    """Hash what decides the bytes: the files' paths, sizes and times, settings, and a tokenizer from elsewhere.

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
    """True if a folder has a data set, and not the one that the new meta describes."""
    old = read_json(folder / "meta.json")
    if not old:  # nanoGPT's data has no command
        return (folder / "train.bin").exists() and not (folder / COMMAND).exists()
    same = all(old.get(key) == new[key] for key in ("task", "tokenizer", "splits"))
    return not same and old.get("made_from") != new["made_from"]


def refuse_to_replace(folder: Path, command: str) -> None:
    ways = f"take another name, or replace it: {as_written_here(command)} --overwrite=True"
    raise UserError(f"{folder} holds another data set; {ways}")


def install(preparing: Path, folder: Path, meta: dict) -> None:
    """Move the complete files into the folder. If this is interrupted, the same command moves the rest."""
    (preparing / "progress.json").unlink(missing_ok=True)  # meta.json is the progress now
    if (preparing / COMMAND).exists():  # nothing has been moved yet
        # meta.json is removed before the tokens, so that half of them are never taken for the whole
        for path in sorted(folder.iterdir()):
            if OURS.fullmatch(path.name):
                path.unlink()
    names = [file["name"] for split in meta["splits"].values() for file in split["files"]]
    # the command first, since everything in the folder is new from then on; meta.json last
    for name in (COMMAND, *names, "meta.json"):
        if (preparing / name).exists():
            (preparing / name).replace(folder / name)
    shutil.rmtree(preparing)
