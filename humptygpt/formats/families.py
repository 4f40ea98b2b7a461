"""GPT-2 and Llama: transformers' names for their settings and weights, and ours.

Each table is used for both import and export. To support another family, add an entry to FAMILIES.
"""

from dataclasses import dataclass

from humptygpt.cli import UserError
from humptygpt.model import ModelConfig

ROPE_SCALING = {  # settings of rope_type=llama3, which config.json keeps in an entry of their own
    "factor": "rope_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_context",
}
ACTIVATION_NAMES = {  # {transformers' name: our name}; if two map to the same name, export writes the later one
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "relu": "relu",
    "relu2": "relu_squared",
}
# settings of ours that every family has: variants of ours that transformers lacks are off
COMMON = {
    "mlp_conv": 0,
    "qk_norm": False,
    "embed_norm": False,
    "logit_soft_cap": 0.0,
    "window": 0,
    "block": "pre_norm",
    "attention": "softmax",
    "init": "gpt2",
    "model": "gpt",
    "n_members": 1,
}
# settings that are not exported: biases that a model lacks are 0, only rotary positions have a base, and the others are
# for training
NOT_EXPORTED = {
    "bias",
    "attn_bias",
    "mlp_bias",
    "rope_base",
    "init",
    "dropout",
    "label_smoothing",
}


@dataclass(frozen=True)
class Family:
    """An architecture in transformers. Models of a family differ only in the values of `settings`."""

    name: str  # model_type in config.json
    architecture: str  # name of the class in transformers
    # prefix of all weight names except the head's; files saved without a head may omit it
    prefix: str
    settings: dict[str, str]  # {key of config.json: key of ModelConfig}
    # keys that config.json may omit, with their defaults in transformers; other keys default to None
    defaults: dict[str, object]
    fixed: dict[str, object]  # {key of ModelConfig: its value in the whole family}
    # {layer in transformers: our layers, separated by spaces and concatenated}, the embedding first; "#" stands for the
    # index of a block
    weights: dict[str, str]
    transposed: bool  # True: matrices in blocks are (inputs, outputs), unlike ours
    preset: str  # one of our config files that describes a model of this family


GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    settings={
        "vocab_size": "vocab_size",
        "n_positions": "block_size",
        "n_embd": "n_embd",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_inner": "n_hidden",
        "activation_function": "activation",
        "layer_norm_epsilon": "norm_eps",
        "tie_word_embeddings": "tie_weights",
    },
    defaults={
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    fixed=COMMON
    | {
        "position": "learned",
        "norm": "layernorm",
        "mlp": "plain",
        "n_kv_head": None,
        "head_size": None,
        "bias": True,
        "attn_bias": None,
        "mlp_bias": None,
    },
    weights={
        "transformer.wte": "wte",
        "transformer.wpe": "stack.position.wpe",
        "transformer.h.#.ln_1": "stack.blocks.#.attn_norm",
        "transformer.h.#.attn.c_attn": (
            "stack.blocks.#.attn.q_proj stack.blocks.#.attn.k_proj stack.blocks.#.attn.v_proj"
        ),
        "transformer.h.#.attn.c_proj": "stack.blocks.#.attn.o_proj",
        "transformer.h.#.ln_2": "stack.blocks.#.mlp_norm",
        "transformer.h.#.mlp.c_fc": "stack.blocks.#.mlp.up_proj",
        "transformer.h.#.mlp.c_proj": "stack.blocks.#.mlp.down_proj",
        "transformer.ln_f": "stack.norm",
        "lm_head": "lm_head",
    },
    transposed=True,
    preset="config/gpt2_124m.py",
)
LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    settings={
        "vocab_size": "vocab_size",
        "max_position_embeddings": "block_size",
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "head_dim": "head_size",
        "intermediate_size": "n_hidden",
        "hidden_act": "activation",
        "attention_bias": "attn_bias",
        "mlp_bias": "mlp_bias",
        "rms_norm_eps": "norm_eps",
        "rope_theta": "rope_base",
        "tie_word_embeddings": "tie_weights",
    },
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    fixed=COMMON | {"position": "rotary", "norm": "rmsnorm", "mlp": "gated", "bias": False},
    weights={
        "model.embed_tokens": "wte",
        "model.layers.#.input_layernorm": "stack.blocks.#.attn_norm",
        "model.layers.#.self_attn.q_proj": "stack.blocks.#.attn.q_proj",
        "model.layers.#.self_attn.k_proj": "stack.blocks.#.attn.k_proj",
        "model.layers.#.self_attn.v_proj": "stack.blocks.#.attn.v_proj",
        "model.layers.#.self_attn.o_proj": "stack.blocks.#.attn.o_proj",
        "model.layers.#.post_attention_layernorm": "stack.blocks.#.mlp_norm",
        "model.layers.#.mlp.gate_proj": "stack.blocks.#.mlp.gate_proj",
        "model.layers.#.mlp.up_proj": "stack.blocks.#.mlp.up_proj",
        "model.layers.#.mlp.down_proj": "stack.blocks.#.mlp.down_proj",
        "model.norm": "stack.norm",
        "lm_head": "lm_head",
    },
    transposed=False,
    preset="config/exportable.py",
)
FAMILIES = {family.name: family for family in (GPT2, LLAMA)}


def find_family(config: ModelConfig) -> Family:
    """Return the family that a model with this config is exported as. Raises UserError that names all obstacles."""
    family = GPT2 if config.position == "learned" else LLAMA
    free = {*family.settings.values(), *ROPE_SCALING.values(), *NOT_EXPORTED}
    # a key that is not in the tables is a user's own, and off by default
    needed = {
        key: value
        for key, value in (vars(ModelConfig()) | family.fixed).items()
        if key not in free and getattr(config, key) != value
    }
    known = dict.fromkeys(ACTIVATION_NAMES.values())
    if config.activation not in known:
        needed["activation"] = " or ".join(known)
    if config.n_embd % config.n_head:
        needed["n_embd"] = f"a multiple of n_head={config.n_head}"
    if needed:
        own = ", ".join(f"{key}={getattr(config, key)}" for key in needed)
        asked = ", ".join(f"{key}={value}" for key, value in needed.items())
        raise UserError(f"{own} cannot be exported; {family.architecture} needs {asked}, as in {family.preset}")
    return family
