"""python -m benchmarks --what=machine: the demo's speed for each dtype, way of sharing a step and way of waiting."""

import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count, product
from typing import NamedTuple

import torch
from humptygpt.model import ModelConfig
from tqdm import tqdm

from benchmarks.contenders import Isolated
from benchmarks.ours import OurGenerator, OurTrainer
from benchmarks.settings import BenchConfig
from benchmarks.training import DEMO, read_configs
from humptygpt.device import THREADS, training_dtype
from humptygpt.machine import usable_cores
from humptygpt.training.settings import TrainConfig

SPINS = (1_300, 5_000, 20_000, 300_000)  # libgomp's default is 300,000
ROUNDS = 3
SECONDS = 0.6  # for each measurement
TOKENS = 32
DTYPES = ("float32", "bfloat16")
HEADER = """
tokens/s                           training, threads share    training, processes share
                                    operators  each of two       a batch  each of two      one text  each of two
"""
BUSY = "while True: pass"


class Choice(NamedTuple):
    """dtype: of training; tokens are generated with float32 weights. spins: before a waiting thread sleeps."""

    dtype: str
    threads: int
    spins: int


class Contender:
    """A process that trains with any dtype and number of threads, and generates. Its threads wait in one way."""

    ours = True

    def __init__(self, config: TrainConfig, model_config: ModelConfig, bench_config: BenchConfig):
        # with a single thread there is one process, so operators take as many threads as they are given
        self.trainers = {
            (dtype, threads): OurTrainer(replace(config, dtype=dtype, threads=threads), model_config)
            for dtype, threads in product(DTYPES, {1, THREADS})
        }
        self.tokens = config.batch_size * model_config.block_size
        self.generator = OurGenerator(model_config, bench_config)

    def operators(self, choice: Choice) -> float:
        """Return the tokens per second of training if threads share each operator."""
        return self.train(self.trainers[choice.dtype, 1], choice.threads)

    def processes(self, choice: Choice) -> float:
        """Return the tokens per second of training if forked processes share a batch."""
        return self.train(self.trainers[choice.dtype, choice.threads], 1)

    def train(self, trainer: OurTrainer, threads: int) -> float:
        torch.set_num_threads(threads)
        _, first = trainer.take_steps(0, 2)
        steps = trainer.take_steps(0, math.ceil(SECONDS / first))
        return self.tokens / statistics.mean(steps)

    def generate(self, choice: Choice) -> float:
        """Return the tokens per second of one text."""
        return TOKENS * calls_per_second(partial(self.generator.measure, TOKENS), choice.threads)


def calls_per_second(call: Callable[[], object], threads: int) -> float:
    torch.set_num_threads(threads)
    call()
    began = time.perf_counter()
    for calls in count(1):
        call()
        seconds = time.perf_counter() - began
        if seconds > SECONDS:
            return calls / seconds


def bench(config: BenchConfig) -> dict:
    config = replace(config, device="cpu")
    ours, model_config = read_configs(config, DEMO)
    own = int(os.environ.get("GOMP_SPINCOUNT", SPINS[-1]))
    pairs = {}
    for spins in sorted({*SPINS, own}):
        os.environ["GOMP_SPINCOUNT"] = str(spins)  # read by the processes that start now
        pairs[spins] = [Isolated(Contender, ours, model_config, config) for _ in range(2)]
    choices = [Choice(*each) for each in product(DTYPES, sorted({1, THREADS}), pairs)]
    kinds = ("operators", "processes", "generate")
    measured = {(kind, choice): [] for kind in kinds for choice in choices}
    for kind, choice in tqdm(ROUNDS * [*measured], disable=None):
        measured[kind, choice].append(pairs[choice.spins][0].call(kind, choice))
    alone = {key: statistics.median(speeds) for key, speeds in measured.items()}
    auto = Choice(training_dtype(torch.device("cpu")), THREADS, own)
    print(HEADER)
    both = {}
    for choice in choices:
        row = f"{choice.dtype:9} {choice.threads:3} threads {choice.spins:7} spins"
        for kind in kinds:
            calls = [each.begin(kind, choice) for each in pairs[choice.spins]]
            both[kind, choice] = [call.result() for call in calls]
            row += f" {alone[kind, choice]:13,.0f} {min(both[kind, choice]):12,.0f}"
        print(row, "<- auto" if choice == auto else "", flush=True)

    programs = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(usable_cores())]
    try:
        single = auto._replace(threads=1)
        busy = [[pairs[own][0].call("processes", choice) for choice in (auto, single)] for _ in range(ROUNDS)]
    finally:
        for program in programs:
            program.kill()
    operators = max(alone["operators", choice] for choice in choices)
    shared = alone["processes", auto]
    return {
        "operators": round(operators),
        "shared": round(shared),
        "ratio": round(shared / operators, 3),
        "beside_another": [round(speed / shared, 3) for speed in both["processes", auto]],
        "beside_busy_cores": round(statistics.median(x / y for x, y in busy), 3),
    }
