"""GPT-2 and Llama models of transformers: read, they give its logits; written again, it opens them bit for bit."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import assert_same_weights
from safetensors.torch import load_file, save_file
from test_damage import (
    Code,
    Target,
    change_json,
    check_damages,
    cut_bytes,
    flip_bytes,
    replace_json,
)
from test_damage_checkpoint import OTHER_TENSORS
from test_model import VARIANTS, random_model
from torch import Tensor, nn

from humptygpt import checkpoint
from humptygpt.config import UserError
from humptygpt.convert.families import FAMILIES
from humptygpt.convert.huggingface import (
    read_pretrained,
    to_pretrained,
    to_theirs,
    write_pretrained,
)

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install -r requirements-dev.txt"
)
transformers.logging.disable_progress_bar()

IDX = torch.randint(11, (2, 24), generator=torch.Generator().manual_seed(0))
HF = Path("theirs")

# --------------------------------------------------------------------------------------
# Models of transformers


def gpt2(**settings) -> nn.Module:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 24, "vocab_size": 11}
    return randomized(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**sizes | NO_DROPOUT | settings)
        )
    )


def llama(**settings) -> nn.Module:
    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 32,
        "intermediate_size": 44,
    }
    sizes |= {
        "max_position_embeddings": 24,
        "vocab_size": 11,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return randomized(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | settings))
    )


NO_DROPOUT = dict.fromkeys(
    ["resid_pdrop", "embd_pdrop", "attn_pdrop", "bos_token_id", "eos_token_id"]
)
NO_DROPOUT |= dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)


def randomized(model: nn.Module) -> nn.Module:
    """All weights are random: at initialization norms and biases have no effect."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        is_norm = name.endswith("weight") and parameter.dim() == 1
        nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=0.3)
    return model.eval()


