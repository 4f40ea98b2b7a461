import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import overfit
from humptygpt.model import (
    ACTIVATIONS,
    ATTENTIONS,
    BLOCKS,
    MLPS,
    NORMS,
    POSITIONS,
    alibi_slopes,
    attend,
    attention_mask,
    relu_squared,
)
from uncached import generate, uncached

from humptygpt import model as models
from humptygpt.cli import UserError
from humptygpt.device import autocast
from humptygpt.generation.translation import select
from humptygpt.models import attention
from humptygpt.models.attention import fused_attend
from humptygpt.models.build import build, config_class, make_model_config, model_class

# An encoder-decoder has these variants as well
COMMON_VARIANTS = [
    *({"position": name} for name in POSITIONS),
    *({"norm": name} for name in NORMS),
    *({"activation": name} for name in ACTIVATIONS),
    *({"mlp": name} for name in MLPS),
    *({"block": name} for name in BLOCKS),
    *({"attention": name} for name in ATTENTIONS),
    {"bias": True},
    {"tie_weights": False},
    {"qk_norm": True},
    {"embed_norm": True},
    {"logit_soft_cap": 5.0},
    {"init": "zero"},
]
VARIANTS = [
    *COMMON_VARIANTS,
    {"bias": True, "attn_bias": False},
    {"mlp_bias": True, "mlp": "gated"},
    {"norm_eps": 0.5},
    {"init": "zero", "tie_weights": False},
    {"n_head": 1},
    {"n_kv_head": 1},
    {"head_size": 6, "position": "rotary"},
    {"head_size": 24, "n_head": 3, "n_kv_head": 1},
    {"window": 5},
    {"n_hidden": 40},
    *({"mlp_conv": 3, "block": name} for name in BLOCKS),
    {"mlp_conv": 40, "mlp": "gated"},
    {"position": "rotary", "rope_factor": 4.0, "rope_original_context": 16},
    {"block_size": 1},
    {"model": "window_mlp", "window": 16},
    {"model": "window_mlp", "window": 16, "n_layer": 1, "bias": True},
    {"model": "number_mlp", "window": 16, "n_hidden": 64, "n_embd": 1},
]
# (n_kv_head, window): each combination is tested with each of these. Two layers see further back than one window.
KV_HEADS_AND_WINDOW = [(None, 0), (2, 0), (1, 3)]


def each(variants: list[dict]) -> pytest.MarkDecorator:
    name = lambda v: "-".join(f"{key}-{value}" for key, value in v.items())  # noqa: E731
    return pytest.mark.parametrize("variant", variants, ids=name)


every_variant = each(VARIANTS)


def tiny(**keys) -> models.GPT:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 11}
    return build(make_model_config(sizes | keys))


def random_model(**keys) -> models.GPT:
    """A model whose weights are all random: at initialization some are zero, and their layers have no effect."""
    model = tiny(**keys)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def combinations(position: str, block: str) -> list[dict]:
    """Every norm x mlp x (n_kv_head, window) with these two, in a loop: thousands of tests take long to collect."""
    found = []
    for norm, mlp, (n_kv_head, window) in itertools.product(NORMS, MLPS, KV_HEADS_AND_WINDOW):
        keys = {"position": position, "block": block, "norm": norm, "mlp": mlp}
        sizes = {"n_head": 4, "n_embd": 16, "block_size": 8}
        found.append(sizes | keys | {"n_kv_head": n_kv_head, "window": window})
    return found


