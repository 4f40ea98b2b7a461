"""Refuse models that the page's JavaScript, transformers or llama.cpp would compute differently than model.py.

reference.json has the settings of a tiny model, and the logits that the JavaScript computes for each variant of it.
Tests hold the JavaScript, transformers and llama.cpp equal to model.py.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from humptygpt.config import UserError
from humptygpt.tasks import build
from model import ModelConfig

REFERENCE = Path(__file__).with_name("reference.json")
TOKENIZERS = ("char", "byte", "sentencepiece", "gpt2", "bpe")  # in explain/tokenizer.js
TRAINING = {"dropout", "label_smoothing", "init"}


def known_values() -> dict[str, set]:
    """Map each setting of the page to its values in reference.json, which are all of its variants and some numbers."""
    reference = json.loads(REFERENCE.read_bytes())
    values = {"tokenizer": set(TOKENIZERS)}
    for settings in (
        reference["config"],
        *(settings for settings, _ in reference["logits"]),
    ):
        for key, value in settings.items():
            values.setdefault(key, set()).add(value)
    return values


def check_settings(config: ModelConfig, tokenizer: str) -> None:
    """Raise UserError for the first setting that the page would ignore or misread. tokenizer: its name."""
    known = known_values()
    for key, value in (vars(config) | {"tokenizer": tokenizer}).items():
        values = known.get(key, {getattr(type(config), key, None)})
        is_number = key in known and isinstance(value, int | float | None)
        if key not in TRAINING and value not in values and not is_number:
            raise UserError(
                f"{key}={value} is a setting that the page does not compute with, so its numbers would not be the"
                " model's; teach it to explain/ and add it to humptygpt/page/reference.json"
            )


def known_logits(model: nn.Module, idx: Tensor) -> Tensor:
    """Give a new model weights that are the same on every machine, and compute the logits after idx, (1, T): (1, V).

    Every weight has an effect, and float16 holds it exactly.
    """
    model.eval().requires_grad_(False)
    for n, p in enumerate(model.parameters()):
        i = torch.arange(p.numel()).view(p.shape)
        scale = 2 / p.shape[-1:].numel() ** 0.5
        p.copy_(((p.dim() != 2) + scale * (i * (i + 7 * n) % 61 / 30 - 1)).half())
    texts = {"source": idx} if model.has_encoder else {}
    return model(idx, **texts)[0][:, -1]


@torch.inference_mode()
def check_formulas(config: ModelConfig, reader: str) -> None:
    """Raise UserError if model.py was edited so that the reader, such as the page, computes this model differently."""
    reference = json.loads(REFERENCE.read_bytes())
    for settings, logits in reference["logits"]:
        if any(kind(getattr(config, key)) != kind(settings[key]) for key in settings):
            continue  # the model has none of these settings
        model = build(replace(config, **reference["config"] | settings))
        found = known_logits(model, torch.tensor([reference["text"]]))
        if not torch.allclose(found, torch.tensor([logits]), 2e-4, 2e-4):
            raise UserError(
                f"{reader} would not compute what this model.py computes: with {settings} it gives other logits"
            )


def kind(value: object) -> object:
    """Reduce a setting to its variant: a name, or whether a number or a switch is on."""
    return bool(value) if isinstance(value, int | float | None) else value
