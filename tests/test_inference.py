"""Models made for generation: the same results by fewer and smaller products."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_model import random_model, tokens

from humptygpt import model as models
from humptygpt.cli import UserError
from humptygpt.generation import generator as decoding
from humptygpt.generation.generator import ProductLinear, make_generator
from humptygpt.generation.sampling import Context
from humptygpt.generation.translation import translate


def logits_in_pieces(model, idx, padding=None) -> torch.Tensor:
    """A prompt of three tokens, then token by token: (B, T - 2, V)."""
    cache = model.make_cache(size=idx.shape[1])
    cache.n_padding = padding
    pieces = [idx[:, :3], *idx[:, 3:].split(1, dim=1)]
    return torch.stack([model.next_logits(piece, cache) for piece in pieces], dim=1)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_large_matrices_are_packed_and_give_the_same_logits(monkeypatch):
    monkeypatch.setattr(decoding, "PACKED_FROM", 1)
    for keys in (
        {"bias": True},
        {"mlp": "gated", "tie_weights": False},
        {"n_kv_head": 1, "position": "rotary", "qk_norm": True},
    ):
        model, idx = random_model(**keys).eval(), tokens(3, 9)
        expected = model(idx)[0][:, 2:].detach()
        found = logits_in_pieces(make_generator(copy.deepcopy(model)), idx)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4, msg=str(keys))
    ready = make_generator(random_model())
    functions = [f for module in ready.modules() for f in vars(module).values()]
    products = [isinstance(getattr(f, "__self__", f), ProductLinear) for f in functions]
    assert sum(products) == 2 * 4 + 1  # one for queries, keys and values
    assert not any(isinstance(module, torch.nn.Linear) for module in ready.modules())


def test_a_torch_without_onednn_is_not_asked_what_it_can_do(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    ready = make_generator(random_model(), torch.bfloat16)
    assert ready(tokens(1, 3))[0].isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("low", "bound"),
    [({"dtype": torch.bfloat16}, 0.03), ({"dtype": torch.int8}, 0.05)],
    ids=str,
)
def test_weights_in_fewer_bits_change_logits_little(low, bound, bias):
    model = random_model(n_embd=64, n_head=2, bias=bias, position="rotary", qk_norm=True).eval()
    idx = tokens(2, 16)
    expected = model(idx)[0][:, 2:].detach()
    ready = make_generator(copy.deepcopy(model), **low)
    found = logits_in_pieces(ready, idx)
    error = (found - expected).square().mean() / expected.var()
    assert 0 < error < bound**2
    torch.testing.assert_close(ready(idx)[0][:, 2:], found, atol=4 * bound, rtol=0.0)


def test_int8_rounds_to_the_nearest_of_255_steps_of_each_row():
    weight = torch.tensor([[1.0, -0.5, 0.0], [127.0, 63.4, -0.6], [0.0, 0.0, 0.0]])
    rows = decoding.quantize_rows(weight)
    assert rows.int_repr().tolist() == [[127, -64, 0], [127, 63, -1], [0, 0, 0]]
    assert rows.q_per_channel_scales()[1] == 1


def test_int8_weights_are_refused_on_a_gpu():
    with pytest.raises(UserError, match="int8 weights need a CPU, but the device is"):
        make_generator(random_model(), torch.int8, torch.device("cuda"))


def test_a_transformer_made_for_generation_translates_as_before():
    model = random_model(model="transformer").eval()
    source, idx = tokens(2, 6), tokens(2, 5, seed=1)
    expected = model(idx, source=source)[0][:, -1]
    ready = make_generator(copy.deepcopy(model))
    state = ready.make_cache(source)
    for piece in idx.split([2, 1, 1, 1], dim=1):
        found = ready.next_logits(piece, state)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("device", "replaced"), [("cpu", True), ("meta", False)])
def test_norms_are_replaced_on_a_cpu_only_because_a_gpu_has_a_kernel_for_them(device, replaced):
    model = random_model(norm="rmsnorm", qk_norm=True)
    device = torch.device(device)
    decoding.replace_layers(model, torch.float32, device, joins=False)
    functions = [f for module in model.modules() for f in vars(module).values()]
    fast = [isinstance(getattr(f, "__self__", f), decoding.FastRMSNorm) for f in functions]
    assert any(fast) == replaced


# --------------------------------------------------------------------------------------
# A model.py that its user has edited


class Doubled(models.SelfAttention):
    def forward(self, x, shared, cache=None):
        return 2 * super().forward(x, shared, cache)


def test_an_attention_of_ones_own_generates_with_a_cache(monkeypatch, capsys):
    monkeypatch.setitem(models.ATTENTIONS, "doubled", Doubled)
    keys = {"attention": "doubled", "position": "rotary", "mlp_conv": 2, "window": 5}
    model, idx = random_model(**keys).eval(), tokens(3, 12)
    expected = model(idx)[0][:, 2:].detach()
    found = logits_in_pieces(make_generator(copy.deepcopy(model)), idx)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert capsys.readouterr().err == ""


def mix(self, x, forward, *inputs):
    """Each token with the one before it, which no cache keeps, in the last layer only."""
    before = F.pad(x, (0, 0, 1, -1)) if self.is_last else 0
    return forward(self, x + before, *inputs)


def ask(self, x, forward, *inputs):
    """A function of the layer's weights, which a function in its place has not."""
    return forward(self, x, *inputs) + F.linear(x, self.q_proj.weight)


