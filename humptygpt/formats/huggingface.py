"""Convert GPT-2 and Llama models from Hugging Face's format to our config and weights, and back.

A model is a folder with config.json and weights in safetensors, in one file or in several shards.
No code from the folder is run, and only compare_logits() needs transformers. Weights are read as float32, which
represents bfloat16 and float16 exactly.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from humptygpt.cli import UserError, note, restore
from humptygpt.files import refuse_damaged, write_bytes, write_text
from humptygpt.formats.checkpoint import check_sizes, check_tensors
from humptygpt.formats.families import (
    ACTIVATION_NAMES,
    FAMILIES,
    ROPE_SCALING,
    Family,
    find_family,
)
from humptygpt.model import ModelConfig
from humptygpt.models.build import build_on_meta, restore_model
from humptygpt.models.checks import rounded_logits, text_to_compare
from humptygpt.tokenizers.huggingface import refuse_old_form

Weights = dict[str, Tensor]  # tensors by name
# ends of the names of buffers that older files contain; they are ignored
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
SUPPORTED = {  # {key of config.json that changes the model's formulas: the only value that we support}
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "partial_rotary_factor": 1,
}
ROPE_TYPES = ("default", "llama3")
TOLERANCE = 1e-3  # of the largest logit; transformers has differed by up to 1e-6 of it


# --------------------------------------------------------------------------------------
# Names


def weight_names(family: Family, config: ModelConfig, ours: Weights) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each weight in transformers, with our names for its parts. ours: our state dict."""
    for layer, names in family.weights.items():
        for i in range(config.n_layer if "#" in layer else 1):
            for kind in ("weight", "bias"):
                theirs, *parts = [f"{name}.{kind}".replace("#", str(i)) for name in (layer, *names.split())]
                if parts[0] in ours and not (layer == "lm_head" and config.tie_weights):
                    yield theirs, parts


def transposed(family: Family, name: str, tensor: Tensor) -> Tensor:
    """Transpose a block's matrix if the family stores it as (inputs, outputs). Vectors stay as they are."""
    return tensor.t() if family.transposed and ".h." in name else tensor


def to_theirs(family: Family, config: ModelConfig, ours: Weights) -> Weights:
    """Convert our state dict to the family's names and shapes."""
    theirs = {}
    for name, parts in weight_names(family, config, ours):
        first, *others = [ours[part] for part in parts]
        tensor = torch.cat([first, *others]) if others else first
        theirs[name] = transposed(family, name, tensor)
    return theirs


# --------------------------------------------------------------------------------------
# Reading a model


def read_pretrained(folder: Path) -> nn.Module:
    """Load a model from a Hugging Face folder, in float32 on the CPU. Dropout is 0, whatever config.json says.

    Raises UserError if the model is damaged or not supported.
    """
    family, config = read_config(folder)
    with refuse_damaged(f"the model in {folder}"):
        tensors = open_weights(folder)
    return build_model(f"the model in {folder}", family, config, tensors)


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """Read config.json. Raises UserError if it is damaged or describes a model that is not supported."""
    with refuse_damaged(f"the model in {folder}: config.json"):
        content = json.loads((folder / "config.json").read_bytes())
        kind = content["model_type"]
        if kind not in FAMILIES:
            raise ValueError(f"model_type={kind} is not one of: {', '.join(FAMILIES)}")
        family = FAMILIES[kind]
        return family, restore(ModelConfig, family.fixed | model_settings(family, content))


def model_settings(family: Family, content: dict[str, object]) -> dict[str, object]:
    """Translate config.json into our settings, without checking their types. Raises ValueError if it is unsupported."""
    # transformers before version 5 writes the first of these keys, later versions the second
    rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
    content = family.defaults | content | rope
    table = family.settings
    kind = rope.get("rope_type", rope.get("type", "default"))  # older files have the second
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type={kind} is not one of: {', '.join(ROPE_TYPES)}")
    if kind == "llama3":
        table = table | ROPE_SCALING
    for key, value in SUPPORTED.items():
        if content.get(key, value) != value:
            raise ValueError(f"{key}={content[key]} is not supported; only {key}={value} is")
    settings = {ours: content.get(theirs) for theirs, ours in table.items()}
    activation = str(settings["activation"])
    # a name that is not in the table is kept, and ModelConfig then refuses it
    return settings | {"activation": ACTIVATION_NAMES.get(activation, activation)}


def build_model(what: object, family: Family, config: ModelConfig, tensors: Weights) -> nn.Module:
    """Build a model from the tensors of a file. Removes them from `tensors` along the way, to save memory.

    All names and shapes are checked before any memory is allocated. Raises UserError if they do not match the config.
    what: the name of the file in error messages.
    """
    with refuse_damaged(what):
        check_sizes(config, tensors)
        if config.tie_weights and "lm_head.weight" in tensors:
            embedding, *_ = family.weights
            if not torch.equal(tensors["lm_head.weight"], tensors[f"{embedding}.weight"]):
                note(f"{what} has its own head, so it is loaded with tie_weights=False")
                config = replace(config, tie_weights=False)
    model = build_on_meta(config)
    like = model.state_dict()
    with refuse_damaged(what):
        return restore_model(model, to_ours(family, config, tensors, like))


