"""Ranks that are forked from the process that trains, on a CPU under Linux: each trains on some rows of every batch.

They share its weights, gradients and optimizer state, and meet three times in a step: when all have their gradients,
when each has summed those of some parameters, and when each has updated these parameters. Threads that share each
operator meet several hundred times in a step of a small model. Beside another program, each meeting waits until the
system lets all threads run. Threads that share a batch would wait for Python's lock instead.
"""

import ctypes
import gc
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from threading import Thread

import numpy as np
import torch
from torch import Tensor

from humptygpt.cli import UserError
from humptygpt.machine import STOPPING, is_out_of_memory
from humptygpt.training.optimizers import Optimizer, trained_parameters
from humptygpt.training.ranks import Ranks
from humptygpt.training.run import Run

PR_SET_PDEATHSIG = 1  # in sys/prctl.h


class ForkedRanks(Ranks):
    """Ranks that share the memory of this machine. Until each() forks them, this process is the only one."""

    def __init__(self, size: int):
        super().__init__(torch.device("cpu"))
        self.size = size
        self.pipes = []  # of rank 0: one to each other rank; of another rank: one to rank 0

    def each(self, function: Callable[[Run], object], run: Run) -> object:
        """Fork the other ranks, which end when function(run) has returned in rank 0."""
        self.share_memory(run)
        groups = run.optimizer.param_groups
        params = [group["params"] for group in groups]
        # ranks share all memory until somebody writes to it: give back what is free, and let no collection write
        ctypes.CDLL(None).malloc_trim(0)
        gc.freeze()
        others = []
        try:
            for rank in range(1, self.size):
                others.append(self.fork(rank, function, run))
            self.divide(run.optimizer)
            return function(run)
        finally:
            for process in others:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            for pipe in self.pipes:
                pipe.close()
            self.pipes = []
            for group, all_params in zip(groups, params, strict=True):
                group["params"] = all_params
            gc.unfreeze()

    def share_memory(self, run: Run) -> None:
        """Move what ranks have in common to memory that they share."""
        self.parameters = list(trained_parameters(run.model).values())
        for p in self.parameters:
            p.data = shared(p.data)
        if isinstance(run.optimizer, Optimizer):
            run.optimizer.make_state()
            for state in run.optimizer.state.values():
                state |= {key: shared(x) for key, x in state.items()}
        # each rank's gradients, and whether it has used a parameter
        self.gradients = [[shared(p.data) for p in self.parameters] for _ in range(self.size)]
        self.used = shared(torch.zeros(self.size, len(self.parameters), dtype=torch.bool))

    def fork(self, rank: int, function: Callable, run: Run) -> int:
        """Start a rank, which ends when rank 0 ends. Returns its process id."""
        ours, theirs = Pipe()
        process = os.fork()
        if process:
            theirs.close()
            self.pipes.append(ours)
            return process
        try:
            self.rank = rank
            self.pipes = [theirs]
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            for stop in STOPPING:
                signal.signal(stop, signal.SIG_IGN)
            # only rank 0 prints and logs what model.py does, and stops at its breakpoints
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            sys.breakpointhook = lambda *arguments, **keys: None
            # in a thread of its own, because this one remembers OpenMP's threads, which were not forked
            thread = Thread(target=self.follow, args=(function, run))
            thread.start()
            thread.join()
        finally:
            os._exit(1)

    def follow(self, function: Callable, run: Run) -> None:
        """Call the function. If it fails, send rank 0 what to raise or, if that is not ours to say, to print."""
        (pipe,) = self.pipes
        try:
            self.divide(run.optimizer)
            function(run)
        except UserError as error:
            pipe.send(error)
        except Exception as error:
            no_memory = is_out_of_memory(error)
            pipe.send(MemoryError(str(error)) if no_memory else traceback.format_exc())

    def divide(self, optimizer: torch.optim.Optimizer) -> None:
        """Let this rank's optimizer update its part of the parameters.

        An update by a class from elsewhere may depend on all parameters, so rank 0 makes it alone.
        """
        count = len(self.parameters)
        if isinstance(optimizer, Optimizer):
            self.own = range(self.rank, count, self.size)
        else:
            self.own = range(count if self.rank == 0 else 0)
        mine = {self.parameters[i] for i in self.own}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p in mine]

    # ----------------------------------------------------------------------------------
    # Meetings

    def sum(self, x: Tensor) -> Tensor:
        """Sum x over ranks. Each waits until all have come."""
        try:
            if self.rank:
                (pipe,) = self.pipes
                pipe.send(x.numpy())
                return torch.from_numpy(pipe.recv())
            total = x.numpy().copy()
            for pipe in self.pipes:
                total += received(pipe)
            for pipe in self.pipes:
                pipe.send(total)
            return torch.from_numpy(total)
        except (EOFError, ConnectionError) as error:
            raise UserError(
                "a process that trains on some rows of each batch was ended from outside; the last checkpoint is"
                " intact: continue from it with --init_from=resume"
            ) from error

    def sum_with_gradients(self, losses: Tensor) -> Tensor:
        """Sum losses over ranks, and those gradients whose parameters this rank updates."""
        for i, p in enumerate(self.parameters):
            gradient = self.gradients[self.rank][i]
            self.used[self.rank, i] = p.grad is not None
            gradient.zero_() if p.grad is None else gradient.copy_(p.grad)
        losses = self.sum(losses)
        used = self.used.any(dim=0).tolist()
        total, *others = self.gradients
        for i in self.own:
            for gradients in others:
                total[i] += gradients[i]
        # whoever looks at them after the step finds the sums of all
        for p, gradient, is_used in zip(self.parameters, total, used, strict=True):
            p.grad = gradient if is_used else None
        return losses

    def total_norm(self, norm: Tensor) -> Tensor:
        return self.sum(norm.double().square()).sqrt().float()


def received(pipe: Connection) -> np.ndarray:
    """Return what another rank has sent. If it has failed, show its exception as Python would, and exit."""
    sent = pipe.recv()
    if isinstance(sent, Exception):
        raise sent
    if isinstance(sent, str):
        sys.stderr.write(sent)
        sys.exit(1)
    return sent


def shared(x: Tensor) -> Tensor:
    """Copy a tensor to memory that is shared with processes forked later."""
    memory = mmap.mmap(-1, x.nbytes)
    return torch.frombuffer(memory, dtype=x.dtype).view(x.shape).copy_(x)
