"""Models made for generation: the same results by fewer and smaller products."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_model import (
    combinations,
    every_position_and_block,
    every_variant,
    random_model,
    tokens,
)

import model as models
from humptygpt import decoder as inference
from humptygpt import layers
from humptygpt.compiled import CompiledGPT, make_generator
from humptygpt.config import UserError
from humptygpt.decoder import ProductLinear, prepare_for_generation
from humptygpt.sampling import Context, generate
from humptygpt.translation.beams import translate
from model import POSITIONS, rotate

FLOAT = {"dtype": torch.float32, "device": torch.device("cpu"), "compiles": False}


def logits_in_pieces(model, idx, padding=None) -> torch.Tensor:
    """A prompt of three tokens, then token by token: (B, T - 2, V)."""
    state = model.make_state(size=idx.shape[1])
    state.padding = padding
    pieces = [idx[:, :3], *idx[:, 3:].split(1, dim=1)]
    return torch.stack([model.next_logits(piece, state) for piece in pieces], dim=1)


def check_equal(keys: dict, low_bit: bool = False) -> None:
    model = random_model(**keys).eval()
    T = min(model.config.block_size, 9)
    idx = tokens(3, T)
    expected = model(idx)[0][:, 2:].detach()
    ready = make_generator(copy.deepcopy(model), **FLOAT)
    torch.testing.assert_close(
        logits_in_pieces(ready, idx), expected, atol=1e-5, rtol=1e-4, msg=str(keys)
    )
    padded = F.pad(idx, (2, 0))[:, :T]
    if T > 4:
        found = logits_in_pieces(ready, padded, padding=torch.full((3,), 2))[:, -1]
        torch.testing.assert_close(
            found, model(idx[:, : T - 2])[0][:, -1], atol=1e-5, rtol=1e-4, msg=str(keys)
        )


@every_variant
def test_a_model_made_for_generation_gives_the_same_logits(variant, capsys):
    if variant.get("model") == "window_mlp":
        model = random_model(**variant).eval()
        ready = prepare_for_generation(copy.deepcopy(model))
        torch.testing.assert_close(
            ready.next_logits(tokens(3, 9)), model(tokens(3, 9))[0][:, -1].detach()
        )
    elif variant.get("block_size", 16) > 3:
        check_equal(variant)
    assert capsys.readouterr().err == ""  # its shortcuts are used


@every_position_and_block
def test_it_does_so_in_any_combination(position, block, capsys):
    for keys in combinations(position, block):
        check_equal(keys | {"qk_norm": True, "bias": keys["norm"] == "layernorm"})
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)
def test_large_matrices_are_packed_and_give_the_same_logits(monkeypatch):
    monkeypatch.setattr(inference, "PACKED_FROM", 1)
    for keys in (
        {"bias": True},
        {"mlp": "gated", "tie_weights": False},
        {"n_kv_head": 1, "position": "rotary"},
    ):
        check_equal(keys)
    ready = prepare_for_generation(random_model())
    linears = [module for module in ready.modules() if isinstance(module, ProductLinear)]
    assert len(linears) == 2 * 4 + 1
    assert not any(isinstance(module, torch.nn.Linear) for module in ready.modules())


def test_a_torch_without_onednn_is_not_asked_what_it_can_do(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    ready = prepare_for_generation(random_model(), torch.bfloat16)
    assert ready(tokens(1, 3))[0].isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("low", "bound"),
    [({"dtype": torch.bfloat16}, 0.03), ({"dtype": torch.int8}, 0.05)],
    ids=str,
)
def test_weights_in_fewer_bits_change_logits_little(low, bound, bias):
    model = random_model(
        n_embd=64, n_head=2, bias=bias, position="rotary", qk_norm=True
    ).eval()
    idx = tokens(2, 16)
    expected = model(idx)[0][:, 2:].detach()
    ready = prepare_for_generation(copy.deepcopy(model), **low)
    found = logits_in_pieces(ready, idx)
    error = (found - expected).square().mean() / expected.var()
    assert 0 < error < bound**2
    torch.testing.assert_close(ready(idx)[0][:, 2:], found, atol=4 * bound, rtol=0.0)


def test_int8_rounds_to_the_nearest_of_255_steps_of_each_row():
    weight = torch.tensor([[1.0, -0.5, 0.0], [127.0, 63.4, -0.6], [0.0, 0.0, 0.0]])
    rows = inference.quantize_rows(weight)
    assert rows.int_repr().tolist() == [[127, -64, 0], [127, 63, -1], [0, 0, 0]]
    assert rows.q_per_channel_scales()[1] == 1


def test_a_transformer_made_for_generation_translates_as_before():
    model = random_model(model="transformer").eval()
    source, idx = tokens(2, 6), tokens(2, 5, seed=1)
    expected = model(idx, source=source)[0][:, -1]
    ready = prepare_for_generation(copy.deepcopy(model))
    state = ready.make_state(source)
    for piece in idx.split([2, 1, 1, 1], dim=1):
        found = ready.next_logits(piece, state)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------
# A model.py that its user has edited


def changed(module, name: str, change):
    """An edit: module.name computes change(what it computed)."""
    old = getattr(module, name)
    return module, name, lambda *args, **keys: change(old(*args, **keys))


EDITS = {
    "scaled queries": changed(models.Attention, "queries", lambda q: 1.2 * q),
    "attention": changed(models.SelfAttention, "forward", lambda y: 0.9 * y),
    "rotation": changed(models, "rotate", lambda q: 1.2 * q),
    "block": changed(models.PreNormBlock, "forward", lambda x: 1.1 * x + 0.1),
    "stack": changed(models.Stack, "forward", lambda x: 0.9 * x),
    "feed-forward network": changed(models.MLP, "forward", lambda y: 0.9 * y),
    "convolution": changed(layers.CausalConv, "forward", lambda y: y + 0.1),
    "norm": changed(models.LayerNorm, "forward", lambda y: 0.9 * y),
}


class Tempered(models.SelfAttention):
    """One learned temperature a head, and a setting that scales the keys."""

    def __init__(self, config, window=0):
        super().__init__(config, window)
        self.temperature = torch.nn.Parameter(torch.ones(config.n_head, 1, 1))
        self.scale = getattr(config, "scale", 1.0)

    def forward(self, x, inputs, state=None):
        q, (k, v) = self.queries(x) * self.temperature, self.keys_and_values(x)
        if inputs.rotary:
            q, k = rotate(q, inputs.rotary), rotate(self.scale * k, inputs.rotary)
        if state:
            k, v = state.append(k, v, *inputs.cached)
        return self.attend_and_project(q, k, v, inputs.masks[self.window])


class TemperedBlock(models.ParallelBlock):
    def __init__(self, config, *args):
        super().__init__(config, *args)
        self.attn = Tempered(config, config.window)


@pytest.mark.parametrize("name", [*EDITS, "block of her own", "setting of her own"])
def test_an_edit_of_the_model_reaches_generation_and_scores(name, monkeypatch, capsys):
    keys = {"position": "rotary", "mlp_conv": 2, "window": 5}
    monkeypatch.setattr(torch, "compile", lambda step, **options: step)
    if name in EDITS:
        monkeypatch.setattr(*EDITS[name])
        if name == "rotation":  # which an edited file has everywhere
            monkeypatch.setattr(inference, "rotate", EDITS[name][2])
    elif name == "block of her own":
        monkeypatch.setitem(models.BLOCKS, "tempered", TemperedBlock)
        keys["block"] = "tempered"
    else:
        monkeypatch.setattr(models, "SelfAttention", Tempered)
        monkeypatch.setattr(models.ModelConfig, "scale", 1.3, raising=False)
    model = random_model(**keys).eval()
    idx = tokens(3, 12)
    expected = model(idx)[0][:, 2:].detach()
    for compiles in (False, True):
        ready = make_generator(copy.deepcopy(model), **FLOAT | {"compiles": compiles})
        torch.testing.assert_close(
            logits_in_pieces(ready, idx), expected, atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(ready(idx)[0][:, 2:], expected, atol=1e-5, rtol=1e-4)
    lines = set(capsys.readouterr().err.splitlines())
    assert len(lines - {"compiling: this takes about a minute"}) <= 1


def test_a_model_whose_cache_forgets_an_edit_does_without_it(monkeypatch, capsys):
    forward = models.SelfAttention.forward
    monkeypatch.setattr(  # each token is mixed with the one before it, which no state keeps
        models.SelfAttention,
        "forward",
        lambda self, x, *rest: forward(self, x + F.pad(x, (0, 0, 1, -1)), *rest),
    )
    model, idx = random_model().eval(), tokens(2, 8)
    expected = model(idx)[0][:, -1].detach()
    context = Context(make_generator(model, **FLOAT), idx[:, :7])
    context.next_logits()
    context.append(idx[:, 7:])
    torch.testing.assert_close(context.next_logits(), expected)
    assert capsys.readouterr().err.count("\n") == 2
    with pytest.raises(UserError, match="cannot translate: with its cache"):
        translate(model, [np.array([1, 2])], eot=2)


def test_a_class_that_fails_in_the_comparison_is_named_and_used(monkeypatch, capsys):
    def forward(self, *args):
        assert self.q_proj.in_features == 32, "made for 32 features"
        return attend(self, *args)

    attend = models.SelfAttention.forward
    monkeypatch.setattr(models.SelfAttention, "forward", forward)
    ready = make_generator(random_model(), **FLOAT)
    assert "(AssertionError: made for 32 features): " in capsys.readouterr().err
    assert ready.has_state and len(greedy(ready, tokens(2, 4), 5)) == 2


def test_a_linear_layer_of_ones_own_is_not_swapped_for_a_product(monkeypatch):
    class Doubled(layers.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    monkeypatch.setattr(models, "Linear", Doubled)
    monkeypatch.setattr(inference, "PACKED_FROM", 1)
    model, idx = random_model().eval(), tokens(2, 5)
    expected = model(idx)[0].detach()
    for dtype in (torch.float32, torch.bfloat16):
        ready = prepare_for_generation(copy.deepcopy(model), dtype)
        torch.testing.assert_close(ready(idx)[0], expected, atol=0.02, rtol=0.0)


# --------------------------------------------------------------------------------------
# Compiled


def test_a_compiled_step_writes_into_keys_and_values_alone():
    """Otherwise CUDA would make no graph of it."""
    keys = {"mlp_conv": 2, "position": "rotary"}
    ready = prepare_for_generation(random_model(**keys), compiles=True)
    compiled = CompiledGPT(ready, backend="eager")

    def step(idx, position, padding, buffers):
        before = [last_inputs.clone() for _, _, last_inputs in buffers]
        answer = compiled.step(idx, position, padding, buffers)
        kept.extend(map(torch.equal, before, [buffer[2] for buffer in buffers]))
        return answer

    kept = []

    compiled.compiled = step
    state = compiled.make_state()
    for piece in tokens(2, 5).split([2, 1, 1, 1], dim=1):
        compiled.next_logits(piece, state)
    assert len(kept) == 6 and all(kept)


def greedy(model, idx, n: int, **options) -> list[list[int]]:
    steps = generate(model, idx, n, temperature=0.0, **options)
    return torch.stack(list(steps), dim=1).tolist()


def compile_both(model, backend: str, **low):
    """The model made for generation, and the same compiled; and a list of the graphs."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    eager = prepare_for_generation(copy.deepcopy(model), **low)
    ready = prepare_for_generation(copy.deepcopy(model), **low, compiles=True)
    return eager, CompiledGPT(ready, backend=count), graphs


