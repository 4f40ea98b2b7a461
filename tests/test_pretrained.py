"""GPT-2 and Llama models of transformers: read, they give its logits; written again, it opens them bit for bit."""

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import assert_same_weights
from safetensors.torch import load_file, save_file
from test_damage import (
    Target,
    change_json,
    check_damages,
    cut_bytes,
    flip_bytes,
    replace_json,
)
from test_model import VARIANTS, random_model
from torch import Tensor, nn

from humptygpt.cli import UserError
from humptygpt.formats.families import FAMILIES, ROPE_SCALING
from humptygpt.formats.huggingface import (
    read_pretrained,
    to_pretrained,
    to_theirs,
    write_pretrained,
)

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -r requirements-dev.txt")
transformers.logging.disable_progress_bar()

IDX = torch.randint(11, (2, 24), generator=torch.Generator().manual_seed(0))
HF = Path("theirs")

# --------------------------------------------------------------------------------------
# Models of transformers


NONE = dict.fromkeys(["bos_token_id", "eos_token_id"])
NO_DROPOUT = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)


def gpt2(**settings) -> nn.Module:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 24, "vocab_size": 11}
    config = transformers.GPT2Config(**sizes | NO_DROPOUT | NONE | settings)
    return randomized(transformers.GPT2LMHeadModel(config))


def llama(**settings) -> nn.Module:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    sizes |= {"intermediate_size": 44, "max_position_embeddings": 24, "vocab_size": 11}
    config = transformers.LlamaConfig(**sizes | NONE | settings)
    return randomized(transformers.LlamaForCausalLM(config))


def randomized(model: nn.Module) -> nn.Module:
    """All weights are random: at initialization norms and biases have no effect."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        is_norm = name.endswith("weight") and parameter.dim() == 1
        nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=0.3)
    return model.eval()


def rope_scaling(**changes) -> dict:
    """With a head of 8, one frequency stays, one is interpolated, and the others are divided."""
    return {"rope_parameters": ROPE | {"rope_theta": 50.0} | changes}


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}

# --------------------------------------------------------------------------------------
# Ways to save them


def save(model: nn.Module) -> None:
    model.save_pretrained(HF)


def save_bfloat16(model: nn.Module) -> None:
    """The model itself gets the rounded weights in float32: what it computes is not rounded."""
    copy.deepcopy(model).bfloat16().save_pretrained(HF)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()


def save_shards(model: nn.Module) -> None:
    model.save_pretrained(HF, max_shard_size="6KB")
    assert len(list(HF.glob("model-*-of-*.safetensors"))) > 2


def save_without_prefix(model: nn.Module) -> None:
    """Save the names of the model without its head."""
    model.base_model.save_pretrained(HF)


def save_with_buffers(model: nn.Module) -> None:
    """Save all names, as the Hub's GPT-2 has them: also of tied weights and of buffers."""
    weights = {name: x.detach().clone() for name, x in with_buffers(model).items()}
    save_file(weights, HF / "model.safetensors")


