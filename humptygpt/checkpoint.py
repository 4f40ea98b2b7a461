"""Checkpoints: tensors and plain data, written whole or not at all, opened without running code."""

import warnings
from pathlib import Path

import torch

from humptygpt.configurator import UserError
from humptygpt.files import write_whole

FORMAT = "gpt checkpoint 2"  # a change of what a checkpoint holds gets a new number


def save(path: Path, state: dict) -> None:
    """Write a checkpoint: tensors and plain data only."""
    write_whole(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load(path: Path) -> dict:
    """Read a checkpoint onto the CPU. Raises UserError for a file that is missing, damaged, foreign or holds code."""
    try:
        path.open("rb").close()
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint {path}; train first: python train.py --out_dir={path.parent}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a foreign pickle torch tells more than the one line below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have errors of their own for a file that is not theirs
        raise UserError(
            f"{path} is not a checkpoint: it is truncated, damaged or holds more than tensors and plain data"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version; it should say format={FORMAT!r}")
    return state