PADDED = torch.tensor([[-1, -1, 3, 4], [1, 2, 3, 4], [-1, 5, 6, 7]])


@pytest.mark.parametrize(
    "position",
    [
        "rotary",
        "alibi",
        *(pytest.param(name, marks=pytest.mark.long) for name in POSITIONS),
    ],
)
def test_compiled_decode_writes_the_tokens_of_eager_decode_by_one_graph(position, capsys):
    """Past block_size, plain and padded, and after a text has ended."""
    for keys in (
        {"bias": True, "logit_soft_cap": 5.0},
        {"window": 5, "mlp_conv": 2, "qk_norm": True, "n_kv_head": 1, "mlp": "gated"},
    ):
        eager, compiled, graphs = compile_both(
            random_model(position=position, **keys).eval(), "eager"
        )
        for idx in (tokens(3, 4), PADDED):
            graphs.clear()
            expected = greedy(eager, idx, 30)
            assert greedy(compiled, idx, 30) == expected
            assert len(graphs) == 1
        eot = expected[0][3]
        assert greedy(compiled, idx, 30, eot=eot) == greedy(eager, idx, 30, eot=eot)
    assert "compile fails" not in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_by_inductor_it_computes_what_eager_decode_computes(dtype, capsys):
    model = random_model(n_embd=64, position="rotary", qk_norm=True, bias=True).eval()
    eager, compiled, graphs = compile_both(model, "inductor", dtype=dtype)
    for B in (1, 3):
        idx = tokens(B, 12)
        with torch.inference_mode():
            expected = logits_in_pieces(eager, idx)
            found = logits_in_pieces(compiled, idx)
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0.0)
    assert len(graphs) == 2 and "compile fails" not in capsys.readouterr().err


def test_where_compiling_fails_it_generates_uncompiled(capsys):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here\nand a long story")

    torch._dynamo.reset()
    model = random_model().eval()
    ready = prepare_for_generation(copy.deepcopy(model), compiles=True)
    found = greedy(CompiledGPT(ready, backend=broken), tokens(2, 4), 5)
    assert found == greedy(prepare_for_generation(model), tokens(2, 4), 5)
    notes = capsys.readouterr().err
    assert notes.count("torch.compile fails here") == 1 and notes.count("\n") == 1
