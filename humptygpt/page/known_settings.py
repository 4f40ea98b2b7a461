"""Refuse models whose results in the page's JavaScript, transformers or llama.cpp would differ from model.py's.

reference.json contains the settings of a tiny model, the logits that the JavaScript computes for each variant of it,
and the names of its parameters. Tests check that the JavaScript, transformers and llama.cpp agree with our model.py,
and check_formulas() checks that an edited model.py still gives the same logits.
"""

import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from humptygpt.cli import UserError
from humptygpt.model import ModelConfig
from humptygpt.models.build import build

REFERENCE = Path(__file__).with_name("reference.json")
KNOWN = json.loads(REFERENCE.read_bytes())
# implemented in explain/tokenizer.js
TOKENIZERS = ("char", "byte", "sentencepiece", "gpt2", "bpe")
# any value will do: a page shows a trained model and, of several members, the first
ANY_VALUE = {"dropout", "label_smoothing", "init", "n_members"}


def check_settings(config: ModelConfig, tokenizer: str) -> None:
    """Raise UserError for the first setting that the page does not support. tokenizer: the tokenizer's name."""
    known = [KNOWN["config"], *(settings for settings, _ in KNOWN["logits"])]
    known += [{"tokenizer": name} for name in TOKENIZERS]
    for key, value in (vars(config) | {"tokenizer": tokenizer}).items():
        kinds = [kind(settings[key]) for settings in known if key in settings]
        fits = kind(value) in kinds if kinds else value == getattr(type(config), key)
        if not fits and key not in ANY_VALUE:
            raise UserError(
                f"the page does not support {key}={value}, so its numbers would differ from the"
                " model's; implement the setting in explain/ and add it to humptygpt/page/reference.json"
            )


def known_logits(model: nn.Module, idx: Tensor) -> Tensor:
    """Set a model's weights to fixed values, the same on every machine, and compute the logits of the token after idx.

    Every weight affects the logits and is exact in float16. idx: (1, T). Returns (1, V).
    """
    model.eval().requires_grad_(False)
    for n, p in enumerate(model.parameters()):
        i = torch.arange(p.numel()).view(p.shape)
        scale = 1.6 / p.shape[-1:].numel() ** 0.5
        p.copy_(((p.dim() != 2) + scale * (i * (i + 7 * n) % 61 / 30 - 1)).half())
    texts = {"source": idx} if hasattr(model, "encode") else {}
    return model(idx, **texts)[0][:, -1]


@torch.inference_mode()
def check_formulas(config: ModelConfig, reader: str) -> None:
    """Raise UserError if model.py has been edited in a way that changes its logits.

    reader: what would then compute different results, for the message, such as "a page".
    """
    for settings, logits in KNOWN["logits"]:
        if any(kind(getattr(config, key)) != kind(settings[key]) for key in settings):
            continue  # this entry is for a different variant
        expected = torch.tensor([logits])
        with suppress(Exception):  # in an edited model.py
            model = build(replace(config, n_members=1, **KNOWN["config"] | settings))
            found = known_logits(model, torch.tensor([KNOWN["text"]]))
            known = {name_of(name) for name in model.state_dict()} <= {*KNOWN["names"]}
            largest = float(expected.abs().max())
            if known and torch.allclose(found, expected, 2e-4, 2e-4 * largest):
                continue
        raise UserError(
            f"{reader} computes the formulas that model.py came with, but this model.py has been edited and"
            " computes something else; undo the edit, or use sample.py and score.py, which run model.py itself"
        )


def name_of(parameter: str) -> str:
    """Return the name of a parameter without the numbers of layers."""
    return re.sub(r"\.\d+\.", ".", parameter)


def kind(value: object) -> object:
    """Reduce a value to the variant that it selects: a name stays as it is, a number, bool or None becomes a bool."""
    return bool(value) if isinstance(value, int | float | None) else value
