"""Files of torch.save, read without running code that they may hold, and checked by their checksums."""

import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from humptygpt.core import limits
from humptygpt.core.errors import UserError, one_line

SHARDED = ".metadata"  # the file that makes a folder a sharded checkpoint


def load_plain(path: Path, mapped: bool = False, legacy: bool = False) -> object:
    """Return what torch.save wrote, on the CPU. Raises some Exception where it is damaged or would run code.

    mapped: the system reads of the tensors what is used. legacy: also read files of PyTorch before 1.6, which are no
    zip files and have no checksums.
    """
    in_records = not legacy or zipfile.is_zipfile(path)
    sizes = check_records(path) if in_records else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says more about a foreign pickle than one line
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    # torch would map what follows a record that is too short
    if mapped and in_records and storage_sizes(content) != sizes:
        raise ValueError("a record has another size than its tensor")
    return content


def check_records(path: Path) -> list[int]:
    """Compare all checksums. Returns the sizes in bytes of the records of tensors, sorted, empty ones left out."""
    with zipfile.ZipFile(path) as file:
        records = file.infolist()
        damaged = file.testzip() is not None
    # torch.load takes a record marked as a directory for an empty one and leaves its tensor uninitialized
    if damaged or any(info.external_attr & 0x10 for info in records):
        raise ValueError("a record is damaged")
    sizes = (info.file_size for info in records if "/data/" in info.filename)
    return sorted(size for size in sizes if size)


def storage_sizes(content: object) -> list[int]:
    """Return the sizes in bytes of the storages of all tensors in dictionaries, sorted, empty ones left out."""
    storages = {}
    remaining = [content]
    while remaining:
        entry = remaining.pop()
        if isinstance(entry, dict):
            remaining += entry.values()
        elif isinstance(entry, list | tuple):
            remaining += entry
        elif isinstance(entry, Tensor):
            storage = entry.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sorted(size for size in storages.values() if size)


@contextmanager
def refuse_damaged(path: Path) -> Iterator[None]:
    """Raise UserError for whatever a damaged file makes the block raise; zip, pickle and torch have many errors."""
    try:
        yield
    except Exception as error:
        if limits.is_out_of_memory(error):
            raise
        raise UserError(f"{path} is damaged: {one_line(error)}") from error
