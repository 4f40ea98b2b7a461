"""Data parallelism: several processes, started by torchrun, train one model together.

    torchrun --standalone --nproc_per_node=2 train.py CONFIG

Every process, or rank, computes a share of each step. Gradients are summed over ranks, so that a step has as many
tokens as with one process, and all ranks take the same step. With DDP every rank holds the whole model; with FSDP, only
a part of it (see fsdp.py). Rank 0 writes and reports.

If a rank dies, its connections close, and the next collective of the others fails. If a rank hangs, the others notice
when a collective has waited for TIMEOUT. In either case the run ends, and torchrun may restart it. This also holds on
GPUs, because the numbers that ranks exchange in each step go through gloo; NCCL's watchdog covers the rest of the step.
"""

import datetime
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from humptygpt.config import UserError, first_line
from humptygpt.data import count_targets
from humptygpt.optimizers import Optimizer
from humptygpt.process import Process, Share, launched
from model import Dropout

TIMEOUT = datetime.timedelta(minutes=10)  # for a collective during training
LONG = datetime.timedelta(days=7)  # while one rank prepares data or scores translations
# NCCL's wait() only orders streams and raises nothing. With these settings, a torch thread kills a process whose
# collective failed or exceeded TIMEOUT, a second thread kills it if the first one hangs, and neither dumps a trace.
WATCHDOG = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    "TORCH_NCCL_ENABLE_MONITORING": "1",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": f"{TIMEOUT.total_seconds():.0f}",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}


@contextmanager
def raise_if_rank_died() -> Iterator[None]:
    """Raise UserError if the block fails because of another rank. Other errors come from the model and pass through."""
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no class of their own, but they name its source files
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        raise UserError(
            f"another process has ended or does not respond ({first_line(error)}), so the run ends;"
            " its last checkpoint is intact: continue from it with --init_from=resume"
        ) from error


class SharedDropout(Dropout):
    """Dropout for some rows of a batch. On the CPU, its mask is the one a single process would draw for these rows."""

    rows: tuple[int, int] | None = None  # (first row, rows of the whole batch); None: all

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is None or not self.training or x.device.type != "cpu":
            return super().forward(x)
        first, total = self.rows
        mask = super().forward(x.new_ones(total, *x.shape[1:]))
        return x * mask[first : first + len(x)]


