"""Choose what depends on the machine: the dtypes and the number of threads with which a run trains."""

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from humptygpt.device import DTYPES, autocast, pick_dtype, thread_counts, training_dtype
from humptygpt.machine import fastest, usable_cores
from humptygpt.process import Process
from humptygpt.settings import TrainConfig
from humptygpt.tasks import build
from model import ModelConfig

# A measurement takes as many tokens as multiply this many weights of a block, in about 10 ms, but at most TOKENS.
WEIGHTS = 2**27
TOKENS = 512
LARGE = 2048  # n_embd above which nothing is measured, because a block and its gradients take too much memory


def tune(config: TrainConfig, model_config: ModelConfig, process: Process) -> TrainConfig:
    """Return the config with the fastest dtypes and number of CPU threads, and set the number of threads.

    What the user has set stays. The dtypes are the same in all runs on a machine. The number of threads follows the
    load: all of them, unless fewer are clearly faster for one layer of the model at this moment, as they are while
    another training runs. In a run of several processes, the first one decides.
    """
    device = process.device

    def choose(choices: Sequence[Hashable], measure: Callable[[], Hashable]) -> Hashable:
        index = choices.index(measure()) if process.first else 0
        return choices[int(process.sum(torch.tensor(index)))]

    dtype, muon_dtype = config.dtype, config.muon_dtype
    if "auto" in (dtype, muon_dtype):
        best = choose(["float32", "bfloat16"], lambda: training_dtype(device))
        muon_dtype = best if muon_dtype == "auto" else muon_dtype
        if device.type == "cpu" and dtype == "auto":
            dtype = best
    dtype = str(pick_dtype(dtype, device)).removeprefix("torch.")

    counts = [min(config.threads, usable_cores())] if config.threads else thread_counts()
    counts = counts[::-1]
    number = counts[0]
    if device.type == "cpu" and model_config.n_embd <= LARGE:
        number = choose(counts, lambda: fastest_count(counts, model_config, DTYPES[dtype]))
    torch.set_num_threads(number)
    return replace(
        config,
        dtype=dtype,
        muon_dtype=muon_dtype,
        # another number of processes may have more threads each
        threads=number if process.size == 1 else None,
    )


def fastest_count(counts: Sequence[int], config: ModelConfig, dtype: torch.dtype) -> int:
    """Time the forward and backward pass of one layer of the model with each number of threads."""
    with suppress(Exception):  # from an edited model.py: training will show the error
        model = build(replace(config, n_layer=1, n_members=1, vocab_size=256))
        weights = sum(p.numel() for p in model.parameters())
        tokens = min(TOKENS, WEIGHTS // weights + 1)
        T = min(config.block_size, tokens)
        idx = torch.zeros(tokens // T, T, dtype=torch.int64)
        batch = {"idx": idx, "targets": idx} | (
            {"source": idx} if hasattr(model, "encode") else {}
        )

        def train(number: int) -> None:
            torch.set_num_threads(number)
            with autocast(torch.device("cpu"), dtype):
                model(**batch)[1].backward()

        return fastest(counts, train)
    return counts[0]
