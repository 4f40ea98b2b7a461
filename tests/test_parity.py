"""The GPT beside Hugging Face's: with the same random weights, the same logits and gradients."""

import re

import pytest
import torch
from torch import Tensor

import model as models
from model import ModelConfig

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -r requirements-dev.txt")

SHAPE = {"n_layer": 3, "n_head": 4, "n_embd": 48, "block_size": 96, "vocab_size": 71}
GPT2 = ModelConfig(**SHAPE, bias=True, activation="gelu_tanh")
LLAMA = ModelConfig(  # of the 6 pairs of a head, one turns as before, one in between, and four 8 times slower
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


def their_gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(
        n_layer=3, n_head=4, n_embd=48, n_positions=96, vocab_size=71, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


def their_llama() -> torch.nn.Module:
    rope = {"rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
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
        rope_scaling={"rope_type": "llama3", "original_max_position_embeddings": 32, **rope},
    )
    return transformers.LlamaForCausalLM(config)


def as_gpt2(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors, weights or gradients, under GPT-2's names: queries, keys and values are one, and all transposed."""
    names = {
        "wte.": "transformer.wte.",
        "stack.position.wpe.": "transformer.wpe.",
        "stack.norm.": "transformer.ln_f.",
        "stack.blocks.": "transformer.h.",
        "attn_norm": "ln_1",
        "mlp_norm": "ln_2",
        "attn.proj": "attn.c_proj",
        "mlp.fc": "mlp.c_fc",
        "mlp.proj": "mlp.c_proj",
    }
    theirs = {}
    for name, tensor in ours.items():
        if re.search(r"attn\.(key|value)", name):
            continue
        if "attn.query" in name:
            tensor = torch.cat([ours[name.replace("query", part)] for part in ("query", "key", "value")])
            name = name.replace("query", "c_attn")
        if ".blocks." in name and tensor.dim() == 2:
            tensor = tensor.T
        theirs[renamed(name, names)] = tensor
    return theirs


def as_llama(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors, weights or gradients, under Llama's names."""
    names = {
        "wte.": "model.embed_tokens.",
        "stack.norm.": "model.norm.",
        "stack.blocks.": "model.layers.",
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attn.query": "self_attn.q_proj",
        "attn.key": "self_attn.k_proj",
        "attn.value": "self_attn.v_proj",
        "attn.proj": "self_attn.o_proj",
        "mlp.proj": "mlp.down_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.fc": "mlp.up_proj",
    }
    return {renamed(name, names): tensor for name, tensor in ours.items()}


def renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize(
    ("config", "make_theirs", "as_theirs"),
    [(GPT2, their_gpt2, as_gpt2), (LLAMA, their_llama, as_llama)],
    ids=["GPT-2", "Llama 3.1"],
)
def test_logits_and_gradients_are_those_of_hugging_face(config, make_theirs, as_theirs):
    torch.manual_seed(0)
    ours, theirs = models.build(config), make_theirs()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    weights = as_theirs(dict(ours.named_parameters()))
    assert weights.keys() == dict(theirs.named_parameters()).keys()
    theirs.load_state_dict({key: value.detach() for key, value in weights.items()}, strict=False)
    idx = torch.randint(71, (2, 97))

    logits, loss = ours(idx[:, :-1], idx[:, 1:])
    their_logits = theirs(idx[:, :-1]).logits
    torch.testing.assert_close(logits, their_logits, atol=1e-4, rtol=1e-4)

    loss.backward()
    torch.nn.functional.cross_entropy(their_logits.flatten(0, 1), idx[:, 1:].flatten()).backward()
    gradients = as_theirs({name: parameter.grad for name, parameter in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: n + m)


def test_this_text_is_long_enough_for_the_frequency_scaling_to_matter():
    torch.manual_seed(0)
    scaled = models.build(LLAMA)
    for parameter in scaled.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    torch.manual_seed(0)
    plain = models.build(ModelConfig(**{**vars(LLAMA), "rope_factor": 1.0}))
    plain.load_state_dict(scaled.state_dict())
    idx = torch.randint(71, (2, 96))
    assert (scaled(idx)[0] - plain(idx)[0]).abs().max() > 0.01