def tokens(B: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(11, (B, T), generator=torch.Generator().manual_seed(seed))


@every_variant
def test_future_tokens_do_not_change_past_logits(variant):
    model = random_model(**variant)
    T = model.config.block_size
    idx = tokens(2, T)
    logits, _ = model(idx)
    for t in range(1, T):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 11
        torch.testing.assert_close(model(changed)[0][:, :t], logits[:, :t])


@every_variant
def test_reading_in_pieces_and_selecting_rows_in_between_gives_the_same_logits(variant):
    model = random_model(**variant).eval()
    if not model.has_cache:
        pytest.skip("this model has no cache")
    idx, rows = tokens(3, model.config.block_size), torch.tensor([2, 0, 0, 1])
    together, _ = model(idx)
    cache = model.make_cache()
    pieces = idx[:, :11].split([1, 5, 1, 1, 3] if idx.shape[1] > 1 else [1], dim=1)
    found = torch.cat([model(piece, cache=cache)[0] for piece in pieces], dim=1)
    torch.testing.assert_close(found, together[:, :11], atol=1e-5, rtol=1e-5)
    if idx.shape[1] > 11:
        select(cache, rows)
        found, _ = model(idx[rows, 11:], cache=cache)
        torch.testing.assert_close(found, together[rows, 11:], atol=1e-5, rtol=1e-5)


@every_variant
def test_one_batch_overfits(variant):
    model = tiny(**variant, dropout=0.0)
    idx = tokens(4, model.config.block_size + 1)
    if variant.get("position") == "none" or variant.get("block_size") == 1:
        # learnable without order or context
        idx = torch.arange(4)[:, None].expand(4, idx.shape[1]).contiguous()
    batch = {"idx": idx[:, :-1], "targets": idx[:, 1:]}
    assert overfit(model, batch, steps=150, lr=5e-3, until=0.1) < 0.1


@every_variant
def test_every_parameter_gets_a_gradient(variant):
    model = random_model(**variant)
    idx = tokens(4, model.config.block_size + 1)
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    for name, parameter in model.named_parameters():
        # a bias of the keys shifts all scores of a query alike, which softmax cancels; so it does a single score
        one_score = variant.get("block_size") == 1
        without = ("q_proj.weight", "k_proj.weight") if one_score else "k_proj.bias"
        assert name.endswith(without) or parameter.grad.abs().max() > 0, name


# --------------------------------------------------------------------------------------
# Every variant with every other


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("block", BLOCKS)
def test_texts_padded_and_cached_equal_each_alone_and_uncached_in_any_combination(position, block):
    texts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 6, 1)]
    for keys in combinations(position, block):
        model = random_model(**keys).eval()
        # 3 tokens and 9 more are past block_size
        found = generate(model, texts, 9, temperature=0)
        for text, new in zip(texts, found, strict=True):
            assert new == uncached(model, text, 9, temperature=0), keys


# --------------------------------------------------------------------------------------
# Each part


def test_no_loss_is_counted_where_targets_are_minus_one():
    model = tiny()
    idx, targets = tokens(2, 8), tokens(2, 8, seed=1)
    logits, loss = model(idx)
    assert loss is None and logits.shape == (2, 8, 11)
    targets[0, 3:] = -1
    kept = torch.cat([logits[0, :3], logits[1]]), torch.cat([targets[0, :3], targets[1]])
    torch.testing.assert_close(model(idx, targets)[1], F.cross_entropy(*kept))


