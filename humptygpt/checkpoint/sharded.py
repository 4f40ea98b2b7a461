"""Checkpoints of a sharded model: a folder to which every process writes its part, by torch.distributed.checkpoint.

    ckpt/entries.pt      all that is no tensor, as in ckpt.pt
    ckpt/__0_0.distcp    the rows that process 0 keeps, and so on
    ckpt/.metadata       where each tensor is: a pickle, read without running what else it may hold

Any number of processes reads it, each its own part; one process, and sample.py, all of it, without a process group.
"""

import hashlib
import io
import math
import pickle
import re
import warnings
import zipfile
from pathlib import Path, PurePath
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from humptygpt.checkpoint import checkpoint
from humptygpt.core.errors import UserError
from humptygpt.core.files import cannot_write, remove, write_whole
from humptygpt.core.schema import check_schema
from humptygpt.parallel.processes import Processes, raise_if_rank_died

ENTRIES, METADATA = "entries.pt", checkpoint.SHARDED
SCHEMA = {
    "metadata": str,
    "tied": {str: str},
}  # SHA-256 of .metadata; {name in the model: name of the same tensor}
# The classes that .metadata is made of: {module: names}
CLASSES = {
    "torch": ("Size", "float32", "int64"),
    "torch.serialization": ("_get_layout",),  # looks a name up
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties"),
        *("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
}


# --------------------------------------------------------------------------------------
# Writing


def save(folder: Path, entries: dict, processes: Processes) -> None:
    """Write a checkpoint; all processes have to call this. entries: those of checkpoint.SCHEMA, with DTensors.

    It is written beside the earlier one, which is then moved to ckpt.old, replaced and removed: at any moment one of
    the two is whole, and checkpoint.stored() finds it. The processes have to share the disk. Raises UserError.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    if processes.first:
        remove(temporary)  # of a run that was killed
    processes.wait_for_all()  # so that nobody writes before
    tied, first_names = {}, {}
    for name, tensor in entries["model"].items():
        memory = tensor.to_local().untyped_storage().data_ptr()
        if memory and (first := first_names.setdefault(memory, name)) != name:
            tied[name] = first
    try:
        with raise_if_rank_died():
            dcp.save(flat(entries, tied), storage_writer=dcp.FileSystemWriter(temporary))
    except CheckpointException as error:
        (reason, _), *_ = error.failures.values()
        raise cannot_write(folder, reason) from error
    if processes.first:
        plain = {key: value for key, value in entries.items() if key not in ("model", "optimizer")}
        plain |= {
            "format": checkpoint.FORMAT,
            "tied": tied,
            "metadata": digest(temporary / METADATA),
        }
        if "optimizer" in entries:
            plain |= {"optimizer": {"steps": entries["optimizer"]["steps"]}}
        write_whole(temporary / ENTRIES, lambda file: torch.save(plain, file))
        put_in_place(temporary, folder)


def put_in_place(temporary: Path, folder: Path) -> None:
    old = folder.with_name(f"{folder.name}.old")
    try:
        if folder.is_dir():
            remove(old)  # of a run that was killed after its checkpoint was in place
            folder.rename(old)
        temporary.rename(folder)
        remove(old)
    except OSError as error:
        raise cannot_write(folder, error) from error


def flat(entries: dict, tied: dict[str, str]) -> dict[str, Tensor]:
    """Names such as optimizer/wte.weight/exp_avg; of tied weights the first name alone."""
    tensors = {
        f"model/{name}": tensor for name, tensor in entries["model"].items() if name not in tied
    }
    for name, state in entries["optimizer"]["state"].items() if "optimizer" in entries else ():
        tensors |= {f"optimizer/{name}/{key}": tensor for key, tensor in state.items()}
    return tensors


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --------------------------------------------------------------------------------------
# Reading


class Unpickler(pickle.Unpickler):
    """Of .metadata: it admits the classes that this is made of and no others."""

    def find_class(self, module: str, name: str) -> type:
        if module.startswith("pathlib") and name in (
            "PosixPath",
            "WindowsPath",
        ):  # where it was written
            return PurePath
        if name not in CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


class Folder(NamedTuple):
    path: Path
    entries: dict  # what is no tensor
    metadata: Metadata


def read(path: Path, with_tensors: bool = True) -> dict:
    """All of a checkpoint, on the CPU, as checkpoint.SCHEMA has it; without tensors, these are on the meta device.

    Raises some Exception where it is damaged or would run code, and UserError where a file is missing.
    """
    folder = open_folder(path)
    device = "cpu" if with_tensors else "meta"
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device=device)
        for name, entry in folder.metadata.state_dict_metadata.items()
    }
    if with_tensors:
        check_shards(path, list(folder.metadata.storage_data.values()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process, as no_dist says
            dcp.load(tensors, storage_reader=Reader(folder), no_dist=True)
    return nested(folder.entries, tensors)


def load(path: Path, entries: dict, processes: Processes) -> None:
    """Fill the DTensors of entries, as from Run.state() and Run.training_state(), each process its own part."""
    folder, problem = open_folder(path), None
    infos = list(folder.metadata.storage_data.values())
    try:
        check_shards(path, infos[processes.rank :: processes.size])
    except (UserError, ValueError, OSError, zipfile.BadZipFile) as error:
        problem = error if isinstance(error, UserError) else checkpoint.damaged(path, error)
    if processes.sum(int(problem is not None)):
        raise problem or UserError(f"{path} is damaged, as another process has found")
    with raise_if_rank_died():
        dcp.load(flat(entries, folder.entries["tied"]), storage_reader=Reader(folder))


def nested(plain: dict, tensors: dict[str, Tensor]) -> dict:
    """The entries as checkpoint.SCHEMA has them, of names as from flat()."""
    found = {key: value for key, value in plain.items() if key not in SCHEMA} | {"model": {}}
    for full, tensor in tensors.items():
        kind, name, *key = full.split("/")
        if kind == "optimizer" and key:
            found["optimizer"].setdefault("state", {}).setdefault(name, {})[key[0]] = tensor
        elif kind in ("model", "ema") and not key:  # ema: of an earlier version
            found[kind] = (found.get(kind) or {}) | {name: tensor}
        else:
            raise ValueError(f"{full} is unknown")
    if "optimizer" in found:
        found["optimizer"].setdefault("state", {})
    return found | {
        "model": found["model"] | {name: found["model"][of] for name, of in plain["tied"].items()}
    }


class Reader(dcp.FileSystemReader):
    """torch's own would read .metadata by a pickle that runs code."""

    def __init__(self, folder: Folder):
        super().__init__(folder.path)
        self.metadata = folder.metadata

    def read_metadata(self, *args: object, **settings: object) -> Metadata:
        return self.metadata


def open_folder(path: Path) -> Folder:
    """What is in a checkpoint but its tensors, checked. Raises as read() does."""
    for name in (ENTRIES, METADATA):
        check_there(path / name)
    entries = checkpoint.load_plain(path / ENTRIES)
    check_schema(entries, SCHEMA)
    if entries["metadata"] != digest(path / METADATA):
        raise ValueError(f"{METADATA} is damaged")
    metadata = Unpickler(io.BytesIO((path / METADATA).read_bytes())).load()
    check_metadata(metadata)
    return Folder(path, entries, metadata)


def check_there(file: Path) -> None:
    if not file.is_file():
        raise UserError(
            f"{file.parent} is not whole: its file {file.name} is missing; copy all files of the folder, from the disks"
            " of all machines"
        )


def check_metadata(metadata: Metadata) -> None:
    """Raise an Exception unless each tensor is there in consecutive rows, in files of the folder itself."""
    assert type(metadata) is Metadata, "it is something else"
    for name, entry in metadata.state_dict_metadata.items():
        assert type(name) is str and type(entry) is TensorStorageMetadata, (
            "it holds more than tensors"
        )
        size, rows = tuple(entry.size), 0
        assert all(type(n) is int and n >= 0 for n in size), "a size is none"
        for chunk in sorted(entry.chunks, key=lambda chunk: tuple(chunk.offsets)):
            kept = tuple(chunk.sizes)
            if not math.prod(kept):
                continue
            assert (
                tuple(chunk.offsets) == (rows, *(0 for _ in size[1:])) and kept[1:] == size[1:]
            ), f"{name} has gaps"
            rows += kept[0]
            assert MetadataIndex(name, chunk.offsets) in metadata.storage_data, f"{name} is missing"
        assert rows == size[0], f"{name} has gaps"
    for info in metadata.storage_data.values():
        assert type(info) is _StorageInfo and not info.transform_descriptors, "it is converted"
        assert type(info.relative_path) is str and re.fullmatch(
            r"\w+\.distcp", info.relative_path
        ), "a foreign file"
        assert type(info.offset) is int and type(info.length) is int, "a length is none"


def check_shards(path: Path, infos: list[_StorageInfo]) -> None:
    """Raise an Exception where a tensor is damaged: each has checksums, which torch does not compare."""
    for info in infos:
        check_there(path / info.relative_path)
        with (path / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            with zipfile.ZipFile(io.BytesIO(file.read(info.length))) as records:
                if records.testzip() is not None:
                    raise ValueError(f"{info.relative_path} is damaged")
