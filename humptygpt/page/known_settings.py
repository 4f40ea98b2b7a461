"""The settings that the page's JavaScript computes with: with others, its numbers would not be the model's."""

import dataclasses

from humptygpt.core.errors import UserError
from model import ModelConfig

COMPUTED = {
    "n_layer",
    "n_head",
    "n_kv_head",
    "n_embd",
    "head_size",
    "n_hidden",
    "block_size",
    "window",
    "vocab_size",
    "bias",
    "attn_bias",
    "mlp_bias",
    "tie_weights",
    "mlp_conv",
    "qk_norm",
    "rope_base",
    "rope_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_context",
    "norm_eps",
    "embed_norm",
    "logit_soft_cap",
}
VARIANTS = {  # the keys of the dictionaries in explain/model.js
    "model": ("window_mlp", "gpt", "transformer"),
    "embedding": ("table", "number"),
    "position": ("none", "learned", "sinusoidal", "rotary", "alibi"),
    "norm": ("layernorm", "rmsnorm", "none"),
    "block": ("pre_norm", "post_norm", "plain", "parallel"),
    "mlp": ("plain", "gated", "none"),
    "activation": ("gelu", "gelu_tanh", "relu", "silu", "relu_squared"),
}
TRAINING = {"dropout", "label_smoothing", "init", "lora_alpha", "lora_targets"}


def check_settings(config: ModelConfig) -> None:
    """Raise UserError for the first setting that the page would ignore or misread."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in VARIANTS:
            known = value in VARIANTS[field.name]
        elif field.name in COMPUTED:
            known = value is None or isinstance(value, int | float)
        else:
            known = field.name in TRAINING or value == field.default
        if not known:
            raise UserError(
                f"{field.name}={value} is a setting that the page does not compute with, so its numbers would not be"
                " the model's; teach it to explain/model.js and humptygpt/page/known_settings.py"
            )
