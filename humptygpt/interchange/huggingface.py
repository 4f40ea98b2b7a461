"""GPT-2 and Llama models in Hugging Face's format -> config and weights of ours, and back.

A folder holds config.json and weights. Nothing in it is run as code, and transformers is not needed. Weights become
float32 and are written so: of bfloat16 or float16 that is exact, but takes twice the space.
"""

import json
import re
import typing
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from humptygpt.checkpoint.checkpoint import build_on_meta
from humptygpt.core.errors import UserError
from humptygpt.core.files import cannot_write, write_whole
from humptygpt.core.schema import check_schema, parse_json
from humptygpt.core.settings import convert, without_effect
from humptygpt.interchange.families import (
    ACTIVATION_NAMES,
    FAMILIES,
    REQUIRED,
    ROPE_SCALING,
    Family,
)
from humptygpt.interchange.weight_files import DTYPES, Stored, open_weights
from model import ModelConfig


def weight_names(
    family: Family, config: ModelConfig, ours: dict
) -> Iterator[tuple[str, list[str], str]]:
    """(their name, our names, how) of each weight of a model of this config; ours: its state dict."""
    for theirs, names, how in family.weights:
        for layer in range(config.n_layer if "#" in theirs else 1):
            for kind in ("weight", "bias"):
                found = [f"{name}.{kind}".replace("#", str(layer)) for name in names]
                if found[0] in ours and not (theirs == "lm_head" and config.tie_weights):
                    yield f"{theirs}.{kind}".replace("#", str(layer)), found, how


