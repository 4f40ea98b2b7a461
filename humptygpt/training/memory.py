"""What will not fit into memory, before it is tried: lower bounds, so that nothing that would run is refused."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

import model as models
from humptygpt.checkpoint import checkpoint
from humptygpt.core.device import free_memory
from humptygpt.core.errors import UserError
from humptygpt.core.limits import gigabytes
from humptygpt.training.optimizers import group_parameters, state_bytes
from model import ModelConfig

TABLES = (
    "rotary",
    "sinusoidal",
    "alibi",
)  # positions without weights, but with tables that may be large, too
MOST = 3  # times what training_size() finds is what a training takes


class Size(NamedTuple):
    parameters: float
    bytes: float


def training_size(
    config,
    model_config: ModelConfig,
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    parts: int = 1,
) -> Size:
    """Of a training, by its configs; rows: sequences that the process has at once; parts: of a sharded model.

    sizes.memory() is exact, but needs torch's compiler, which takes a second and 70 MB. This is less than that, and all
    of it linear in the number of layers, so two small models on the meta device give that of any depth.
    """
    try:
        few = (replace(model_config, n_layer=n) for n in (1, 2))
        one, two = (
            size_of_layers(config, layers, rows, device, dtype, parts=parts) for layers in few
        )
    except RuntimeError:  # a matrix has more elements than an int64 can count
        return Size(float("inf"), float("inf"))
    return Size(*(a + (model_config.n_layer - 1) * (b - a) for a, b in zip(one, two, strict=True)))


def size_of_layers(
    config,
    model_config: ModelConfig,
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    parts: int = 1,
) -> Size:
    if model_config.position in TABLES:
        model_config = replace(model_config, position="none")
    model = checkpoint.build_on_meta(model_config)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    averages = models.count_parameters(model) * 4 if config.ema_decay else 0
    gradients = sum(
        p.nbytes
        for group, members in group_parameters(model).items()
        for p in members.values()
        if group != "sparse"  # whose gradient is as large as the batch
    )
    gradients /= parts
    activations = (
        0 if config.checkpoint_activations else activation_bytes(model, rows, device, dtype)
    )
    if config.gradient_accumulation_steps > 1:
        gradients += activations
    else:  # activations are freed while the gradients are computed
        gradients = max(gradients, activations)
    kept = (weights + averages + state_bytes(config.optimizer, model)) / parts
    return Size(models.count_parameters(model), kept + gradients)


def activation_bytes(
    model: nn.Module, rows: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Some of what the backward pass needs: of linear layers inputs or outputs, scores where attention keeps them."""
    config, on_cpu = model.config, device.type == "cpu"
    tokens, scores = rows * config.block_size, rows * config.n_head * config.block_size**2
    one = (
        config.activation == "relu" or not on_cpu
    )  # of an activation only one side is kept; a compiler sees to that
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    kept = sum(
        m.in_features if getattr(m, "ends_branch", False) else m.out_features
        for name, m in layers.items()
        if not (one and name.endswith("up_proj"))
    )
    each = kept * dtype.itemsize + 4 * config.vocab_size  # the gradient of the logits
    if model.has_encoder:  # a token is in the source or in the target, and sentences are short
        return tokens / 2 * each
    copies = 0  # as in models.prefers_explicit()
    if on_cpu and (config.dropout or (dtype != torch.float32 and scores <= models.EXPLICIT_SCORES)):
        copies = 2 if config.dropout else 1
    attentions = sum(isinstance(m, models.Attention) for m in model.modules())
    return tokens * each + copies * attentions * scores * dtype.itemsize


def check_training_fits(
    config,
    model_config: ModelConfig,
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    processes: int = 1,
) -> None:
    """Raises UserError with the size, what there is, and a setting that would fit. config: a TrainConfig."""
    parts = processes if config.parallel == "fsdp" else 1
    parameters, size = training_size(config, model_config, rows, device, dtype, parts=parts)
    free = free_memory(device)
    if size <= free:
        return
    model = f"{parameters:,.0f} parameters" if parameters < 1e30 else "a model of that size"
    fits = what_fits(config, model_config, rows, device, dtype, parts=parts)
    raise UserError(
        f"training {model} with batch_size={config.batch_size} and block_size={model_config.block_size} takes"
        f" {gigabytes(size)} of memory or more{' in each process' if processes > 1 else ''},"
        f" and {gigabytes(free)} are free{on(device)}; {fits or 'make the model smaller, and the batches'}"
    )


def what_fits(
    config,
    model_config: ModelConfig,
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    parts: int,
) -> str | None:
    """The first key that need only be made smaller, and how small."""
    free = free_memory(device) / MOST
    for key in ("batch_size", "n_layer", "n_embd", "block_size", "n_hidden"):
        owner = config if hasattr(config, key) else model_config
        step = 2 * model_config.n_head if key == "n_embd" else 1
        value = getattr(owner, key)
        while value and (value := value // 2 // step * step):
            smaller = model_config if owner is config else replace(model_config, **{key: value})
            fewer = math.ceil(rows * value / config.batch_size) if owner is config else rows
            if training_size(config, smaller, fewer, device, dtype, parts=parts).bytes <= free:
                return f"--{key}={value} would fit"
    return None


def check_weights_fit(model: nn.Module, name: object, device: torch.device, *, bits: int) -> None:
    """Before the weights of a checkpoint are converted, or moved to a GPU; bits: of each afterwards."""
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    size, free = weights * bits / 8, free_memory(device)
    if size <= free:
        return
    way_out = (
        "--quantize=int8 takes a quarter"
        if device.type == "cpu" and bits == 32
        else "free some memory"
    )
    raise UserError(
        f"{name} takes {gigabytes(size)} of memory, and {gigabytes(free)} are free{on(device)}; {way_out}"
    )


def on(device: torch.device) -> str:
    return f" on {device}" if device.type == "cuda" else ""
