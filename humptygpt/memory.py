"""Estimate the memory that training takes: --dry_run=True reports it, and a run that cannot fit is refused.

Everything is computed from the run's model on the meta device, before any tensor is allocated. Tracing a forward pass
would be exact, but torch's tracing takes a second and 70 MB to load, and every run starts with this estimate.
"""

from itertools import dropwhile
from typing import NamedTuple

import torch
from torch import nn

import model as models
from humptygpt.device import free_memory
from humptygpt.machine import check_fits
from humptygpt.optimizers import freeze, make_optimizer, trained_parameters
from humptygpt.tasks import build_on_meta
from model import ModelConfig

ADVICE = (
    "use a smaller --batch_size with more --gradient_accumulation_steps, --checkpoint_activations=True, or a smaller"
    " model (--n_embd, --n_layer)"
)
FLOAT = 4  # bytes in a float32, the dtype of weights, gradients and optimizer state for any --dtype


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


def model_on_meta(config, model_config: ModelConfig) -> nn.Module:
    """Build a run's model on the meta device, and freeze the parameters that config freezes. config: a TrainConfig."""
    model = build_on_meta(model_config, vars(config))
    freeze(model, config.freeze)
    return model


def training_memory(
    config, model: nn.Module, device: torch.device, dtype: torch.dtype, processes: int = 1
) -> Memory:
    """Estimate the memory that each process needs. config: a TrainConfig. model: from model_on_meta()."""
    weights = FLOAT * models.count_parameters(model)
    gradients = FLOAT * sum(p.numel() for p in trained_parameters(model).values())
    states = make_optimizer(config, model).state_like().values()
    optimizer = sum(x.nbytes for state in states for x in state.values())
    activations = activation_bytes(config, model, device, dtype, processes)
    if processes == 1 or config.parallel == "ddp":
        return Memory(weights, gradients, optimizer, activations)
    # a process that accumulates several micro-batches holds unsharded gradients
    if config.gradient_accumulation_steps <= processes:
        gradients /= processes
    # gathered at once: the parameters outside the blocks, such as the embedding, and two blocks with their gradients
    modules = [module for module in model.modules() if isinstance(module, models.Block)]
    blocks = [FLOAT * models.count_parameters(block) for block in modules]
    buffers = weights - sum(blocks) + 4 * max(blocks, default=0)
    return Memory(
        weights / processes, gradients, optimizer / processes, activations, buffers
    )


def activation_bytes(
    config, model: nn.Module, device: torch.device, dtype: torch.dtype, processes: int
) -> float:
    """Estimate the bytes that an uncompiled model keeps for its backward pass, including the logits' gradient."""
    shape = model.config
    tokens = config.rows(processes) * shape.block_size
    layers = (module for module in model.modules() if not list(module.children()))
    # frozen layers before the first trained one need no activations for the backward pass
    layers = dropwhile(lambda layer: not trained_parameters(layer), layers)
    heads = [module.lm_head for module in model.modules() if hasattr(module, "lm_head")]
    kept = sum(kept_of(layer, dtype) for layer in layers if layer not in heads)
    scores = tokens * shape.n_head * shape.block_size  # attention scores per layer
    short = device.type == "cpu" and scores <= models.EXPLICIT_SCORES
    for module in model.modules():  # attend() in model.py keeps the attention scores
        if isinstance(module, models.SelfAttention) and (short or not module.fuses):
            kept += dtype.itemsize * scores / tokens
    blocks = sum(isinstance(module, models.Block) for module in model.modules())
    if config.checkpoint_activations and blocks:  # one block at a time is recomputed
        kept = kept / blocks + blocks * FLOAT * shape.n_embd
    return tokens * (kept + len(heads) * 2 * FLOAT * shape.vocab_size)


def kept_of(layer: nn.Module, dtype: torch.dtype) -> int:
    """Bytes per token that a layer keeps for the backward pass."""
    if isinstance(layer, nn.Linear):
        # its output, needed by the next operation, and its input, needed for the gradient of its weight
        inputs = layer.in_features if layer.weight.requires_grad else 0
        return dtype.itemsize * (inputs + layer.out_features)
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return FLOAT * layer.normalized_shape[0]
    if isinstance(layer, models.CausalConv):
        return FLOAT * layer.weight.shape[1]  # its input
    return 0


def memory_report(
    config,
    model_config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    processes: int,
) -> str:
    """Describe the parameters, FLOPs and memory of a run. config: a TrainConfig."""
    model = model_on_meta(config, model_config)
    memory = training_memory(config, model, device, dtype, processes)
    micro_batches = config.gradient_accumulation_steps
    tokens = micro_batches * config.batch_size * model_config.block_size
    flops = models.flops_per_token(model)
    free = free_memory(device)
    fits = "it fits" if memory.total <= free else f"it does not fit; {ADVICE}"
    entries = ", ".join(
        f"{name} {size / 1e9:.3g}" for name, size in memory._asdict().items() if size
    )
    each = ""
    if processes > 1:
        each = f" per process ({processes} processes, {config.parallel.upper()})"
    return (
        f"model: {model_config.model}, {models.count_parameters(model):,} parameters, {flops:,} FLOPs per token\n"
        f"step: {tokens:,} tokens, {micro_batches} x {config.batch_size} x {model_config.block_size},"
        f" {flops * tokens:.3g} FLOPs\n"
        f"memory{each}, in GB: {entries}; {memory.total / 1e9:.3g} in all,"
        f" {free / 1e9:.3g} free on {device}: {fits}"
    )


def check_training_fits(
    config,
    model_config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    processes: int = 1,
) -> None:
    """Raise UserError if a run needs more memory than is free. config: a TrainConfig."""
    model = model_on_meta(config, model_config)
    training = (
        f"training {models.count_parameters(model):,} parameters with batch_size={config.batch_size} and"
        f" block_size={model_config.block_size} takes at least"
    )
    least = training_memory(config, model, device, dtype, processes).least
    check_fits(training, least, free_memory(device), ADVICE)
