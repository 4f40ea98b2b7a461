"""The processes that train one model together, called ranks. This file is about a single one.

Every rank runs the same loop, and calls these methods at the same points of it. forked.py has ranks that are forked on
a CPU and share its memory; torchrun.py and fsdp.py have ranks that torchrun has started, with DDP or FSDP.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from humptygpt.data.dataset import count_targets
from humptygpt.formats import checkpoint
from humptygpt.machine import random_key
from humptygpt.models.build import add_seeds

if TYPE_CHECKING:  # run.py imports this file
    from humptygpt.training.run import Run


class Share(NamedTuple):
    """Rows of a micro-batch that a rank trains on."""

    batch: dict[str, Tensor]
    tokens: int  # targets that are not ignored
    seeds: list[int]  # one for each row, for dropout
    weight: float = 1.0  # factor of its mean loss, so that the losses of all shares add up to the step's


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


class Ranks(AbstractContextManager):
    """The only rank, which holds the whole model and computes whole steps."""

    rank = 0
    size = 1
    sharded = False  # whether a rank holds only part of each weight
    by_torchrun = False
    averaged = 1  # the number of ranks over which gradients are averaged where they should be summed

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def first(self) -> bool:
        """True for the rank that reads the clock, prints and writes files."""
        return self.rank == 0

    @property
    def sampling_device(self) -> torch.device:
        """Where a model that is loaded to generate text fits."""
        return self.device

    def __exit__(self, error: type | None, *_: object) -> None:
        """Wait until all ranks have finished, unless there was an error."""

    def each(self, function: Callable[["Run"], object], run: "Run") -> object:
        """Let each rank call function(run). Returns this rank's result."""
        return function(run)

    def place(self, model: nn.Module, run: "Run") -> None:
        """Move a model of the run, which has no optimizer yet, to the device."""
        add_seeds(model)
        model.to(self.device)

    def wrap(self, model: nn.Module, compiled: bool, dynamic: bool) -> nn.Module:
        """Wrap the model for training, and compile it if compiled=True. dynamic: whether batch shapes vary."""
        return torch.compile(model, dynamic=dynamic) if compiled else model

    # ----------------------------------------------------------------------------------
    # A step

    def shares(self, run: "Run", step: int) -> tuple[list[Share], int]:
        """Return this rank's shares of a step, counted from 0, and the number of tokens in the whole step."""
        count = run.config.gradient_accumulation_steps
        end = (step + 1) * count
        turns = self.turns(count)
        own = range(end - count + self.rank % turns, end, turns)
        micro_batches = [read_micro_batch(run, number) for number in own]
        number, parts = self.rank // turns, self.size // turns
        shares = [part_of(share, number, parts) for share in micro_batches]
        tokens = self.count_tokens(micro_batches, shares)
        whole = max(1, tokens)
        weights = [share.tokens / whole * self.averaged for share in shares]
        pairs = zip(shares, weights, strict=True)
        return [share._replace(weight=weight) for share, weight in pairs], tokens

    def turns(self, count: int) -> int:
        """Return how many of `count` micro-batches are computed at the same time, by ranks that take turns."""
        return 1

    def count_tokens(self, micro_batches: list[Share], shares: list[Share]) -> int:
        """Count the tokens of a step. shares: this rank's parts of these micro-batches."""
        return sum(share.tokens for share in micro_batches)

    def syncing(self, net: nn.Module, last: bool) -> AbstractContextManager:
        """Return the context for computing a share's gradients with net. last: whether it is the step's last share."""
        return nullcontext()

    def sum(self, x: Tensor) -> Tensor:
        """Sum x over ranks."""
        return x

    def sum_with_gradients(self, losses: Tensor) -> Tensor:
        """Sum the losses of a step over ranks, and the gradients, in place. Returns the sums of the losses."""
        return losses

    def total_norm(self, norm: Tensor) -> Tensor:
        """Return the norm of all gradients. norm: that of the parameters that this rank's optimizer updates."""
        return norm

    def spread(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply a function to n independent matrices, x: (n, rows, columns), of which each rank computes some."""
        return function(x)

    # ----------------------------------------------------------------------------------
    # Checkpoints

    def receive(self, value: Tensor, like: Tensor) -> Tensor:
        """Return this rank's part of a tensor that the first rank has, on the device.

        value: the tensor; in other ranks only its shape and dtype count. like: what has the part's place.
        """
        return value.to(self.device)

    def save(self, path: Path, entries: dict) -> None:
        """Write a checkpoint such as ckpt.pt, from rank 0 only."""
        if self.first:
            checkpoint.save(path, entries)


def read_micro_batch(run: "Run", number: int) -> Share:
    config = run.config
    batch = run.dataset.batch(number, config.batch_size)
    rows = range(len(batch["targets"]))
    seeds = [random_key(config.seed, number, row) for row in rows]
    return Share(batch, count_targets(batch), seeds)
