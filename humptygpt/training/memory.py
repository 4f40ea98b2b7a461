"""The memory that a run needs at least, and a limit under which needing more is an error instead of a kill."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from humptygpt.data.dataset import read_meta
from humptygpt.device import free_memory, pick_device
from humptygpt.machine import available_memory, check_fits, launched
from humptygpt.model import ModelConfig, count_parameters, flops_per_token
from humptygpt.models.build import WithoutValues, build_on_meta
from humptygpt.tokenizers.saved import from_state
from humptygpt.training import optimizers
from humptygpt.training.optimizers import trained_parameters
from humptygpt.training.run import Run
from humptygpt.training.settings import TrainConfig, choose_dtype

FLOAT = 4  # bytes in a float32, the dtype of weights, gradients and optimizer state for any --dtype
ADVICE = (
    "use a smaller --batch_size with more --gradient_accumulation_steps, --checkpoint_activations=True, or a smaller"
    " model (--n_embd, --n_layer)"
)


class Memory(NamedTuple):
    """Bytes that one process needs. A step also needs activations, which only a trial can measure."""

    weights: float
    gradients: float
    optimizer: float
    logits: float  # the logarithms of their probabilities and the gradient

    @property
    def least(self) -> float:
        """Lower bound: the logits are freed while the gradients are computed."""
        return self.weights + self.optimizer + max(self.gradients, self.logits)


def model_on_meta(config: TrainConfig, model_config: ModelConfig) -> nn.Module:
    """Build a run's model on the meta device, and freeze the parameters that config freezes."""
    model = build_on_meta(model_config, vars(config))
    optimizers.freeze(model, config.freeze)
    return model


def training_memory(config: TrainConfig, model: nn.Module, processes: int = 1) -> Memory:
    """Compute what each process holds. model: from model_on_meta()."""
    weights = FLOAT * count_parameters(model)
    gradients = FLOAT * sum(p.numel() for p in trained_parameters(model).values())
    trained = optimizers.make_optimizer(config, model)
    optimizer = 0  # unknown: a class from elsewhere makes its state in the first step
    if isinstance(trained, optimizers.Optimizer):
        with WithoutValues():
            trained.make_state()
        optimizer = sum(x.nbytes for state in trained.state.values() for x in state.values())
    shape = model.config
    tokens = config.rows(processes) * shape.block_size
    logits = 2 * FLOAT * tokens * shape.n_members * shape.vocab_size
    shards = processes if config.parallel == "fsdp" else 1
    return Memory(weights / shards, gradients / shards, optimizer / shards, logits)


@contextmanager
def limited_memory(run: Run) -> Iterator[None]:
    """Let the block, on a CPU, allocate no more than this process's share of the free memory.

    An allocation then fails, which is one line with advice; otherwise the kernel would kill the process. Linux counts a
    process's private writable memory for this limit.
    """
    if run.device.type != "cpu" or sys.platform != "linux":
        yield
        return
    import resource

    before = soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", run.ranks.size))
    used = re.search(r"^VmData:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    limit = 1024 * int(used[1]) + available_memory() // processes
    unlimited = resource.RLIM_INFINITY
    limit = min([limit, *(x for x in (soft, hard) if x != unlimited)])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def check_training_fits(
    config: TrainConfig,
    model_config: ModelConfig,
    device: torch.device,
    processes: int = 1,
) -> None:
    """Raise UserError if a run needs more memory than is free for its weights, gradients, optimizer and logits."""
    model = model_on_meta(config, model_config)
    training = (
        f"training {count_parameters(model):,} parameters with batch_size={config.batch_size} and"
        f" block_size={model_config.block_size} takes at least"
    )
    least = training_memory(config, model, processes).least
    check_fits(training, least, free_memory(device), ADVICE)


def dry_run(config: TrainConfig, model_config: ModelConfig) -> str:
    """Describe the parameters, FLOPs and memory of a run, without reading the data or allocating a model."""
    if model_config.vocab_size is None:
        meta = read_meta(Path("data") / config.dataset)
        vocab_size = from_state(meta["tokenizer"]).vocab_size
        model_config = replace(model_config, vocab_size=vocab_size)
    device = pick_device(config.device)
    config = choose_dtype(config, device)
    _, processes = launched()
    model = model_on_meta(config, model_config)
    memory = training_memory(config, model, processes)
    micro_batches = config.gradient_accumulation_steps
    tokens = micro_batches * config.batch_size * model_config.block_size
    flops = flops_per_token(model)
    free = free_memory(device)
    fits = "activations come on top" if memory.least <= free else f"it does not fit; {ADVICE}"
    entries = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in memory._asdict().items() if size)
    each = ""
    if processes > 1:
        each = f" per process ({processes} processes, {config.parallel.upper()})"
    return (
        f"model: {model_config.model}, {count_parameters(model):,} parameters, {flops:,} FLOPs per token\n"
        f"step: {tokens:,} tokens, {micro_batches} x {config.batch_size} x {model_config.block_size},"
        f" {flops * tokens:.3g} FLOPs\n"
        f"memory{each}, in GB: {entries}; at least {memory.least / 1e9:.3g},"
        f" {free / 1e9:.3g} free on {device}: {fits}"
    )
