"""Data parallelism: several processes, started by torchrun, train one model together.

    torchrun --standalone --nproc_per_node=2 train.py CONFIG

Each process, called a rank, computes a share of every step. Gradients are summed over ranks, so that a step has as many
tokens as with one process, and all ranks take the same step. With DDP every rank holds the whole model; with FSDP, only
a part of it (see fsdp.py). Only rank 0 writes files and prints messages.

If a rank dies, its connections close, so the next collective operation of the other ranks fails. If a rank hangs, the
others notice when a collective has waited for TIMEOUT. In either case the run ends, and torchrun may restart it. This
also holds on GPUs, because ranks exchange some numbers through gloo in each step. Collectives that go through NCCL are
covered by its watchdog, a thread that ends the process if one of them fails or waits too long.
"""

import datetime
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import cache
from threading import Timer

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from humptygpt.cli import UserError, first_line
from humptygpt.formats.checkpoint import code_checksum
from humptygpt.machine import launched
from humptygpt.models.build import add_seeds, restore_model
from humptygpt.training.ranks import Ranks, Share
from humptygpt.training.run import Run
from humptygpt.training.settings import TrainConfig

TIMEOUT = datetime.timedelta(minutes=10)  # for a collective during training
# while one rank prepares data or scores translations
PATIENT_TIMEOUT = datetime.timedelta(days=7)
QUIET = 20  # seconds of waiting after which a machine says for whom it waits


@contextmanager
def raise_if_rank_died() -> Iterator[None]:
    """Raise UserError if the block fails because of another rank. Other errors pass through unchanged."""
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no class of their own, but their messages contain the names of its source files
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        raise UserError(
            f"another process has ended or does not respond ({first_line(error)}), so the run ends;"
            " the last checkpoint is intact: continue from it with --init_from=resume"
        ) from error


def say(text: str) -> None:
    """Print a note to stderr, from one process of each machine."""
    if os.environ.get("LOCAL_RANK") == "0":
        print(f"note: {text}", file=sys.stderr, flush=True)


