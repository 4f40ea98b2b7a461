"""Several processes that train one model together, started by torchrun: data parallelism.

    torchrun --standalone --nproc_per_node=2 train.py CONFIG

Every process, or rank, takes a part of each step's batch. Gradients are summed over ranks, so that a step has the
tokens of one process, and all take the same step. With DDP every rank has the whole model, with FSDP a part of it: see
fsdp.py. Rank 0 writes and reports.

A rank that dies closes its connections, so that the next collective of the others fails; one that hangs is noticed when
a collective has waited for TIMEOUT. Either ends the run, and torchrun may start it again. On GPUs as well, since the
numbers on which ranks agree in each step go through gloo; what waits for the GPU before, NCCL's watchdog ends.
"""

import datetime
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from humptygpt import checkpoint
from humptygpt.config import UserError
from humptygpt.data import Dataset, Prefetcher, random_key
from humptygpt.files import remove
from humptygpt.tasks import build
from model import Dropout, ModelConfig

TIMEOUT = datetime.timedelta(minutes=10)  # of a collective in training
LONG = datetime.timedelta(days=7)  # while ranks prepare data, or rank 0 scores translations
# NCCL's wait() orders streams and raises nothing. A thread of torch ends a process whose collective has failed, or has
# waited for TIMEOUT, and another one that process where the first hangs; neither writes down what every rank did
WATCHDOG = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    "TORCH_NCCL_ENABLE_MONITORING": "1",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": f"{TIMEOUT.total_seconds():.0f}",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}
PATIENCE = 2  # seconds in which rank 0 reports a mistake that all ranks have found
BACKENDS = ("auto", "gloo", "nccl")
WAYS = ("ddp", "fsdp")


@contextmanager
def raise_if_rank_died() -> Iterator[None]:
    """Raise UserError if the block fails because of another rank. Any other error is the model's own, and passes."""
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no class of their own, but name its source files
        lost = "gloo" in str(error) or isinstance(error, dist.DistError)
        if launched()[1] == 1 or not lost:
            raise
        raise UserError(
            f"another process has ended or does not answer ({first_line(error)}); the run ends;"
            " its last checkpoint is whole: --init_from=resume continues from it"
        ) from error


def first_line(error: RuntimeError | ValueError) -> str:
    """Return what an error says; the lines after it are where torch found it."""
    return str(error).strip().partition("\n")[0]


class Rows(NamedTuple):
    """Which rows of a batch this process has: those from the first on."""

    first: int
    total: int


class SharedDropout(Dropout):
    """Dropout whose mask, on a CPU, is the part for these rows of the mask that one process draws for a whole batch."""

    rows: Rows | None = None  # None: all

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is None or not self.training or x.device.type != "cpu":
            return super().forward(x)
        first, total = self.rows
        mask = super().forward(x.new_ones(total, *x.shape[1:]))
        return x * mask[first : first + len(x)]


