"""Files of named tensors, as Hugging Face has them: safetensors, and pickles of torch.save, whole or in shards.

A tensor's shape and dtype are there before the tensor is in memory, so that they can be checked. No code is run.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from humptygpt.checkpoint.checkpoint import load_plain
from humptygpt.core.schema import parse_json


class Stored(NamedTuple):
    """A tensor of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a str where it is not one of DTYPES
    read: Callable[[], Tensor]


DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}  # by their names in safetensors


def open_safetensors(path: Path) -> dict[str, Stored]:
    try:
        file = safe_open(
            path, framework="pt"
        )  # compares what the header declares with the size of the file
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - file is no dictionary
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name} is truncated, damaged or no safetensors file") from error
    kinds = {
        name: DTYPES.get(found.get_dtype(), found.get_dtype()) for name, found in slices.items()
    }
    return {
        name: Stored(tuple(found.get_shape()), kinds[name], partial(file.get_tensor, name))
        for name, found in slices.items()
    }


def open_pickle(path: Path) -> dict[str, Stored]:
    try:
        tensors = load_plain(path, legacy=True)
    except (
        Exception
    ) as error:  # zip, pickle and torch each have errors of their own for a file that is not theirs
        raise ValueError(
            f"{path.name} is truncated, damaged or holds more than tensors and plain data"
        ) from error
    return store(tensors, path.name)


def store(tensors: object, file: str) -> dict[str, Stored]:
    """What torch.save wrote, checked; file: its name in messages."""
    if not isinstance(tensors, dict) or any(type(name) is not str for name in tensors):
        raise ValueError(f"{file} holds no dictionary of tensors by name")
    for name, x in tensors.items():
        dense = (
            isinstance(x, Tensor)
            and x.layout == torch.strided
            and x.device.type == "cpu"
            and not x.is_nested
        )
        if (
            not dense or x.nbytes > x.untyped_storage().nbytes()
        ):  # a stride of 0 may declare any size
            raise ValueError(f"{file}: {name} must be a dense tensor")
    return {
        name: Stored(tuple(x.shape), x.dtype, partial(tensors.pop, name))
        for name, x in tensors.items()
    }


FORMATS = {"model.safetensors": open_safetensors, "pytorch_model.bin": open_pickle}


def open_weights(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder. Raises ValueError or OSError."""
    present = {path.name for path in folder.iterdir()}
    for name, open_file in FORMATS.items():
        if name in present:
            return open_file(folder / name)
        if f"{name}.index.json" in present:
            return open_shards(folder / f"{name}.index.json", open_file, present)
    raise ValueError(f"there is neither {' nor '.join(FORMATS)}")


def open_shards(index: Path, open_file: Callable, present: set[str]) -> dict[str, Stored]:
    """The tensors of all files that an index names; present: the files beside it."""
    try:
        shards = set(
            parse_json(index.read_bytes(), {"weight_map": {str: str}})["weight_map"].values()
        )
    except ValueError as error:
        raise ValueError(f"{index.name}: {error}") from error
    if missing := shards - present:
        raise ValueError(f"{index.name} names {min(missing)}, which is missing")
    found = {}
    for shard in sorted(shards):
        more = open_file(index.with_name(shard))
        if twice := found.keys() & more.keys():
            raise ValueError(f"the weight {min(twice)} is in two files")
        found |= more
    return found
