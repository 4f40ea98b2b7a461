"""The process that trains a run. For several processes, humptygpt/parallel has classes with the same methods."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from humptygpt import checkpoint
from humptygpt.data import count_targets, random_key
from humptygpt.device import (
    THREADS,
    pick_device,
    pick_dtype,
    training_dtype,
    tune_malloc,
)
from humptygpt.machine import usable_cores
from humptygpt.settings import TrainConfig
from humptygpt.workers import Workers, add_seeds

if TYPE_CHECKING:  # run.py imports this file
    from humptygpt.run import Run


class Share(NamedTuple):
    """Rows of a micro-batch that a process or a worker trains on."""

    batch: dict[str, Tensor]
    tokens: int  # targets that are not ignored
    seeds: list[int]  # one for each row, for dropout


def part_of(share: Share, number: int, parts: int) -> Share:
    """Return some rows of a share: part `number`, from 0. With fewer rows than parts, some are row 0 with weight 0."""
    if parts == 1:
        return share
    total = len(share.seeds)
    start, end = total * number // parts, total * (number + 1) // parts
    counts = start < end
    own = slice(start, end) if counts else slice(1)
    batch = {name: value[own] for name, value in share.batch.items()}
    return Share(batch, counts * count_targets(batch), share.seeds[own])


class Process(AbstractContextManager):
    """A single process, which holds the whole model and computes whole steps."""

    rank = 0
    size = 1
    first = True  # whether this process writes files and prints
    sharded = False  # whether this process holds only part of each weight
    workers: Workers | None = None  # None with eval_only, and until they are started

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def sampling_device(self) -> torch.device:
        """Where a model that is loaded to generate text fits."""
        return self.device

    def __exit__(self, error: type | None, *_: object) -> None:
        """End the run. With several processes, wait until all have finished, unless there was an error."""
        if self.workers:
            self.workers.close()

    def place(self, model: nn.Module, run: "Run") -> None:
        """Move a model of the run, which has no optimizer yet, to the device."""
        add_seeds(model)
        model.to(self.device)

    def wrap(self, model: nn.Module, compiled: bool, dynamic: bool) -> nn.Module:
        """Wrap the model for training, and compile it if compiled=True. dynamic: whether batch shapes vary."""
        return torch.compile(model, dynamic=dynamic) if compiled else model

    def shares(self, run: "Run", step: int) -> tuple[list[Share], int]:
        """Return this process's shares of a step, and the number of tokens in the whole step."""
        config = run.config
        count = config.gradient_accumulation_steps
        stride = min(self.size, count)
        shares = []
        for number in range(step * count + self.rank % stride, (step + 1) * count, stride):
            batch = run.dataset.batch(number, config.batch_size)
            rows = range(len(batch["targets"]))
            seeds = [random_key(config.seed, number, row) for row in rows]
            shares.append(Share(batch, count_targets(batch), seeds))
        return shares, sum(share.tokens for share in shares)

    def syncing(self, net: nn.Module, last: bool) -> AbstractContextManager:
        """Return the context for computing a share's gradients with net. last: whether it is the step's last share."""
        return nullcontext()

    def sum(self, x: Tensor) -> Tensor:
        """Sum x over processes, in place."""
        return x

    def spread(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply a function to n independent matrices, x: (n, rows, columns), of which each process computes some."""
        return function(x)

    def gather(self, x: Tensor) -> Tensor:
        """Return x itself or, if its parts are in several processes, all of it."""
        return x

    def receive(self, value: Tensor, like: Tensor) -> Tensor:
        """Return this process's part of a tensor that the first process has, on the device.

        value: the tensor; in other processes only its shape and dtype count. like: what has the part's place.
        """
        return value.to(self.device)

    def save(self, path: Path, entries: dict) -> None:
        """Write a checkpoint such as ckpt.pt."""
        checkpoint.save(path, entries)


def read_once(read: Callable[[], dict | None], backend: str) -> dict | None:
    """Read a checkpoint in the first process only. The others get it with tensors that have no values."""
    if launched()[1] == 1:
        return read()
    from humptygpt.parallel.processes import read_and_describe

    return read_and_describe(read, backend)


def start_process(config: TrainConfig, prepare: Callable[[], None]) -> Process:
    """Start the process of a run, connected to the other processes if there are any.

    prepare: function that prepares the data if it is missing. Several processes call it one after another.
    Raises UserError if the device is not available, or the processes cannot connect.
    """
    device = pick_device(config.device)
    _, size = launched()
    if size == 1:
        prepare()
        return Process(device)
    if config.parallel == "fsdp":
        from humptygpt.parallel.fsdp import FullySharded as Parallel
    else:
        from humptygpt.parallel.processes import DataParallel as Parallel
    return Parallel.start(config, device, prepare)


# --------------------------------------------------------------------------------------
# What depends on the machine


def tune(config: TrainConfig, process: Process) -> TrainConfig:
    """Return the config with the fastest dtypes and a number of CPU threads. Set the number of threads, and malloc.

    What the user has set stays.
    """
    if not process.sharded:  # that gathers whole weights and frees them, which leaves gaps
        tune_malloc()
    threads = min(config.threads, usable_cores()) if config.threads else THREADS
    torch.set_num_threads(threads)
    # another number of processes may have more threads each
    threads = threads if process.size == 1 else None
    return replace(choose_dtypes(config, process.device), threads=threads)


def choose_dtypes(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Replace auto by the dtypes in which a device trains fastest. Raises UserError for a dtype that it cannot have."""
    fastest = training_dtype(device)
    dtype = pick_dtype(fastest if config.dtype == "auto" else config.dtype, device)
    muon_dtype = config.muon_dtype
    if muon_dtype == "auto":
        muon_dtype = "bfloat16" if fastest == "bfloat16" else "float32"
    return replace(config, dtype=str(dtype).removeprefix("torch."), muon_dtype=muon_dtype)


# --------------------------------------------------------------------------------------
# Environment variables that torchrun sets


def launched() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
