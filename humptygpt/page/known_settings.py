"""Whether the page's JavaScript, transformers and llama.cpp compute what model.py computes.

reference.json has what they were tested with: the settings of a tiny model, and for each setting the logits that the
JavaScript computes. Tests hold the JavaScript, transformers and llama.cpp equal to model.py.
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
VARIANTS = {  # the keys of the dictionaries in explain/model.js
    "model": ("window_mlp", "number_mlp", "gpt", "transformer"),
    "attention": ("softmax",),
    "position": ("none", "learned", "sinusoidal", "rotary", "alibi"),
    "norm": ("layernorm", "rmsnorm", "none"),
    "block": ("pre_norm", "post_norm", "plain", "parallel"),
    "mlp": ("plain", "gated", "none"),
    "activation": ("gelu", "gelu_tanh", "relu", "silu", "relu_squared"),
    "tokenizer": ("char", "byte", "sentencepiece", "gpt2", "bpe"),  # in tokenizer.js
}
TRAINING = {"dropout", "label_smoothing", "init"}


def check_settings(config: ModelConfig, tokenizer: str) -> None:
    """Raise UserError for the first setting that the page would ignore or misread. tokenizer: its name."""
    computed = json.loads(REFERENCE.read_bytes())["config"]
    for key, value in (vars(config) | {"tokenizer": tokenizer}).items():
        if key in VARIANTS:
            known = value in VARIANTS[key]
        elif key in computed:
            known = isinstance(value, int | float | None)
        else:
            known = key in TRAINING or value == getattr(type(config), key)
        if not known:
            raise UserError(
                f"{key}={value} is a setting that the page does not compute with, so its numbers would not be the"
                " model's; teach it to explain/ and humptygpt/page/known_settings.py"
            )


def known_logits(model: nn.Module, idx: Tensor) -> Tensor:
    """Give a new model the same weights on every machine, and return the logits after idx, (1, T): (1, V).

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
    """Raise UserError if model.py was edited so that the reader of this model, say a page, computes something else."""
    reference = json.loads(REFERENCE.read_bytes())
    for settings, logits in reference["logits"]:
        if any(kind(getattr(config, key)) != kind(settings[key]) for key in settings):
            continue  # the model does not have them
        model = build(replace(config, **reference["config"] | settings))
        found = known_logits(model, torch.tensor([reference["text"]]))
        if not torch.allclose(found, torch.tensor([logits]), 2e-4, 2e-4):
            raise UserError(
                f"{reader} would not compute what this model.py computes: with {settings} it gives other logits"
            )


def kind(value: object) -> object:
    """The name of a variant; of a number or a switch, whether it is on."""
    return bool(value) if isinstance(value, int | float | None) else value
