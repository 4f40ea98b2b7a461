"""bench.py --what=machine: the demo's speed for each dtype, number of threads and way of waiting, and auto's choice."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count, product
from typing import NamedTuple

import torch
from tqdm import tqdm

from bench import BenchConfig
from benchmarks.contenders import Isolated
from benchmarks.ours import OurGenerator, OurTrainer
from benchmarks.training import DEMO, read_configs
from humptygpt.device import thread_counts
from humptygpt.process import Process, tune
from humptygpt.settings import TrainConfig
from model import ModelConfig

SPINS = (1_300, 5_000, 20_000, 300_000)  # libgomp's default is 300,000
ROUNDS = 3
SECONDS = 0.6  # for each measurement
TOKENS = 32
DTYPES = ("float32", "bfloat16")
HEADER = (
    "tokens/s:                             training  each of two     one text  each of two"
)


class Choice(NamedTuple):
    """dtype: of training; tokens are generated with float32 weights. spins: before a waiting thread sleeps."""

    dtype: str
    threads: int
    spins: int


class Contender:
    """A process that trains with any dtype and number of threads, and generates. Its threads wait in one way."""

    ours = True

    def __init__(
        self, config: TrainConfig, model_config: ModelConfig, bench_config: BenchConfig
    ):
        self.trainers = {
            dtype: OurTrainer(replace(config, dtype=dtype), model_config)
            for dtype in DTYPES
        }
        self.config = config
        self.model_config = model_config
        self.tokens = config.batch_size * model_config.block_size
        self.generator = OurGenerator(model_config, bench_config)

    def choose(self, spins: int) -> Choice:
        """Return what train.py would choose now."""
        tuned = tune(self.config, self.model_config, Process(torch.device("cpu")))
        return Choice(tuned.dtype, tuned.threads, spins)

    def train(self, choice: Choice) -> float:
        """Return the tokens per second of training."""
        step = partial(self.trainers[choice.dtype].take_steps, 0, 1)
        return self.tokens * calls_per_second(step, choice.threads)

    def generate(self, choice: Choice) -> float:
        """Return the tokens per second of one text."""
        return TOKENS * calls_per_second(
            partial(self.generator.measure, TOKENS), choice.threads
        )


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
    spins = int(os.environ.get("GOMP_SPINCOUNT", SPINS[-1]))
    pairs = {}
    for number in sorted({*SPINS, spins}):
        os.environ["GOMP_SPINCOUNT"] = str(number)  # read by the processes that start now
        pairs[number] = [Isolated(Contender, ours, model_config, config) for _ in range(2)]
    first, second = pairs[spins]
    auto = first.call("choose", spins)
    choices = [Choice(*each) for each in product(DTYPES, thread_counts(), pairs)]
    alone = {(what, choice): [] for what in ("train", "generate") for choice in choices}
    for choice in tqdm(choices * ROUNDS, disable=None):
        for what in ("train", "generate"):
            alone[what, choice].append(pairs[choice.spins][0].call(what, choice))
    alone = {key: statistics.median(each) for key, each in alone.items()}
    print(HEADER)
    for choice in choices:
        row = f"{choice.dtype:9} {choice.threads:3} threads {choice.spins:7} spins"
        for what in ("train", "generate"):
            calls = [each.begin(what, choice) for each in pairs[choice.spins]]
            slower = min(call.result() for call in calls)
            row += f" {alone[what, choice]:12,.0f} {slower:12,.0f}"
        print(row, "<- auto" if choice == auto else "", flush=True)

    busy = first.begin("train", auto)
    other = second.call("choose", spins)  # while the first one trains
    print(f"a second training chooses {other.dtype}, {other.threads} threads")
    busy.result()
    calls = [first.begin("train", auto), second.begin("train", other)]
    speeds = [call.result() for call in calls]
    best = max(alone["train", choice] for choice in choices)
    own = alone["train", auto]
    return {
        "auto": round(own),
        "best": round(best),
        "ratio": round(own / best, 3),
        "beside_another": [round(speed / own, 3) for speed in speeds],
    }
