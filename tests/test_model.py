import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import know_ngrams, overfit

import model as models
from model import ACTIVATIONS, BLOCKS, MLPS, NORMS, POSITIONS, ModelConfig, alibi_slopes, attend, frequent_ngrams
from sample import generate

VARIANTS = [
    *({"position": name} for name in POSITIONS),
    *({"norm": name} for name in NORMS),
    *({"activation": name} for name in ACTIVATIONS),
    *({"mlp": name} for name in MLPS),
    *({"block": name} for name in BLOCKS),
    {"bias": True},
    {"tie_weights": False},
    {"qk_norm": True},
    {"embed_norm": True},
    {"logit_soft_cap": 5.0},
    {"ngrams": 2, "ngram_rows": 50},
    {"ngrams": 4, "ngram_rows": 2000},
    {"init": "zero"},
    {"init": "zero", "tie_weights": False},
    {"n_head": 1},
    {"n_kv_head": 1},
    {"window": 5},
    {"n_hidden": 40},
    {"position": "rotary", "rope_factor": 4.0, "rope_original_context": 16},
    {"block_size": 1},
    {"model": "window_mlp", "window": 16},
    {"model": "window_mlp", "window": 16, "n_layer": 1, "n_hidden": 64, "bias": True, "logit_soft_cap": 5.0},
    {"model": "window_mlp", "window": 16, "n_hidden": 64, "bias": True, "embedding": "number", "n_embd": 1},
]
# Each with each of these, where the configuration allows it. The widths leave room for a look back beyond the window.
SHARED_HEADS_AND_WINDOW = [(None, 0), (2, 0), (1, 3)]
KEYS = ("position", "block", "norm", "mlp", "n_kv_head", "window")
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()))


def tiny(**keys) -> models.GPT:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 11}
    model = models.build(ModelConfig(**sizes | keys))
    know_ngrams(model)
    return model


def shaken(**keys) -> models.GPT:
    """A model whose weights are all drawn large, so that none is as idle as it may be at the start."""
    model = tiny(**keys)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def combinations(**fixed) -> list[dict]:
    """Every position x norm x block x mlp x heads and window, with these keys fixed, that the configuration takes."""
    found = []
    choices = [
        [fixed[key]] if key in fixed else of for key, of in zip(KEYS, (POSITIONS, BLOCKS, NORMS, MLPS), strict=False)
    ]
    for *names, (n_kv_head, window) in itertools.product(*choices, SHARED_HEADS_AND_WINDOW):
        keys = dict(zip(KEYS, (*names, n_kv_head, window), strict=True))
        try:
            ModelConfig(**keys)
        except ValueError:
            continue
        found.append({"n_head": 4, "n_embd": 16, "block_size": 8} | keys)
    return found


def every_position_and_block(test):
    """Run the test for each, which goes through the rest itself: thousands of tests would take longer to count."""
    return pytest.mark.parametrize("position", POSITIONS)(pytest.mark.parametrize("block", BLOCKS)(test))


def tokens(B: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(11, (B, T), generator=torch.Generator().manual_seed(seed))


@every_variant
def test_future_tokens_do_not_change_past_logits(variant):
    model = shaken(**variant)
    T = model.config.block_size
    idx = tokens(2, T)
    logits, _ = model(idx)
    for t in range(1, T):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 11
        torch.testing.assert_close(model(changed)[0][:, :t], logits[:, :t])


@every_variant
def test_past_tokens_change_later_logits(variant):
    model = shaken(**variant)
    idx = tokens(1, model.config.block_size)
    changed = idx.clone()
    place = max(0, idx.shape[1] - 3)
    changed[:, place] = (changed[:, place] + 1) % 11
    assert not torch.allclose(model(changed)[0][:, -1], model(idx)[0][:, -1])


@every_variant
def test_reading_with_a_cache_gives_the_same_logits(variant):
    model = shaken(**variant).eval()
    if not model.has_cache:
        pytest.skip("this model has no cache")
    idx = tokens(3, model.config.block_size)
    together, _ = model(idx)
    caches = model.make_caches()
    pieces = [
        model(piece, caches=caches)[0] for piece in idx.split([1, 5, 1, 1, 3, 5] if idx.shape[1] > 1 else [1], dim=1)
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), together, atol=1e-5, rtol=1e-5)