@pytest.mark.parametrize(("causal", "padded"), [(True, False), (True, True), (False, True), (False, False)])
@pytest.mark.parametrize(("length", "window"), [(9, 0), (9, 4), (4, 0)])
@pytest.mark.parametrize("biased", [False, True])
def test_fused_attention_equals_the_formula(causal, padded, length, window, biased):
    torch.manual_seed(0)
    q = torch.randn(2, 4, length, 8).requires_grad_()
    k, v = (torch.randn(2, 2, 9, 8).requires_grad_() for _ in range(2))
    bias = torch.randn(1, 4, length, 9) if biased else None
    padding = torch.arange(9) >= torch.tensor([[9], [6]]) if padded and length == 9 else None
    distance = torch.arange(9 - length, 9)[:, None] - torch.arange(9)
    mask = attention_mask(distance, causal, window, bias, padding)
    for mixed, bound in ((False, 1e-5), (True, 0.02)):
        results = []
        for function in (attend, fused_attend):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                y = function(q, k, v, mask)
            gradients = torch.autograd.grad(y.float().square().sum(), (q, k, v))
            results.append([y, *gradients])
        for expected, found in zip(*results, strict=True):
            assert (found - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize(
    ("limit", "gradients", "dtype", "fused"),
    [
        (8, True, torch.bfloat16, False),
        (7, True, torch.bfloat16, True),
        (8, False, torch.bfloat16, True),
        (8, True, torch.float32, True),
    ],
)
def test_a_cpu_uses_the_formula_in_sight_to_train_with_few_keys_in_bfloat16(
    limit, gradients, dtype, fused, monkeypatch, sdpa_calls
):
    monkeypatch.setattr(attention, "EXPLICIT_KEYS", limit)
    model = tiny()
    sdpa_calls.clear()
    with autocast(torch.device("cpu"), dtype), torch.set_grad_enabled(gradients):
        model(tokens(2, 8))
    assert len(sdpa_calls) == 2 * fused


def test_an_edited_formula_is_used_where_the_kernel_was(monkeypatch):
    doubled = lambda q, k, v, mask: attend(2 * q, k, v, mask)  # noqa: E731
    monkeypatch.setattr(models, "attend", doubled)
    model, idx = random_model().eval(), tokens(2, 8)
    expected = model(idx)[0]
    monkeypatch.setattr(attention, "EXPLICIT_KEYS", 0)
    assert torch.equal(model(idx)[0], expected)
    assert all(block.attn.kernel is doubled for block in model.stack.blocks)


@pytest.mark.parametrize(
    "edited",
    [
        lambda scores: scores.clamp(-5, 5),
        lambda scores: scores.where(scores >= scores.topk(min(8, scores.shape[-1])).values[..., -1:], -math.inf),
        lambda scores: scores * (3 if scores.shape[-1] > 60 else 1),
        lambda scores: 50 * torch.tanh(scores / 50),
        lambda scores: scores.roll(1, dims=1),
    ],
    ids=["clamped", "8 largest", "many keys", "capped", "other heads"],
)  # fmt: skip
def test_the_kernel_is_not_used_for_an_edit_that_few_keys_or_small_scores_do_not_show(
    edited,
):
    def explicit(q, k, v, mask):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if mask is None and q.shape[2] > 1:
            mask = torch.full(scores.shape[-2:], -math.inf).triu(1)
        return (edited(scores) + (0 if mask is None else mask)).softmax(-1) @ v

    assert not attention.agrees(explicit, fused_attend)
    edited = lambda scores: scores  # noqa: E731, explicit() without the edit
    attention.agrees.cache_clear()
    assert attention.agrees(explicit, fused_attend)


def test_building_a_model_draws_only_its_weights():
    torch.manual_seed(1)
    attention.agrees.__wrapped__(attend, fused_attend)
    found = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), found)


