"""What will not fit into memory, before it is tried: lower bounds, so that nothing that would run is refused."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from humptygpt import checkpoint
from humptygpt.configurator import UserError
from humptygpt.limits import available_memory, gigabytes
from humptygpt.optimizers import STATE, group_parameters, update_rules
from model import MODELS, ModelConfig, activations_per_token, count_parameters

# Bytes for each activation that model.py counts. Measured on a CPU: 6.4 to 8, as there are more than it counts, and
# autocast keeps both the float32 and its bfloat16.
CPU_BYTES = 6


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


class Size(NamedTuple):
    parameters: float
    bytes: float


def training_size(config, model_config: ModelConfig, itemsize: int) -> Size:
    """Of a training, by its configs: parameters, gradients, optimizer state, average, and a micro-batch's activations.

    itemsize: bytes of an activation.
    All of it is linear in the number of layers, so two small models on the meta device give that of any depth.
    """
    try:
        one, two = (size_of_layers(config, replace(model_config, n_layer=n), itemsize) for n in (1, 2))
    except RuntimeError:  # a matrix has more elements than an int64 can count
        return Size(float("inf"), float("inf"))
    return Size(*(a + (model_config.n_layer - 1) * (b - a) for a, b in zip(one, two, strict=True)))


def size_of_layers(config, model_config: ModelConfig, itemsize: int) -> Size:
    model, rules = checkpoint.build_on_meta(model_config), update_rules(config.optimizer)
    copies = 2 if config.ema_decay else 1
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    for group, members in group_parameters(model).items():
        for p in members.values():
            size += (copies - 1) * p.nbytes + sum(like(p).nbytes for like in STATE[rules[group]].values())
            if group != "sparse":  # whose gradient is as large as the batch
                size += p.nbytes
    tokens = config.batch_size * model_config.block_size
    if MODELS[model_config.model].has_encoder:  # a token is in the source or in the target
        tokens /= 2
    if not config.checkpoint_activations:
        size += tokens * itemsize * activations_per_token(model)
    size += tokens * 8 * model_config.vocab_size
    return Size(count_parameters(model), size)


def check_training_fits(config, model_config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError with the size, what there is, and a setting that would fit. config: a TrainConfig."""
    itemsize = CPU_BYTES if device.type == "cpu" else dtype.itemsize
    parameters, size = training_size(config, model_config, itemsize)
    free = free_memory(device)
    if size <= free:
        return
    model = f"{parameters:,.0f} parameters" if parameters < 1e30 else "a model of that size"
    raise UserError(  # what is proposed has half of the memory, as the size is a lower bound
        f"training {model} with batch_size={config.batch_size} and block_size={model_config.block_size} takes"
        f" {gigabytes(size)} of memory or more, and {gigabytes(free)} are free{on(device)}; "
        + (what_fits(config, model_config, itemsize, free // 2) or "make the model smaller, and the batches")
    )


def what_fits(config, model_config: ModelConfig, itemsize: int, free: int) -> str | None:
    """The first key that need only be made smaller, and how small."""
    for key in ("batch_size", "n_layer", "n_embd", "block_size", "n_hidden"):
        owner = config if hasattr(config, key) else model_config
        step = 2 * model_config.n_head if key == "n_embd" else 1
        value = getattr(owner, key)
        while value and (value := value // 2 // step * step):
            smaller = replace(owner, **{key: value})
            configs = (smaller, model_config) if owner is config else (config, smaller)
            if training_size(*configs, itemsize).bytes <= free:
                return f"--{key}={value} would fit"
    return None


def check_weights_fit(model: nn.Module, name: object, device: torch.device, *, bits: int) -> None:
    """Before the weights of a checkpoint are converted, or moved to a GPU; bits: of each afterwards."""
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    size, free = weights * bits / 8, free_memory(device)
    if size <= free:
        return
    way_out = "--quantize=int8 takes a quarter" if device.type == "cpu" and bits == 32 else "free some memory"
    raise UserError(f"{name} takes {gigabytes(size)} of memory, and {gigabytes(free)} are free{on(device)}; {way_out}")


def on(device: torch.device) -> str:
    return f" on {device}" if device.type == "cuda" else ""