@every_variant
def test_one_batch_overfits(variant):
    model = tiny(**variant, dropout=0.0)
    idx = tokens(4, model.config.block_size + 1)
    if variant.get("position") == "none" or variant.get("block_size") == 1:
        idx = torch.arange(4)[:, None].expand(4, idx.shape[1]).contiguous()  # learnable without order, or a past
    assert overfit(model, {"idx": idx[:, :-1], "targets": idx[:, 1:]}, steps=150, lr=5e-3, until=0.1) < 0.1


@every_variant
def test_every_parameter_gets_a_gradient(variant):
    model = shaken(**variant)
    idx = tokens(4, model.config.block_size + 1)
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    for name, parameter in model.named_parameters():
        needless = name.endswith("key.bias") or (variant.get("block_size") == 1 and ("query" in name or "key" in name))
        assert needless or parameter.grad.to_dense().abs().max() > 0, (
            name
        )  # softmax does not see a shift of all its scores


@every_variant
def test_a_state_that_was_saved_and_loaded_gives_equal_logits(variant):
    model = tiny(**variant)
    again = models.build(model.config)
    again.load_state_dict(model.state_dict())
    idx = tokens(2, model.config.block_size)
    assert torch.equal(model(idx)[0], again(idx)[0])


# --------------------------------------------------------------------------------------
# Every variant with every other


@every_position_and_block
def test_future_tokens_do_not_change_past_logits_in_any_combination(position, block):
    idx = tokens(1, 8)
    changes = [torch.cat([idx[:, :t], (idx[:, t:] + 1) % 11], dim=1) for t in range(1, 8)]
    together = torch.cat([idx, *changes])
    for keys in combinations(position=position, block=block):
        logits, _ = shaken(**keys)(together)
        for t in range(1, 8):
            torch.testing.assert_close(logits[t, :t], logits[0, :t], msg=lambda m, keys=keys: f"{keys}: {m}")


@every_position_and_block
def test_cached_equals_uncached_generation_in_any_combination(position, block):
    for keys in combinations(position=position, block=block):
        model = shaken(**keys).eval()
        for exact in (True, False):  # 3 tokens and 9 more are past block_size
            written = [
                list(generate(model, tokens(2, 3), 9, temperature=0, exact=exact, cached=cached))
                for cached in (True, False)
            ]
            assert torch.equal(torch.stack(written[0]), torch.stack(written[1])), (keys, exact)


@every_position_and_block
def test_one_batch_overfits_in_any_combination(position, block):
    for keys in combinations(position=position, block=block):
        idx = tokens(2, 9)
        batch = {"idx": idx[:, :-1], "targets": idx[:, 1:]}
        loss = overfit(tiny(**keys, n_layer=1), batch, steps=300, lr=1e-2, until=0.3)
        assert loss < 0.3, (keys, loss)


@every_position_and_block
def test_a_state_that_was_saved_and_loaded_gives_equal_logits_in_any_combination(position, block):
    for keys in combinations(position=position, block=block):
        model, other = shaken(**keys), models.build(ModelConfig(**keys, n_layer=2, vocab_size=11))
        other.load_state_dict(model.state_dict())
        assert torch.equal(model(tokens(2, 8))[0], other(tokens(2, 8))[0]), keys


def test_the_only_combinations_refused_have_nothing_beside_attention():
    every = len(POSITIONS) * len(BLOCKS) * len(NORMS) * len(MLPS) * len(SHARED_HEADS_AND_WINDOW)
    taken = combinations()
    assert not any(keys["block"] == "parallel" and keys["mlp"] == "none" for keys in taken)
    assert every - len(taken) == len(POSITIONS) * len(NORMS) * len(SHARED_HEADS_AND_WINDOW)


# --------------------------------------------------------------------------------------
# What each part does


def test_a_new_model_gives_every_token_about_the_same_chance():
    model = tiny(n_embd=128)
    idx = tokens(8, 17)
    _, loss = model(idx[:, :-1], idx[:, 1:])
    assert abs(loss.item() - math.log(11)) < 0.1


