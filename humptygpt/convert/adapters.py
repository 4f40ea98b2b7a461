"""LoRA's matrices alone, in PEFT's format: a small file beside the base model. Written, and merged into that model."""

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from humptygpt.config import UserError
from humptygpt.convert.families import FAMILIES
from humptygpt.convert.huggingface import find_family, write_files
from humptygpt.convert.weight_files import Weights, check_tensor, open_weights, reading
from humptygpt.finetune.lora import adapted
from humptygpt.schema import parse_json
from humptygpt.tasks import build_on_meta
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
# what PEFT has beside plain LoRA, where it is set
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
# other ways to start A and B change the base model
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def layer_names(
    config: ModelConfig, layers: Iterable[str]
) -> Iterator[tuple[str, list[str]]]:
    """Yield (name in the adapter, our names) of each layer: the names of transformers where it has such a model."""
    try:
        table = FAMILIES[find_family(config)].weights
    except UserError:
        table = {name: [name] for name in sorted({unnumbered(layer) for layer in layers})}
    for theirs, ours in table.items():
        for i in range(config.n_layer if "#" in theirs else 1):
            yield theirs.replace("#", str(i)), [name.replace("#", str(i)) for name in ours]


def unnumbered(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".#", name)


# --------------------------------------------------------------------------------------
# Writing


def write_adapter(model: nn.Module, training, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json, A and B alone, each whole or not at all.

    training: a TrainConfig. A GPT-2 or Llama has the names of transformers, so that PEFT opens it beside the base
    model; GPT-2's c_attn, which is ours of queries, keys and values in one, has the rank of all of them. Other models
    have our names. Raises UserError.
    """
    layers = adapted(model)
    weights = {}
    targets = set()
    ranks = {}
    alphas = {}
    for theirs, ours in layer_names(model.config, layers):
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
        targets.add(unnumbered(theirs).split(".#.")[-1])
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
        "fan_in_fan_out": any(".c_" in name for name in targets),  # GPT-2's own matrices
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    weights = {name: x.detach().float().cpu() for name, x in weights.items()}
    write_files(folder, {CONFIG: content, WEIGHTS[0]: weights})


# --------------------------------------------------------------------------------------
# Reading


def read_config(folder: Path) -> dict:
    """Read adapter_config.json. Raises UserError where it is damaged, or more than plain LoRA."""
    with reading(f"the adapter in {folder}"):
        config = parse_json((folder / CONFIG).read_bytes(), SCHEMA)
        for key in VARIANTS:
            if config.get(key):
                raise ValueError(f"{key}={config[key]} is not supported; plain LoRA is")
        if (start := config.get("init_lora_weights")) not in STARTS:
            raise ValueError(
                f"init_lora_weights={start} changes the base model; convert the adapter to plain LoRA"
            )
        return config


def merge_adapter(folder: Path, config: ModelConfig, weights: Weights) -> Weights:
    """Return the state dict of the adapter's base model with W + scale * B A for each W that it changes.

    config, weights: of the base model. Raises UserError.
    """
    adapter = read_config(folder)
    with reading(f"the adapter in {folder}"):
        return weights | changed_weights(
            open_weights(folder, WEIGHTS), adapter, config, weights
        )


def changed_weights(
    stored: Weights, adapter: dict, config: ModelConfig, weights: Weights
) -> Weights:
    """Return W + scale * B A by our names; stored: the adapter's tensors."""
    modules = build_on_meta(config).named_modules()
    layers = [name for name, module in modules if isinstance(module, nn.Linear)]
    changed = {}
    for theirs, ours in layer_names(config, layers):
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
            f"the weight {min(stored)} is unknown, or the other of its pair is missing"
        )
    if not changed:
        raise ValueError("it has no weights")
    return changed


def alpha(layer: str, adapter: dict) -> float:
    """Return lora_alpha of a layer. PEFT's keys of alpha_pattern are regular expressions; here, the ends of names."""
    for pattern, value in (adapter.get("alpha_pattern") or {}).items():
        if not re.fullmatch(r"\^?[\w.]+", pattern):
            raise ValueError(
                f"alpha_pattern has the regular expression {pattern!r}; names of layers are supported"
            )
        if layer == pattern.removeprefix("^") or layer.endswith(f".{pattern}"):
            return value
    return adapter["lora_alpha"]
