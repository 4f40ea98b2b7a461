"""Several processes that train one model together, started by torchrun: data parallelism.

    torchrun --standalone --nproc_per_node=2 train.py CONFIG

Every process takes a part of each step's batch. They add up their gradients, so that a step has the tokens of one
process, and all take the same step. With DDP every process has the whole model, with FSDP a part of it: see
sharding.py. One process, the first, writes and reports.

With DDP the gradients are added up here, after the last backward pass of a step, and not by torch's
DistributedDataParallel: that takes no part without sentence pairs, wants a hook to leave out all passes but the last,
wraps the model, and on a CPU, where computing and sending share the cores, it is no faster.
"""

import datetime
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stdout,
    suppress,
)
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from humptygpt.checkpoint import checkpoint
from humptygpt.core.errors import UserError
from humptygpt.data.batches import Dataset, Prefetcher, random_key
from humptygpt.nn import layers

BUCKET = 2**23  # elements of the gradients that are sent together: 32 MiB of float32
LONG = datetime.timedelta(
    days=7
)  # the longest that others wait for what the first process does alone
PATIENCE = 2  # seconds
SILENCE = 25.0  # seconds without a sign of life after which a process is given up
ABSENCE = datetime.timedelta(minutes=10)  # the longest that a sum waits for a process that is alive
DONE = "done"
WAY_OUT = "the run ends; its last checkpoint is whole: --init_from=resume continues from it"
BACKENDS = ("auto", "gloo", "nccl")
WAYS = ("ddp", "fsdp")


class Lost(UserError):
    """Another process has ended, or does not answer."""