def test_logits_are_there_for_every_place_with_and_without_targets():
    model = tiny()
    idx = tokens(2, 7)
    (logits, loss), (with_targets, some_loss) = model(idx), model(idx, idx)
    assert loss is None and logits.shape == (2, 7, 11)
    assert torch.equal(logits, with_targets) and some_loss.shape == ()


def test_no_loss_is_counted_where_targets_are_minus_one():
    model = tiny()
    idx, targets = tokens(2, 8), tokens(2, 8, seed=1)
    logits, _ = model(idx)
    targets[0, 3:] = -1
    kept = torch.cat([logits[0, :3], logits[1]]), torch.cat([targets[0, :3], targets[1]])
    torch.testing.assert_close(model(idx, targets)[1], F.cross_entropy(*kept))


def test_dropout_acts_in_training_and_only_there():
    model = tiny(dropout=0.5)
    idx = tokens(2, 8)
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize("cached", [0, 3])
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("window", [0, 1, 2, 4, 99])
@pytest.mark.parametrize("n_kv_head", [6, 3, 1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_is_a_weighted_mean_of_the_values(cached, T, window, n_kv_head, with_bias):
    torch.manual_seed(0)
    S, D = T + cached, 4
    q, k, v = torch.randn(2, 6, T, D), torch.randn(2, n_kv_head, S, D), torch.randn(2, n_kv_head, S, D)
    bias = torch.randn(6, T, S) if with_bias else None
    expected = torch.empty_like(q)
    for head in range(6):
        keys, values = k[:, head * n_kv_head // 6], v[:, head * n_kv_head // 6]
        for t in range(T):
            end = cached + t + 1
            seen = slice(max(0, end - window) if window else 0, end)
            scores = (q[:, head, t, None] * keys[:, seen]).sum(-1) / math.sqrt(D)
            if with_bias:
                scores = scores + bias[head, t, seen]
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            expected[:, head, t] = (weights[..., None] * values[:, seen]).sum(1)
    torch.testing.assert_close(attend(q, k, v, causal=True, window=window, bias=bias), expected)


@pytest.mark.parametrize(("causal", "padded"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("length", "window"), [(9, 0), (9, 4), (4, 0)])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_written_out_is_that_of_torch(monkeypatch, causal, padded, length, window, biased):
    torch.manual_seed(0)
    q = torch.randn(2, 4, length, 8).requires_grad_()
    k, v = (torch.randn(2, 2, 9, 8).requires_grad_() for _ in range(2))
    bias = torch.randn(4, length, 9) if biased else None
    padding = torch.arange(9) >= torch.tensor([[9], [6]]) if padded and length == 9 else None
    results = []
    for mixed in (False, True):
        if mixed:  # a CPU has it written out
            monkeypatch.setattr(F, "scaled_dot_product_attention", None)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            y = attend(q, k, v, causal, window, bias, padding)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), (q, k, v))])
    for expected, found in zip(*results, strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()


def test_attention_written_out_drops_weights_and_leaves_many_scores_to_torch(monkeypatch):
    q, k, v = torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4), torch.ones(1, 1, 8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        dropped = attend(q, k, v, causal=False, dropout=0.5)
        assert dropped.float().std() > 0.05  # a mean of ones is one, but not of half of them
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **keys: "torch's")
        assert attend(q, k, v, causal=True) != "torch's"
        monkeypatch.setattr(models, "WRITTEN_OUT", 63)
        assert attend(q, k, v, causal=True) == "torch's"


def test_the_usual_attention_makes_no_mask(monkeypatch):
    """A mask would cost the fast kernels."""
    masks = []
    theirs = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *a, **k: masks.append((k["attn_mask"], k["is_causal"])) or theirs(*a, **k),
    )
    tiny(position="rotary")(tokens(2, 16))
    tiny(window=16)(tokens(2, 16))
    assert masks == [(None, True)] * 4


@pytest.mark.parametrize(
    "keys",
    [{}, {"block": "parallel"}, {"position": "alibi"}, {"model": "window_mlp"}, {"model": "window_mlp", "n_hidden": 9}],
)
def test_a_window_reaches_back_to_itself_and_the_tokens_before_it(keys):
    model = shaken(**keys, window=5, n_layer=1)
    idx = tokens(1, 16)
    for place in range(16):
        changed = idx.clone()
        changed[:, place] = (changed[:, place] + 1) % 11
        moved = (model(changed)[0] != model(idx)[0]).any(dim=-1)[0].nonzero().flatten().tolist()
        assert moved == list(range(place, min(place + 5, 16)))


