"""Convert GPT-2 and Llama models from Hugging Face's format to our config and weights, and back.

A model is a folder with config.json and weights. No code from the folder is run, and transformers is not needed.
Weights are read as float32, which represents bfloat16 and float16 exactly.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from humptygpt.checkpoint import build_like, restore_model
from humptygpt.cli import UserError, refuse, restore
from humptygpt.convert.families import (
    ACTIVATION_NAMES,
    FAMILIES,
    ROPE_SCALING,
    Family,
)
from humptygpt.convert.weight_files import Weights, check_shapes, open_weights
from humptygpt.files import parse_json, write_whole
from humptygpt.tasks import build_on_meta
from model import ModelConfig

# Export does not check settings that only affect training, biases, which the weights imply, or rope_base, which GPT-2
# does not use.
NOT_EXPORTED = {
    "dropout",
    "label_smoothing",
    "init",
    "bias",
    "attn_bias",
    "mlp_bias",
    "rope_base",
}
SUPPORTED = {  # {key of config.json that changes the model's formulas: the only value that we support}
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "partial_rotary_factor": 1,
}
ROPE_TYPES = {"default", "llama3"}
ROPE = {"rope_type?": ROPE_TYPES, "type?": ROPE_TYPES}  # older files have the second key
SCHEMA = {
    "model_type": set(FAMILIES),
    "vocab_size": int,
    # transformers before version 5 writes the first of these keys, later versions the second
    "rope_scaling?": (ROPE, None),
    "rope_parameters?": (ROPE, None),
}


def layer_names(family: Family, config: ModelConfig) -> list[tuple[str, list[str]]]:
    """List the layers of a model: transformers' name for each, and the names of our layers that it combines."""
    return [
        (theirs.replace("#", str(i)), ours.replace("#", str(i)).split())
        for theirs, ours in family.weights.items()
        for i in range(config.n_layer if "#" in theirs else 1)
    ]


def weight_names(
    family: Family, config: ModelConfig, ours: dict
) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each weight in transformers, with our names for its parts. ours: our state dict."""
    for theirs, names in layer_names(family, config):
        for kind in ("weight", "bias"):
            own = [f"{name}.{kind}" for name in names]
            if own[0] in ours and not (theirs == "lm_head" and config.tie_weights):
                yield f"{theirs}.{kind}", own


def transposed(family: Family, name: str, tensor: Tensor) -> Tensor:
    """Transpose a block's matrix if the family stores it as (inputs, outputs). Vectors stay as they are."""
    return tensor.t() if family.transposed and ".h." in name else tensor


def to_theirs(family: Family, config: ModelConfig, ours: Weights) -> Weights:
    """Convert our state dict to the family's names and shapes."""
    theirs = {}
    for name, own in weight_names(family, config, ours):
        tensor = ours[own[0]] if len(own) == 1 else torch.cat([ours[part] for part in own])
        theirs[name] = transposed(family, name, tensor)
    return theirs


# --------------------------------------------------------------------------------------
# Reading


def read_pretrained(folder: Path) -> nn.Module:
    """Load a model from a Hugging Face folder, in float32 on the CPU. Dropout is 0, whatever config.json says.

    Raises UserError if the model is damaged or not supported.
    """
    what = f"the model in {folder}"
    family, config = read_config(folder)
    with refuse(f"cannot read {what}: "):
        tensors = open_weights(folder)
    return build_model(what, family, config, tensors)


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """Read config.json. Raises UserError if it is damaged or describes a model that is not supported."""
    with refuse(f"cannot read the model in {folder}: config.json: "):
        content = parse_json((folder / "config.json").read_bytes(), SCHEMA)
        family = FAMILIES[content["model_type"]]
        return family, restore(ModelConfig, family.fixed | model_settings(family, content))


def model_settings(family: Family, content: dict) -> dict[str, object]:
    """Translate config.json into our settings, without checking their types. Raises ValueError if it is unsupported."""
    rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
    content = family.defaults | content | rope
    table = family.settings
    if rope.get("rope_type", rope.get("type")) == "llama3":
        table = table | ROPE_SCALING
    for key, value in SUPPORTED.items():
        if content.get(key, value) != value:
            raise ValueError(
                f"{key}={content[key]} is not supported; only {key}={value} is"
            )
    settings = {ours: content.get(theirs) for theirs, ours in table.items()}
    if any(type(value) is int and abs(value) >= 2**63 for value in settings.values()):
        raise ValueError("a number does not fit in 64 bits")
    activation = str(settings["activation"])
    # a name that is not in the table is kept, and ModelConfig then refuses it
    return settings | {"activation": ACTIVATION_NAMES.get(activation, activation)}


