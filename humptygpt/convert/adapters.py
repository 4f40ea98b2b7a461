"""LoRA adapters in PEFT's format: export the trained matrices, and merge an adapter into its base model."""

import math
import os
import re
from pathlib import Path

import torch
from torch import nn

from humptygpt.checkpoint import check_tensors
from humptygpt.cli import UserError, refuse
from humptygpt.convert.families import find_family
from humptygpt.convert.huggingface import layer_names, open_weights, write_files
from humptygpt.files import parse_json
from humptygpt.finetune.lora import adapted
from humptygpt.settings import TrainConfig

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
SCHEMA = {
    "peft_type": {"LORA"},
    "base_model_name_or_path": str,
    "lora_alpha": float,
    "use_rslora?": (bool, None),
    "alpha_pattern?": ({str: float}, None),
    # other initializations, such as "pissa", are refused because they change the base model's weights
    "init_lora_weights?": (None, bool, {"gaussian", "eva", "orthogonal"}),
}


def adapter_names(model: nn.Module) -> list[tuple[str, list[str]]]:
    """List the layers that an adapter may change: the adapter's name for each, and the names of our matching layers.

    Adapters use transformers' names if transformers supports the architecture, and our names otherwise.
    """
    try:
        family = find_family(model.config)
    except UserError:
        modules = model.named_modules()
        return [(name, [name]) for name, layer in modules if isinstance(layer, nn.Linear)]
    return layer_names(family, model.config.n_layer)


# --------------------------------------------------------------------------------------
# Writing


@torch.no_grad()
def write_adapter(model: nn.Module, training: TrainConfig, folder: Path) -> None:
    """Write the LoRA matrices A and B to adapter_model.safetensors, and the settings to adapter_config.json.

    An adapter for GPT-2 or Llama uses transformers' layer names, so that PEFT can load it with the base model. GPT-2's
    c_attn combines our q_proj, k_proj and v_proj in one matrix, so its LoRA rank is the sum of their ranks.

    Raises UserError if the files cannot be written.
    """
    layers = adapted(model)
    weights, ranks, alphas = {}, {}, {}
    for theirs, ours in adapter_names(model):
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
        weights[f"{PREFIX}{theirs}.lora_A.weight"] = A.cpu()
        weights[f"{PREFIX}{theirs}.lora_B.weight"] = torch.block_diag(*B).cpu()
        kind = re.split(r"\.\d+\.", theirs)[-1]
        ranks[kind] = training.lora_rank * len(present)
        alphas[kind] = training.lora_alpha * len(present)
    base = training.init_from
    # a published adapter should not name the user's folders; on Windows, a model may be on another drive
    if Path(base).anchor == Path.cwd().anchor:
        base = os.path.relpath(base)
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": training.lora_rank,
        "lora_alpha": training.lora_alpha,
        "target_modules": sorted(ranks),
        # matrices in transformers' GPT-2 are (inputs, outputs)
        "fan_in_fan_out": any(".c_" in name for name in ranks),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    write_files(folder, {WEIGHTS[0]: weights, CONFIG: content})


# --------------------------------------------------------------------------------------
# Reading


def read_config(folder: Path) -> dict:
    """Read adapter_config.json. Raises UserError if it is damaged or does not describe LoRA."""
    with refuse(f"cannot read the adapter in {folder}: "):
        return parse_json((folder / CONFIG).read_bytes(), SCHEMA)


@torch.no_grad()
def merge_adapter(folder: Path, adapter: dict, model: nn.Module) -> None:
    """Replace each weight W that the adapter covers with W + scale * B A, in place.

    adapter: from read_config(). Raises UserError if the adapter is damaged, does not fit the model, or has other
    weights than A and B, as PEFT's variants of LoRA do.
    """
    with refuse(f"cannot read the adapter in {folder}: "):
        stored = open_weights(folder, WEIGHTS)
        for theirs, ours in adapter_names(model):
            a, b = (f"{PREFIX}{theirs}.lora_{part}.weight" for part in "AB")
            tied = theirs == "lm_head" and model.config.tie_weights
            if tied or not {a, b} <= stored.keys():
                continue
            pair = {a: stored.pop(a), b: stored.pop(b)}
            matrices = [model.get_submodule(name).weight for name in ours]
            rank = max(1, pair[a].shape[:1].numel())
            inputs, outputs = matrices[0].shape[1], [len(W) for W in matrices]
            with torch.device("meta"):
                like = {a: torch.empty(rank, inputs), b: torch.empty(sum(outputs), rank)}
            check_tensors("the weight ", pair, like, any_float=True)
            product = pair[b].float() @ pair[a].float()
            updates = (scale(theirs, adapter, rank) * product).split(outputs)
            for W, update in zip(matrices, updates, strict=True):
                W += update
        if stored:
            raise ValueError(
                f"the weight {min(stored)} is unknown, or its counterpart (lora_A or lora_B) is missing"
            )


def scale(layer: str, adapter: dict, rank: int) -> float:
    """Compute the factor by which a layer's B A is multiplied: alpha / rank or, with use_rslora, alpha / sqrt(rank).

    PEFT allows any regular expression in alpha_pattern. Here, only layer names and their suffixes are supported.
    """
    alpha = adapter["lora_alpha"]
    for pattern, value in (adapter.get("alpha_pattern") or {}).items():
        if not re.fullmatch(r"[\w.]+", pattern):
            raise ValueError(
                f"alpha_pattern has the regular expression {pattern!r}; only layer names are supported"
            )
        if f".{layer}".endswith(f".{pattern}"):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if adapter.get("use_rslora") else rank)
