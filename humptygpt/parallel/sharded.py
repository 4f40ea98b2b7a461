"""Checkpoints of a sharded model: a folder to which every rank writes its part, by torch.distributed.checkpoint (DCP).

    ckpt/entries.pt      everything that is not a tensor, as in ckpt.pt
    ckpt/__0_0.distcp    the rows that rank 0 keeps, and so on
    ckpt/.metadata       where each tensor is stored: a pickle, read without running any code in it

Any number of processes can read it, each its own part. A single process, such as sample.py, reads all of it without a
process group.
"""

import hashlib
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePath

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from humptygpt.checkpoint import SHARDED, load_plain, refuse_damaged
from humptygpt.config import UserError
from humptygpt.files import cannot_write, remove, write_whole
from humptygpt.schema import check_schema

ENTRIES = "entries.pt"
# metadata: SHA-256 of .metadata; tied: {name in the model: first name of the same tensor}
SCHEMA = {"metadata": str, "tied": {str: str}}
# The classes that .metadata is made of, some private to torch
CLASSES = {
    "torch.Size",
    "torch.float32",
    "torch.int64",
    "torch.serialization._get_layout",  # looks a name up
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
}


# --------------------------------------------------------------------------------------
# Writing


def save(folder: Path, entries: dict, wait_for_all: Callable[[], None]) -> None:
    """Write a checkpoint. All ranks must call this, and share the disk. entries: from a run's latest_state().

    It is written to ckpt.tmp. Then the earlier checkpoint is moved to ckpt.old, the new one takes its place, and the
    old one is removed. At any moment, at least one of the two is complete, and checkpoint.stored() finds it. Raises
    UserError.
    """
    rank = dist.get_rank()
    temporary = folder.with_name(f"{folder.name}.tmp")
    if rank == 0:
        remove(temporary)  # left behind by a run that was killed
    wait_for_all()
    tied = tied_names(entries["model"])
    try:
        dcp.save(flat(entries, tied), storage_writer=dcp.FileSystemWriter(temporary))
    except CheckpointException as error:
        (reason, _), *_ = error.failures.values()
        raise cannot_write(folder, reason) from error
    if rank == 0:
        plain = entries | {"tied": tied, "metadata": digest(temporary / SHARDED)}
        del plain["model"]
        if "optimizer" in entries:
            plain["optimizer"] = {"steps": entries["optimizer"]["steps"]}
        write_whole(temporary / ENTRIES, lambda file: torch.save(plain, file))
        put_in_place(temporary, folder)


def put_in_place(temporary: Path, folder: Path) -> None:
    """Replace an earlier checkpoint. Raises UserError."""
    old = folder.with_name(f"{folder.name}.old")
    try:
        if folder.is_dir():
            # left behind by a run that was killed after its checkpoint was in place
            remove(old)
            folder.rename(old)
        temporary.rename(folder)
        remove(old)
    except OSError as error:
        raise cannot_write(folder, error) from error