def build_model(
    what: object, family: Family, config: ModelConfig, tensors: Weights
) -> nn.Module:
    """Build a model from the tensors of a file. Removes them from `tensors` along the way, to save memory.

    All names and shapes are checked before any memory is allocated. Raises UserError if they do not match the config.
    what: the name of the file in error messages.
    """
    model = build_like(what, config, tensors)
    like = model.state_dict()
    stored = {}
    while tensors:
        name, tensor = tensors.popitem()
        if not name.startswith((family.prefix, "lm_head.")):
            name = family.prefix + name
        if not re.fullmatch(family.no_weights, name):
            stored[name] = tensor
    if config.tie_weights:  # older files contain the tied head as well
        stored.pop("lm_head.weight", None)
    expected = to_theirs(family, config, like)
    with refuse(f"cannot read {what}: "):
        check_shapes(stored, {name: tuple(x.shape) for name, x in expected.items()})
    ours = {}
    for name, own in weight_names(family, config, like):
        tensor = transposed(family, name, stored.pop(name).detach())
        pieces = tensor.split([len(like[part]) for part in own])
        for part, piece in zip(own, pieces, strict=True):
            # copied, because the file may be memory-mapped
            ours[part] = piece.to(
                torch.float32, copy=True, memory_format=torch.contiguous_format
            )
    if config.tie_weights:
        ours["lm_head.weight"] = ours["wte.weight"]
    return restore_model(model, ours)


# --------------------------------------------------------------------------------------
# Writing


def to_pretrained(
    model: nn.Module, dtype: str = "float32"
) -> tuple[dict[str, object], Weights]:
    """Convert a model for export. Returns the content of config.json, and weights under transformers' names.

    transformers' GPT-2 always has biases, so they are 0 if our model has none. dtype: data type of the weights, which
    are on the CPU. Raises UserError if a setting cannot be exported.
    """
    config = model.config
    name = find_family(config)
    family = FAMILIES[name]
    block = model.stack.blocks[0]
    names = {ours: theirs for theirs, ours in ACTIVATION_NAMES.items()}
    settings = vars(config) | {
        "n_kv_head": config.kv_heads,
        "head_size": config.features,
        "n_hidden": block.mlp.up_proj.out_features,
        "attn_bias": block.attn.q_proj.bias is not None,
        "mlp_bias": block.mlp.up_proj.bias is not None,
        "activation": names[config.activation],
    }
    content = {
        "model_type": name,
        "architectures": [family.architecture],
        "torch_dtype": dtype,
        # None, because transformers' defaults are ids of other tokenizers; generation_config.json has ours
        "bos_token_id": None,
        "eos_token_id": None,
    }
    content |= {theirs: settings[key] for theirs, key in family.settings.items()}
    if name == "llama" and config.rope_factor != 1:
        scaling = {theirs: settings[key] for theirs, key in ROPE_SCALING.items()}
        content["rope_scaling"] = {"rope_type": "llama3"} | scaling
    like = build_on_meta(replace(config, **family.fixed)).state_dict()
    zeros = {key: torch.zeros(x.shape) for key, x in like.items() if key.endswith(".bias")}
    theirs = to_theirs(family, config, zeros | model.state_dict())
    return content, {
        key: x.to("cpu", getattr(torch, dtype)).contiguous() for key, x in theirs.items()
    }


def find_family(config: ModelConfig) -> str:
    """Return the model_type that a model with this config is exported as. Raises UserError if a setting prevents it."""
    name = "gpt2" if config.position == "learned" else "llama"
    family = FAMILIES[name]
    free = {*family.settings.values(), *ROPE_SCALING.values(), *NOT_EXPORTED}
    # n_members comes last, because n_members=1 would not help a model that differs in another key; a key that is not in
    # the tables is a user's own, and off by default
    for key, needed in (family.fixed | vars(ModelConfig()) | family.fixed).items():
        value = getattr(config, key)
        if key not in free and value != needed:
            raise UserError(
                f"{key}={value} cannot be exported; {family.architecture} needs {key}={needed},"
                f" as in {family.preset}"
            )
    known = dict.fromkeys(ACTIVATION_NAMES.values())
    if config.activation not in known:
        raise UserError(
            f"activation={config.activation} cannot be exported; transformers needs activation={' or '.join(known)}"
        )
    if config.n_embd % config.n_head:
        raise UserError(
            f"n_embd={config.n_embd} cannot be exported; transformers needs a multiple of n_head={config.n_head}"
        )
    return name


def write_pretrained(model: nn.Module, folder: Path, dtype: str = "float32") -> None:
    """Export a model to config.json and model.safetensors. Raises UserError if a setting or the disk prevents it."""
    content, weights = to_pretrained(model, dtype)
    write_files(folder, {"config.json": content, "model.safetensors": weights})


def write_files(folder: Path, contents: dict[str, str | dict]) -> None:
    """Write several files to a folder, each atomically. Weights are written before config files.

    contents: {file name: a text, named tensors, or the content of a JSON file}. Raises UserError if writing fails.
    """
    for name, content in sorted(contents.items(), reverse=True):
        if name.endswith(".safetensors"):
            from safetensors.torch import save

            data = save(content, {"format": "pt"})
        elif isinstance(content, str):
            data = content.encode()
        else:
            data = f"{json.dumps(content, indent=2)}\n".encode()
        write_whole(folder / name, lambda file, data=data: file.write(data))