@contextmanager
def others_answer() -> Iterator[None]:
    """Raise Lost where what is within, which waits for other processes, fails."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = re.sub(r"^\[\S+\] ", "", str(error).strip()).splitlines()[0].split(". ")[0]
        raise Lost(f"another process has ended or does not answer ({reason}); {WAY_OUT}") from error


class Heartbeat(threading.Thread):
    """Signs of life of this process, and a look at those of the next one: where they stop, this process ends.

    A process that has died closes its connections, which the others notice at once; one that hangs, or whose machine
    has stopped, does not. Each process watches one other, so that a thousand processes cause as little traffic as two.
    """

    def __init__(self, rank: int, size: int):
        super().__init__(daemon=True)
        self.rank, self.watched, self.stopped = rank, (rank + 1) % size, threading.Event()
        # a connection of its own: while one thread waits on a connection, no other can use it
        self.store = dist.PrefixStore(
            "heartbeat", connect(False, datetime.timedelta(seconds=SILENCE))
        )

    def beat(self, number: int | str) -> None:
        self.store.set(str(self.rank), f"{socket.gethostname()} {number}")

    def run(self) -> None:
        number, last, where = 0, "", ""
        heard = looked = time.monotonic()
        self.beat(number)
        while not self.stopped.wait(SILENCE / 10):
            number += 1
            now = time.monotonic()
            if (
                now - looked > SILENCE / 2
            ):  # this process was stopped, and the others may have been, too
                heard = now
            looked = now
            try:
                self.beat(number)
                sign = self.store.get(str(self.watched)).decode()
            except RuntimeError as error:  # who started this run is gone
                end_now(
                    f"the processes' store does not answer any more ({str(error).splitlines()[0]})"
                )
            if sign != last or sign.endswith(DONE):
                last, heard, where = sign, time.monotonic(), sign.split(" ")[0]
            elif time.monotonic() - heard > SILENCE:
                end_now(
                    f"process {self.watched} on {where} has given no sign of life for {SILENCE:.0f} s"
                )

    def stop(self) -> None:
        self.stopped.set()
        self.join()
        with suppress(RuntimeError):
            self.beat(DONE)


def end_now(reason: str) -> None:
    """End this process whatever its other threads wait for; torchrun then ends the others."""
    os.write(2, f"train.py: {reason}; {WAY_OUT}\n".encode())
    os._exit(1)


class Part(NamedTuple):
    """What one process takes of a micro-batch: some of its rows, or all."""

    index: int  # of the micro-batch
    batch: dict[str, Tensor]
    tokens: int  # targets that count
    rows: layers.Rows | None  # None: all

    def same_dropout(self, seed: int, device: torch.device) -> AbstractContextManager:
        """Within this, dropout masks are those that one process draws for these rows, in a resumed run, too.

        On a GPU, where no process can draw a part of a mask, the parts of one micro-batch have masks of their own.
        """
        if self.rows is None or device.type == "cpu":
            torch.manual_seed(random_key(seed, self.index))
            return layers.rows_of_batch(self.rows) if self.rows else nullcontext()
        torch.manual_seed(random_key(seed, self.index, self.rows.first))
        return nullcontext()


@dataclass(frozen=True)
class Processes:
    """The processes of a run. With one, which is the default, every method does nothing beside its plain work."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # of this process
    heartbeat: Heartbeat | None = field(default=None, compare=False)

    sharded = False  # FSDP: a model in parts, see sharding.ShardedProcesses

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    # ----------------------------------------------------------------------------------
    # Data

    def stride(self, micro_batches: int) -> int:
        """From one micro-batch of this process to its next, where a step has this many."""
        return min(self.size, micro_batches)

    def parts(
        self, batches: Dataset | Prefetcher, first: int, micro_batches: int, batch_size: int
    ) -> Iterator[Part]:
        """What this process takes of a step's micro-batches, of which the first has this number.

        Whole ones; or, where there are fewer of them than processes, neighbouring rows of one.
        """
        stride = self.stride(micro_batches)
        number, parts = self.rank // stride, self.size // stride
        for index in range(first + self.rank % stride, first + micro_batches, stride):
            batch = batches.batch(index, batch_size)
            rows = None
            if parts > 1:
                total = len(batch["targets"])
                start, end = total * number // parts, total * (number + 1) // parts
                rows = layers.Rows(min(start, total - 1), total)
                batch = {
                    name: value[rows.first : max(end, rows.first + 1)]
                    for name, value in batch.items()
                }
            # with fewer pairs than processes, some take one that does not count, since all need gradients
            counts = parts == 1 or end > start
            yield Part(index, batch, int((batch["targets"] >= 0).sum()) if counts else 0, rows)

    def alternate(self, batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Every size-th batch, beginning with number rank."""
        return islice(batches, self.rank, None, self.size)

    # ----------------------------------------------------------------------------------
    # Sums

    def sum(self, *numbers: float) -> list:
        """Of each number, the sum over the processes; exact for int."""
        if self.size == 1:
            return list(numbers)
        dtype = torch.int64 if all(type(number) is int for number in numbers) else torch.float64
        total = torch.tensor(numbers, dtype=dtype)
        with others_answer():
            dist.all_reduce(total)
        return total.tolist()

    @torch.no_grad()
    @others_answer()
    def sum_gradients(self, model: nn.Module, loss: Tensor) -> None:
        """Every gradient becomes its sum over the processes, and so does the loss, which travels with them."""
        if self.size == 1:
            return
        dense: dict[torch.dtype, list[Tensor]] = {loss.dtype: [loss]}
        for p in model.parameters():
            if p.grad is not None and p.grad.is_sparse:
                p.grad = self.sum_sparse(p.grad)
            elif p.grad is not None:
                dense.setdefault(p.grad.dtype, []).append(p.grad)
        pending = []
        for bucket in (bucket for gradients in dense.values() for bucket in buckets(gradients)):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            pending.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, work in pending:
            work.wait()
            parts = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(
                bucket,
                [part.view_as(gradient) for gradient, part in zip(bucket, parts, strict=True)],
            )

    def sum_sparse(self, gradient: Tensor) -> Tensor:
        """Of the gradients of a table, which have each the rows that its process looked up: all of these."""
        gradient = gradient.coalesce()
        indices, values = (
            gradient.indices()[0],
            gradient.values(),
        )  # (looked up,), (looked up, columns)
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(indices)]))
        longest = max(map(int, counts))
        rows = self.gather(pad(indices, longest)).split(longest)
        found = self.gather(pad(values, longest)).split(longest)
        lengths = [int(count) for count in counts]
        rows = torch.cat([x[:n] for x, n in zip(rows, lengths, strict=True)])
        found = torch.cat([x[:n] for x, n in zip(found, lengths, strict=True)])
        return torch.sparse_coo_tensor(rows[None], found, gradient.shape, check_invariants=False)

    @others_answer()
    def gather(self, x: Tensor) -> Tensor:
        """The tensors of all processes, equally shaped, one after another."""
        found = x.new_empty(self.size * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(found, x.contiguous())
        return found

    def spread(self, function: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
        """function(x), x: (n, rows, columns), whose n matrices are independent: each process computes some of them."""
        if self.size == 1:
            return function(x)
        most = -(-len(x) // self.size)
        mine = x[self.rank * most : (self.rank + 1) * most]
        return self.gather(pad(function(mine) if len(mine) else mine, most))[: len(x)]

    total = None  # where matrices are in parts, their sum over the processes

    # ----------------------------------------------------------------------------------
    # The model

    def check_model(self, model_config: object, dtype: torch.dtype) -> None:
        """Raise UserError where these processes cannot train such a model; model_config: a ModelConfig."""

    def distribute(self, model: nn.Module) -> None:
        """On the device; each process has the whole model."""
        model.to(self.device)
        self.broadcast(model)

    def compile(self, model: nn.Module, dynamic: bool | None) -> nn.Module:
        """The same compiled."""
        return torch.compile(model, dynamic=dynamic)

    def before_backward(self, model: nn.Module, last: bool) -> None:
        """last: of a step's micro-batches of this process."""

    def after_forward(self, model: nn.Module) -> None:
        """Before the weights change otherwise than by a step."""

    def whole_model(self, model: nn.Module) -> nn.Module | None:
        """With which the first process can compute while the others do not; all have to call this."""
        return model

    def save(self, path: Path, entries: dict) -> None:
        """Write a checkpoint such as ckpt.pt, in the first process; all have to call this."""
        if self.first:
            checkpoint.save(path, entries)
            checkpoint.remove_sharded(path)

    # ----------------------------------------------------------------------------------
    # Order

    @contextmanager
    def first_alone(self, name: str) -> Iterator[None]:
        """The first process runs what is within while the others wait; then they do. name: of this occasion."""
        if self.size > 1 and not self.first:
            dist.distributed_c10d._get_default_store().wait([name], LONG)
        yield
        if self.size > 1 and self.first:
            dist.distributed_c10d._get_default_store().set(name, "done")

    def check_alike(self, settings: dict[str, object]) -> None:
        """Raise UserError, in every process, where one has other settings or other data than the first."""
        if self.size == 1:
            return
        found = [None] * self.size
        dist.all_gather_object(found, (socket.gethostname(), settings))
        (host, ours), *others = found
        for rank, (other_host, theirs) in enumerate(others, start=1):
            for key in sorted(ours.keys() | theirs.keys()):
                if ours.get(key) != theirs.get(key):
                    raise UserError(
                        f"process {rank} on {other_host} has {key}={theirs.get(key)}, but process 0 on {host} has"
                        f" {key}={ours.get(key)}; start all with the same command, on the same data"
                    )

    def watch(self) -> None:
        """From here on, a process without a sign of life ends the run; not before, as preparing data may stop them."""
        if self.heartbeat:
            self.heartbeat.start()

    def broadcast(self, model: nn.Module) -> None:
        """All take the first process's weights: other hardware might have drawn other ones."""
        if self.size > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)

    def agree(self, signals: list[int]) -> int | None:
        """The number of a signal that some process has got; None: no process has got one. All get the same answer."""
        number = signals[0] if signals else 0
        if self.size > 1:
            largest = torch.tensor(number)
            with others_answer():
                dist.all_reduce(largest, dist.ReduceOp.MAX)
            number = int(largest)
        return number or None

    def end(self) -> None:
        """The others end after the first: torchrun stops what is still running where one ends with an error."""
        if self.size == 1:
            return
        store = dist.distributed_c10d._get_default_store()
        with others_answer():
            if self.first:
                store.set("end", "")
                store.wait(
                    [f"end {rank}" for rank in range(1, self.size)], ABSENCE
                )  # it may be in this process
            else:
                store.wait(["end"], LONG)
            self.heartbeat.stop()
            store.set(f"end {self.rank}", "")
        dist.destroy_process_group()