@pytest.mark.parametrize("position", ["rotary", "alibi"])
def test_a_cache_keeps_values_of_another_size_than_the_keys(position, monkeypatch):
    class WideValues(models.SelfAttention):
        def __init__(self, config, layer):
            super().__init__(config, layer)
            D = 2 * self.head_size
            self.v_proj = torch.nn.Linear(config.n_embd, self.n_head * D)
            self.o_proj = torch.nn.Linear(self.n_head * D, config.n_embd)

        def heads(self, x):
            return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

        def forward(self, x, shared, cache=None):
            q, k, v = map(self.heads, (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
            if cache:
                k, v = cache.append(shared.end, k=k, v=v)
            y = attend(q, k, v, shared.masks[self.window])
            return self.o_proj(y.transpose(1, 2).flatten(2))

    monkeypatch.setitem(models.ATTENTIONS, "wide", WideValues)
    model, idx = random_model(attention="wide", position=position).eval(), tokens(2, 8)
    cache = model.make_cache()
    for token in idx.split(1, dim=1):
        found = model.next_logits(token, cache)
    torch.testing.assert_close(found, model(idx)[0][:, -1], atol=1e-5, rtol=1e-5)


def test_with_targets_gradients_flow_through_the_loss_only():
    """Logits that a compiled graph returns would get a gradient of zeros, as large as they are."""
    idx = tokens(2, 5)
    assert not tiny()(idx, idx)[0].requires_grad and tiny()(idx)[0].requires_grad


@pytest.mark.parametrize("cached", [True, False])
def test_generate_clamps_top_k_to_the_vocabulary_and_obeys_a_model_without_a_cache(cached):
    model, idx = random_model().eval(), tokens(2, 3)
    torch.manual_seed(0)
    expected = model.generate(idx, 20)
    model.has_cache = cached
    torch.manual_seed(0)
    found = model.generate(idx, 13, top_k=200)  # up to block_size, where half is forgotten
    assert torch.equal(found, expected[:, :16])
    if not cached:
        model.make_cache = None
        assert model.generate(idx, 20).shape == (2, 23)


@pytest.fixture
def sdpa_calls(monkeypatch) -> list[tuple]:
    """(mask, is_causal) of every call of SDPA."""
    calls, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *args, **keys: calls.append((args[3], keys["is_causal"])) or sdpa(*args, **keys),
    )
    return calls


def test_plain_causal_attention_makes_no_mask(sdpa_calls, monkeypatch):
    """With a mask, SDPA cannot use its fast kernels."""
    monkeypatch.setattr(attention, "EXPLICIT_KEYS", 0)
    model = tiny()
    each = [(tiny(position="rotary"), 16, None), (tiny(window=16), 16, None)]
    cache = model.make_cache()
    sdpa_calls.clear()
    for made, T, kept in [*each, (model, 5, cache)]:
        made(tokens(2, T), cache=kept)
    assert sdpa_calls == [(None, True)] * 6
    sdpa_calls.clear()
    model(tokens(2, 1), cache=cache)  # one query attends to all keys
    assert sdpa_calls == [(None, False)] * 2


def test_each_layer_may_have_a_window_of_its_own_cached_or_not(monkeypatch):
    block = models.Block.__init__

    def alternating(self, config, layer):
        block(self, config, layer)
        self.attn.window = 3 if layer % 2 else 0

    monkeypatch.setattr(models.Block, "__init__", alternating)
    model, idx = random_model(n_layer=2, position="rotary").eval(), tokens(2, 12)
    expected = model(idx)[0]
    cache = model.make_cache()
    pieces = [model(piece, cache=cache)[0] for piece in idx.split([5, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-5, rtol=1e-5)
    for layer in model.stack.blocks:
        layer.attn.window = 0
    assert not torch.allclose(model(idx)[0], expected, atol=1e-3)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"position": "alibi"},
        {"model": "window_mlp"},
        {"model": "window_mlp", "n_hidden": 9},
    ],
)
def test_a_window_holds_a_token_itself_and_those_before_it(keys):
    model = random_model(**keys, window=5, n_layer=1)
    idx = tokens(1, 16)
    before, _ = model(idx)
    for t in range(16):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 11
        affected = (model(changed)[0] != before).any(dim=-1)[0].nonzero().flatten()
        assert affected.tolist() == list(range(t, min(t + 5, 16)))


def test_the_window_mlp_reads_zeros_before_the_first_token():
    model = random_model(model="window_mlp", window=4)
    idx = tokens(2, 2)
    x = torch.cat([torch.zeros(2, 2 * 32), model.wte(idx).flatten(1)], dim=1)
    for layer in model.layers:
        x = F.gelu(layer(x))
    torch.testing.assert_close(model.lm_head(x), model(idx)[0][:, -1])


def test_the_cache_holds_keys_and_values_of_the_kv_heads_only_in_buffers_made_once():
    model = tiny(n_head=4, n_kv_head=2)
    cache = model.make_cache()
    buffers = lambda: [x for layer in cache.layers for x in layer.buffers.values()]  # noqa: E731
    model(tokens(3, 5), cache=cache)
    before = buffers()
    assert [x.shape for x in before] == [(3, 2, 16, 8)] * 4
    model(tokens(3, 1), cache=cache)
    assert cache.length == 6
    assert all(a is b for a, b in zip(before, buffers(), strict=True))