def tied_names(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return {name: first name of the same DTensor}."""
    tied = {}
    first_names: dict[int, str] = {}
    for name, tensor in tensors.items():
        memory = tensor.to_local().untyped_storage().data_ptr()
        first = first_names.setdefault(memory, name)
        if memory and first != name:
            tied[name] = first
    return tied


def flat(entries: dict, tied: dict[str, str]) -> dict[str, Tensor]:
    """Return {name: tensor}, with names such as optimizer/wte.weight/exp_avg. Tied tensors have one name, the first."""
    weights = entries["model"].items()
    tensors = {f"model/{name}": tensor for name, tensor in weights if name not in tied}
    for name, state in entries.get("optimizer", {"state": {}})["state"].items():
        tensors |= {f"optimizer/{name}/{key}": tensor for key, tensor in state.items()}
    return tensors


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --------------------------------------------------------------------------------------
# Reading


class Unpickler(pickle.Unpickler):
    """Reads .metadata, and refuses every class that does not belong in it."""

    def find_class(self, module: str, name: str) -> type:
        # path of the folder to which the checkpoint was written
        if module.startswith("pathlib") and name in ("PosixPath", "WindowsPath"):
            return PurePath
        if f"{module}.{name}" not in CLASSES:
            raise pickle.UnpicklingError(f"it contains {module}.{name}")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """Reads tensors with metadata that is already loaded; torch's own reader would unpickle it, which may run code."""

    def __init__(self, path: Path, metadata: Metadata):
        super().__init__(path)
        self.metadata = metadata

    def read_metadata(self, *args: object, **settings: object) -> Metadata:
        return self.metadata


def read(path: Path, with_tensors: bool = True) -> dict:
    """Return the entries of checkpoint.SCHEMA, unchecked, on the CPU; if with_tensors is False, on the meta device.

    Raises UserError if a file is missing, is damaged, or would run code.
    """
    entries, reader = open_folder(path)
    if with_tensors:
        check_shards(path, list(reader.metadata.storage_data.values()))
    with refuse_damaged(path), warnings.catch_warnings():
        # torch warns that there is only one process, although no_dist says so
        warnings.simplefilter("ignore")
        device = "cpu" if with_tensors else "meta"
        tensors = {}
        for name, entry in reader.metadata.state_dict_metadata.items():
            # zeros, because rows that no file contains keep their initial values
            tensors[name] = torch.zeros(
                entry.size, dtype=entry.properties.dtype, device=device
            )
        if with_tensors:
            try:
                dcp.load(tensors, storage_reader=reader, no_dist=True)
            except CheckpointException as error:  # not a subclass of Exception
                raise ValueError("its shards do not match its metadata") from error
        return nested(entries, tensors)


def load(path: Path, entries: dict) -> None:
    """Fill the DTensors of a run's latest_state(). Each rank fills its own part.

    All ranks must call this. If one of them finds a damaged file, all raise UserError.
    """
    plain, reader = open_folder(path)
    infos = list(reader.metadata.storage_data.values())
    problem = None
    try:
        check_shards(path, infos[dist.get_rank() :: dist.get_world_size()])
    except UserError as error:
        problem = str(error)
    problems = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for problem in filter(None, problems):
        raise UserError(problem)
    dcp.load(flat(entries, plain["tied"]), storage_reader=reader)


def nested(plain: dict, tensors: dict[str, Tensor]) -> dict:
    """Rebuild the entries of checkpoint.SCHEMA from tensors whose names come from flat()."""
    entries = {key: value for key, value in plain.items() if key not in SCHEMA}
    if "optimizer" in entries:
        entries["optimizer"]["state"] = {}
    for name, tensor in tensors.items():
        *path, last = name.replace("optimizer/", "optimizer/state/").split("/")
        place = entries
        for key in path:
            place = place.setdefault(key, {})
        place[last] = tensor
    for name, first in plain["tied"].items():
        entries["model"][name] = entries["model"][first]
    return entries


def open_folder(path: Path) -> tuple[dict, Reader]:
    """Return a checkpoint's entries without its tensors, and a reader for the tensors. Raises UserError."""
    for name in (ENTRIES, SHARDED):
        check_there(path / name)
    with refuse_damaged(path):
        entries = load_plain(path / ENTRIES)
        check_schema(entries, SCHEMA)
        if entries["metadata"] != digest(path / SHARDED):
            raise ValueError(f"the checksum of {SHARDED} does not match")
        metadata = Unpickler(io.BytesIO((path / SHARDED).read_bytes())).load()
        check_files(metadata)
    return entries, Reader(path, metadata)


def check_there(file: Path) -> None:
    if not file.is_file():
        raise UserError(
            f"{file.parent} is incomplete: its file {file.name} is missing; copy all files of the folder from the disks"
            " of all machines"
        )


def check_files(metadata: Metadata) -> None:
    """Raise ValueError unless all tensors are stored unchanged in files of the folder itself."""
    for info in metadata.storage_data.values():
        if (
            not re.fullmatch(r"\w+\.distcp", info.relative_path)
            or info.transform_descriptors
        ):
            raise ValueError("some tensors are transformed or in another folder")


def check_shards(path: Path, infos: list) -> None:
    """Raise UserError if a tensor is damaged: each has checksums, but torch does not verify them."""
    for info in infos:
        file = path / info.relative_path
        check_there(file)
        with refuse_damaged(path), file.open("rb") as stream:
            stream.seek(info.offset)
            with zipfile.ZipFile(io.BytesIO(stream.read(info.length))) as records:
                if records.testzip() is not None:
                    raise ValueError(f"the checksum of {info.relative_path} does not match")