def to_theirs(family: Family, config: ModelConfig, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under their names and in their shapes."""
    theirs = {}
    for name, parts, how in weight_names(family, config, ours):
        tensor = torch.cat([ours[part] for part in parts]) if len(parts) > 1 else ours[parts[0]]
        theirs[name] = (
            tensor.t() if how == "conv1d" else tensor
        )  # of a bias, t() is the bias itself
    return theirs


# --------------------------------------------------------------------------------------
# Reading


def read_pretrained(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config and the state dict, in float32 on the CPU, of the model in a folder.

    checkpoint.restore_model(state_dict, config) makes a model of them. Dropout is a matter of training and
    not read. Raises UserError for a folder that is incomplete or damaged, or holds what cannot be built here.
    """
    try:
        family, config = read_config(folder / "config.json")
        return config, read_stored(family, config, open_weights(folder))
    except (ValueError, OSError, OverflowError) as error:
        reason = "".join(
            char if char.isprintable() else " " for char in str(error)[:500]
        )  # it may quote a file
        raise UserError(f"cannot read the model in {folder}: {reason}") from error


def check_supported(folder: Path) -> None:
    """Raise UserError where config.json describes a model that cannot be built here."""
    try:
        read_config(folder / "config.json")
    except (ValueError, OSError) as error:
        raise UserError(f"cannot read the model in {folder}: {error}") from error


def read_stored(
    family: Family, config: ModelConfig, tensors: dict[str, Stored]
) -> dict[str, Tensor]:
    """Our state dict, of a file's tensors by name."""
    stored = {}
    for name, tensor in tensors.items():
        full = name if name.startswith((family.prefix, "lm_head.")) else family.prefix + name
        if full in stored:
            raise ValueError(
                f"there are two weights named {full}, with and without {family.prefix}"
            )
        if not re.fullmatch(family.no_weights, full):
            stored[full] = tensor
    return read_weights(family, config, stored)


def read_config(path: Path) -> tuple[Family, ModelConfig]:
    try:
        content = parse_json(
            path.read_bytes(), {"model_type": str, "architectures?": ([str], None)}
        )
        kind = content["model_type"]
        if kind not in FAMILIES:
            raise ValueError(f"model_type={kind} is not supported; {' and '.join(FAMILIES)} are")
        for name in content.get("architectures") or ():
            if name not in FAMILIES[kind].architectures:
                raise ValueError(
                    f"{name} is not supported; {' and '.join(FAMILIES[kind].architectures)} are"
                )
        return FAMILIES[kind], ModelConfig(
            **FAMILIES[kind].fixed | read_settings(FAMILIES[kind], content)
        )
    except FileNotFoundError as error:
        raise ValueError("there is no config.json") from error
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from error


def read_settings(family: Family, content: dict) -> dict[str, object]:
    """Settings of ours, from config.json."""
    rope = (
        content.get("rope_scaling") or content.get("rope_parameters") or {}
    )  # before and since transformers 5
    check_schema(rope, {"rope_type?": str, "type?": str}, "rope_scaling")
    content = content | {
        key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope
    }
    found, kind = take(family.settings, content), rope.get("rope_type", rope.get("type", "default"))
    if kind == "llama3":
        found |= take(ROPE_SCALING, rope)
    elif kind != "default":
        raise ValueError(f"rope_type={kind} is not supported; default and llama3 are")
    for key, value in family.supported.items():
        if content.get(key, value) != value:
            raise ValueError(f"{key}={content[key]} is not supported; {key}={value} is")
    if found["activation"] not in ACTIVATION_NAMES:
        raise ValueError(
            f"the activation {found['activation']} is not supported; {', '.join(ACTIVATION_NAMES)} are"
        )
    return found | {"activation": ACTIVATION_NAMES[found["activation"]]}


def take(table: list[tuple], content: dict) -> dict[str, object]:
    """What a table of settings names, by our keys."""
    check_schema(
        content,
        {key if default is REQUIRED else f"{key}?": form for key, _, form, default in table},
    )
    types = typing.get_type_hints(ModelConfig)
    return {
        ours: convert(ours, content.get(theirs, default), types[ours])
        for theirs, ours, _, default in table
    }


def read_weights(
    family: Family, config: ModelConfig, stored: dict[str, Stored]
) -> dict[str, Tensor]:
    """Our state dict. Nothing is allocated before all names, shapes and dtypes are checked."""
    if config.n_layer > len(stored):  # or building would take long
        raise ValueError(
            f"config.json has {config.n_layer:,} layers, but there are only {len(stored)} weights"
        )
    head = stored.pop("lm_head.weight", None) if config.tie_weights else None
    like = build_on_meta(config).state_dict()
    check_weights(stored, to_theirs(family, config, like))
    ours = {}
    for name, parts, how in weight_names(family, config, like):
        tensor = stored.pop(name).read().detach()
        pieces = (tensor.t() if how == "conv1d" else tensor).split(
            [len(like[part]) for part in parts]
        )
        for part, piece in zip(
            parts, pieces, strict=True
        ):  # copied: the file may be mapped into memory
            ours[part] = piece.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if config.tie_weights:
        if head and not torch.equal(
            head.read().float(), ours["wte.weight"]
        ):  # older files have it, too
            raise ValueError(
                "lm_head.weight must equal the embedding, to which tie_word_embeddings=true ties it"
            )
        ours["lm_head.weight"] = ours["wte.weight"]
    return ours


def check_weights(stored: dict[str, Stored], expected: dict[str, Tensor]) -> None:
    """Raise ValueError where names or shapes differ, or a dtype is not supported."""
    if stored.keys() != expected.keys():
        name = min(stored.keys() ^ expected.keys())
        raise ValueError(f"the weight {name} is {'unknown' if name in stored else 'missing'}")
    for name, (shape, dtype, _) in stored.items():
        if shape != expected[name].shape:
            raise ValueError(
                f"the weight {name} must have shape {tuple(expected[name].shape)}, but has {shape}"
            )
        if dtype not in DTYPES.values():
            raise ValueError(f"the weight {name} must be in {', '.join(DTYPES)}, but is in {dtype}")


# --------------------------------------------------------------------------------------
# Writing

# Settings that are not exported: of training alone, and of what the weights themselves have or lack
NOT_EXPORTED = {
    "dropout",
    "label_smoothing",
    "init",
    "bias",
    "attn_bias",
    "mlp_bias",
}


def to_pretrained(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    eot: int | None = None,
    bos: int | None = None,
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """What config.json holds, and the weights under their names, in this dtype on the CPU.

    eot: the token that ends a text. bos: the one that a text starts with, if that is another.
    GPT-2 always has bias terms: those of a model without are 0. Raises UserError where a setting cannot be expressed.
    """
    config, state = model.config, model.state_dict()
    name = find_family(config)
    family, attn, mlp = FAMILIES[name], model.stack.blocks[0].attn, model.stack.blocks[0].mlp
    settings = vars(config) | {"n_kv_head": attn.n_kv_head, "head_size": attn.head_size}
    settings |= {"n_hidden": mlp.up_proj.out_features, "mlp_bias": mlp.up_proj.bias is not None}
    settings |= {"attn_bias": attn.q_proj.bias is not None}
    settings["activation"] = next(
        theirs for theirs, ours in ACTIVATION_NAMES.items() if ours == config.activation
    )
    content = {
        "model_type": name,
        "architectures": family.architectures[:1],
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    content |= {theirs: settings[key] for theirs, key, *_ in family.settings}
    content |= dict.fromkeys(family.dropouts, config.dropout)
    content |= {
        "bos_token_id": eot if bos is None else bos,
        "eos_token_id": eot,
    }  # None, too: the defaults belong to other tokenizers
    if name == "gpt2":
        content["n_ctx"] = config.block_size  # which llama.cpp reads
    elif config.rope_factor != 1:
        content["rope_scaling"] = {"rope_type": "llama3"} | {
            theirs: settings[key] for theirs, key, *_ in ROPE_SCALING
        }
    like = build_on_meta(replace(config, **family.fixed)).state_dict()
    lacking = {
        key: torch.zeros(x.shape)
        for key, x in like.items()
        if key.endswith(".bias") and key not in state
    }
    theirs = to_theirs(family, config, state | lacking)
    return content, {key: x.detach().to("cpu", dtype).contiguous() for key, x in theirs.items()}


def find_family(config: ModelConfig) -> str:
    """The model_type that a model of this config belongs to. Raises UserError where it has what none of them has."""
    found = {family.fixed["position"]: name for name, family in FAMILIES.items()}
    if config.position not in found:
        needed = " or ".join(f"position={position} ({name})" for position, name in found.items())
        raise UserError(f"position={config.position} cannot be exported; export needs {needed}")
    family = FAMILIES[found[config.position]]
    allowed = {field.name: (field.default,) for field in fields(ModelConfig)}
    allowed |= {key: (value,) for key, value in family.fixed.items()}
    allowed |= {"window": (0, config.block_size), "n_kv_head": (None, config.n_head)}
    allowed["head_size"] = (None, config.n_embd // config.n_head)
    exported = {key for _, key, *_ in family.settings + ROPE_SCALING}
    free = exported | NOT_EXPORTED | without_effect(vars(config), ModelConfig).keys()
    keys = [
        key
        for key, values in allowed.items()
        if key not in free and getattr(config, key) not in values
    ]
    if keys:
        if "model" in keys:
            keys = ["model"]  # of other models the other keys mean something else
        given, needed = (
            " ".join(f"{key}={value}" for key, value in pairs)
            for pairs in (
                [(key, getattr(config, key)) for key in keys],
                [(key, allowed[key][0]) for key in keys],
            )
        )
        way_out = f"{family.architectures[0]} needs {needed}, as in {family.preset}"
        raise UserError(f"{given} cannot be exported; {way_out}")
    if config.n_embd % config.n_head:
        needed = f"transformers needs a multiple of n_head={config.n_head}"
        raise UserError(f"n_embd={config.n_embd} cannot be exported; {needed}")
    return found[config.position]


def write_pretrained(
    model: nn.Module,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    eot: int | None = None,
    bos: int | None = None,
) -> None:
    """Write config.json and model.safetensors, each whole or not at all; as to_pretrained. Raises UserError.

    They may replace those of an older model of the same config. Those of another one stay as they are: a crash between
    the two files would leave neither model.
    """
    content, weights = to_pretrained(model, dtype, eot, bos)
    text, path = (json.dumps(content, indent=2) + "\n").encode(), folder / "config.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        same = not path.exists() or path.read_bytes() == text
    except OSError as error:
        raise cannot_write(folder, error) from error
    if not same:
        raise UserError(f"{path} describes another model; remove it, or write to another folder")
    data = safetensors.torch.save(weights, {"format": "pt"})
    write_whole(folder / "model.safetensors", lambda file: file.write(data))
    write_whole(path, lambda file: file.write(text))
