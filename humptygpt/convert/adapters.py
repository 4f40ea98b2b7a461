"""LoRA adapters in PEFT's format: write the trained matrices to files, and merge such files into a base model."""

import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from humptygpt.config import UserError
from humptygpt.convert.families import FAMILIES
from humptygpt.convert.huggingface import find_family, layer_names, write_files
from humptygpt.convert.weight_files import Weights, check_tensor, open_weights, reading
from humptygpt.finetune.lora import adapted
from humptygpt.schema import parse_json
from model import ModelConfig

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
SCHEMA = {
    "peft_type": {"LORA"},
    "base_model_name_or_path": str,
    "lora_alpha": float,
    "use_rslora?": (bool, None),
    "alpha_pattern?": ({str: float}, None),
}
# PEFT settings that make an adapter more than plain LoRA
VARIANTS = [
    "use_dora",
    "use_qalora",
    "lora_bias",
    "modules_to_save",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "kasa_config",
    "use_bdlora",
]
# values of init_lora_weights that leave the base model unchanged; the others modify its weights
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def adapter_names(
    config: ModelConfig, layers: Iterable[str]
) -> list[tuple[str, list[str]]]:
    """Pair each layer name in the adapter with the names of our layers.

    An adapter has transformers' names if transformers supports the architecture, and ours otherwise.
    """
    try:
        family = FAMILIES[find_family(config)]
    except UserError:
        return [(layer, [layer]) for layer in layers]
    return layer_names(family, config)


# --------------------------------------------------------------------------------------
# Writing


def write_adapter(model: nn.Module, training, folder: Path) -> None:
    """Write adapter_model.safetensors, which holds A and B, and adapter_config.json. Raises UserError.

    training: a TrainConfig. An adapter for GPT-2 or Llama uses the layer names of transformers, so that PEFT can load
    it with the base model. GPT-2's c_attn combines our q_proj, k_proj and v_proj in one matrix, and its rank is the sum
    of their ranks.
    """
    layers = adapted(model)
    weights = {}
    targets = set()
    ranks = {}
    alphas = {}
    for theirs, ours in adapter_names(model.config, layers):
        present = [name for name in ours if name in layers]
        if not present:
            continue
        A = torch.cat([layers[name].lora_A.weight for name in present])
        B = [
            layers[name].lora_B.weight
            if name in layers
            else A.new_zeros(model.get_submodule(name).out_features, 0)
            for name in ours
        ]
        weights[f"{PREFIX}{theirs}.lora_A.weight"] = A
        weights[f"{PREFIX}{theirs}.lora_B.weight"] = torch.block_diag(*B)
        targets.add(re.split(r"\.\d+\.", theirs)[-1])
        if len(present) > 1:
            kind = theirs.rpartition(".")[2]
            ranks[kind] = training.lora_rank * len(present)
            alphas[kind] = training.lora_alpha * len(present)
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": training.init_from,
        "r": training.lora_rank,
        "lora_alpha": training.lora_alpha,
        "target_modules": sorted(targets),
        "fan_in_fan_out": any(
            ".c_" in name for name in targets
        ),  # matrices in transformers' GPT-2 are (inputs, outputs)
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    weights = {name: x.detach().float().cpu() for name, x in weights.items()}
    write_files(folder, {CONFIG: content, WEIGHTS[0]: weights})


# --------------------------------------------------------------------------------------
# Reading


def read_config(folder: Path) -> dict:
    """Read adapter_config.json. Raises UserError if it is damaged or describes more than plain LoRA."""
    with reading(f"the adapter in {folder}"):
        config = parse_json((folder / CONFIG).read_bytes(), SCHEMA)
        for key in VARIANTS:
            if config.get(key):
                raise ValueError(
                    f"{key}={config[key]} is not supported; only plain LoRA is"
                )
        if (start := config.get("init_lora_weights")) not in STARTS:
            raise ValueError(
                f"init_lora_weights={start} changes the base model; convert the adapter to plain LoRA"
            )
        return config


def merge_adapter(folder: Path, config: ModelConfig, weights: Weights) -> Weights:
    """Merge an adapter into its base model. Raises UserError.

    config, weights: the config and state dict of the base model. Returns the merged state dict.
    """
    adapter = read_config(folder)
    with reading(f"the adapter in {folder}"):
        return weights | changed_weights(
            open_weights(folder, WEIGHTS), adapter, config, weights
        )


def changed_weights(
    stored: Weights, adapter: dict, config: ModelConfig, weights: Weights
) -> Weights:
    """Compute W + scale * B A for each W that the adapter changes, under our names. stored: the adapter's tensors."""
    layers = [name.removesuffix(".weight") for name, W in weights.items() if W.dim() == 2]
    changed = {}
    for theirs, ours in adapter_names(config, layers):
        names = [f"{PREFIX}{theirs}.lora_{part}.weight" for part in "AB"]
        if not stored.keys() >= set(names):
            continue
        if config.tie_weights and theirs == "lm_head":
            raise ValueError("it changes lm_head, which is tied to the embedding")
        A, B = (stored.pop(name) for name in names)
        own = [weights[f"{name}.weight"] for name in ours]
        sizes = [len(W) for W in own]
        rank = max(1, len(A)) if A.dim() else 1
        check_tensor(names[0], A, (rank, own[0].shape[1]))
        check_tensor(names[1], B, (sum(sizes), rank))
        scale = alpha(theirs, adapter) / (
            math.sqrt(rank) if adapter.get("use_rslora") else rank
        )
        updates = (scale * (B.float() @ A.float())).split(sizes)
        for name, W, update in zip(ours, own, updates, strict=True):
            changed[f"{name}.weight"] = W + update
    if stored:
        raise ValueError(
            f"the weight {min(stored)} is unknown, or its counterpart (lora_A or lora_B) is missing"
        )
    if not changed:
        raise ValueError("it has no weights")
    return changed


def alpha(layer: str, adapter: dict) -> float:
    """Look up the lora_alpha of a layer. PEFT allows any regex in alpha_pattern; here only names and suffixes work."""
    for pattern, value in (adapter.get("alpha_pattern") or {}).items():
        if not re.fullmatch(r"\^?[\w.]+", pattern):
            raise ValueError(
                f"alpha_pattern has the regular expression {pattern!r}; only layer names are supported"
            )
        if layer == pattern.removeprefix("^") or layer.endswith(f".{pattern}"):
            return value
    return adapter["lora_alpha"]
