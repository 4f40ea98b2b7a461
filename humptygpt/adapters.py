"""LoRA's matrices alone, in PEFT's format: a small file beside the base model."""

import json
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from humptygpt.configurator import UserError
from humptygpt.families import FAMILIES
from humptygpt.files import write_whole
from humptygpt.lora import MARK, OFF, adapted
from humptygpt.pretrained import find_family

PREFIX = "base_model.model."


def write_adapter(model: nn.Module, base: str, folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json: A and B alone, each whole or not at all. Raises UserError.

    base: what init_from named. A GPT-2 or Llama has the names of transformers, so that PEFT opens it beside the base
    model; GPT-2's c_attn, which is ours of queries, keys and values in one, has the rank of all of them. Other models
    have our names.
    """
    config = model.config
    weights, patterns = rename(model)
    conv1d = config.position == "learned" and any("c_attn" in name or ".c_" in name for name in weights)
    targets = sorted(
        {name.removeprefix(PREFIX).rpartition(MARK)[0].split(".#.")[-1] for name in map(unnumbered, weights)}
    )
    content = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "bias": "none"}
    content |= {"r": config.lora_rank, "lora_alpha": config.lora_alpha, "lora_dropout": 0.0, "inference_mode": True}
    content |= {"target_modules": targets, "fan_in_fan_out": conv1d, "rank_pattern": patterns[0]}
    content |= {"alpha_pattern": patterns[1]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    data, text = safetensors.torch.save(weights, {"format": "pt"}), json.dumps(content, indent=2)
    write_whole(folder / "adapter_model.safetensors", lambda file: file.write(data))
    write_whole(folder / "adapter_config.json", lambda file: file.write(f"{text}\n".encode()))


def unnumbered(name: str) -> str:
    return ".".join("#" if part.isdecimal() else part for part in name.split("."))


def rename(model: nn.Module) -> tuple[dict[str, Tensor], tuple[dict, dict]]:
    """({PEFT's name: A or B}, (ranks, alphas) of the layers where they are not those of the config)."""
    layers, config = adapted(model), model.config
    try:
        table = FAMILIES[find_family(replace(config, **OFF))].weights
    except UserError:
        table = [(name, [name], "same") for name in {unnumbered(name) for name in layers}]
    weights, ranks, alphas = {}, {}, {}
    for theirs, ours, _ in table:
        for i in range(config.n_layer):
            parts = [layers.get(name.replace("#", str(i))) for name in ours]
            found = [part for part in parts if part]
            if not found:
                continue
            name = PREFIX + theirs.replace("#", str(i))
            weights[f"{name}.lora_A.weight"] = torch.cat([part.lora_A.weight.detach().float() for part in found])
            sizes = [model.get_submodule(name.replace("#", str(i))).out_features for name in ours]
            blocks = torch.zeros(sum(sizes), config.lora_rank * len(found))
            row = column = 0
            for part, size in zip(parts, sizes, strict=True):
                if part:
                    blocks[row : row + size, column : column + config.lora_rank] = part.lora_B.weight.detach()
                    column += config.lora_rank
                row += size
            weights[f"{name}.lora_B.weight"] = blocks
            if len(found) > 1:
                kind = theirs.rpartition(".")[2]
                ranks[kind], alphas[kind] = config.lora_rank * len(found), config.lora_alpha * len(found)
    return {name: x.cpu().contiguous() for name, x in weights.items()}, (ranks, alphas)
