"""The process that trains a run. For several processes, humptygpt/parallel has classes with the same methods."""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from humptygpt import checkpoint
from humptygpt.data import Dataset, Prefetcher, count_targets
from humptygpt.device import pick_device
from humptygpt.optimizers import Optimizer

if TYPE_CHECKING:  # these two import this file
    from humptygpt.run import Run
    from humptygpt.settings import TrainConfig

PARALLEL = ("ddp", "fsdp")
BACKENDS = ("auto", "gloo", "nccl")


class Share(NamedTuple):
    """One process's share of a micro-batch: all of its rows, or some of them if several processes split it."""

    key: tuple[int, ...]  # seeds dropout: the index of the micro-batch in the run
    batch: dict[str, Tensor]
    tokens: int  # targets that are not ignored
    # (number of rows in the micro-batch, slice of them in this share); None: all rows
    rows: tuple[int, slice] | None = None


class Process(AbstractContextManager):
    """A single process, which holds the whole model and computes whole steps."""

    rank = 0
    size = 1
    first = True  # whether this process writes files and prints
    sharded = False  # whether this process holds only part of each weight
    optimizer_class = Optimizer

    def __init__(self, device: torch.device):
        self.device = device

    def __exit__(self, error: type | None, *_: object) -> None:
        """End the run. With several processes, wait until all have finished, unless there was an error."""

    def place(self, model: nn.Module, run: "Run") -> None:
        """Move a model of the run, which has no optimizer yet, to the device."""
        model.to(self.device)

    def wrap(self, model: nn.Module, compiled: bool, dynamic: bool) -> nn.Module:
        """Wrap the model for training, and compile it if compiled=True. dynamic: whether batch shapes vary."""
        return torch.compile(model, dynamic=dynamic) if compiled else model

    def shares(
        self, batches: Dataset | Prefetcher, config: "TrainConfig", step: int
    ) -> tuple[list[Share], int]:
        """Return this process's shares of a step, and the number of tokens in the whole step."""
        count = config.gradient_accumulation_steps
        stride = min(self.size, count)
        shares = []
        for number in range(step * count + self.rank % stride, (step + 1) * count, stride):
            batch = batches.batch(number, config.batch_size)
            shares.append(Share((number,), batch, count_targets(batch)))
        return shares, sum(share.tokens for share in shares)

    def accumulate(
        self, net: nn.Module, share: Share, last: bool
    ) -> AbstractContextManager:
        """Return the context for computing a share's gradients with net. last: whether it is the step's last share."""
        return nullcontext()

    def sum(self, x: Tensor) -> Tensor:
        """Sum x over processes, in place."""
        return x

    def save(self, path: Path, entries: dict) -> None:
        """Write a checkpoint such as ckpt.pt."""
        checkpoint.save(path, entries)


def start_process(config: "TrainConfig", prepare: Callable[[], None]) -> Process:
    """Start the process of a run, connected to the other processes if there are any.

    prepare: function that prepares the data if it is missing. Several processes call it one after another.
    Raises UserError if the device is not available, or the processes cannot connect.
    """
    device = pick_device(config.device)
    _, size = launched()
    if size > 1 and config.parallel == "fsdp":
        from humptygpt.parallel.fsdp import FullySharded

        return FullySharded.start(config, device, prepare)
    if size > 1:
        from humptygpt.parallel.processes import DataParallel

        return DataParallel.start(config, device, prepare)
    prepare()
    return Process(device)


# --------------------------------------------------------------------------------------
# Environment variables that torchrun sets


def launched() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def restarted() -> bool:
    """True if torchrun restarted the processes after one of them failed (--max_restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def silence_other_processes() -> None:
    """Discard the standard output of all processes but the first."""
    rank, _ = launched()
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115, stays open until the process ends