@pytest.mark.parametrize(
    ("edited", "note"),
    [
        (mix, "generating without a cache, which is slower\n"),
        (ask, "not using faster layers, because this model.py's logits would change"),
    ],
)
def test_a_model_generates_without_what_its_edit_does_not_survive(monkeypatch, model_is_edited, capsys, edited, note):
    forward, init = models.SelfAttention.forward, models.SelfAttention.__init__

    def make(self, config, layer):
        init(self, config, layer)
        self.is_last = layer == config.n_layer - 1

    monkeypatch.setattr(models.SelfAttention, "__init__", make)
    monkeypatch.setattr(
        models.SelfAttention,
        "forward",
        lambda self, x, *rest: edited(self, x, forward, *rest),
    )
    model, idx = random_model(n_layer=3).eval(), tokens(2, 8)
    expected = model(idx)[0][:, -1].detach()
    context = Context(make_generator(model), idx[:, :7].tolist())
    context.next_logits()
    context.append(idx[:, 7:].tolist())
    torch.testing.assert_close(context.next_logits(), expected)
    assert f"note: {note}" in capsys.readouterr().err
    if edited is mix:
        with pytest.raises(UserError, match="cannot translate: its logits with the cache"):
            translate(model, None, [])


def tripled_queries(self, x, shared, cache=None):
    q, k, v = (self.heads(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
    if cache:
        k, v = cache.append(shared.end, k=k, v=v)
    y = models.attend(3 * q, k, v, shared.masks[self.window])
    return self.o_proj(y.transpose(1, 2).flatten(2))


def test_edited_queries_keep_the_cache_the_faster_layers_and_int8(monkeypatch, capsys):
    monkeypatch.setattr(models.SelfAttention, "forward", tripled_queries)
    model, idx = random_model().eval(), tokens(2, 8)
    expected = model(idx)[0][:, -1].detach()
    for dtype, atol in ((torch.float32, 1e-5), (torch.int8, 0.1)):
        ready = make_generator(copy.deepcopy(model), dtype)
        context = Context(ready, idx.tolist())
        found = context.next_logits()
        torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)
    assert isinstance(ready.lm_head.__self__, decoding.ProductLinear)
    assert capsys.readouterr().err == ""


def test_a_linear_layer_of_ones_own_is_not_swapped_for_a_product(monkeypatch):
    class DoubledLinear(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, idx = random_model().eval(), tokens(2, 5)
    for block in model.stack.blocks:
        block.mlp.up_proj.__class__ = DoubledLinear
    monkeypatch.setattr(decoding, "PACKED_FROM", 1)
    expected = model(idx)[0].detach()
    for dtype in (torch.float32, torch.bfloat16):
        ready = make_generator(copy.deepcopy(model), dtype)
        torch.testing.assert_close(ready(idx)[0], expected, atol=0.02, rtol=0.0)
