"""Checkpoints of sharded models: folders, to which each rank writes its part with torch.distributed.checkpoint (DCP).

    ckpt/entries.pt      everything that is not a tensor, as in ckpt.pt
    ckpt/__0_0.distcp    the rows that rank 0 keeps; one such file for each rank
    ckpt/.metadata       where each tensor is stored; a pickle, but no code in it is run

Any number of processes can load the folder, and each reads only its own part. A single process, such as sample.py,
reads everything, and needs no process group.
"""

import io
import pickle
import shutil
import warnings
from pathlib import Path, PurePath

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from humptygpt.checkpoint import SHARDED, load_plain, refuse_damaged
from humptygpt.files import cannot_write, remove, write_whole
from humptygpt.parallel.processes import raise_if_rank_died

ENTRIES = "entries.pt"
# what .metadata may contain; some of these names are private to torch
CLASSES = {
    "torch.Size",
    "torch.float32",
    "torch.int64",
    "torch.serialization._get_layout",  # a function that only looks up a name
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


def save(folder: Path, entries: dict) -> None:
    """Write a checkpoint. All ranks must call this, and their folders must be on the same disk.

    The new checkpoint is written to ckpt.tmp. Then the old one is moved to ckpt.old, the new one takes its place, and
    the old one is removed. At any moment, at least one of them is complete, and checkpoint.stored() finds it.

    entries: a run's latest_state(). Raises UserError if writing fails.
    """
    first = dist.get_rank() == 0
    temporary = folder.with_name(f"{folder.name}.tmp")
    if first:
        # left behind by a run that was killed; ignore errors, since another rank may already be creating it anew
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        # no rank starts to write before all ranks have called this
        dcp.save(flat(entries), storage_writer=dcp.FileSystemWriter(temporary))
    except CheckpointException as error:
        raise cannot_write(folder, first_failure(error)) from error
    if first:
        plain = entries | {"model": {}}
        if "optimizer" in entries:
            plain["optimizer"] = entries["optimizer"] | {"state": {}}
        write_whole(temporary / ENTRIES, lambda file: torch.save(plain, file))
        put_in_place(temporary, folder)


def put_in_place(temporary: Path, folder: Path) -> None:
    """Move a complete checkpoint from `temporary` to `folder`, replacing the one there."""
    old = folder.with_name(f"{folder.name}.old")
    if folder.is_dir():
        # left behind by a run that was killed after its checkpoint was in place
        remove(old)
        folder.rename(old)
    temporary.rename(folder)
    remove(old)


def flat(entries: dict) -> dict[str, Tensor]:
    """Flatten a checkpoint into {name: tensor}, with names such as optimizer/wte.weight/exp_avg."""
    tensors = {f"model/{name}": tensor for name, tensor in entries["model"].items()}
    if "optimizer" in entries:
        for name, state in entries["optimizer"]["state"].items():
            tensors |= {f"optimizer/{name}/{key}": x for key, x in state.items()}
    return tensors


def first_failure(error: CheckpointException) -> BaseException:
    """Return the error of the first rank that failed."""
    reason, _ = next(iter(error.failures.values()))
    return reason


# --------------------------------------------------------------------------------------
# Reading


class Unpickler(pickle._Unpickler):
    """Reads .metadata, and refuses every class that does not belong in it.

    It extends the Python unpickler, because a damaged pickle can make the C version allocate any amount of memory.
    """

    def find_class(self, module: str, name: str) -> type:
        # .metadata contains the path of the folder to which the checkpoint was written
        if module.startswith("pathlib") and name in ("PosixPath", "WindowsPath"):
            return PurePath
        if f"{module}.{name}" not in CLASSES:
            raise pickle.UnpicklingError(
                f"it contains {module}.{name}, which is not allowed"
            )
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """Reads tensors. torch's own reader would run code in .metadata, and would read files elsewhere."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.metadata = Unpickler(io.BytesIO((path / SHARDED).read_bytes())).load()

    def read_metadata(self, *args, **settings):
        return self.metadata

    def read_data(self, plan, planner):
        """Read this process's tensors."""
        for item in plan.items:
            info = self.storage_data[item.storage_index]
            elsewhere = Path(info.relative_path).name != info.relative_path
            if elsewhere or info.transform_descriptors:
                raise ValueError(
                    "a tensor is in another folder or was transformed before it was stored"
                )
        return super().read_data(plan, planner)


def read(path: Path, with_tensors: bool = True) -> dict:
    """Read a checkpoint as a single process. Returns the entries of checkpoint.SCHEMA, not yet checked against it.

    with_tensors: True: read tensors to the CPU; False: create them on the meta device instead. Raises UserError if a
    file is missing, is damaged, or would run code.
    """
    device = "cpu" if with_tensors else "meta"
    with refuse_damaged(path):
        entries = load_plain(path / ENTRIES)
        reader = Reader(path)
        tensors = {}
        for name, entry in reader.metadata.state_dict_metadata.items():
            # zeros rather than empty, because rows that are in no file keep their initial values
            x = torch.zeros(entry.size, dtype=entry.properties.dtype, device=device)
            # the inverse of flat()
            *keys, last = name.replace("optimizer/", "optimizer/state/").split("/")
            place = entries
            for key in keys:
                place = place.setdefault(key, {})
            tensors[name] = place[last] = x
    if with_tensors:
        fill(tensors, reader, no_dist=True)
    return entries


@raise_if_rank_died()
def load(path: Path, entries: dict) -> None:
    """Read a checkpoint into the DTensors of a run's latest_state(). All ranks must call this; each reads its own part.

    If one of them finds a damaged file, all raise UserError.
    """
    with refuse_damaged(path):
        reader = Reader(path)
    fill(flat(entries), reader)


def fill(tensors: dict[str, Tensor], reader: Reader, no_dist: bool = False) -> None:
    """Read tensors in place. no_dist: no other process takes part. Raises UserError if a file is damaged."""
    try:
        # torch warns that there is only one process, although no_dist=True already says so
        with warnings.catch_warnings(action="ignore"):
            dcp.load(tensors, storage_reader=reader, no_dist=no_dist)
    except CheckpointException as error:  # not a subclass of Exception
        with refuse_damaged(reader.path):
            raise first_failure(error) from error