def rope_scaling(**changes) -> dict:
    """Of the frequencies of a head of 8, one stays, one is interpolated, and the others are divided."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 50.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
    }
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    return {"rope_parameters": scaling | changes}


# --------------------------------------------------------------------------------------
# Ways to save them


def save(model: nn.Module) -> None:
    model.save_pretrained(HF)


def save_bfloat16(model: nn.Module) -> None:
    save_rounded(model, torch.bfloat16)


def save_float16(model: nn.Module) -> None:
    save_rounded(model, torch.float16)


def save_rounded(model: nn.Module, dtype: torch.dtype) -> None:
    """The model itself gets the rounded weights, too, in float32: what it computes is not rounded."""
    copy.deepcopy(model).to(dtype).save_pretrained(HF)
    assert {tensor.dtype for tensor in load_file(HF / "model.safetensors").values()} == {
        dtype
    }
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()


def save_shards(model: nn.Module) -> None:
    model.save_pretrained(HF, max_shard_size="6KB")
    assert (
        len(list(HF.glob("model-*-of-*.safetensors"))) > 2
        and not (HF / "model.safetensors").exists()
    )


def save_without_prefix(model: nn.Module) -> None:
    """As the model without its head has it."""
    model.base_model.save_pretrained(HF)
    assert not [
        name
        for name in load_file(HF / "model.safetensors")
        if name.startswith(("transformer.", "model."))
    ]


def save_pickle(model: nn.Module) -> None:
    """As before safetensors: all names, those of tied weights and of buffers among them."""
    (HF / "model.safetensors").unlink(missing_ok=True)
    torch.save(with_buffers(model), HF / "pytorch_model.bin")


def save_legacy_pickle_shards(model: nn.Module) -> None:
    names = list(with_buffers(model))
    weight_map = {
        name: f"pytorch_model-{number % 3}.bin" for number, name in enumerate(names)
    }
    for shard in set(weight_map.values()):
        held = {
            name: tensor
            for name, tensor in with_buffers(model).items()
            if weight_map[name] == shard
        }
        torch.save(held, HF / shard, _use_new_zipfile_serialization=False)
    (HF / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def with_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and the buffers that older versions saved; config.json is in the folder."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(HF)
    weights = dict(model.state_dict(keep_vars=True))
    for layer in range(2):
        if "transformer.wte.weight" in weights:
            weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(
                1, 1, 24, 24, dtype=torch.bool
            ).tril()
            weights[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        else:
            weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    return weights


def save_old_config(model: nn.Module) -> None:
    """config.json as before transformers 5: rope_scaling beside rope_theta, and no key that has its default value."""
    save(model)
    content = json.loads((HF / "config.json").read_text())
    if rope := content.pop("rope_parameters", None):
        content["rope_theta"] = rope.pop("rope_theta")
        content["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    for key in (
        "tie_word_embeddings",
        "activation_function",
        "layer_norm_epsilon",
        "n_inner",
        "scale_attn_weights",
    ):
        content.pop(key, None)
    for key in (
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "attention_bias",
        "mlp_bias",
        "rms_norm_eps",
    ):
        content.pop(key, None)
    (HF / "config.json").write_text(json.dumps(content))


SHAPES = {
    "gpt2": (gpt2, {}, save),
    "gpt2, 3 heads of 5": (gpt2, {"n_head": 3, "n_embd": 15}, save),
    "gpt2, 1 head, 1 layer": (gpt2, {"n_head": 1, "n_layer": 1, "n_embd": 7}, save),
    "gpt2, 7 heads of 1, untied": (
        gpt2,
        {"n_head": 7, "n_embd": 7, "tie_word_embeddings": False},
        save,
    ),
    "gpt2, n_inner": (gpt2, {"n_inner": 37}, save),
    "gpt2, n_inner below n_embd": (gpt2, {"n_inner": 3}, save),
    "gpt2, gelu": (gpt2, {"activation_function": "gelu"}, save),
    "gpt2, relu": (gpt2, {"activation_function": "relu"}, save),
    "gpt2, relu2": (gpt2, {"activation_function": "relu2"}, save),
    "gpt2, silu": (gpt2, {"activation_function": "silu"}, save),
    "gpt2, large epsilon": (gpt2, {"layer_norm_epsilon": 0.5}, save),
    "gpt2, bfloat16": (gpt2, {}, save_bfloat16),
    "gpt2, float16, untied": (gpt2, {"tie_word_embeddings": False}, save_float16),
    "gpt2, shards": (gpt2, {}, save_shards),
    "gpt2, without prefix": (gpt2, {}, save_without_prefix),
    "gpt2, old config": (gpt2, {}, save_old_config),
    "gpt2, pickle": (gpt2, {}, save_pickle),
    "gpt2, untied, pickle": (gpt2, {"tie_word_embeddings": False}, save_pickle),
    "gpt2, 12 layers, shards of legacy pickles": (
        gpt2,
        {"n_layer": 12, "n_embd": 8},
        save_legacy_pickle_shards,
    ),
    "llama": (llama, {}, save),
    "llama, 3 heads of 6": (llama, {"num_attention_heads": 3, "hidden_size": 18}, save),
    "llama, 6 heads share 2": (
        llama,
        {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 36},
        save,
    ),
    "llama, 5 heads share 1": (
        llama,
        {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 30},
        save,
    ),
    "llama, tied": (llama, {"tie_word_embeddings": True}, save),
    "llama, wide heads": (llama, {"head_dim": 14, "num_key_value_heads": 2}, save),
    "llama, narrow heads, biases": (
        llama,
        {"head_dim": 2, "attention_bias": True, "mlp_bias": True},
        save,
    ),
    "llama, attention biases": (
        llama,
        {"attention_bias": True, "num_key_value_heads": 2},
        save,
    ),
    "llama, MLP biases": (llama, {"mlp_bias": True}, save),
    "llama, rope_theta": (
        llama,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        save,
    ),
    "llama, scaled": (llama, rope_scaling(), save),
    "llama, scaled, wide heads, tied, shards": (
        llama,
        rope_scaling(factor=32.0) | {"head_dim": 18, "tie_word_embeddings": True},
        save_shards,
    ),
    "llama, scaled, old config": (
        llama,
        rope_scaling() | {"rms_norm_eps": 1e-6},
        save_old_config,
    ),
    "llama, old config": (
        llama,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        save_old_config,
    ),
    "llama, large epsilon": (llama, {"rms_norm_eps": 0.5}, save),
    "llama, gelu_pytorch_tanh": (llama, {"hidden_act": "gelu_pytorch_tanh"}, save),
    "llama, relu": (llama, {"hidden_act": "relu"}, save),
    "llama, bfloat16": (llama, {"num_key_value_heads": 2}, save_bfloat16),
    "llama, float16, tied": (llama, {"tie_word_embeddings": True}, save_float16),
    "llama, tied, without prefix": (
        llama,
        {"tie_word_embeddings": True},
        save_without_prefix,
    ),
    "llama, pickle": (llama, {"num_key_value_heads": 1}, save_pickle),
    "llama, tied, shards of legacy pickles": (
        llama,
        {"tie_word_embeddings": True},
        save_legacy_pickle_shards,
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_gives_the_logits_of_transformers_and_goes_back_bit_for_bit(shape):
    make, settings, save = SHAPES[shape]
    theirs = make(**settings)
    save(theirs)
    config, weights = read_pretrained(HF)
    for tensor in weights.values():
        assert (
            tensor.dtype == torch.float32
            and tensor.is_contiguous()
            and not tensor.requires_grad
        )
    ours = checkpoint.restore_model(weights, config).eval()
    expected = theirs(IDX).logits.detach()
    torch.testing.assert_close(ours(IDX)[0], expected, atol=1e-4, rtol=1e-4)

    write_pretrained(ours, Path("back"))
    again, report = type(theirs).from_pretrained("back", output_loading_info=True)
    assert not any(report.values()), report
    assert_same_weights(again.float().state_dict(), theirs.state_dict())
    # not bit for bit: gelu_pytorch_tanh, which becomes gelu_new, rounds otherwise
    torch.testing.assert_close(again.eval()(IDX).logits, expected, atol=2e-6, rtol=2e-6)
    _, weights_again = read_pretrained(Path("back"))
    assert_same_weights(weights_again, weights)


GRADIENTS = {"gpt2": {}, "llama": rope_scaling() | {"num_key_value_heads": 2}}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_are_those_of_transformers(kind):
    theirs = {"gpt2": gpt2, "llama": llama}[kind](**GRADIENTS[kind])
    theirs.save_pretrained(HF)
    config, weights = read_pretrained(HF)
    ours = checkpoint.restore_model(weights, config)
    inputs, targets = IDX[:, :-1], IDX[:, 1:]
    ours(inputs, targets)[1].backward()
    logits = theirs(inputs).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    torch.testing.assert_close(
        to_theirs(FAMILIES[kind], config, gradients),
        {name: p.grad for name, p in theirs.named_parameters()},
        atol=1e-4,
        rtol=1e-4,
    )


# --------------------------------------------------------------------------------------
# Models of ours

ROTARY = {"position": "rotary", "norm": "rmsnorm", "mlp": "gated"}
EXPORTED = [
    {},  # without bias terms, which GPT-2 has
    {"bias": True, "activation": "gelu_tanh"},
    {"bias": True, "mlp_bias": False, "tie_weights": False},
    {"attn_bias": True, "n_kv_head": 2, "head_size": 16, "n_hidden": 40, "norm_eps": 0.3},
    {"dropout": 0.1, "label_smoothing": 0.1, "init": "zero", "window": 16},
    ROTARY,
    ROTARY | {"tie_weights": False, "n_kv_head": 1, "activation": "silu", "norm_eps": 0.3},
    ROTARY | {"head_size": 6, "bias": True, "n_hidden": 40, "rope_base": 50.0},
    ROTARY | {"bias": True, "attn_bias": False},
    ROTARY
    | {
        "mlp_bias": True,
        "rope_factor": 4.0,
        "rope_original_context": 8,
        "rope_high_freq_factor": 2.0,
    },
]


def opened(model: nn.Module) -> nn.Module:
    """The model of transformers with what to_pretrained says."""
    content, weights = to_pretrained(model)
    content = json.loads(json.dumps(content))
    theirs = getattr(transformers, content["architectures"][0])(
        transformers.AutoConfig.for_model(**content)
    ).eval()
    found = theirs.load_state_dict(weights, strict=False)
    assert found.missing_keys in ([], ["lm_head.weight"]) and not found.unexpected_keys
    assert (found.missing_keys == ["lm_head.weight"]) == model.config.tie_weights
    return theirs


@pytest.mark.parametrize(
    "keys",
    EXPORTED,
    ids=lambda keys: "-".join(f"{k}-{x}" for k, x in keys.items()) or "default",
)
def test_an_exported_model_gives_the_same_logits_in_transformers(keys):
    model = random_model(**keys).eval()
    idx = IDX[:, :16]
    torch.testing.assert_close(
        opened(model)(idx).logits, model(idx)[0], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("base", [{}, ROTARY], ids=["gpt2", "llama"])
def test_every_variant_is_refused_or_gives_the_same_logits_in_transformers(base):
    refused = 0
    for variant in VARIANTS:
        keys = base | variant
        model = random_model(**keys).eval()
        try:
            theirs = opened(model)
        except UserError as error:
            message = r"(\w+)=(.*) cannot be exported; .* needs (.*)"
            key, value, needed = re.fullmatch(message, str(error)).groups()
            assert str(getattr(model.config, key)) == value
            assert f"{key}=" in needed or (key == "n_embd" and "n_head=" in needed)
            refused += 1
            continue
        idx = IDX[:, : model.config.block_size]
        torch.testing.assert_close(
            theirs(idx).logits, model(idx)[0], atol=1e-4, rtol=1e-4, msg=str(keys)
        )
    assert len(VARIANTS) / 3 < refused < len(VARIANTS)


REFUSED = [
    (
        {"position": "alibi"},
        "position=alibi cannot be exported; export needs position=learned (gpt2) or position=rotary",
    ),
    ({"window": 5}, "window=5 cannot be exported; GPT2LMHeadModel needs window=0"),
    (
        {"model": "transformer"},
        "model=transformer cannot be exported; GPT2LMHeadModel needs model=gpt",
    ),
    (
        ROTARY | {"norm": "layernorm"},
        "norm=layernorm cannot be exported; LlamaForCausalLM needs norm=rmsnorm",
    ),
    (
        ROTARY | {"logit_soft_cap": 15.0},
        "logit_soft_cap=15.0 cannot be exported; LlamaForCausalLM needs logit_soft_cap=",
    ),
    (
        ROTARY | {"n_head": 3, "head_size": 6},
        "n_embd=32 cannot be exported; transformers needs a multiple of n_head=3",
    ),
]


@pytest.mark.parametrize(("keys", "complaint"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_exported_is_refused_by_name_and_nothing_is_written(keys, complaint):
    with pytest.raises(UserError, match=f"^{re.escape(complaint)}"):
        write_pretrained(random_model(**keys), HF)
    assert not HF.exists()


# --------------------------------------------------------------------------------------
# What cannot be read


def edit_config(**changes: object) -> Callable[[], None]:
    """config.json with these values; ...: without the key."""

    def edit() -> None:
        content = json.loads((HF / "config.json").read_text()) | changes
        content = {key: value for key, value in content.items() if value is not ...}
        (HF / "config.json").write_text(json.dumps(content))

    return edit


def edit_weights(edit: Callable[[dict], object]) -> Callable[[], None]:
    def apply() -> None:
        weights = load_file(HF / "model.safetensors")
        edit(weights)
        save_file(weights, HF / "model.safetensors")

    return apply


def pickled(content: object, **options) -> Callable[[], None]:
    """pytorch_model.bin in place of safetensors; content: what it holds, or a function of the weights."""

    def write() -> None:
        weights = load_file(HF / "model.safetensors")
        (HF / "model.safetensors").unlink()
        torch.save(
            content(weights) if callable(content) else content,
            HF / "pytorch_model.bin",
            **options,
        )

    return write


def damaged_pickle(damage: Callable[[bytes], bytes]) -> Callable[[], None]:
    def write() -> None:
        pickled(lambda weights: weights | {LN: torch.ones(32)})()
        path = HF / "pytorch_model.bin"
        path.write_bytes(damage(path.read_bytes()))

    return write


def sharded(weight_map: dict[str, str] | None = None, **content) -> Callable[[], None]:
    """Two files, each with all weights, and an index."""

    def write() -> None:
        (HF / "model.safetensors").rename(HF / "a.safetensors")
        shutil.copy(HF / "a.safetensors", HF / "b.safetensors")
        content_ = content or {"weight_map": weight_map}
        (HF / "model.safetensors.index.json").write_text(json.dumps(content_))

    return write


def write_config(text: str) -> Callable[[], object]:
    return lambda: (HF / "config.json").write_text(text)


def write_file(change: Callable[[bytes], bytes]) -> Callable[[], object]:
    path = HF / "model.safetensors"
    return lambda: path.write_bytes(change(path.read_bytes()))


LN, WTE = "transformer.h.1.ln_1.weight", "transformer.wte.weight"
WHOLE = "truncated, damaged or"
BAD = [
    # the folder and config.json
    (lambda: (HF / "config.json").unlink(), "config.json: No such file or directory"),
    (
        lambda: (HF / "model.safetensors").unlink(),
        "there is neither model.safetensors nor pytorch_model.bin",
    ),
    (write_config(""), "config.json: Expecting value: line 1"),
    (write_config("[1]"), "config.json: the content must be dict"),
    (write_config("[" * 10**5), "config.json: it is nested too deeply"),
    (edit_config(model_type=...), "config.json: model_type is missing"),
    (
        edit_config(model_type="mistral"),
        "model_type=mistral is not supported; gpt2 and llama are",
    ),
    (edit_config(model_type="a\nb\x1b[2J\ud800"), "model_type=a b [2J  is not supported"),
    (edit_config(n_layer=...), "config.json: n_layer is missing"),
    (edit_config(n_layer="2"), "n_layer='2' must be int"),
    (edit_config(n_head=3), "n_embd=32 must be a multiple of n_head=3"),
    (edit_config(tie_word_embeddings=None), "tie_weights=None must be bool"),
    (
        edit_config(activation_function="tanh"),
        "the activation tanh is not supported; gelu_new, ",
    ),
    (
        edit_config(scale_attn_weights=False),
        "scale_attn_weights=False is not supported; scale_attn_weights=True is",
    ),
    (edit_config(layer_norm_epsilon=float("nan")), "norm_eps=nan must be above 0"),
    (edit_config(layer_norm_epsilon=10**400), "norm_eps"),
    # absurd sizes
    (
        edit_config(n_embd=2**40),
        "n_embd=1099511627776 must be at least 1 and at most 1048576",
    ),
    (
        edit_config(vocab_size=2**62),
        "must be at least 1 and at most 1048576|do not describe its weights",
    ),
    (edit_config(n_layer=2**20), "n_layer=1048576 and n_embd=32 do not"),
    (edit_config(n_inner=2**20), "c_fc.bias must have shape (1048576,) and"),
    # weights
    (edit_weights(lambda weights: weights.pop(LN)), f"the weight {LN} is missing"),
    (
        edit_weights(lambda weights: weights.update({"x.y": torch.ones(2)})),
        "the weight transformer.x.y is unknown",
    ),
    (edit_config(n_layer=1), "the weight transformer.h.1.attn.c_attn.bias is unknown"),
    (
        edit_weights(lambda weights: weights.update({LN: torch.ones(33)})),
        f"{LN} must have shape (32,) and",
    ),
    (
        edit_weights(lambda weights: weights.update({LN: weights[LN].double()})),
        "and be in float32, bfloat16 or float16, but has (32,) and is in torch.float64",
    ),
    (
        edit_weights(lambda weights: weights.update({"lm_head.weight": weights[WTE] + 1})),
        "lm_head.weight must equal the embedding",
    ),
    (edit_config(tie_word_embeddings=False), "the weight lm_head.weight is missing"),
    # safetensors
    (write_file(lambda data: data[:-1]), f"model.safetensors is {WHOLE} holds more than"),
    (write_file(lambda data: data + b"x"), WHOLE),
    (write_file(lambda data: b"\xff" * 8 + data[8:]), WHOLE),
    (
        lambda: ((HF / "model.safetensors").unlink(), (HF / "model.safetensors").mkdir()),
        "cannot read the model in theirs: Is a directory",
    ),
    # shards
    (
        sharded({WTE: "a.safetensors", LN: "c.safetensors"}),
        "index.json names c.safetensors, which is missing",
    ),
    (
        sharded({WTE: "a.safetensors", LN: "../theirs/b.safetensors"}),
        "names ../theirs/b.safetensors, which is missing",
    ),
    (
        sharded({}),
        "the weight transformer.h.0.attn.c_attn.bias is missing|do not describe its weights",
    ),
    # pickles
    (
        pickled(lambda weights: weights | {LN: Code()}),
        f"pytorch_model.bin is {WHOLE} holds more than tensors and plain data",
    ),
    (pickled(Code(), _use_new_zipfile_serialization=False), WHOLE),
    (damaged_pickle(lambda data: data[:-100]), WHOLE),
    (
        damaged_pickle(
            lambda data: data.replace(b"\0\0\x80\x3f" * 3, b"\0\0\x80\x3e" * 3, 1)
        ),
        WHOLE,
    ),
    (pickled([1]), "pytorch_model.bin holds no dictionary of tensors by name"),
    (
        pickled(lambda weights: weights | {LN: [1.0]}),
        f"pytorch_model.bin: {LN} must be a dense tensor",
    ),
    (
        pickled(lambda weights: weights | {WTE: weights[WTE].to_sparse()}),
        f"{WTE} must be a dense tensor",
    ),
    (
        pickled(lambda weights: weights | {WTE: torch.zeros(()).expand(2**40, 32)}),
        f"{WTE} must be a dense tensor",
    ),
]
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
BAD_LLAMA = [
    (
        edit_config(rope_scaling={"type": "yarn", "factor": 2.0}),
        "rope_type=yarn is not supported; default and llama3 are",
    ),
    (
        edit_config(rope_scaling=ROPE),
        "config.json: original_max_position_embeddings is missing",
    ),
    (
        edit_config(rope_scaling=ROPE | {"original_max_position_embeddings": 0}),
        "rope_original_context=0 must be at least 1",
    ),
    (
        edit_config(
            rope_scaling=ROPE | {"original_max_position_embeddings": 8, "factor": 0}
        ),
        "rope_factor=0.0 must be at least 1",
    ),
    (edit_config(rope_scaling="linear"), "config.json: rope_scaling must be dict"),
    (
        edit_config(rope_parameters={"partial_rotary_factor": 0.5}),
        "partial_rotary_factor=0.5 is not supported",
    ),
    (edit_config(head_dim=7), "head_size=7 must be even"),
    (edit_config(num_key_value_heads=3), "n_head=2 must be a multiple of n_kv_head=3"),
    (edit_config(attention_bias=True), "self_attn.k_proj.bias is missing"),
    (
        edit_config(model_type="gpt2"),
        "config.json: n_embd is missing",
    ),
]


def check_refused(keys: dict, damage: Callable[[], object], complaint: str) -> None:
    write_pretrained(random_model(**keys), HF)
    read_pretrained(HF)
    damage()
    with pytest.raises(UserError) as refusal:
        read_pretrained(HF)
    line = str(refusal.value)
    assert (
        line.startswith("cannot read the model in theirs: ")
        and line.isprintable()
        and len(line) < 600
    )
    assert any(option in line for option in complaint.split("|")), line
    assert not Path("ran").exists()


@pytest.mark.parametrize(("damage", "complaint"), BAD, ids=range(len(BAD)))
def test_a_folder_that_is_incomplete_damaged_or_unsupported_is_refused_in_one_line(
    damage, complaint
):
    check_refused({}, damage, complaint)


@pytest.mark.parametrize(("damage", "complaint"), BAD_LLAMA, ids=range(len(BAD_LLAMA)))
def test_a_llama_that_cannot_be_built_is_refused_in_one_line(damage, complaint):
    check_refused(ROTARY, damage, complaint)


@pytest.mark.parametrize("number", range(len(OTHER_TENSORS)))
def test_any_kind_of_tensor_in_a_pickle_is_refused_in_one_line_or_read_as_it_is(number):
    model = random_model()
    write_pretrained(model, HF)
    other = OTHER_TENSORS[number](model.wte.weight.detach().clone())
    pickled(lambda weights: weights | {WTE: other})()
    try:
        found = read_pretrained(HF)[1]
    except UserError as error:
        assert str(error).isprintable()
    else:
        assert torch.equal(found["wte.weight"], other.float())


def read_all() -> None:
    """Read the folder; flipped bytes of a weight or of an epsilon give another model, which nothing reveals."""
    config, weights = read_pretrained(HF)
    checkpoint.restore_model(weights, config)


TARGETS = {
    "config.json": (change_json, change_json, change_json, replace_json, cut_bytes),
    "model.safetensors": (
        cut_bytes,
        cut_bytes,
        lambda data, rng: flip_bytes(data[:2000], rng) + data[2000:],
    ),
    "pytorch_model.bin": (cut_bytes, flip_bytes),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_refused_in_one_line_or_read(name):
    write_pretrained(random_model(n_layer=1, n_embd=8, **ROTARY), HF)
    if name == "pytorch_model.bin":
        pickled(lambda weights: weights)()
    check_damages(name, Target(HF / name, read_all, TARGETS[name]), range(100))