def test_a_text_longer_than_block_size_is_refused_with_and_without_a_cache():
    model = tiny(block_size=8)
    cache = model.make_cache()
    model(tokens(1, 8), cache=cache)
    for T, state in ((9, None), (1, cache)):
        with pytest.raises(AssertionError, match=r"^9 tokens, but block_size is 8\b"):
            model(tokens(1, T), cache=state)


def test_alibi_slopes_are_those_of_the_paper():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(1) == [2**-8]
    added = [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]  # to the eight, by the paper's code
    assert alibi_slopes(12) == pytest.approx(alibi_slopes(8) + added)


def test_alibi_lowers_scores_in_proportion_to_distance_to_both_sides():
    distances = torch.tensor([[2, 1, 0], [-3, -2, 1]])
    bias = tiny(position="alibi", n_head=2).stack.position.score_bias(distances)
    slopes = torch.tensor([2**-4, 2**-8])[None, :, None, None]
    torch.testing.assert_close(bias, -slopes * distances.abs())


def test_a_gated_mlp_has_as_many_parameters_as_a_plain_one():
    plain, gated = tiny(n_embd=128).stack, tiny(n_embd=128, mlp="gated").stack
    # 8/3 of 128 is 341.3, 8 times 43 is 344
    assert gated.blocks[0].mlp.up_proj.out_features == 344
    expected = models.count_parameters(plain)
    assert models.count_parameters(gated) == pytest.approx(expected, rel=0.01)


def test_parameters_and_flops_are_those_of_gpt2():
    sizes = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}
    with torch.device("meta"):
        gpt2 = tiny(**sizes, vocab_size=50257, bias=True)
    assert models.count_parameters(gpt2) == 124_439_808
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert models.flops_per_token(gpt2) == 6 * matrices + 12 * 12 * 768 * 1024


def test_flops_count_what_is_computed():
    def flops(**keys) -> int:
        return models.flops_per_token(tiny(n_head=4, **keys))

    assert flops() - flops(n_kv_head=1) == 6 * 2 * (2 * 32 * 24)
    # 3 features less in each of 4 heads
    fewer = 6 * 2 * (4 * 32 * 4 * 3) + 12 * 2 * (4 * 3) * 16
    assert flops() - flops(head_size=5) == fewer
    assert flops() - flops(window=4) == 12 * 2 * 32 * (16 - 4)
    window_mlp = flops(model="window_mlp", window=4, n_hidden=50)
    assert window_mlp == 6 * (4 * 32 * 50 + 50 * 50 + 50 * 11)


def test_initial_weights_are_gpt2s():
    for mlp, branches in (("plain", 16), ("gated", 16), ("none", 8)):
        model = tiny(n_embd=128, n_layer=8, vocab_size=500, mlp=mlp)
        for name, weight in model.named_parameters():
            ends_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 / math.sqrt(branches) if ends_branch else 0.02
            if "norm" not in name:
                assert weight.std().item() == pytest.approx(expected, rel=0.06), name


def test_without_residual_connections_initialization_keeps_the_scale_of_activations():
    model = tiny(n_embd=128, n_layer=8, block="plain", norm="none", position="none")
    x = torch.randn(1, 1, 128)
    assert model.stack(x, tokens(1, 1))[0].std() > 1e-2  # with GPT-2's initial weights: 1e-12


@pytest.mark.parametrize("block", [name for name in BLOCKS if name != "plain"])
def test_with_init_zero_a_new_block_is_the_identity(block):
    model = tiny(init="zero", block=block, norm="none", position="none")
    x = torch.randn(2, 5, 32)
    assert torch.equal(model.stack(x, tokens(2, 5))[0], x)