@contextmanager
def say_if_slow(whom: str) -> Iterator[None]:
    """Say for whom the block waits if it takes longer than QUIET."""
    timer = Timer(QUIET, say, [f"waiting for {whom}"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class DataParallel(Ranks):
    """One of several ranks that torchrun has started, and that each hold the whole model (DDP)."""

    by_torchrun = True
    # the default group, kept until Python ends: if DDP were the last to hold it, freeing it could wait forever for a
    # thread that waits for Python's lock (PyTorch issue 56297)
    world = None

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        patient: dist.ProcessGroup | None = None,
    ):
        """patient: a process group whose collectives have the timeout PATIENT_TIMEOUT."""
        super().__init__(device)
        self.rank = rank
        self.size = self.averaged = size
        self.patient = patient

    @classmethod
    def start(cls, config: TrainConfig, device: torch.device, prepare: Callable[[], None]) -> "DataParallel":
        """Connect to the other ranks, and prepare the data. Parameters: as for start_ranks()."""
        rank, size = launched()
        if device.type == "cuda":
            device = pick_gpu()
        ranks = cls(rank, size, device, connect(config.backend))
        DataParallel.world = dist.group.WORLD
        # ranks take turns, so that data is prepared only once on each disk, even if several machines share a disk
        for turn in range(size):
            with together(f"process {turn}, which prepares the data", ranks.patient):
                if turn == rank:
                    prepare()
        return ranks

    def __exit__(self, error: type | None, *_: object) -> None:
        if not error:
            # let all ranks finish first: if one exits with a nonzero code, torchrun stops the others
            self.wait_for_all()
            dist.destroy_process_group()

    @raise_if_rank_died()
    @say_if_slow("the other processes")
    def wait_for_all(self) -> None:
        dist.barrier(group=self.patient)

    # ----------------------------------------------------------------------------------
    # Methods that a single rank also has

    def place(self, model: nn.Module, run: Run) -> None:
        """Move a model of the run to the device, with the state of rank 0. Other ranks may have it on meta.

        Raises UserError if the ranks cannot train together.
        """
        self.check(run)
        add_seeds(model)
        whole = dict(model.state_dict())
        self.allocate(model, run.dtype)
        for name, x in model.state_dict().items():
            x.copy_(self.receive(whole[name], x))

    def allocate(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Allocate this rank's part of a model on the device. dtype: that of products."""
        if not self.first:
            whole = model.state_dict()
            restore_model(model, {k: torch.empty_like(x, device="cpu") for k, x in whole.items()})
        model.to(self.device)

    @raise_if_rank_died()
    def receive(self, value: Tensor, like: Tensor) -> Tensor:
        """Return rank 0's tensor."""
        whole = torch.empty_like(value, device=self.device)
        if self.first:
            whole.copy_(value)
        dist.broadcast(whole, src=0)
        return whole

    @raise_if_rank_died()
    def check(self, run: Run) -> None:
        """Raise UserError if a step cannot be split evenly over ranks, or if ranks differ in settings, data or code."""
        count = run.config.gradient_accumulation_steps
        if count % self.size and self.size % count:
            raise UserError(
                f"gradient_accumulation_steps={count} micro-batches cannot be split evenly over {self.size} processes;"
                f" use gradient_accumulation_steps={count + -count % self.size}"
            )
        settings = asdict(run.config) | asdict(run.model.config)
        own = settings | run.dataset.identity | {"iter": run.progress.iter}
        own |= {"model.py": code_checksum(), "torch": torch.__version__}
        ranks = [None] * self.size
        dist.all_gather_object(ranks, own)
        for rank, settings in enumerate(ranks):
            if differ := dict(settings.items() - ranks[0].items()):
                raise UserError(
                    f"process {rank} differs from process 0 in {differ}; start all with the same command, data,"
                    " model.py and torch"
                )

    def wrap(self, model: nn.Module, compiled: bool, dynamic: bool) -> nn.Module:
        """Wrap the model in DDP, which copies rank 0's weights to all ranks and averages gradients over them."""
        net = super().wrap(model, compiled, dynamic)
        net = DistributedDataParallel(net, gradient_as_bucket_view=True)
        # Buffers are constant tables, so no step broadcasts them. As an argument, this would print a warning.
        net.broadcast_buffers = False
        return net

    def turns(self, count: int) -> int:
        return min(self.size, count)

    def count_tokens(self, micro_batches: list[Share], shares: list[Share]) -> int:
        """Count the tokens of a step. Ranks with equally many rows may have different numbers of targets.

        The sum also shows in one line that a rank has died, before the forward pass of a sharded model fails for that.
        """
        tokens = sum(share.tokens for share in shares)
        return int(self.sum(torch.tensor(tokens)))

    @contextmanager
    def syncing(self, net: nn.Module, last: bool) -> Iterator[None]:
        """Compute the gradients of a share in this context. In the last share, gradients are averaged over ranks."""
        with raise_if_rank_died(), nullcontext() if last else net.no_sync():
            yield

    @raise_if_rank_died()
    def sum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def sum_with_gradients(self, losses: Tensor) -> Tensor:
        """Sum losses over ranks. The last backward pass has averaged the gradients."""
        return self.sum(losses) / self.averaged

    @raise_if_rank_died()
    def spread(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply a function to matrices of which rank i computes numbers i, i + size, and so on. Returns all of them.

        Each rank sends equally many matrices to the others; some of them may be padding.
        """
        computed = function(x[self.rank :: self.size])
        own = computed.new_zeros(math.ceil(len(x) / self.size), *x.shape[1:])
        own[: len(computed)] = computed
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own)
        return torch.stack(every, dim=1).flatten(0, 1)[: len(x)]


# --------------------------------------------------------------------------------------
# Startup


def pick_gpu() -> torch.device:
    """Return the GPU of this rank. Raises UserError if the machine has too few GPUs."""
    local_rank = int(os.environ["LOCAL_RANK"])
    cards = torch.cuda.device_count()
    if local_rank >= cards:
        raise UserError(
            f"process {local_rank} of this machine has no GPU; use --nproc_per_node={cards} or --device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextmanager
def together(whom: str, group: dist.ProcessGroup) -> Iterator[None]:
    """Run a block in every rank and wait for all. If it raises UserError in one rank, it does so in all.

    whom: for whom a rank waits that has come to the end of the block.
    """
    problem = None
    try:
        yield
    except UserError as error:
        rank = dist.get_rank()
        problem = f"process {rank} on {socket.gethostname()}: {error}" if rank else str(error)
    problems = [None] * dist.get_world_size()
    with raise_if_rank_died(), say_if_slow(whom):
        dist.all_gather_object(problems, problem, group=group)
    for problem in filter(None, problems):
        raise UserError(problem)


@cache
@say_if_slow("the other processes to connect")
def connect(backend: str) -> dist.ProcessGroup:
    """Connect all ranks to the default process group. Returns a second group of them, whose timeout is PATIENT_TIMEOUT.

    Ranks exchange GPU tensors through NCCL, and CPU tensors through gloo, which does not wait for the GPU. Raises
    UserError if they cannot connect.
    """
    if backend == "auto" and not torch.cuda.is_available():
        backend = "gloo"
    # each machine's torchrun counts its own restarts, so restarted processes would not find each other
    several = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    if several and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
        raise UserError(
            "torchrun's --max_restarts works on one machine only; leave it out, and continue with --init_from=auto"
        )
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # when torchrun restarts ranks, it keeps the store, which still has the addresses of the ranks that ended
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            "gloo" if backend == "gloo" else "cpu:gloo,cuda:nccl",
            store=dist.PrefixStore(f"start {attempt}", store),
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
        )
        return dist.new_group(backend="gloo", timeout=PATIENT_TIMEOUT)
    except (RuntimeError, ValueError) as error:  # e.g. a port in use, an unreachable host
        raise UserError(
            f"the processes cannot connect ({first_line(error)}); start them with torchrun or use another --master_port"
            "; on several machines, set GLOO_SOCKET_IFNAME as docs/processes.md says"
        ) from error


@raise_if_rank_died()
def read_and_describe(read: Callable[[], dict | None], backend: str) -> dict | None:
    """Read a checkpoint in rank 0, and send the other ranks all of it except for the values of its tensors."""
    group = connect(backend)
    with together("process 0, which reads the checkpoint", group):
        saved = read() if dist.get_rank() == 0 else None
    described = [tree_map_only(Tensor, lambda x: torch.empty_like(x, device="meta"), saved)]
    dist.broadcast_object_list(described, group=group)
    return saved or described[0]