def test_the_window_network_reads_zeros_before_the_first_token():
    model = shaken(model="window_mlp", window=4)
    idx = tokens(2, 2)
    x = torch.cat([torch.zeros(2, 2 * 32), model.wte(idx).flatten(1)], dim=1)
    for layer in model.stack:
        x = F.gelu(layer(x))
    torch.testing.assert_close(model.lm_head(x), model(idx)[0][:, -1])


def test_the_cache_holds_only_the_heads_of_keys_and_values():
    model = tiny(n_head=4, n_kv_head=2)
    caches = model.make_caches()
    model(tokens(3, 5), caches=caches)
    assert [cache.k.shape for cache in caches] == [(3, 2, 16, 8)] * 2


def test_alibis_slopes_are_those_of_the_paper():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(1) == [2**-8]
    twelve = [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]  # what the paper's code adds to the eight
    assert alibi_slopes(12) == pytest.approx(alibi_slopes(8) + twelve)


def test_alibi_takes_from_a_score_in_proportion_to_distance():
    bias = tiny(position="alibi", n_head=2).stack.position.bias(2, 4)
    distances = torch.tensor([[2.0, 1.0, 0.0], [3.0, 2.0, 1.0]])
    torch.testing.assert_close(bias[:, :, :3], -torch.tensor([2**-4, 2**-8])[:, None, None] * distances)


@pytest.mark.parametrize(
    ("keys", "norms"),
    [
        ({}, 2 * 3 + 1),
        ({"block": "plain"}, 2 * 3 + 1),
        ({"block": "parallel"}, 3 + 1),
        ({"block": "post_norm"}, 2 * 3),
        ({"mlp": "none"}, 3 + 1),
        ({"block": "post_norm", "mlp": "none"}, 3),
    ],
)
def test_each_branch_has_its_norm_and_the_stack_ends_with_exactly_one(keys, norms):
    model = tiny(n_layer=3, **keys)
    assert sum(isinstance(module, torch.nn.LayerNorm) for module in model.modules()) == norms
    x = model.stack(torch.randn(2, 5, 32))
    torch.testing.assert_close(x.std(dim=-1, correction=0), torch.ones(2, 5), atol=1e-3, rtol=0)


def test_a_gated_network_costs_what_a_plain_one_does():
    plain, gated = tiny(n_embd=128).stack, tiny(n_embd=128, mlp="gated").stack
    assert gated.blocks[0].mlp.fc.out_features == 344  # 8/3 of 128 is 341.3; and 8 times 43
    assert models.count_parameters(gated) == pytest.approx(models.count_parameters(plain), rel=0.01)
    assert tiny(n_embd=128, mlp="gated", n_hidden=30).stack.blocks[0].mlp.fc.out_features == 30


def test_rotation_makes_scores_depend_on_distance_alone():
    position = tiny(position="rotary").stack.position
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(q_at: int, k_at: int) -> torch.Tensor:
        return (position.rotate(q, q, q_at)[0] * position.rotate(k, k, k_at)[1]).sum()

    torch.testing.assert_close(score(9, 5), score(5, 1))
    assert not torch.allclose(score(9, 5), score(9, 6))
    torch.testing.assert_close(position.rotate(q, k, 0), (q, k))


def test_the_tied_head_is_the_embedding():
    tied, free = tiny(), tiny(tie_weights=False)
    assert tied.lm_head.weight is tied.wte.weight
    assert models.count_parameters(free) - models.count_parameters(tied) == 11 * 32


def test_parameters_and_flops_are_those_of_gpt2():
    with torch.device("meta"):
        gpt2 = models.build(
            ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257, bias=True)
        )
    assert models.count_parameters(gpt2) == 124_439_808
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert models.flops_per_token(gpt2) == 6 * matrices + 12 * 12 * 768 * 1024


