"""How much memory a training takes: reported by --dry_run=True, and refused where it cannot fit.

All of it is computed before a tensor has any memory, from the model of the run itself on the meta device.
"""

import itertools
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import model as models
from humptygpt.device import autocast, free_memory
from humptygpt.machine import check_fits
from humptygpt.optimizers import (
    freeze,
    make_optimizer,
    trained_parameters,
)
from humptygpt.tasks import build, build_on_meta
from model import ModelConfig

ADVICE = (
    "take a smaller --batch_size with more --gradient_accumulation_steps, --checkpoint_activations=True, or a smaller"
    " model, as with --n_embd or --n_layer"
)
FLOAT = 4  # bytes of a weight, of a gradient, and of an element of the optimizer state


class Memory(NamedTuple):
    """Bytes of one process. Weights, gradients and states are float32 whatever dtype the products are computed in."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float = 0  # with FSDP: what a process has whole

    @property
    def total(self) -> float:
        return sum(self)


def without_memory(config, model_config: ModelConfig) -> nn.Module:
    """Build the model of a run on the meta device, its frozen parameters frozen. config: a TrainConfig."""
    model = build_on_meta(model_config, vars(config))
    freeze(model, config.freeze)
    return model


def training_memory(
    config, model: nn.Module, activations: float, processes: int = 1
) -> Memory:
    """Return the memory of one of several processes. config: a TrainConfig."""
    weights = FLOAT * models.count_parameters(model)
    gradients = FLOAT * sum(p.numel() for p in trained_parameters(model).values())
    states = make_optimizer(config, model).state_like().values()
    optimizer = sum(x.nbytes for state in states for x in state.values())
    if processes == 1 or config.parallel == "ddp":
        return Memory(weights, gradients, optimizer, activations)
    if config.gradient_accumulation_steps <= processes:  # else it sums whole gradients
        gradients /= processes
    # what is in no block, such as the embedding, two blocks, and the gradients of one twice: by parameters and by ranks
    modules = [module for module in model.modules() if isinstance(module, models.Block)]
    blocks = [FLOAT * models.count_parameters(block) for block in modules]
    buffers = weights - sum(blocks) + 4 * max(blocks, default=0)
    return Memory(
        weights / processes, gradients, optimizer / processes, activations, buffers
    )


def activation_bytes(
    config,
    model_config: ModelConfig,
    rows: int,
    dtype: torch.dtype,
    on_gpu: bool,
) -> float:
    """Return the bytes that the backward pass needs of the forward pass, uncompiled, and the gradient of the logits."""
    shape = (config.freeze, model_config, rows, dtype, on_gpu)
    kept = saved_bytes(*shape, checkpointed=False)
    if config.checkpoint_activations:  # one block at a time is recomputed
        inputs = saved_bytes(*shape, checkpointed=True)
        kept = inputs + (kept - inputs) / model_config.n_layer
    return kept + FLOAT * rows * model_config.block_size * model_config.vocab_size


def saved_bytes(
    frozen: str | None,
    config: ModelConfig,
    rows: int,
    dtype: torch.dtype,
    on_gpu: bool,
    checkpointed: bool,
) -> int:
    """Return the bytes of the tensors that autograd keeps in a forward pass, by tensors that have no memory."""
    T = config.block_size
    with FakeTensorMode():
        model = build(config)
        freeze(model, frozen)
        for module in model.modules():
            if isinstance(module, models.Stack):
                module.checkpoint_activations = checkpointed
        idx = torch.zeros(rows, T, dtype=torch.int64)
        batch = {"idx": idx, "targets": idx}
        if model.has_encoder:
            batch["source"] = idx
        saved = []
        keep = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
        )
        with keep, autocast(torch.device("cpu"), dtype):
            model(**batch)
    if on_gpu:  # its attention keeps no scores
        saved = [tensor for tensor in saved if tensor.shape[2:] != (T, T)]
    storages = {tensor.untyped_storage()._cdata: tensor for tensor in saved}
    for p in model.parameters():
        storages.pop(p.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def memory_report(
    config,
    model_config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    processes: int,
) -> str:
    """Return parameters, FLOPs and memory of a run as text."""
    model = without_memory(config, model_config)
    rows = config.rows(processes)
    on_gpu = device.type == "cuda"
    activations = activation_bytes(config, model_config, rows, dtype, on_gpu)
    memory = training_memory(config, model, activations, processes)
    micro_batches = config.gradient_accumulation_steps
    tokens = micro_batches * config.batch_size * model_config.block_size
    flops = models.flops_per_token(model)
    free = free_memory(device)
    fits = "it fits"
    if memory.total > free:
        fits = f"it does not fit; {ADVICE}"
    sizes = {name: size for name, size in memory._asdict().items() if size}
    entries = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in sizes.items())
    each = ""
    if processes > 1:
        each = f" of each of {processes} processes, {config.parallel.upper()}"
    return (
        f"model: {model_config.model}, {models.count_parameters(model):,} parameters, {flops:,} FLOPs per token\n"
        f"step: {tokens:,} tokens, {micro_batches} x {config.batch_size} x {model_config.block_size},"
        f" {flops * tokens:.3g} FLOPs\n"
        f"memory{each}, in GB: {entries}; {memory.total / 1e9:.3g} in all,"
        f" {free / 1e9:.3g} free on {device}: {fits}"
    )


# --------------------------------------------------------------------------------------
# Refused before it is tried, by lower bounds, so that nothing that would run is refused


def check_training_fits(
    config,
    model_config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    processes: int = 1,
) -> None:
    """Raise UserError with the size and what there is. config: a TrainConfig."""
    model = without_memory(config, model_config)
    least = least_memory(config, model, dtype, processes)
    training = (
        f"training {models.count_parameters(model):,} parameters with batch_size={config.batch_size} and"
        f" block_size={model_config.block_size} takes at least"
    )
    check_fits(training, least.total, free_memory(device), ADVICE)


def least_memory(config, model: nn.Module, dtype: torch.dtype, processes: int) -> Memory:
    """Return less than what a training takes: without buffers, and with the larger of gradients and activations alone.

    activation_bytes() is exact, but needs torch's compiler, which takes a second and 70 MB.
    """
    activations = 0
    if not config.checkpoint_activations:
        activations = least_activation_bytes(model, config.rows(processes), dtype)
    memory = training_memory(config, model, activations, processes)
    if activations > memory.gradients:  # they are freed while the gradients are computed
        return memory._replace(gradients=0, buffers=0)
    return memory._replace(activations=0, buffers=0)


def least_activation_bytes(model: nn.Module, rows: int, dtype: torch.dtype) -> float:
    """Return some of what the backward pass needs: a side of each linear layer, and the logits' gradient."""
    tokens = rows * model.config.block_size
    if model.has_encoder:  # a token is in the source or in the target
        tokens /= 2
    layers = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    # nothing is kept of frozen layers before the first that trains
    layers = itertools.dropwhile(lambda layer: not trained_parameters(layer), layers)
    features = sum(min(layer.in_features, layer.out_features) for layer in layers)
    return tokens * (features * dtype.itemsize + FLOAT * model.config.vocab_size)
