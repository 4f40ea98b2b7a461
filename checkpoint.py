"""Files that are written whole or not at all, and checkpoints that are opened without running code."""

import contextlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from configurator import UserError

FORMAT = "gpt checkpoint 1"  # a change of what a checkpoint holds gets a new number


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let write(file) fill a temporary file beside path, then put it in path's place in one step.

    A crash, a kill or a full disk at any moment leaves the old file as it was. Raises UserError where writing fails.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save turns the file's OSError into a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        kept = "; the one before it is as it was" if os.path.exists(path) else ""
        raise UserError(f"cannot write {path}: {reason}{kept}") from error


def append(path: Path, line: str) -> None:
    """Add a line to a file. Raises UserError if it cannot be written."""
    try:
        with path.open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


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