def test_flops_count_what_is_computed():
    shared, own = tiny(n_head=4, n_kv_head=1), tiny(n_head=4)
    assert models.flops_per_token(own) - models.flops_per_token(shared) == 6 * 2 * (2 * 32 * 24)
    narrow = tiny(n_head=4, window=4)
    assert models.flops_per_token(own) - models.flops_per_token(narrow) == 12 * 2 * 32 * (16 - 4)
    network = tiny(model="window_mlp", window=4, n_hidden=50)
    assert models.flops_per_token(network) == 6 * (4 * 32 * 50 + 50 * 50 + 50 * 11)


def test_initial_weights_are_gpt2s():
    model = tiny(n_embd=128, n_layer=8, vocab_size=500)
    block = model.stack.blocks[0]
    assert abs(model.wte.weight.std() - 0.02) < 0.001
    assert abs(block.mlp.fc.weight.std() - 0.02) < 0.001
    assert abs(block.mlp.proj.weight.std() - 0.02 / 4) < 0.0003
    assert abs(block.attn.proj.weight.std() - 0.02 / 4) < 0.0003


def test_the_last_matrix_of_each_branch_starts_smaller_the_more_branches_there_are():
    gated = tiny(n_embd=128, n_layer=8, mlp="gated", n_kv_head=1).stack.blocks[0]
    assert abs(gated.mlp.gate.weight.std() - 0.02) < 0.001 and abs(gated.attn.key.weight.std() - 0.02) < 0.001
    assert abs(gated.mlp.proj.weight.std() - 0.02 / 4) < 0.0003
    alone = tiny(n_embd=128, n_layer=4, mlp="none").stack.blocks[0]
    assert abs(alone.attn.proj.weight.std() - 0.02 / 2) < 0.0006


def test_without_a_residual_path_the_numbers_keep_their_size():
    model = tiny(n_embd=128, n_layer=8, block="plain", norm="none", position="none")
    x = torch.randn(1, 1, 128)
    assert model.stack(x).std() > 1e-2  # GPT-2's first weights would leave 1e-12


@pytest.mark.parametrize("block", [name for name in BLOCKS if name != "plain"])
def test_with_zero_init_a_new_block_changes_nothing(block):
    model = tiny(init="zero", block=block, norm="none", position="none")
    x = torch.randn(2, 5, 32)
    assert torch.equal(model.stack(x), x)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"n_embd": 33}, "n_embd=33 must be a multiple of n_head=4"),
        ({"n_layer": 0}, "n_layer=0 must be at least 1"),
        ({"block_size": -1}, "block_size=-1 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"dropout": math.nan}, "dropout=nan must be at least 0 and below 1"),
        ({"rope_base": math.nan}, "rope_base=nan must be above 1"),
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ({"norm": "batch"}, "norm=batch is not one of: layernorm, rmsnorm, none"),
        ({"position": "gps"}, "position=gps is not one of: none, learned, sinusoidal, rotary, alibi"),
        ({"model": "rnn"}, "model=rnn is not one of: window_mlp, gpt"),
        ({"n_kv_head": 3}, "n_head=4 must be a multiple of n_kv_head=3"),
        ({"n_kv_head": 8}, "n_head=4 must be a multiple of n_kv_head=8"),
        ({"n_kv_head": 0}, "n_kv_head=0 must be at least 1"),
        ({"n_hidden": 0}, "n_hidden=0 must be at least 1"),
        ({"window": -1}, "window=-1 must be at least 0"),
        ({"window": 65}, "window=65 must be at most block_size=64"),
        ({"rope_factor": 0.5}, "rope_factor=0.5 must be at least 1"),
        ({"rope_low_freq_factor": 4.0}, "rope_low_freq_factor=4.0 must be below rope_high_freq_factor=4.0"),
        ({"rope_original_context": 0}, "rope_original_context=0 must be at least 1"),
        ({"block": "plain", "init": "zero"}, "init=zero must not meet block=plain: no block would ever give"),
        ({"mlp": "none", "n_hidden": 64}, "n_hidden=64 is the width of a network that mlp=none leaves out"),
        ({"mlp": "none", "block": "parallel"}, "block=parallel needs a feed-forward network beside attention"),
        ({"embedding": "number"}, "embedding=number is for model=window_mlp"),
        ({"model": "window_mlp"}, "window=0 must be at least 1: model=window_mlp reads that many tokens"),
        ({"model": "window_mlp", "window": 3, "embedding": "number"}, "n_embd=128 must be 1: embedding=number gives"),
    ],
)
def test_a_bad_model_config_is_refused(keys, complaint):
    with pytest.raises(ValueError, match=f"^{complaint}"):
        ModelConfig(**keys)


