"""The memory that a run needs.

Everything is computed from the run's model on the meta device, before any tensor is allocated. Tracing a forward pass
would be exact, but torch's tracing takes a second and 70 MB to load, and every run starts with this estimate.
"""

from dataclasses import replace
from itertools import dropwhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from humptygpt.data.dataset import read_meta
from humptygpt.device import DTYPES, free_memory, pick_device
from humptygpt.machine import check_fits, launched
from humptygpt.model import Block, ModelConfig, count_parameters, flops_per_token
from humptygpt.models.build import WithoutValues, build_on_meta
from humptygpt.tokenizers.saved import from_state
from humptygpt.training import optimizers
from humptygpt.training.optimizers import trained_parameters
from humptygpt.training.settings import TrainConfig, choose_dtype

FLOAT = 4  # bytes in a float32, the dtype of weights, gradients and optimizer state for any --dtype
ADVICE = (
    "use a smaller --batch_size with more --gradient_accumulation_steps, --checkpoint_activations=True, or a smaller"
    " model (--n_embd, --n_layer)"
)


class Memory(NamedTuple):
    """Bytes that one process needs."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float = 0  # FSDP: unsharded parameters and gradients held at once

    @property
    def total(self) -> float:
        return sum(self)

    @property
    def least(self) -> float:
        """Lower bound, so that no run that would fit is refused.

        A compiled model keeps fewer activations, and they are freed while the gradients are computed.
        """
        return self.weights + self.optimizer + max(self.gradients, self.activations / 3)


def model_on_meta(config: TrainConfig, model_config: ModelConfig) -> nn.Module:
    """Build a run's model on the meta device, and freeze the parameters that config freezes."""
    model = build_on_meta(model_config, vars(config))
    optimizers.freeze(model, config.freeze)
    return model


def training_memory(config: TrainConfig, model: nn.Module, processes: int = 1) -> Memory:
    """Estimate the memory that each process needs. model: from model_on_meta()."""
    weights = FLOAT * count_parameters(model)
    gradients = FLOAT * sum(p.numel() for p in trained_parameters(model).values())
    trained = optimizers.make_optimizer(config, model)
    # a guess: a class from elsewhere makes its state in the first step
    optimizer = 2 * gradients
    if isinstance(trained, optimizers.Optimizer):
        with WithoutValues():
            trained.make_state()
        optimizer = sum(
            x.nbytes for state in trained.state.values() for x in state.values()
        )
    activations = activation_bytes(config, model, processes)
    if processes == 1 or config.parallel == "ddp":
        return Memory(weights, gradients, optimizer, activations)
    # a process that accumulates several micro-batches holds unsharded gradients
    if config.gradient_accumulation_steps <= processes:
        gradients /= processes
    # gathered at once: the parameters outside the blocks, such as the embedding, and two blocks with their gradients
    blocks = [
        FLOAT * count_parameters(module)
        for module in model.modules()
        if isinstance(module, Block)
    ]
    buffers = weights - sum(blocks) + 4 * max(blocks, default=0)
    return Memory(
        weights / processes, gradients, optimizer / processes, activations, buffers
    )


def activation_bytes(config: TrainConfig, model: nn.Module, processes: int) -> float:
    """Estimate the bytes that an uncompiled model keeps for its backward pass.

    Of each token, a block keeps some eight float32 vectors of width C, among them the residual stream and its norms,
    eight in the dtype of matrix products, around attention, and in that dtype its hidden neurons twice, before and
    after their activation, or four times with a gate. Frozen matrices do without their inputs. The head has float32
    logits, the logarithms of their probabilities and their gradient. RECORDS.md has measured peaks beside this.
    """
    shape = model.config
    C = shape.n_embd
    size = DTYPES[config.dtype].itemsize
    hidden = shape.n_hidden or (8 * C / 3 if shape.mlp == "gated" else 4 * C)
    tensors = {"none": 0, "gated": 4}.get(shape.mlp, 2)
    block = FLOAT * 8 * C + size * (8 * C + tensors * hidden)
    if config.lora_rank:
        block *= 0.7
    # frozen layers before the first trained one keep nothing
    parts = (x for x in model.modules() if isinstance(x, nn.Embedding | Block))
    kept = dropwhile(lambda part: not trained_parameters(part), parts)
    blocks = sum(isinstance(part, Block) for part in kept)
    layers = blocks * block
    if config.checkpoint_activations and blocks:  # one block at a time is recomputed
        layers = block + blocks * FLOAT * C
    head = shape.n_members * 3 * FLOAT * shape.vocab_size
    return config.rows(processes) * shape.block_size * (layers + head)


def check_training_fits(
    config: TrainConfig,
    model_config: ModelConfig,
    device: torch.device,
    processes: int = 1,
) -> None:
    """Raise UserError if a run needs more memory than is free."""
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
    fits = "it fits" if memory.total <= free else f"it does not fit; {ADVICE}"
    entries = ", ".join(
        f"{name} {size / 1e9:.3g}" for name, size in memory._asdict().items() if size
    )
    each = ""
    if processes > 1:
        each = f" per process ({processes} processes, {config.parallel.upper()})"
    return (
        f"model: {model_config.model}, {count_parameters(model):,} parameters, {flops:,} FLOPs per token\n"
        f"step: {tokens:,} tokens, {micro_batches} x {config.batch_size} x {model_config.block_size},"
        f" {flops * tokens:.3g} FLOPs\n"
        f"memory{each}, in GB: {entries}; {memory.total / 1e9:.3g} in all,"
        f" {free / 1e9:.3g} free on {device}: {fits}"
    )