@pytest.mark.parametrize("tied", [True, False])
def test_with_init_zero_tokens_and_positions_weigh_the_same(tied):
    model = tiny(init="zero", tie_weights=tied, n_embd=64, vocab_size=500, block_size=200)
    expected = 64**-0.5 if tied else 1.0
    assert model.wte.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert model.stack.position.wpe.weight.std().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        (
            {"n_embd": 33},
            "n_embd=33 must be a multiple of n_head=2 unless head_size is set",
        ),
        (
            {"head_size": 7, "position": "rotary"},
            "position=rotary rotates feature pairs, so head_size=7 must be even",
        ),
        ({"n_layer": 0}, "n_layer=0 must be from 1 to 4096"),
        ({"dropout": math.nan}, "dropout=nan must be from 0 to 0.99"),
        ({"rope_base": 0.5}, "rope_base=0.5 must be from 1 to"),
        ({"rope_factor": 0.5}, "rope_factor=0.5 must be from 1 to 1000000000"),
        ({"logit_soft_cap": -1.0}, "logit_soft_cap=-1.0 must be from 0 to"),
        ({"norm": "batch"}, f"norm=batch is not one of: {', '.join(NORMS)}"),
        ({"n_kv_head": 3}, "n_head=2 must be a multiple of n_kv_head=3"),
        ({"window": 257}, "window=257 must be from 0 to block_size=256"),
        (
            {"block": "plain", "init": "zero"},
            "block=plain has no residual connections, so with init=zero it would output 0",
        ),
        (
            {"model": "window_mlp"},
            "window=0 must be at least 1: model=window_mlp reads that many tokens",
        ),
        (
            {"model": "number_mlp", "window": 3},
            "n_embd=128 must be 1: model=number_mlp represents",
        ),
    ],
)
def test_a_bad_model_config_is_refused(keys, complaint):
    with pytest.raises(UserError, match=f"^{complaint}"):
        make_model_config(keys)
    config = config_class(keys)(**{"vocab_size": 9} | keys)
    with pytest.raises(ValueError, match=f"^{complaint}"):  # the error in a notebook
        build(config)


def test_an_unknown_variant_is_refused_with_the_name_of_the_table_for_it():
    for key, choices in models.ModelConfig.choices().items():
        if isinstance(choices, dict):
            with pytest.raises(ValueError, match=f"^{key}=own is not one of: ") as refusal:
                models.ModelConfig(**{key: "own"}).validate()
            _, table = str(refusal.value).removesuffix(" in model.py)").split(" (")
            assert getattr(models, table) is choices


def test_capped_logits_keep_their_precision_in_bfloat16():
    model = tiny(logit_soft_cap=30.0)
    logits = torch.linspace(10, 40, 200).bfloat16()
    expected = 30 * torch.tanh(logits.float() / 30)
    model.lm_head = torch.nn.Identity()
    torch.testing.assert_close(model.head(logits), expected)


@pytest.mark.parametrize("kind", ["gpt", "transformer"])
def test_an_edit_of_the_head_reaches_next_logits(kind, monkeypatch):
    cls = model_class(kind)
    head = cls.head
    monkeypatch.setattr(cls, "head", lambda self, x: head(self, x) + 1)
    model = random_model(model=kind).eval()
    idx = tokens(2, 5)
    texts = {"source": tokens(2, 4)} if kind == "transformer" else {}
    found = model.next_logits(idx, model.make_cache(**texts))
    torch.testing.assert_close(found, model(idx, **texts)[0][:, -1])


def test_queries_that_a_parameter_made_float32_attend_to_keys_in_bfloat16():
    q, k, v = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    distance = torch.arange(5)[:, None] - torch.arange(5)
    mask = attention_mask(distance, window=3)
    for function in (attend, fused_attend):
        found = function(q, k.bfloat16(), v.bfloat16(), mask)
        expected = function(q, k, v, mask)
        torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)


def test_the_squared_relu_makes_no_power_which_a_gpu_would_compute_in_float32():
    x = torch.linspace(-2, 3, 12)
    expected = [max(each, 0) ** 2 for each in x.tolist()]
    assert relu_squared(x).tolist() == pytest.approx(expected)
    graph = torch.fx.symbolic_trace(relu_squared).graph
    assert not {node.target for node in graph.nodes} & {"square", "pow", torch.square}
