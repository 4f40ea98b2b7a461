"""GPT-2 and Llama as Hugging Face's transformers has them: names of settings and weights, theirs and ours.

Each table is read in both directions. A further family is one more entry of FAMILIES.
"""

from typing import NamedTuple

SIZE = range(1, 2**20 + 1)  # the product of three of these, in bytes, is still an int64
REQUIRED = object()
ROPE_SCALING = [  # settings of rope_type=llama3, an entry of its own in config.json
    ("factor", "rope_factor", float, REQUIRED),
    ("low_freq_factor", "rope_low_freq_factor", float, REQUIRED),
    ("high_freq_factor", "rope_high_freq_factor", float, REQUIRED),
    ("original_max_position_embeddings", "rope_original_context", SIZE, REQUIRED),
]
ACTIVATION_NAMES = {  # theirs: ours; of several names for one of ours, the first is written
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu_squared",
}


class Family(NamedTuple):
    """Models that differ in the values of these settings alone."""

    architectures: list[
        str
    ]  # classes of transformers: with the head, which is written, without it
    prefix: (
        str  # of the names of all weights but the head's; files without a head may lack it
    )
    settings: list[tuple]  # key of config.json, of ModelConfig, its schema, its default
    supported: dict[
        str, object
    ]  # further keys of config.json, and the value that is supported
    fixed: dict[str, object]  # settings of ours that all these models have
    weights: dict[
        str, list[str]
    ]  # theirs: ours, several are concatenated; #: number of the block
    transposed: bool  # whether the matrices of blocks are (inputs, outputs), unlike ours
    no_weights: (
        str  # regular expression for buffers that older files hold beside the weights
    )
    dropouts: list[str]  # keys of config.json
    preset: str  # a config file whose models are exported as this family


GPT2 = Family(
    architectures=["GPT2LMHeadModel", "GPT2Model"],
    prefix="transformer.",
    settings=[
        ("vocab_size", "vocab_size", SIZE, REQUIRED),
        ("n_positions", "block_size", SIZE, REQUIRED),
        ("n_embd", "n_embd", SIZE, REQUIRED),
        ("n_layer", "n_layer", SIZE, REQUIRED),
        ("n_head", "n_head", SIZE, REQUIRED),
        ("n_inner", "n_hidden", (SIZE, None), None),
        ("activation_function", "activation", str, "gelu_new"),
        ("layer_norm_epsilon", "norm_eps", float, 1e-5),
        ("tie_word_embeddings", "tie_weights", bool, True),
    ],
    supported={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    fixed={
        "position": "learned",
        "norm": "layernorm",
        "mlp": "plain",
        "bias": True,
        "attn_bias": None,
        "mlp_bias": None,
    },
    weights={
        "transformer.wte": ["wte"],
        "transformer.wpe": ["stack.position.wpe"],
        "transformer.h.#.ln_1": ["stack.blocks.#.attn_norm"],
        "transformer.h.#.attn.c_attn": [
            f"stack.blocks.#.attn.{part}_proj" for part in "qkv"
        ],
        "transformer.h.#.attn.c_proj": ["stack.blocks.#.attn.o_proj"],
        "transformer.h.#.ln_2": ["stack.blocks.#.mlp_norm"],
        "transformer.h.#.mlp.c_fc": ["stack.blocks.#.mlp.up_proj"],
        "transformer.h.#.mlp.c_proj": ["stack.blocks.#.mlp.down_proj"],
        "transformer.ln_f": ["stack.norm"],
        "lm_head": ["lm_head"],
    },
    transposed=True,
    no_weights=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
    dropouts=["embd_pdrop", "attn_pdrop", "resid_pdrop"],
    preset="config/gpt2_124m.py",
)
LLAMA = Family(
    architectures=["LlamaForCausalLM", "LlamaModel"],
    prefix="model.",
    settings=[
        ("vocab_size", "vocab_size", SIZE, REQUIRED),
        ("max_position_embeddings", "block_size", SIZE, REQUIRED),
        ("hidden_size", "n_embd", SIZE, REQUIRED),
        ("num_hidden_layers", "n_layer", SIZE, REQUIRED),
        ("num_attention_heads", "n_head", SIZE, REQUIRED),
        ("num_key_value_heads", "n_kv_head", (SIZE, None), None),
        ("head_dim", "head_size", (SIZE, None), None),
        ("intermediate_size", "n_hidden", SIZE, REQUIRED),
        ("hidden_act", "activation", str, "silu"),
        ("attention_bias", "attn_bias", bool, False),
        ("mlp_bias", "mlp_bias", bool, False),
        ("rms_norm_eps", "norm_eps", float, 1e-6),
        ("rope_theta", "rope_base", float, 10000.0),
        ("tie_word_embeddings", "tie_weights", bool, False),
    ],
    supported={"partial_rotary_factor": 1},
    fixed={"position": "rotary", "norm": "rmsnorm", "mlp": "gated"},
    weights={
        "model.embed_tokens": ["wte"],
        "model.layers.#.input_layernorm": ["stack.blocks.#.attn_norm"],
        "model.layers.#.self_attn.q_proj": ["stack.blocks.#.attn.q_proj"],
        "model.layers.#.self_attn.k_proj": ["stack.blocks.#.attn.k_proj"],
        "model.layers.#.self_attn.v_proj": ["stack.blocks.#.attn.v_proj"],
        "model.layers.#.self_attn.o_proj": ["stack.blocks.#.attn.o_proj"],
        "model.layers.#.post_attention_layernorm": ["stack.blocks.#.mlp_norm"],
        "model.layers.#.mlp.gate_proj": ["stack.blocks.#.mlp.gate_proj"],
        "model.layers.#.mlp.up_proj": ["stack.blocks.#.mlp.up_proj"],
        "model.layers.#.mlp.down_proj": ["stack.blocks.#.mlp.down_proj"],
        "model.norm": ["stack.norm"],
        "lm_head": ["lm_head"],
    },
    transposed=False,
    no_weights=r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    dropouts=["attention_dropout"],
    preset="config/shakespeare_char_llama.py",
)
FAMILIES = {"gpt2": GPT2, "llama": LLAMA}  # by config.json's model_type
