"""The settings that the page's JavaScript computes with: with others, its numbers would not be the model's."""

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
    "tokenizer": ("char", "byte", "sentencepiece", "gpt2", "bpe"),  # in tokenizer.js
}
TRAINING = {"dropout", "label_smoothing", "init", "lora_alpha", "lora_targets"}


def check_settings(config: ModelConfig, tokenizer: str) -> None:
    """Raise UserError for the first setting that the page would ignore or misread. tokenizer: its name."""
    for key, value in (vars(config) | {"tokenizer": tokenizer}).items():
        if key in VARIANTS:
            known = value in VARIANTS[key]
        elif key in COMPUTED:
            known = isinstance(value, int | float | None)
        else:
            known = key in TRAINING or value == getattr(type(config), key)
        if not known:
            raise UserError(
                f"{key}={value} is a setting that the page does not compute with, so its numbers would not be the"
                " model's; teach it to explain/ and humptygpt/page/known_settings.py"
            )