ONE_PROCESS = Processes()


def buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """The gradients, in order, as many together as fit into BUCKET; a larger one alone."""
    bucket, elements = [], 0
    for gradient in gradients:
        if bucket and elements + gradient.numel() > BUCKET:
            yield bucket
            bucket, elements = [], 0
        bucket.append(gradient)
        elements += gradient.numel()
    yield bucket


def pad(x: Tensor, length: int) -> Tensor:
    """x with zeros at the end of its first dimension, up to this length."""
    return torch.cat([x, x.new_zeros(length - len(x), *x.shape[1:])]) if len(x) < length else x


# --------------------------------------------------------------------------------------
# The start


class Launched(NamedTuple):
    rank: int
    size: int


def launched() -> Launched:
    """As torchrun sets them. Raises UserError where something is missing."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return Launched(0, 1)
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if name not in os.environ]:
        command = "torchrun --standalone --nproc_per_node=N train.py ..."
        raise UserError(
            f"WORLD_SIZE={size} is set, but not {missing[0]}; start several processes with: {command}"
        )
    return Launched(int(os.environ["RANK"]), int(size))


def note(line: str) -> None:
    """One line for the user, from the first process."""
    if launched().rank == 0:
        print(f"note: {line}", file=sys.stderr)


@contextmanager
def one_reports() -> Iterator[None]:
    """Within this, what processes other than the first print to stdout is not shown.

    A mistake that all have found is reported by the first, whose end makes torchrun stop them before they do.
    """
    if launched().rank == 0:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        try:
            yield
        except Lost:
            raise
        except UserError:
            time.sleep(PATIENCE)
            raise


def restarted() -> bool:
    """Whether torchrun has started these processes again after one has ended with an error (--max_restarts)."""
    return launched().size > 1 and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def exit_code(stopped_by: int | None) -> int:
    """Of a run that this signal has stopped, or none has.

    torchrun starts processes again that end with an error, if it may: not those that were asked to stop.
    """
    restarts = launched().size > 1 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    return 128 + stopped_by if stopped_by and not restarts else 0


def check_divisible(size: int, micro_batches: int, batch_size: int, pairs: bool) -> None:
    """Raise UserError where a step cannot be divided over the processes; pairs: micro-batches of any number of rows."""

    def divides(size: int, micro_batches: int, batch_size: int) -> bool:
        if micro_batches >= size:
            return micro_batches % size == 0
        return size % micro_batches == 0 and (pairs or batch_size % (size // micro_batches) == 0)

    if divides(size, micro_batches, batch_size):
        return
    tried = {
        "gradient_accumulation_steps": (
            micro_batches,
            lambda value: divides(size, value, batch_size),
        ),
        "batch_size": (batch_size, lambda value: divides(size, micro_batches, value)),
        "nproc_per_node": (size, lambda value: divides(value, micro_batches, batch_size)),
    }
    ways = []
    for key, (value, works) in tried.items():
        near = [
            next((n for n in numbers if works(n)), None)
            for numbers in (range(value, 0, -1), range(value, 9999))
        ]
        if found := " or ".join(str(n) for n in near if n):
            ways.append(f"{key}={found}")
    raise UserError(
        f"gradient_accumulation_steps={micro_batches} micro-batches of batch_size={batch_size} cannot be divided evenly"
        f" over {size} processes; take {', or '.join(ways)}"
    )


def pick_backend(backend: str, device: torch.device) -> str:
    """Of each kind of tensor: gloo for those on the CPU, nccl for those on a GPU. Raises UserError."""
    if backend == "nccl" and device.type != "cuda":
        raise UserError(
            f"backend=nccl needs CUDA devices, and this is {device.type}; take --backend=gloo"
        )
    if device.type == "mps":
        raise UserError(
            "device=mps trains in one process; take --device=cpu, or start without torchrun"
        )
    if device.type == "cpu" or backend == "gloo":
        return "gloo"
    return "cpu:gloo,cuda:nccl"  # numbers need no GPU to wait for


def connect(serves: bool, timeout: datetime.timedelta) -> dist.Store:
    """The store through which the processes meet; serves: it is in this process."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, None, serves, timeout=timeout, wait_for_workers=False)
    # torchrun keeps it where it starts processes again, with the addresses of those that have ended
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def start(backend: str, device: torch.device, parallel: str = "ddp") -> Processes:
    """Meet the other processes, if there are any; parallel: of WAYS. Raises UserError where they cannot be met."""
    rank, size = launched()
    if size == 1:
        return Processes(device=device)
    backend = pick_backend(backend, device)
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            cards = torch.cuda.device_count()
            raise UserError(
                f"process {local} of this machine has no GPU; take --nproc_per_node={cards} or --device=cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    try:
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun has the store
        store = connect(rank == 0 and not agent, ABSENCE)
        dist.init_process_group(backend, timeout=ABSENCE, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:  # a port in use, a host that is not reached
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the processes cannot meet at {where} ({reason}); take another --master_port"
        ) from error
    processes = Processes
    if parallel == "fsdp":
        from humptygpt.parallel.fsdp import (
            ShardedProcesses as processes,  # here, since it takes a second to load
        )
    return processes(rank, size, device, Heartbeat(rank, size))