def to_ours(family: Family, config: ModelConfig, tensors: Weights, like: Weights) -> Weights:
    """Convert the tensors of a file, which are removed one by one, to our state dict. like: our state dict on meta."""
    stored = {}
    while tensors:
        name, tensor = tensors.popitem()
        if not name.startswith((family.prefix, "lm_head.")):
            name = family.prefix + name
        if not name.endswith(BUFFERS):
            stored[name] = tensor
    if config.tie_weights:  # older files contain the same matrix as the head
        stored.pop("lm_head.weight", None)
    expected = to_theirs(family, config, like)
    check_tensors("the weight ", stored, expected, any_float=True)
    ours = {}
    for name, parts in weight_names(family, config, like):
        tensor = transposed(family, name, stored.pop(name).detach())
        pieces = tensor.split([len(like[part]) for part in parts])
        for part, piece in zip(parts, pieces, strict=True):
            # copied, because the file may be memory-mapped
            ours[part] = piece.to(torch.float32, copy=True).contiguous()
    if config.tie_weights:
        ours["lm_head.weight"] = ours["wte.weight"]
    return ours


# --------------------------------------------------------------------------------------
# Reading weights. Tensors in safetensors files stay memory-mapped until they are used, so their names and shapes can be
# checked first.


def open_weights(folder: Path) -> Weights:
    """Read all tensors of the folder. Raises an exception of any type."""
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    files = [path]
    if not path.is_file() and index.is_file():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        files = [folder / Path(name).name for name in sorted(names)]  # of this folder alone
    elif not path.is_file():
        refuse_old_form(folder, path.name, "AutoModelForCausalLM")
    tensors = {}
    for file in files:
        file.open("rb").close()  # raises OSError if the file cannot be read
        # load_file also checks that the file has the size that its header declares
        tensors |= load_file(file)
    return tensors


# --------------------------------------------------------------------------------------
# Writing


def to_pretrained(model: nn.Module, dtype: str = "float32") -> tuple[dict[str, object], Weights]:
    """Convert a model for export. Returns the content of config.json, and weights under transformers' names.

    dtype: data type of the weights, which are on the CPU. Raises UserError if a setting cannot be exported.
    """
    family = find_family(model.config)
    settings = all_settings(model)
    names = {ours: theirs for theirs, ours in ACTIVATION_NAMES.items()}
    settings["activation"] = names[settings["activation"]]
    content = {
        "model_type": family.name,
        "architectures": [family.architecture],
        "torch_dtype": dtype,
        # None, because transformers' defaults are ids of other tokenizers; generation_config.json has ours
        "bos_token_id": None,
        "eos_token_id": None,
    }
    content |= {theirs: settings[key] for theirs, key in family.settings.items()}
    if model.config.position == "rotary" and model.config.rope_factor != 1:
        scaling = {theirs: settings[key] for theirs, key in ROPE_SCALING.items()}
        content["rope_scaling"] = {"rope_type": "llama3"} | scaling
    return content, {
        key: x.to("cpu", getattr(torch, dtype)).contiguous() for key, x in exported_weights(family, model).items()
    }


def all_settings(model: nn.Module) -> dict[str, object]:
    """Return a model's settings. None stands for a default in some of them; here it is replaced by the value."""
    block = model.stack.blocks[0]
    return vars(model.config) | {
        "n_kv_head": model.config.kv_heads,
        "head_size": model.config.features,
        "n_hidden": block.mlp.up_proj.out_features,
        "attn_bias": block.attn.q_proj.bias is not None,
        "mlp_bias": block.mlp.up_proj.bias is not None,
    }


def exported_weights(family: Family, model: nn.Module) -> Weights:
    """Convert a model's weights. transformers' GPT-2 always has biases, so they are 0 if our model has none."""
    config = model.config
    like = build_on_meta(replace(config, **family.fixed)).state_dict()
    zeros = {key: torch.zeros(x.shape) for key, x in like.items() if key.endswith(".bias")}
    return to_theirs(family, config, zeros | model.state_dict())


def write_pretrained(model: nn.Module, folder: Path, dtype: str = "float32") -> None:
    """Export a model to config.json and model.safetensors. Raises UserError if a setting or the disk prevents it."""
    from safetensors.torch import save

    content, weights = to_pretrained(model, dtype)
    write_bytes(folder / "model.safetensors", save(weights, {"format": "pt"}))
    write_files(folder, {"config.json": content})


def compare_logits(model: nn.Module, folder: Path, dtype: str) -> None:
    """Raise UserError unless transformers computes the model's logits from the folder that it was written to.

    dtype: that of the folder, to which the model's weights are rounded.
    """
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    idx = text_to_compare(model.config)
    expected = rounded_logits(model, idx, getattr(torch, dtype))
    theirs = AutoModelForCausalLM.from_pretrained(folder).float()
    with torch.inference_mode():
        difference = (theirs(idx).logits[0] - expected).abs().max()
    if not difference <= TOLERANCE * expected.abs().max():
        raise UserError(
            "transformers computes other logits than model.py, which has been edited; undo the edit, or use sample.py"
            " and score.py, which run model.py itself"
        )


def write_files(folder: Path, contents: Mapping[str, str | dict[str, object]]) -> None:
    """Write several files to a folder in this order, each atomically.

    contents: {file name: a text, or the content of a JSON file}. Raises UserError if writing fails.
    """
    for name, content in contents.items():
        if not isinstance(content, str):
            content = f"{json.dumps(content, indent=2)}\n"
        write_text(folder / name, content)
