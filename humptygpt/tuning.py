"""Choose by measurement what depends on the machine: the dtypes and the number of threads with which a CPU trains."""

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from humptygpt.device import (
    DTYPES,
    autocast,
    multiplies_bfloat16,
    pick_dtype,
    thread_counts,
)
from humptygpt.machine import fastest, usable_cores
from humptygpt.process import Process
from humptygpt.settings import TrainConfig
from model import ModelConfig, Stack

# A measurement takes as many tokens as multiply this many weights of a block, in about 10 ms, but at most TOKENS.
WEIGHTS = 2**27
TOKENS = 512
LARGE = 2048  # n_embd above which nothing is measured, because a block and its gradients take too much memory


def tune(config: TrainConfig, model_config: ModelConfig, process: Process) -> TrainConfig:
    """Return the config with the fastest dtypes and number of CPU threads, and set the number of threads.

    On a GPU or with a large model, they follow from the hardware's instructions. On a CPU, the first process measures
    the forward and backward pass of one block of the model, in a tenth of a second. What the user has set stays, and so
    do float32 and all threads unless another choice is clearly faster: see fastest(). Even on an idle machine,
    more threads are sometimes no faster for a moment; beside another training they are several times slower.
    """
    device = process.device
    threads = [min(config.threads, usable_cores())] if config.threads else thread_counts()
    number = threads[-1]
    dtype = str(pick_dtype(config.dtype, device)).removeprefix("torch.")
    faster = "bfloat16" if multiplies_bfloat16(device) else "float32"

    def choose(choices: Sequence[Hashable], run: Callable) -> Hashable:
        index = choices.index(fastest(choices, run)) if process.first else 0
        return choices[int(process.sum(torch.tensor(index)))]

    def train(dtype: str, number: int) -> None:
        torch.set_num_threads(number)
        with autocast(device, DTYPES[dtype]):
            y = stack(x)
        y.sum().backward()

    # an edited model.py may have a Stack that needs something else
    with suppress(Exception):
        if device.type == "cpu" and model_config.n_embd <= LARGE:
            stack = Stack(replace(model_config, n_layer=1))
            weights = sum(p.numel() for p in stack.parameters())
            tokens = min(TOKENS, WEIGHTS // weights + 1)
            T = min(model_config.block_size, tokens)
            x = torch.randn(tokens // T, T, model_config.n_embd)
            if "auto" in (config.dtype, config.muon_dtype):
                dtypes = sorted({"float32", faster}, reverse=True)
                faster = choose(dtypes, lambda dtype: train(dtype, threads[0]))
            if config.dtype == "auto":
                dtype = faster
            number = choose(threads[::-1], lambda number: train(dtype, number))
    torch.set_num_threads(number)
    muon_dtype = faster if config.muon_dtype == "auto" else config.muon_dtype
    return replace(
        config,
        dtype=dtype,
        muon_dtype=muon_dtype,
        # another number of processes may have more threads each
        threads=number if process.size == 1 else None,
    )
