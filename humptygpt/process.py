"""The process that trains a run. For several processes, humptygpt/parallel has classes with the same methods."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from humptygpt import checkpoint
from humptygpt.data import Dataset, count_targets
from humptygpt.device import (
    DTYPES,
    autocast,
    pick_device,
    pick_dtype,
    thread_counts,
    training_dtype,
)
from humptygpt.machine import fastest, usable_cores
from humptygpt.optimizers import Optimizer
from humptygpt.settings import TrainConfig
from humptygpt.tasks import build
from model import ModelConfig, count_parameters

if TYPE_CHECKING:  # run.py imports this file
    from humptygpt.run import Run

# A measurement takes as many tokens as multiply this many weights of a block, in about 10 ms, but at most TOKENS.
WEIGHTS = 2**27
TOKENS = 512
LARGE = 2048  # n_embd above which nothing is measured, because a block and its gradients take too much memory


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
        self, batches: Dataset, config: TrainConfig, step: int
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


def tune(config: TrainConfig, model_config: ModelConfig, process: Process) -> TrainConfig:
    """Return the config with the fastest dtypes and number of CPU threads, and set the number of threads.

    What the user has set stays. The dtypes are the same in all runs on a machine. The number of threads follows the
    load: all of them, unless fewer are clearly faster for one layer of the model at this moment, as they are while
    another training runs. In a run of several processes, the first one decides.
    """
    device = process.device

    def choose(choices: Sequence, measure: Callable):
        index = choices.index(measure()) if process.first else 0
        return choices[int(process.sum(torch.tensor(index)))]

    dtype, muon_dtype = config.dtype, config.muon_dtype
    if "auto" in (dtype, muon_dtype):
        best = choose(["float32", "bfloat16"], lambda: training_dtype(device))
        muon_dtype = best if muon_dtype == "auto" else muon_dtype
        if device.type == "cpu" and dtype == "auto":
            dtype = best
    dtype = str(pick_dtype(dtype, device)).removeprefix("torch.")

    counts = thread_counts()[::-1]
    if config.threads:
        counts = [min(config.threads, usable_cores())]
    number = counts[0]
    if device.type == "cpu" and model_config.n_embd <= LARGE:
        number = choose(counts, lambda: fastest_count(counts, model_config, DTYPES[dtype]))
    torch.set_num_threads(number)
    return replace(
        config,
        dtype=dtype,
        muon_dtype=muon_dtype,
        # another number of processes may have more threads each
        threads=number if process.size == 1 else None,
    )


def fastest_count(counts: Sequence[int], config: ModelConfig, dtype: torch.dtype) -> int:
    """Time the forward and backward pass of one layer of the model with each number of threads."""
    with suppress(Exception):  # from an edited model.py: training will show the error
        model = build(replace(config, n_layer=1, n_members=1, vocab_size=256))
        tokens = min(TOKENS, WEIGHTS // count_parameters(model) + 1)
        T = min(config.block_size, tokens)
        idx = torch.zeros(tokens // T, T, dtype=torch.int64)
        batch = {"idx": idx, "targets": idx}
        if hasattr(model, "encode"):
            batch["source"] = idx

        def train(number: int) -> None:
            torch.set_num_threads(number)
            with autocast(torch.device("cpu"), dtype):
                model(**batch)[1].backward()

        return fastest(counts, train)
    return counts[0]


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
