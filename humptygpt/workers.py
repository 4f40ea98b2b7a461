"""Workers share a batch: they are processes that each compute the gradients of some of its rows.

They are forked from the process that trains and share its weights, gradients and optimizer state. They meet twice in a
step: after the gradients and after the update. Threads that share each operator meet several hundred times in a step of
a small model. Beside another program, each meeting waits until the system lets all threads run. Threads that share a
batch would wait for Python's lock instead.
"""

import ctypes
import gc
import mmap
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe
from threading import Thread
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from humptygpt.cli import UserError
from humptygpt.data import random_key
from humptygpt.optimizers import Optimizer, trained_parameters

if TYPE_CHECKING:  # run.py imports this file
    from humptygpt.run import Run

PR_SET_PDEATHSIG = 1  # in sys/prctl.h
# signals that ask a run to stop: Ctrl-C, kill, Ctrl-Break on Windows, and a closed terminal elsewhere
STOPPING = {
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP")
    if hasattr(signal, name)
}


class Workers:
    """The process that trains, which is worker 0, and others that do parts of its tasks."""

    def __init__(self, run: "Run", tasks: dict[str, Callable], count: int = 1):
        """tasks: called as task(run, number of the worker, *arguments). Workers know the run as it is now."""
        self.run = run
        run.process.workers = self
        self.tasks = tasks
        self.count = count
        self.others = []
        self.gradients = []
        if count == 1:
            return
        self.parameters = list(trained_parameters(run.model).values())
        for p in self.parameters:
            p.data = shared(p.data)
        # the parameters that each worker updates; a class from elsewhere may not let them be divided
        self.updated = [self.parameters, *([] for _ in range(1, count))]
        if isinstance(run.optimizer, Optimizer):
            run.optimizer.make_state()
            self.updated = [self.parameters[number::count] for number in range(count)]
        for state in run.optimizer.state.values():
            state |= {key: shared(x) for key, x in state.items() if isinstance(x, Tensor)}
        run.optimizer.step = self.step
        self.tasks |= {"update": self.update}
        self.gradients = [[shared(p.data) for p in self.parameters] for _ in range(count)]
        # workers share all memory until somebody writes to it: give back what is free, and let no collection write
        ctypes.CDLL(None).malloc_trim(0)
        gc.freeze()
        self.others = [self.fork(number) for number in range(1, count)]

    def fork(self, number: int) -> tuple[int, Connection]:
        """Start a worker, which ends when the process that trains ends. Returns its id and a pipe to it."""
        ours, theirs = Pipe()
        process = os.fork()
        if process:
            theirs.close()
            return process, ours
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            for stop in STOPPING:
                signal.signal(stop, signal.SIG_IGN)
            # only the process that trains prints and logs what model.py does, and stops at its breakpoints
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            sys.breakpointhook = lambda *arguments, **keys: None
            # in a thread of its own, because this one remembers OpenMP's threads, which were not forked
            thread = Thread(target=self.obey, args=(number, theirs))
            thread.start()
            thread.join()
        finally:
            os._exit(1)

    def obey(self, number: int, pipe: Connection) -> None:
        while True:
            name, arguments = pipe.recv()
            try:
                answer = self.do(name, number, *arguments), None
            except Exception:
                answer = None, traceback.format_exc()
            # Connection.send() would pass tensors in files
            pipe.send_bytes(pickle.dumps(answer))

    def each(self, name: str, *arguments: object) -> list:
        """Let each worker do its part of a task at the same time. Returns the results."""
        with raise_if_worker_died():
            for _, pipe in self.others:
                pipe.send((name, arguments))
        results = [self.do(name, 0, *arguments)]
        for number, (_, pipe) in enumerate(self.others, start=1):
            with raise_if_worker_died():
                result, problem = pipe.recv()
            if problem:
                # the same computation in this process raises the exception as Python shows it
                self.do(name, number, *arguments)
                raise RuntimeError(problem)
            results.append(result)
        return results

    def do(self, name: str, number: int, *arguments: object) -> object:
        if self.gradients:
            # Every worker adds to its own gradients. sum_gradients() leaves the sum in those of worker 0.
            own = self.gradients[0 if name == "update" else number]
            if name == "gradients":
                torch._foreach_zero_(own)
            self.show(own)
        return self.tasks[name](self.run, number, *arguments)

    def sum_gradients(self) -> None:
        """Add the gradients of the other workers to those of worker 0."""
        for others in self.gradients[1:]:
            torch._foreach_add_(self.gradients[0], others)

    def step(self) -> None:
        """Take a step of the optimizer, in place of its own step()."""
        self.each("update", [group["lr"] for group in self.run.optimizer.param_groups])
        self.show(self.gradients[0])

    def update(self, run: "Run", number: int, rates: list[float]) -> None:
        """Update a worker's parameters: an optimizer leaves those without a gradient as they are."""
        mine = {*self.updated[number]}
        for p in self.parameters:
            p.grad = p.grad if p in mine else None
        for group, lr in zip(run.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        type(run.optimizer).step(run.optimizer)

    def show(self, gradients: list[Tensor]) -> None:
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient

    def close(self) -> None:
        for process, _ in self.others:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        gc.unfreeze()


@contextmanager
def raise_if_worker_died() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise UserError(
            "a process that trains on some rows of each batch was ended from outside; the last checkpoint is intact:"
            " continue from it with --init_from=resume"
        ) from error


def shared(x: Tensor) -> Tensor:
    """Copy a tensor to memory that is shared with processes forked later."""
    memory = mmap.mmap(-1, x.nbytes)
    return torch.frombuffer(memory, dtype=x.dtype).view(x.shape).copy_(x)


# --------------------------------------------------------------------------------------
# Dropout


class SeededDropout(nn.Dropout):
    """Dropout that draws the mask of each row of a batch from a seed of its own.

    So the masks are the same however rows are divided, and if activations are recomputed. A module that is called twice
    draws the same mask twice. On a GPU, in a compiled model and for a tensor without rows, it is nn.Dropout.
    """

    seeds: list[int] | None = None  # one for each row

    def __init__(self, p: float, number: int):
        """number: which of the model's dropouts it is."""
        super().__init__(p)
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        draws = self.training and self.p and x.is_cpu
        # a compiled model would be compiled anew for other seeds
        if not draws or torch.compiler.is_compiling() or len(self.seeds or ()) != len(x):
            return super().forward(x)
        keep = torch.empty_like(x, memory_format=torch.contiguous_format)
        generator = torch.Generator()
        for row, seed in zip(keep, self.seeds, strict=True):
            generator.manual_seed(random_key(seed, self.number))
            row.bernoulli_(1 - self.p, generator=generator)
        return x * keep.div_(1 - self.p)


def add_seeds(model: nn.Module) -> None:
    """Replace each nn.Dropout with a SeededDropout."""
    for number, (name, module) in enumerate(list(model.named_modules())):
        if type(module) is nn.Dropout:
            model.set_submodule(name, SeededDropout(module.p, number))


def set_seeds(model: nn.Module, seeds: list[int]) -> None:
    """Seed the random numbers for the rows that the model is about to train on."""
    torch.manual_seed(seeds[0])  # on a GPU, or if the model draws numbers of its own
    for module in model.modules():
        if isinstance(module, SeededDropout):
            module.seeds = seeds
