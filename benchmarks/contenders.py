"""Contenders in a benchmark: programs that train or generate, each in a process of its own."""

import math
import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import pairwise
from types import SimpleNamespace

import torch
from humptygpt.model import ModelConfig

from benchmarks.settings import BenchConfig
from humptygpt.machine import GIVEN
from humptygpt.training.evaluation import validation_loss
from humptygpt.training.ranks import Ranks

WARMUP = 20  # steps before the counted ones
CHOSEN = {"GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS"}  # what machine.start() sets
PATIENCE = 20  # seconds of generation after which a measurement ends; without a KV cache it would take minutes


class Trainer:
    """A model in training, one step at a time.

    A subclass has config, model, dataset and device. Its step(it) takes step number it, counted from 0, and reads the
    loss, so that a GPU has finished its work.
    """

    ours = False

    def take_steps(self, first: int, count: int) -> list[float]:
        """Take `count` steps, beginning with number `first`. Returns the seconds of each."""
        seconds = []
        for it in range(first, first + count):
            began = time.perf_counter()
            self.step(it)
            seconds.append(time.perf_counter() - began)
        return seconds

    def val_loss(self) -> float:
        """Loss in nats per token over the whole validation split, in blocks of block_size, in float32."""
        run = SimpleNamespace(
            config=self.config,
            net=None,
            ranks=Ranks(self.device),
            dataset=self.dataset,
            device=self.device,
            dtype=torch.float32,
        )
        loss, *_ = validation_loss(run, self.model, None)
        return loss


class Generator:
    """A program with a model that continues the same texts in every measurement.

    A subclass has load(model_config, config), and steps(n), which generates n tokens of each text, one at a time.
    """

    ours = False
    dtypes = ("float32",)  # dtypes of weights that the program supports
    packages = ("torch",)  # packages that it imports
    max_texts = math.inf  # the most texts that it can continue together

    def __init__(self, model_config: ModelConfig, config: BenchConfig):
        torch.manual_seed(0)
        self.idx = torch.randint(model_config.vocab_size, (config.texts, config.prompt))
        self.load(model_config, config)
        self.measure(2)  # one-time costs come before the timed calls

    def measure(self, n: int) -> list[float]:
        """Generate n >= 2 tokens of each text, or fewer if that takes longer than PATIENCE.

        Returns the seconds of each step; the first step includes reading the prompt.
        """
        ends = [time.perf_counter()]
        for _ in self.steps(n):
            ends.append(time.perf_counter())
            if len(ends) > 2 and ends[-1] - ends[0] > PATIENCE:
                break
        return [end - start for start, end in pairwise(ends)]


class Isolated:
    """A contender in a process of its own, which waits while another one works.

    The settings of threads that our scripts choose for themselves are not in the environment of another program.
    """

    def __init__(self, cls: type, *arguments: object):
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        chosen = {} if cls.ours else {key: os.environ.pop(key) for key in CHOSEN & os.environ.keys() - GIVEN}
        ready = self.pool.submit(start, cls, *arguments)  # starts the process
        os.environ.update(chosen)
        ready.result()

    def call(self, method: str, *arguments: object) -> object:
        return self.begin(method, *arguments).result()

    def begin(self, method: str, *arguments: object) -> Future:
        """Start a call without waiting for its result."""
        return self.pool.submit(call, method, *arguments)

    def end(self) -> None:
        """End the process, which frees its memory."""
        self.pool.shutdown()


contender: Trainer | Generator  # the contender of this process


def start(cls: type, *arguments: object) -> None:
    global contender
    contender = cls(*arguments)


def call(method: str, *arguments: object) -> object:
    return getattr(contender, method)(*arguments)