def share_dropout(model: nn.Module) -> None:
    """Put a SharedDropout in place of each Dropout."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is Dropout:
                setattr(module, name, SharedDropout(child.p))


class LocalBatch(NamedTuple):
    """What one rank takes of a micro-batch: some of its rows, or all."""

    index: int  # of the micro-batch
    batch: dict[str, Tensor]
    tokens: int  # targets that count
    rows: Rows | None  # None: all

    def seed_dropout(self, seed: int, model: nn.Module, device: torch.device) -> None:
        """Let the next dropout masks be those that one process draws for these rows.

        On a GPU, where no process can draw a part of a mask, the parts of a micro-batch have masks of their own.
        """
        key = [self.index]
        if self.rows and device.type != "cpu":
            key.append(self.rows.first)
        torch.manual_seed(random_key(seed, *key))
        for module in model.modules():
            if isinstance(module, SharedDropout):
                module.rows = self.rows


@dataclass(frozen=True)
class Processes:
    """The ranks of a run. With one, which is the default, every method does nothing beside its plain work."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # of this rank
    patient: dist.ProcessGroup | None = field(default=None, compare=False)  # waits LONG

    sharded = False  # FSDP: see fsdp.ShardedProcesses
    total = None  # where matrices are sharded, sum a tensor over ranks

    @property
    def first(self) -> bool:
        """Whether this rank writes and reports."""
        return self.rank == 0

    # ----------------------------------------------------------------------------------
    # Data

    def stride(self, micro_batches: int) -> int:
        """Return the distance from one micro-batch of this rank to its next, where a step has this many."""
        return min(self.size, micro_batches)

    def local_batches(
        self, batches: Dataset | Prefetcher, first: int, micro_batches: int, batch_size: int
    ) -> Iterator[LocalBatch]:
        """Yield what this rank takes of a step's micro-batches, of which the first has number `first`.

        Whole ones; or, where there are fewer of them than ranks, neighbouring rows of one.
        """
        stride = self.stride(micro_batches)
        number = self.rank // stride
        ranks = self.size // stride  # that divide one micro-batch
        for index in range(first + self.rank % stride, first + micro_batches, stride):
            batch = batches.batch(index, batch_size)
            if ranks == 1:
                yield LocalBatch(index, batch, count_targets(batch), None)
                continue
            total = len(batch["targets"])
            start = total * number // ranks
            end = total * (number + 1) // ranks
            # with fewer pairs than ranks, some take one that does not count, since all need gradients
            rows = Rows(min(start, total - 1), total)
            last = max(end, rows.first + 1)
            batch = {name: value[rows.first : last] for name, value in batch.items()}
            yield LocalBatch(index, batch, count_targets(batch) if end > start else 0, rows)

    def alternate(
        self, batches: Iterator[dict[str, Tensor]]
    ) -> Iterator[dict[str, Tensor]]:
        """Yield every size-th batch, from number rank on; equally many for all, the last perhaps without targets."""
        for number, batch in enumerate(batches):
            if number % self.size == self.rank:
                yield batch
        if self.rank > number % self.size:
            yield batch | {"targets": torch.full_like(batch["targets"], -1)}

    # ----------------------------------------------------------------------------------
    # Collectives

    @raise_if_rank_died()
    def all_reduce(self, x: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
        """Sum x over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, op)
        return x

    def sum(self, number: float) -> float:
        """Sum a number over ranks, exactly if it is an int."""
        dtype = torch.int64 if type(number) is int else torch.float64
        return self.all_reduce(torch.tensor(number, dtype=dtype)).item()

    def agree(self, signals: list[int]) -> int | None:
        """Return the number of a signal that some rank has received, the same to all ranks; None: none has."""
        number = torch.tensor(signals[0] if signals else 0)
        return self.all_reduce(number, dist.ReduceOp.MAX).item() or None

    @raise_if_rank_died()
    def gather(self, x: Tensor) -> Tensor:
        """Return the tensors of all ranks, equally shaped, one after another."""
        gathered = x.new_empty(self.size * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    def spread(self, function: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
        """Return function(x), x: (n, rows, columns), whose n matrices are independent: each rank computes some."""
        if self.size == 1:
            return function(x)
        most = -(-len(x) // self.size)
        mine = x[self.rank * most : (self.rank + 1) * most]
        computed = x.new_zeros(most, *x.shape[1:])
        if len(mine):
            computed[: len(mine)] = function(mine)
        return self.gather(computed)[: len(x)]

    # ----------------------------------------------------------------------------------
    # The model

    def check_model(self, config, dtype: torch.dtype) -> None:
        """Raise UserError if these ranks cannot train such a run; config: a TrainConfig."""

    def build(self, model_config: ModelConfig) -> nn.Module:
        """Return a new model, on the CPU."""
        return build(model_config)

    def distribute(self, model: nn.Module, seed: int | None = None) -> None:
        """Move the model to the device; seed: of a new one."""
        if self.size > 1:
            share_dropout(model)
        model.to(self.device)

    def compile(self, model: nn.Module, dynamic: bool) -> nn.Module:
        """Return the model compiled."""
        return torch.compile(model, dynamic=dynamic)

    def replicate(self, net: nn.Module) -> nn.Module:
        """Return the network that trains: backward averages gradients over ranks, which start from rank 0's weights."""
        if self.size == 1:
            return net
        # its buffers are tables, which never change
        return DistributedDataParallel(
            net, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def sync_gradients(self, replica: nn.Module, last: bool) -> AbstractContextManager:
        """Return a context of forward and backward; gradients are averaged in the last micro-batch of a step alone."""
        return nullcontext() if last or self.size == 1 else replica.no_sync()

    @raise_if_rank_died()
    def backward(self, loss: Tensor) -> None:
        """Sum the gradients of the loss over ranks: DDP and FSDP average them."""
        (loss * self.size).backward()

    def whole_model(self, model: nn.Module) -> nn.Module | None:
        """Return a model with which rank 0 can compute while the others do not; all ranks have to call this."""
        return model

    def own_part(self, value: Tensor, p: Tensor) -> Tensor:
        """Return what this rank keeps of a value of a parameter, on its device."""
        return value.to(p.device)

    def save(self, path: Path, entries: dict) -> None:
        """Write a checkpoint such as ckpt.pt, in rank 0; all ranks have to call this."""
        if self.first:
            checkpoint.save(path, entries)
            for folder in checkpoint.sharded_folders(path):  # the one before this
                remove(folder)

    # ----------------------------------------------------------------------------------
    # Order

    @contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Run the block in rank 0, then in local rank 0 of each other machine, then in all others.

        So data that is missing is prepared once on each disk, whether the machines share one or not.
        """
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        mine = 0 if self.first else 1 if local_rank == 0 else 2
        for turn in range(3):
            if turn == mine:
                yield
            self.wait_for_all()

    @raise_if_rank_died()
    def wait_for_all(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.patient)

    def check_alike(self, settings: dict[str, object]) -> None:
        """Raise UserError, in every rank, where one has other settings or other data than rank 0."""
        if self.size == 1:
            return
        ranks = [None] * self.size
        with raise_if_rank_died():
            dist.all_gather_object(ranks, (socket.gethostname(), settings))
        first_host, expected = ranks[0]
        for rank, (host, actual) in enumerate(ranks):
            for key, value in expected.items():
                if actual.get(key) != value:
                    raise UserError(
                        f"process {rank} on {host} has {key}={actual.get(key)}, but process 0 on {first_host} has"
                        f" {key}={value}; start all with the same command, on the same data"
                    )

    def end(self) -> None:
        """Wait for all ranks: torchrun stops those that still run where one ends with an error."""
        if self.size > 1:
            self.wait_for_all()
            dist.destroy_process_group()


ONE_PROCESS = Processes()


def count_targets(batch: dict[str, Tensor]) -> int:
    return int((batch["targets"] >= 0).sum())


# --------------------------------------------------------------------------------------
# The start


def launched() -> tuple[int, int]:
    """Return rank and number of processes, as torchrun sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def silence_other_ranks() -> Iterator[None]:
    """Within this, what ranks other than 0 print to stdout is not shown.

    A mistake that all have found is reported by rank 0, whose end makes torchrun stop the others before they do.
    """
    rank, _ = launched()
    if rank == 0:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        try:
            yield
        except UserError:
            time.sleep(PATIENCE)
            raise


def restarted() -> bool:
    """Whether torchrun has started these processes again after one has ended with an error (--max_restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def exit_code(stopped_by: int | None) -> int:
    """Return the exit code of a run that this signal has stopped, or none has.

    torchrun starts processes again that end with an error, if it may: not those that were asked to stop.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    return 128 + stopped_by if stopped_by and not restarts else 0


def check_divisible(size: int, micro_batches: int, batch_size: int, pairs: bool) -> None:
    """Raise UserError where a step cannot be divided over ranks; pairs: micro-batches of any number of rows."""
    whole_batches = micro_batches % size == 0
    whole_rows = pairs or batch_size % max(1, size // micro_batches) == 0
    if whole_batches or (size % micro_batches == 0 and whole_rows):
        return
    raise UserError(
        f"gradient_accumulation_steps={micro_batches} micro-batches of batch_size={batch_size} cannot be divided evenly"
        f" over {size} processes; take gradient_accumulation_steps={-(-micro_batches // size) * size}"
    )


def pick_backend(backend: str, device: torch.device) -> str:
    """Return the backends of tensors: gloo for those on the CPU, nccl for those on a GPU. Raises UserError."""
    if device.type == "mps" or (backend == "nccl" and device.type != "cuda"):
        raise UserError(
            f"several processes with backend={backend} do not train on {device.type}; take --device=cpu --backend=gloo"
        )
    if device.type == "cpu" or backend == "gloo":
        return "gloo"
    return "cpu:gloo,cuda:nccl"  # numbers need no GPU to wait for


def pick_gpu() -> torch.device:
    """Return the GPU of this rank. Raises UserError."""
    local_rank = int(os.environ["LOCAL_RANK"])
    cards = torch.cuda.device_count()
    if local_rank >= cards:
        raise UserError(
            f"process {local_rank} of this machine has no GPU; take --nproc_per_node={cards} or --device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def start(backend: str, device: torch.device, parallel: str = "ddp") -> Processes:
    """Meet the other ranks, if there are any; parallel: of WAYS. Raises UserError where they cannot be met."""
    rank, size = launched()
    if size == 1:
        return Processes(device=device)
    backends = pick_backend(backend, device)
    if device.type == "cuda":
        device = pick_gpu()
        for key, value in WATCHDOG.items():
            os.environ.setdefault(key, value)
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # torchrun keeps it where it starts ranks again, with the addresses of those that have ended
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"start {attempt}", store)
        dist.init_process_group(
            backends, store=store, rank=rank, world_size=size, timeout=TIMEOUT
        )
        patient = dist.new_group(backend="gloo", timeout=LONG)
    except (RuntimeError, ValueError) as error:  # a port in use, a host that is not reached
        raise UserError(
            f"the processes cannot meet ({first_line(error)}); start them with torchrun, or take another --master_port"
        ) from error
    if parallel == "ddp":
        return Processes(rank, size, device, patient)
    # here, since it takes a second to load
    from humptygpt.parallel.fsdp import ShardedProcesses

    return ShardedProcesses(rank, size, device, patient)
