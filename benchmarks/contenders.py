"""What takes part in a benchmark: a program that trains or generates, in a process of its own."""

import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from types import SimpleNamespace

import torch

from bench import BenchConfig
from humptygpt.evaluation import evaluate
from humptygpt.process import Process
from model import ModelConfig

WARMUP = 20  # steps that are not counted
PATIENCE = 20  # seconds of generating; without a KV cache, all tokens would take minutes


class Trainer:
    """A model in training, one step at a time.

    A subclass has config, model, dataset and device, and step(it), which takes step number it, the first being 0, and
    reads its loss, so that a GPU has done its work.
    """

    def take_steps(self, first: int, count: int) -> list[float]:
        """Take steps number first and on. Returns the seconds of each."""
        seconds = []
        for it in range(first, first + count):
            began = time.perf_counter()
            self.step(it)
            seconds.append(time.perf_counter() - began)
        return seconds

    def val_loss(self) -> float:
        """Return nats per token over the whole validation split, in blocks of block_size, in float32."""
        run = SimpleNamespace(
            config=self.config,
            process=Process(self.device),
            dataset=self.dataset,
            device=self.device,
            dtype=torch.float32,
        )
        return evaluate(run, self.model, None).mean


class Generator:
    """A program with a model, which continues the same texts each time it is asked.

    A subclass has load(model_config, config), and steps(n), which generates n tokens of each text, one at a time.
    """

    dtypes = ("float32",)  # that it has
    packages = ("torch",)  # that it needs
    max_texts = math.inf  # texts that it continues together

    def __init__(self, model_config: ModelConfig, config: BenchConfig):
        torch.manual_seed(0)
        self.idx = torch.randint(model_config.vocab_size, (config.texts, config.prompt))
        self.load(model_config, config)
        self.measure(2)  # what happens only once is not timed

    def measure(self, n: int) -> list[float]:
        """Generate n >= 2 tokens of each text, fewer where that takes longer than PATIENCE.

        Returns the seconds of each step, the first with the prompt.
        """
        ends = [time.perf_counter()]
        for _ in self.steps(n):
            ends.append(time.perf_counter())
            if len(ends) > 2 and ends[-1] - ends[0] > PATIENCE:
                break
        return [end - start for start, end in pairwise(ends)]


class Isolated:
    """A contender in a process of its own, which waits while another works."""

    def __init__(self, cls: type, *arguments: object):
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.pool.submit(start, cls, *arguments).result()

    def call(self, method: str, *arguments: object) -> object:
        return self.pool.submit(call, method, *arguments).result()

    def end(self) -> None:
        """Free its memory."""
        self.pool.shutdown()


contender: Trainer | Generator  # in such a process


def start(cls: type, *arguments: object) -> None:
    global contender
    contender = cls(*arguments)


def call(method: str, *arguments: object) -> object:
    return getattr(contender, method)(*arguments)
