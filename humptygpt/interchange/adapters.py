"""LoRA's matrices alone, in PEFT's format: a small file beside the base model. Written, and merged into that model."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from humptygpt.checkpoint.checkpoint import build_on_meta
from humptygpt.core.errors import UserError
from humptygpt.core.files import cannot_write, write_whole
from humptygpt.core.schema import parse_json
from humptygpt.interchange.families import FAMILIES
from humptygpt.interchange.huggingface import find_family
from humptygpt.interchange.weight_files import DTYPES, Stored, open_pickle, open_safetensors
from humptygpt.nn.lora import MARK, OFF, adapted
from model import ModelConfig

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
WEIGHTS = {"adapter_model.safetensors": open_safetensors, "adapter_model.bin": open_pickle}
SCHEMA = {
    "peft_type": {"LORA"},
    "base_model_name_or_path": str,
    "lora_alpha": float,
    "use_rslora?": (bool, None),
}
SCHEMA |= {"alpha_pattern?": ({str: float}, None)}
# what PEFT has beside plain LoRA, where it is set; other ways to start A and B change the base model
VARIANTS = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "modules_to_save",
    "alora_invocation_tokens",
    "layer_replication",
)
VARIANTS += ("target_parameters", "trainable_token_indices", "kasa_config", "use_bdlora")
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def write_adapter(model: nn.Module, base: str, folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json: A and B alone, each whole or not at all. Raises UserError.

    base: what init_from named. A GPT-2 or Llama has the names of transformers, so that PEFT opens it beside the base
    model; GPT-2's c_attn, which is ours of queries, keys and values in one, has the rank of all of them. Other models
    have our names.
    """
    config = model.config
    weights, patterns = rename(model)
    conv1d = config.position == "learned" and any(
        "c_attn" in name or ".c_" in name for name in weights
    )
    targets = sorted(
        {
            name.removeprefix(PREFIX).rpartition(MARK)[0].split(".#.")[-1]
            for name in map(unnumbered, weights)
        }
    )
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none",
    }
    content |= {
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    content |= {"target_modules": targets, "fan_in_fan_out": conv1d, "rank_pattern": patterns[0]}
    content |= {"alpha_pattern": patterns[1]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    data, text = safetensors.torch.save(weights, {"format": "pt"}), json.dumps(content, indent=2)
    write_whole(folder / "adapter_model.safetensors", lambda file: file.write(data))
    write_whole(folder / CONFIG, lambda file: file.write(f"{text}\n".encode()))


def unnumbered(name: str) -> str:
    return ".".join("#" if part.isdecimal() else part for part in name.split("."))


def layer_names(config: ModelConfig, layers: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """(name in the adapter, our names) of each of these layers; the names of transformers where it has such a model."""
    try:
        table = [
            (theirs, ours)
            for theirs, ours, _ in FAMILIES[find_family(replace(config, **OFF))].weights
        ]
    except UserError:
        table = [(name, [name]) for name in sorted(set(map(unnumbered, layers)))]
    for theirs, ours in table:
        for i in range(config.n_layer if "#" in theirs else 1):
            yield theirs.replace("#", str(i)), [name.replace("#", str(i)) for name in ours]


def rename(model: nn.Module) -> tuple[dict[str, Tensor], tuple[dict, dict]]:
    """({PEFT's name: A or B}, (ranks, alphas) of the layers where they are not those of the config)."""
    layers, config = adapted(model), model.config
    weights, ranks, alphas = {}, {}, {}
    for theirs, ours in layer_names(config, layers):
        parts = [layers.get(name) for name in ours]
        found = [part for part in parts if part]
        if not found:
            continue
        name = PREFIX + theirs
        weights[f"{name}.lora_A.weight"] = torch.cat(
            [part.lora_A.weight.detach().float() for part in found]
        )
        sizes = [model.get_submodule(name).out_features for name in ours]
        blocks = torch.zeros(sum(sizes), config.lora_rank * len(found))
        row = column = 0
        for part, size in zip(parts, sizes, strict=True):
            if part:
                blocks[row : row + size, column : column + config.lora_rank] = (
                    part.lora_B.weight.detach()
                )
                column += config.lora_rank
            row += size
        weights[f"{name}.lora_B.weight"] = blocks
        if len(found) > 1:
            kind = theirs.rpartition(".")[2]
            ranks[kind], alphas[kind] = (
                config.lora_rank * len(found),
                config.lora_alpha * len(found),
            )
    return {name: x.cpu().contiguous() for name, x in weights.items()}, (ranks, alphas)


# --------------------------------------------------------------------------------------
# Reading


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def base_of(folder: Path) -> str:
    """The path or name of the model that an adapter was trained beside. Raises UserError."""
    return read_settings(folder)["base_model_name_or_path"]


def read_settings(folder: Path) -> dict:
    """What adapter_config.json holds. Raises UserError where it is damaged, or more than plain LoRA."""
    try:
        settings = parse_json((folder / CONFIG).read_bytes(), SCHEMA)
        for key in VARIANTS:
            if settings.get(key):
                raise ValueError(f"{key}={settings[key]} is not supported; plain LoRA is")
        if (start := settings.get("init_lora_weights")) not in STARTS:
            raise ValueError(
                f"init_lora_weights={start} changes the base model; convert the adapter to plain LoRA"
            )
        return settings
    except (ValueError, OSError) as error:
        raise cannot_read(folder, error) from error


def cannot_read(folder: Path, error: Exception) -> UserError:
    reason = "".join(
        char if char.isprintable() else " " for char in str(error)[:500]
    )  # it may quote a file
    return UserError(f"cannot read the adapter in {folder}: {reason}")


def merge_adapter(
    folder: Path, config: ModelConfig, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The state dict of the adapter's base model with W + scale * B A for each W that it changes. Raises UserError."""
    settings = read_settings(folder)
    try:
        name = next((name for name in WEIGHTS if (folder / name).is_file()), None)
        if not name:
            raise ValueError(f"there is neither {' nor '.join(WEIGHTS)}")
        return weights | changed_weights(WEIGHTS[name](folder / name), settings, config, weights)
    except (ValueError, OSError) as error:
        raise cannot_read(folder, error) from error


def changed_weights(
    stored: dict[str, Stored], settings: dict, config: ModelConfig, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """By our names; stored: the adapter's tensors."""
    layers = [
        name
        for name, module in build_on_meta(config).named_modules()
        if isinstance(module, nn.Linear)
    ]
    changed = {}
    for theirs, ours in layer_names(config, layers):
        names = [f"{PREFIX}{theirs}.lora_{part}.weight" for part in "AB"]
        if not any(name in stored for name in names):
            continue
        if missing := [name for name in names if name not in stored]:
            raise ValueError(f"the weight {missing[0]} is missing")
        if config.tie_weights and theirs == "lm_head":
            raise ValueError("it changes lm_head, which is tied to the embedding")
        A, B = (stored.pop(name) for name in names)
        sizes, inputs = (
            [len(weights[f"{name}.weight"]) for name in ours],
            weights[f"{ours[0]}.weight"].shape[1],
        )
        rank = A.shape[0] if A.shape else 0
        if not rank or A.shape != (rank, inputs) or B.shape != (sum(sizes), rank):
            expected = f"(rank, {inputs}) and ({sum(sizes)}, rank)"
            raise ValueError(
                f"lora_A and lora_B of {theirs} must have shapes {expected}, but have {A.shape}, {B.shape}"
            )
        if not {A.dtype, B.dtype} <= set(DTYPES.values()):
            raise ValueError(f"lora_A and lora_B of {theirs} must be in {', '.join(DTYPES)}")
        scale = alpha(theirs, settings) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        parts = (scale * (B.read().float() @ A.read().float())).split(sizes)
        changed |= {
            f"{key}.weight": weights[f"{key}.weight"] + part
            for key, part in zip(ours, parts, strict=True)
        }
    if stored or not changed:
        raise ValueError(f"the weight {min(stored)} is unknown" if stored else "it has no weights")
    return changed


def alpha(layer: str, settings: dict) -> float:
    """lora_alpha of a layer. For PEFT, keys of alpha_pattern are regular expressions; here, the ends of names."""
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if not re.fullmatch(r"\^?[\w.]+", pattern):
            raise ValueError(
                f"alpha_pattern has the regular expression {pattern!r}; names of layers are supported"
            )
        if layer == pattern.removeprefix("^") or layer.endswith(f".{pattern}"):
            return value
    return settings["lora_alpha"]