def share_dropout(model: nn.Module) -> None:
    """Replace each Dropout with a SharedDropout."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is Dropout:
                setattr(module, name, SharedDropout(child.p))


class DataParallel(Process):
    """One of several processes that each have the whole model (DDP)."""

    def __init__(self, rank: int, size: int, device: torch.device, patient=None):
        """patient: a process group whose collectives wait up to LONG."""
        super().__init__(device)
        self.rank = rank
        self.size = size
        self.first = rank == 0
        self.patient = patient
        self.optimizer_class = partial(SharedOptimizer, process=self)

    @classmethod
    def start(cls, config, device, dtype, prepare) -> "DataParallel":
        """Connect to the other ranks. Parameters: as for process.start_process()."""
        cls.check_config(config, dtype)
        rank, size = launched()
        backends = pick_backend(config.backend, device)
        if device.type == "cuda":
            device = pick_gpu()
            for key, value in WATCHDOG.items():
                os.environ.setdefault(key, value)
        process = cls(rank, size, device, meet(backends, rank, size))
        process.prepare_in_turn(prepare)
        return process

    def __exit__(self, error: type | None, *_: object) -> None:
        if not error:
            # wait, because a rank that exits with a nonzero code makes torchrun stop the others
            self.wait_for_all()
            dist.destroy_process_group()

    @classmethod
    def check_config(cls, config, dtype: torch.dtype) -> None:
        """Raise UserError if such processes cannot train with these settings. config: a TrainConfig."""

    def prepare_in_turn(self, prepare: Callable[[], None]) -> None:
        """Prepare missing data in rank 0, then in the first rank of each other machine; the rest find it prepared.

        This way, data is prepared once per disk, whether or not the machines share one.
        """
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        mine = 0 if self.first else 1 if local_rank == 0 else 2
        for turn in range(3):
            if turn == mine:
                prepare()
            self.wait_for_all()

    @raise_if_rank_died()
    def wait_for_all(self) -> None:
        dist.barrier(group=self.patient)

    # ----------------------------------------------------------------------------------
    # Methods that a single process has as well

    def place(self, run) -> None:
        """Check that the ranks can train this run together, then move its model to the device."""
        self.check(run)
        share_dropout(run.model)
        run.model.to(self.device)

    def check(self, run) -> None:
        """Raise UserError if a step of this run cannot be split evenly, or the ranks differ in settings or data."""
        config = run.config
        count = config.gradient_accumulation_steps
        check_divisible(self.size, count, config.batch_size, run.task.batches_vary)
        settings = asdict(config) | asdict(run.model.config) | run.dataset.identity
        self.check_alike(settings | {"iter": run.progress.iter})

    def wrap(self, model: nn.Module, compiled: bool, dynamic: bool) -> nn.Module:
        """Wrap the model for training: DDP averages gradients over ranks, which all start from rank 0's weights."""
        net = super().wrap(model, compiled, dynamic)
        # buffers are constant tables, so they need no broadcast
        return DistributedDataParallel(
            net, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def shares(self, run, step: int) -> tuple[list[Share], int]:
        """Return this rank's shares of a step, and the number of tokens in the whole step.

        Shares are whole micro-batches or, if there are fewer of them than ranks, neighbouring rows of one.
        """
        count = run.config.gradient_accumulation_steps
        stride = min(self.size, count)
        parts = self.size // stride  # ranks that share one micro-batch
        shares = []
        for number in range(step * count + self.rank % stride, (step + 1) * count, stride):
            batch = run.batches.batch(number, run.config.batch_size)
            shares.append(self.share(number, batch, self.rank // stride, parts))
        tokens = sum(share.tokens for share in shares)
        # In language modelling, all ranks have the same number of tokens, so they need not wait for each other. Sharded
        # ranks wait anyway: if another rank has died, they report it in one line, before the forward pass fails.
        if run.task.batches_vary or self.sharded:
            return shares, int(self.sum(torch.tensor(tokens)))
        return shares, tokens * self.size

    def share(self, number: int, batch: dict[str, Tensor], part: int, parts: int) -> Share:
        """Return one of several parts of a micro-batch."""
        if parts == 1:
            return Share((number,), batch, count_targets(batch))
        total = len(batch["targets"])
        start = total * part // parts
        end = total * (part + 1) // parts
        # With fewer rows than parts, some ranks compute a row that does not count, because every rank needs gradients.
        first = min(start, total - 1)
        rows = {name: value[first : max(end, first + 1)] for name, value in batch.items()}
        # A GPU cannot draw just some rows of a dropout mask, so there each share draws a mask of its own.
        key = (number,) if self.device.type == "cpu" else (number, first)
        tokens = count_targets(rows) if end > start else 0
        return Share(key, rows, tokens, (first, total))

    @contextmanager
    def accumulate(self, net: nn.Module, share: Share, last: bool) -> Iterator[None]:
        """Context for computing the gradients of a share. In the last share, they are averaged over ranks."""
        for module in net.modules():
            if isinstance(module, SharedDropout):
                module.rows = share.rows
        with raise_if_rank_died(), self.summing(net, last):
            yield

    def summing(self, net: nn.Module, last: bool) -> AbstractContextManager:
        return nullcontext() if last else net.no_sync()

    @raise_if_rank_died()
    def sum(self, x: Tensor) -> Tensor:
        """Sum x over ranks, in place."""
        dist.all_reduce(x)
        return x

    def save(self, path: Path, entries: dict) -> None:
        """Write a checkpoint in rank 0."""
        if self.first:
            super().save(path, entries)

    # ----------------------------------------------------------------------------------
    # Methods for several processes only

    def check_alike(self, settings: dict[str, object]) -> None:
        """Raise UserError in every rank if the settings or data of any rank differ from those of rank 0."""
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

    def spread(self, function: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
        """Compute function(x). x: (n, rows, columns), n independent matrices, of which each rank computes some."""
        most = -(-len(x) // self.size)
        mine = x[self.rank * most : (self.rank + 1) * most]
        computed = x.new_zeros(most, *x.shape[1:])
        if len(mine):
            computed[: len(mine)] = function(mine)
        gathered = x.new_empty(self.size * most, *x.shape[1:])
        with raise_if_rank_died():
            dist.all_gather_into_tensor(gathered, computed)
        return gathered[: len(x)]


class SharedOptimizer(Optimizer):
    """An optimizer that splits Muon's orthogonalisation among the ranks."""

    def __init__(self, groups: list[dict], process: DataParallel):
        super().__init__(groups)
        self.process = process

    def spread(self, function: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
        return self.process.spread(function, x, rows)


# --------------------------------------------------------------------------------------
# Startup


def check_divisible(size: int, micro_batches: int, batch_size: int, pairs: bool) -> None:
    """Raise UserError if a step cannot be split evenly. pairs: micro-batches may have any number of rows."""
    whole_batches = micro_batches % size == 0
    whole_rows = pairs or batch_size % max(1, size // micro_batches) == 0
    if whole_batches or (size % micro_batches == 0 and whole_rows):
        return
    raise UserError(
        f"gradient_accumulation_steps={micro_batches} micro-batches of batch_size={batch_size} cannot be split evenly"
        f" over {size} processes; use gradient_accumulation_steps={-(-micro_batches // size) * size}"
    )


def pick_backend(backend: str, device: torch.device) -> str:
    """Return the backends: gloo for tensors on the CPU, nccl for tensors on a GPU. Raises UserError."""
    if device.type == "mps" or (backend == "nccl" and device.type != "cuda"):
        raise UserError(
            f"several processes with backend={backend} cannot train on {device.type}; use --device=cpu --backend=gloo"
        )
    if device.type == "cpu" or backend == "gloo":
        return "gloo"
    return "cpu:gloo,cuda:nccl"  # exchanging numbers over gloo does not wait for a GPU


def pick_gpu() -> torch.device:
    """Return the GPU of this rank. Raises UserError."""
    local_rank = int(os.environ["LOCAL_RANK"])
    cards = torch.cuda.device_count()
    if local_rank >= cards:
        raise UserError(
            f"process {local_rank} of this machine has no GPU; use --nproc_per_node={cards} or --device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def meet(backends: str, rank: int, size: int) -> dist.ProcessGroup:
    """Form the process group of all ranks. Returns a second, patient one. Raises UserError if they cannot connect."""
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # when torchrun restarts ranks, it keeps the store, with the addresses of ranks that have ended
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"start {attempt}", store)
        dist.init_process_group(
            backends, store=store, rank=rank, world_size=size, timeout=TIMEOUT
        )
        return dist.new_group(backend="gloo", timeout=LONG)
    except (RuntimeError, ValueError) as error:  # a port in use, an unreachable host
        raise UserError(
            f"the processes cannot connect ({first_line(error)}); start them with torchrun or use another --master_port"
        ) from error