def test_rotation_of_an_odd_head_is_refused():
    with pytest.raises(ValueError, match="must be even"):
        ModelConfig(position="rotary", n_embd=6, n_head=2)


def test_frequent_runs_have_a_vector_each_and_others_none():
    text = torch.randint(5, (400,), generator=torch.Generator().manual_seed(0))
    runs = Counter(tuple(text[t : t + n].tolist()) for n in (2, 3, 4) for t in range(401 - n))
    frequent = {run for run, count in runs.items() if count >= 4}
    assert 0 < len(frequent) < len(runs)
    keys = frequent_ngrams(text, 4, min_count=4)
    model = tiny(vocab_size=5, ngrams=4, ngram_rows=len(keys))
    model.ngrams.keys.copy_(keys)
    torch.nn.init.normal_(model.ngrams.table.weight)
    vectors = {}
    for run in runs:
        idx, before = torch.tensor([run[-1:]]), torch.tensor([run[:-1]])
        shorter = sum((vectors[run[-n:]] for n in range(2, len(run))), torch.zeros(32))
        vectors[run] = model.ngrams(idx, before)[0, 0] - shorter
    assert {run for run, vector in vectors.items() if vector.norm() > 0.1} == frequent
    different = {tuple(vector.mul(100).round().int().tolist()) for run, vector in vectors.items() if run in frequent}
    assert len(different) == len(frequent)


def test_a_run_has_one_vector_wherever_it_stands():
    model = tiny(ngrams=4, ngram_rows=2000)
    torch.nn.init.normal_(model.ngrams.table.weight)
    idx = tokens(2, 40)
    none, whole = idx[:, :0], model.ngrams(idx, idx[:, :0])
    torch.testing.assert_close(
        model.ngrams(idx[:, 20:], none)[:, 3:], whole[:, 23:]
    )  # the first 3 reach back before it
    torch.testing.assert_close(model.ngrams(idx[:, 20:], idx[:, 17:20]), whole[:, 20:])
    assert not torch.allclose(model.ngrams(idx[:, 20:], none)[:, :3], whole[:, 20:23])


def test_the_vectors_of_runs_add_to_those_of_tokens():
    model = tiny(ngrams=3, ngram_rows=100)
    torch.nn.init.normal_(model.ngrams.table.weight)
    seen = []
    model.stack.register_forward_pre_hook(lambda stack, args: seen.append(args[0]))
    idx = tokens(2, 5)
    model(idx)
    torch.testing.assert_close(seen[0], model.wte.weight[idx] + model.ngrams(idx, idx[:, :0]))


def test_ngram_dropout_leaves_out_whole_places_in_training_only():
    model = tiny(ngrams=3, ngram_rows=100, ngram_dropout=0.4)
    torch.nn.init.ones_(model.ngrams.table.weight)
    idx = torch.randint(11, (40, 16), generator=torch.Generator().manual_seed(0))
    none = idx[:, :0]
    found, whole = model.ngrams(idx, none), model.eval().ngrams(idx, none)
    known = whole[..., 0] > 0
    left_out = (found == 0).all(dim=-1)
    assert left_out[known].float().mean() == pytest.approx(0.4, abs=0.1)
    torch.testing.assert_close(found[~left_out], whole[~left_out] / 0.6)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.3, 0.9])
def test_dropout_leaves_out_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(37, 2001)
    found = models.drop(x, p)
    left_out = (found == 0).float().mean().item()
    assert left_out == pytest.approx(p, abs=0.006)
    assert found.mean() == pytest.approx(1, abs=0.03)
    assert found[:, 1:].eq(found[:, :-1]).float().mean() == pytest.approx(p**2 + (1 - p) ** 2, abs=0.015)  # one by one


def test_dropout_of_nearly_all_leaves_out_nearly_all():
    torch.manual_seed(0)
    assert (models.drop(torch.ones(10_000), 0.999999) == 0).float().mean() > 0.999
