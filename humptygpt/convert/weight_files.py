"""Read files of named tensors in Hugging Face's formats: safetensors and torch.save's pickles, single or sharded.

Tensors in safetensors files stay memory-mapped until they are used, so all can be checked first. No code is run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from humptygpt.checkpoint import load_plain, refuse_damaged
from humptygpt.config import UserError, one_line
from humptygpt.schema import parse_json

MODEL_FILES = ("model.safetensors", "pytorch_model.bin")  # the first that exists is used
Weights = dict[str, Tensor]  # tensors by name
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turn errors raised in the block, which reads an untrusted file, into a one-line UserError."""
    try:
        yield
    except (ValueError, UserError, OSError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"cannot read {what}: {reason}") from error


def open_weights(folder: Path, names: tuple[str, ...] = MODEL_FILES) -> Weights:
    """Read all tensors from the first of these files found in a folder. Raises ValueError, UserError or OSError."""
    present = {path.name for path in folder.iterdir()}
    for name in names:
        if name in present:
            return open_file(folder / name)
        if f"{name}.index.json" in present:
            return open_shards(folder / f"{name}.index.json", present)
    raise ValueError(f"there is neither {' nor '.join(names)}")


def open_file(path: Path) -> Weights:
    path.open("rb").close()  # raises OSError for a file that cannot be read
    problem = "is truncated, damaged or holds more than tensors and plain data"
    with refuse_damaged(path, problem):
        if path.suffix == ".safetensors":
            return load_file(path)  # it also checks that the file has the declared size
        tensors = load_plain(path, legacy=True)
    check_dense(tensors, path.name)
    return tensors


def open_shards(index: Path, present: set[str]) -> Weights:
    """Read the tensors from all files that an index lists. present: names of the files in its folder."""
    content = parse_json(index.read_bytes(), {"weight_map": {str: str}})
    shards = set(content["weight_map"].values())
    if missing := shards - present:
        raise ValueError(f"{index.name} lists {min(missing)}, which is missing")
    tensors = {}
    for shard in sorted(shards):
        tensors |= open_file(index.with_name(shard))
    return tensors


def check_dense(tensors: object, file: str) -> None:
    """Raise ValueError unless `tensors` is a dictionary of dense tensors by name. file: its name in messages."""
    if not isinstance(tensors, dict) or any(type(name) is not str for name in tensors):
        raise ValueError(f"{file} does not contain a dictionary of tensors by name")
    for name, x in tensors.items():
        dense = (
            isinstance(x, Tensor) and x.layout == torch.strided and x.device.type == "cpu"
        )
        # with a stride of 0, a tensor can claim any size with little memory behind it
        if not dense or x.is_nested or x.nbytes > x.untyped_storage().nbytes():
            raise ValueError(f"{file}: {name} must be a dense tensor")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError if the shape differs or the dtype is not supported."""
    if tensor.shape != shape or tensor.dtype not in DTYPES:
        raise ValueError(
            f"the weight {name} must have shape {tuple(shape)} and dtype float32, bfloat16 or float16,"
            f" but has shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
        )