def with_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and the buffers that older versions saved; config.json is in the folder."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(HF)
    weights = dict(model.state_dict(keep_vars=True))
    for layer in range(2):
        if "transformer.wte.weight" in weights:
            name = f"transformer.h.{layer}.attn"
            weights[f"{name}.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()
            weights[f"{name}.masked_bias"] = torch.tensor(-1e4)
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
    for key in {*FAMILIES["gpt2"].defaults, *FAMILIES["llama"].defaults} - {"rope_theta"}:
        content.pop(key, None)
    (HF / "config.json").write_text(json.dumps(content))


UNTIED, TIED = ({"tie_word_embeddings": tied} for tied in (False, True))
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
SHAPES = {
    "gpt2, 3 heads of 5": (gpt2, {"n_head": 3, "n_embd": 15, "n_inner": 37}, save),
    "gpt2, large epsilon, untied": (gpt2, UNTIED | {"layer_norm_epsilon": 0.5}, save),
    "gpt2, bfloat16": (gpt2, {}, save_bfloat16),
    "gpt2, shards": (gpt2, {}, save_shards),
    "gpt2, without prefix": (gpt2, {}, save_without_prefix),
    "gpt2, old config": (gpt2, {}, save_old_config),
    "gpt2, buffers": (gpt2, {}, save_with_buffers),
    "gpt2, 12 layers": (gpt2, {"n_layer": 12, "n_embd": 8}, save),
    "llama, 3 heads of 6": (llama, {"num_attention_heads": 3, "hidden_size": 18}, save),
    "llama, 4 heads share 1": (llama, {"num_key_value_heads": 1}, save),
    "llama, wide heads": (llama, {"head_dim": 14, "num_key_value_heads": 2}, save),
    "llama, biases": (llama, {"head_dim": 2, "attention_bias": True}, save),
    "llama, MLP biases": (llama, {"mlp_bias": True, "rms_norm_eps": 0.5}, save),
    "llama, scaled, tied, shards": (llama, rope_scaling(factor=32.0) | TIED, save_shards),
    "llama, scaled, old config": (llama, rope_scaling(), save_old_config),
    "llama, old config": (llama, THETA, save_old_config),
    "llama, bfloat16": (llama, {"num_key_value_heads": 2}, save_bfloat16),
    "llama, tied, without prefix": (llama, TIED, save_without_prefix),
    "llama, tied, buffers": (llama, TIED, save_with_buffers),
}
for name in ("gelu", "relu", "relu2", "silu"):
    SHAPES[f"gpt2, {name}"] = (gpt2, {"activation_function": name}, save)
SHAPES["llama, gelu"] = (llama, {"hidden_act": "gelu_pytorch_tanh"}, save)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_gives_the_logits_of_transformers_and_goes_back_bit_for_bit(shape):
    make, settings, save = SHAPES[shape]
    theirs = make(**settings)
    save(theirs)
    ours = read_pretrained(HF).eval()
    for tensor in ours.state_dict().values():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
    expected = theirs(IDX).logits.detach()
    torch.testing.assert_close(ours(IDX)[0], expected, atol=1e-4, rtol=1e-4)

    write_pretrained(ours, Path("back"))
    again, report = type(theirs).from_pretrained("back", output_loading_info=True)
    assert not any(report.values()), report
    assert_same_weights(again.float().state_dict(), theirs.state_dict())
    # not bit for bit: gelu_pytorch_tanh, which becomes gelu_new, rounds otherwise
    torch.testing.assert_close(again.eval()(IDX).logits, expected, atol=2e-6, rtol=2e-6)
    assert_same_weights(read_pretrained(Path("back")).state_dict(), ours.state_dict())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_that_is_called_tied_but_has_its_own_head_keeps_it_and_a_note_says_so(kind, capsys):
    make = {"gpt2": gpt2, "llama": llama}[kind]
    make(**UNTIED).save_pretrained(HF)
    edit_config(**TIED)()
    theirs = type(make()).from_pretrained(HF).eval()
    assert not torch.equal(theirs.lm_head.weight, theirs.get_input_embeddings().weight)
    ours = read_pretrained(HF).eval()
    expected = theirs(IDX).logits.detach()
    torch.testing.assert_close(ours(IDX)[0], expected, atol=1e-4, rtol=1e-4)
    assert "note: the model in theirs has its own head" in capsys.readouterr().err


GRADIENTS = {"gpt2": {}, "llama": rope_scaling() | {"num_key_value_heads": 2}}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_are_those_of_transformers(kind):
    theirs = {"gpt2": gpt2, "llama": llama}[kind](**GRADIENTS[kind])
    theirs.save_pretrained(HF)
    ours = read_pretrained(HF)
    inputs, targets = IDX[:, :-1], IDX[:, 1:]
    ours(inputs, targets)[1].backward()
    logits = theirs(inputs).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    torch.testing.assert_close(
        to_theirs(FAMILIES[kind], ours.config, gradients),
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
    {"attn_bias": True, "n_hidden": 40, "norm_eps": 0.3},
    {"dropout": 0.1, "label_smoothing": 0.1, "init": "zero"},
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
    config = transformers.AutoConfig.for_model(**content)
    theirs = getattr(transformers, content["architectures"][0])(config).eval()
    found = theirs.load_state_dict(weights, strict=False)
    assert found.missing_keys in ([], ["lm_head.weight"]) and not found.unexpected_keys
    assert (found.missing_keys == ["lm_head.weight"]) == model.config.tie_weights
    return theirs


@pytest.mark.parametrize("base", [{}, ROTARY], ids=["gpt2", "llama"])
def test_every_variant_is_refused_or_gives_the_same_logits_in_transformers(base):
    refused = 0
    for variant in [*VARIANTS, *EXPORTED]:
        keys = base | variant
        model = random_model(**keys).eval()
        try:
            theirs = opened(model)
        except UserError as error:
            assert variant not in EXPORTED, error
            message = r"(.*) cannot be exported; \w+ needs (.*), as in config/.*"
            own, needed = re.fullmatch(message, str(error)).groups()
            named = dict(each.split("=") for each in own.split(", "))
            for key, value in named.items():
                assert str(getattr(model.config, key)) == value
            assert list(named) == re.findall(r"(?:^|, )(\w+)=", needed)
            refused += 1
            continue
        idx = IDX[:, : model.config.block_size]
        torch.testing.assert_close(theirs(idx).logits, model(idx)[0], atol=1e-4, rtol=1e-4, msg=str(keys))
    assert len(VARIANTS) / 3 < refused < len(VARIANTS)


GPT2, LLAMA = ("GPT2LMHeadModel needs", "LlamaForCausalLM needs")
REFUSED = {
    "position=alibi": ({}, f"{LLAMA} position=rotary"),
    "window=5": ({}, f"{GPT2} window=0"),
    "model=transformer": ({}, f"{GPT2} model=gpt"),
    "norm=layernorm": (ROTARY, f"{LLAMA} norm=rmsnorm"),
    "logit_soft_cap=15.0": (ROTARY, f"{LLAMA} logit_soft_cap="),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_cannot_be_exported_is_refused_by_name_and_nothing_is_written(setting):
    keys, needed = REFUSED[setting]
    key, _, text = setting.partition("=")
    value = text if text.isalpha() else json.loads(text)
    family, needed = needed.split(" needs ")
    parts = (f"{setting}.* cannot be exported", f"{family} needs .*{needed}.*")
    with pytest.raises(UserError, match=f"{'; '.join(parts)} as in config/.*py$"):
        write_pretrained(random_model(**keys | {key: value}), HF)
    assert not HF.exists()


@pytest.mark.parametrize("family", FAMILIES.values())
def test_a_family_states_every_setting_that_changes_what_a_model_computes(family):
    stated = {*family.fixed, *family.settings.values(), *ROPE_SCALING.values()}
    not_stated = vars(random_model().config).keys() - stated
    assert not_stated - {"rope_base"} == {"dropout", "label_smoothing"}
    assert "rope_base" in stated or family.fixed["position"] != "rotary"


@pytest.mark.parametrize("base", [{}, ROTARY], ids=["gpt2", "llama"])
def test_a_part_of_the_users_own_is_refused_by_name(base, monkeypatch):
    for key, variants in random_model().config.choices().items():
        if isinstance(variants, dict) and key != "init":  # trained weights do not depend on it
            first = random_model(**base).config
            monkeypatch.setitem(variants, "own", variants[getattr(first, key)])
            with pytest.raises(UserError, match=f"{key}=own.* cannot be exported; .* needs .*{key}="):
                to_pretrained(random_model(**base | {key: "own"}))


# --------------------------------------------------------------------------------------
# Damage and unsupported models


def edit_config(**changes: object) -> Callable[[], None]:
    """config.json with these values."""

    def edit() -> None:
        content = json.loads((HF / "config.json").read_text()) | changes
        (HF / "config.json").write_text(json.dumps(content))

    return edit


def edit_weights(edit: Callable[[dict], dict]) -> Callable[[], None]:
    path = HF / "model.safetensors"
    return lambda: save_file(edit(load_file(path)), path)


def sharded(weight_map: dict[str, str]) -> Callable[[], None]:
    """Two files, each with all weights, and an index."""

    def write() -> None:
        (HF / "model.safetensors").rename(HF / "a.safetensors")
        shutil.copy(HF / "a.safetensors", HF / "b.safetensors")
        index = json.dumps({"weight_map": weight_map})
        (HF / "model.safetensors.index.json").write_text(index)

    return write


LN, WTE = "transformer.h.1.ln_1.weight", "transformer.wte.weight"
HEAD = "lm_head.weight"
BAD = [
    # the folder and config.json
    (lambda: (HF / "config.json").unlink(), "config.json: [Errno 2] No such file"),
    (
        edit_config(model_type="mistral"),
        "config.json: model_type=mistral is not one of: gpt2, llama",
    ),
    (edit_config(n_layer="2"), "n_layer='2' must be int"),
    (edit_config(activation_function="tanh"), "activation=tanh is not one of: "),
    (edit_config(scale_attn_by_inverse_layer_idx=True), "layer_idx=True is not supported"),
    (edit_config(scale_attn_weights=False), "scale_attn_weights=False is not supported"),
    # absurd sizes
    (edit_config(n_embd=2**40), "n_embd=1099511627776 must be from 1 to"),
    (edit_config(n_layer=2**12), "n_layer=4096 and n_embd=32 do not"),
    (
        edit_config(n_inner=2**20),
        "must be a dense, contiguous tensor of torch.float32 and shape (1048576, 32)",
    ),
    # weights
    (
        edit_weights(lambda x: {k: x[k] for k in x.keys() - {LN}}),
        f"it lacks the weight {LN}, which this code needs",
    ),
    (
        edit_weights(lambda x: x | {"x.y": torch.ones(2)}),
        "it has the weight transformer.x.y, which this code does not know",
    ),
    (
        edit_weights(lambda x: x | {LN: torch.ones(33)}),
        f"the weight {LN} must be a dense, contiguous tensor of torch.float32 and shape (32,)",
    ),
    (
        edit_config(tie_word_embeddings=False),
        f"it lacks the weight {HEAD}, which this code needs",
    ),
    # safetensors and shards
    (
        sharded({WTE: "../x/c.safetensors"}),
        "[Errno 2] No such file or directory: 'theirs/c.saf",
    ),
    (sharded({}), "do not match its weights"),
]


BAD_LLAMA = [
    (edit_config(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported"),
    (
        edit_config(rope_scaling={"type": "yarn"}),
        "config.json: rope_type=yarn is not one of: default, llama3",
    ),
    (edit_config(rope_scaling={"type": "llama3"}), "rope_factor=None must be float"),
    (edit_config(rope_scaling=ROPE | {"factor": 0}), "rope_factor=0.0 must be from 1"),
    (edit_config(rope_scaling="linear"), "config.json: TypeError: "),
]


@pytest.mark.parametrize(
    ("keys", "damage", "complaint"),
    [*(({}, *case) for case in BAD), *((ROTARY, *case) for case in BAD_LLAMA)],
    ids=range(len(BAD + BAD_LLAMA)),
)
def test_what_is_incomplete_damaged_or_unsupported_is_refused_in_one_line(keys, damage, complaint):
    write_pretrained(random_model(**keys), HF)
    read_pretrained(HF)
    damage()
    with pytest.raises(UserError) as refusal:
        read_pretrained(HF)
    line = str(refusal.value)
    assert line.startswith("cannot read the model in theirs: ")
    assert line.isprintable() and len(line) < 600
    assert complaint in line
    assert not Path("ran").exists()


def test_pickled_weights_are_refused_with_the_command_that_rewrites_them():
    theirs = gpt2()
    weights = with_buffers(theirs)
    torch.save(weights, HF / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"there is no model\.safetensors in theirs") as error:
        read_pretrained(HF)
    command = str(error.value).partition("rewrites it: python ")[2]
    subprocess.run([sys.executable, *shlex.split(command)], check=True)
    expected = theirs(IDX).logits
    torch.testing.assert_close(read_pretrained(HF)(IDX)[0], expected, atol=1e-4, rtol=1e-4)


def read_all() -> None:
    """Read the folder; flipped bytes of a weight or of an epsilon give another model, which nothing reveals."""
    read_pretrained(HF)


TARGETS = {
    "config.json": (change_json, change_json, change_json, replace_json, cut_bytes),
    "model.safetensors": (
        cut_bytes,
        cut_bytes,
        lambda data, rng: flip_bytes(data[:2000], rng) + data[2000:],
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_refused_in_one_line_or_read(name):
    write_pretrained(random_model(n_layer=1, n_embd=8, **ROTARY), HF)
    check_damages(name, Target(HF / name, read_all, TARGETS[name]), range(100))
