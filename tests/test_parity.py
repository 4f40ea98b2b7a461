"""The GPT compared with Hugging Face's: with the same random weights, the same logits and gradients."""

import re

import pytest
import torch
from torch import Tensor

import model as models
from model import ModelConfig

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install -r requirements-dev.txt"
)

SHAPE = {"n_layer": 3, "n_head": 4, "n_embd": 48, "block_size": 96, "vocab_size": 71}
GPT2 = ModelConfig(**SHAPE, bias=True, activation="gelu_tanh")
LLAMA = ModelConfig(  # of the 6 frequencies of a head, one is kept, one interpolated, and four divided by 8
    **SHAPE,
    n_kv_head=2,
    n_hidden=100,
    position="rotary",
    rope_base=500.0,
    rope_factor=8.0,
    rope_original_context=32,
    norm="rmsnorm",
    mlp="gated",
    activation="silu",
    tie_weights=False,
)


def hf_gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(
        n_layer=3,
        n_head=4,
        n_embd=48,
        n_positions=96,
        vocab_size=71,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def hf_llama() -> torch.nn.Module:
    rope = {
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    config = transformers.LlamaConfig(
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=48,
        intermediate_size=100,
        vocab_size=71,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_theta=500.0,
        rope_scaling={
            "rope_type": "llama3",
            "original_max_position_embeddings": 32,
            **rope,
        },
    )
    return transformers.LlamaForCausalLM(config)


def to_gpt2_names(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights or gradients under GPT-2's names: queries, keys and values are one matrix, and all are transposed."""
    names = {
        "wte.": "transformer.wte.",
        "stack.position.wpe.": "transformer.wpe.",
        "stack.norm.": "transformer.ln_f.",
        "stack.blocks.": "transformer.h.",
        "attn_norm": "ln_1",
        "mlp_norm": "ln_2",
        "attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    }
    hf = {}
    for name, tensor in ours.items():
        if re.search(r"attn\.[kv]_proj", name):
            continue
        if "q_proj" in name:
            tensor = torch.cat(
                [
                    ours[name.replace("q_proj", part)]
                    for part in ("q_proj", "k_proj", "v_proj")
                ]
            )
            name = name.replace("q_proj", "c_attn")
        if ".blocks." in name and tensor.dim() == 2:
            tensor = tensor.T
        hf[renamed(name, names)] = tensor
    return hf


def to_llama_names(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights or gradients under Llama's names."""
    names = {
        "wte.": "model.embed_tokens.",
        "stack.norm.": "model.norm.",
        "stack.blocks.": "model.layers.",
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        ".attn.": ".self_attn.",
    }
    return {renamed(name, names): tensor for name, tensor in ours.items()}


def renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize(
    ("config", "make_hf", "to_hf_names"),
    [(GPT2, hf_gpt2, to_gpt2_names), (LLAMA, hf_llama, to_llama_names)],
    ids=["GPT-2", "Llama 3.1"],
)
def test_logits_and_gradients_are_those_of_hugging_face(config, make_hf, to_hf_names):
    torch.manual_seed(0)
    ours, hf = models.build(config), make_hf()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    weights = to_hf_names(dict(ours.named_parameters()))
    assert weights.keys() == dict(hf.named_parameters()).keys()
    hf.load_state_dict(
        {key: value.detach() for key, value in weights.items()}, strict=False
    )
    idx = torch.randint(71, (2, 97))

    logits, loss = ours(idx[:, :-1], idx[:, 1:])
    hf_logits = hf(idx[:, :-1]).logits
    torch.testing.assert_close(logits, hf_logits, atol=1e-4, rtol=1e-4)

    loss.backward()
    torch.nn.functional.cross_entropy(
        hf_logits.flatten(0, 1), idx[:, 1:].flatten()
    ).backward()
    gradients = to_hf_names(
        {name: parameter.grad for name, parameter in ours.named_parameters()}
    )
    for name, parameter in hf.named_parameters():
        torch.testing.assert_close(
            gradients[name],
            parameter.grad,
            atol=1e-4,
            rtol=1e-4,
            msg=lambda m, n=name: n + m,
        )


def test_frequency_scaling_changes_the_logits_of_a_text_of_this_length():
    torch.manual_seed(0)
    scaled = models.build(LLAMA)
    for parameter in scaled.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    torch.manual_seed(0)
    plain = models.build(ModelConfig(**{**vars(LLAMA), "rope_factor": 1.0}))
    plain.load_state_dict(scaled.state_dict())
    idx = torch.randint(71, (2, 96))
    assert (scaled(idx)[0] - plain(idx)[0]).abs().max() > 0.01
