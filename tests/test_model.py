import math

import pytest
import torch
import torch.nn.functional as F

import model as models
from model import ACTIVATIONS, BLOCKS, MLPS, NORMS, POSITIONS, ModelConfig, attend

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
    {"init": "zero"},
    {"init": "zero", "tie_weights": False},
    {"n_head": 1},
    {"block_size": 1},
]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()))


def tiny(**keys) -> models.GPT:
    torch.manual_seed(0)
    return models.build(
        ModelConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 11} | keys)
    )


def shaken(**keys) -> models.GPT:
    """A model whose weights are all drawn large, so that none is as idle as it may be at the start."""
    model = tiny(**keys)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


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
    changed[:, 0] = (changed[:, 0] + 1) % 11
    assert not torch.allclose(model(changed)[0][:, -1], model(idx)[0][:, -1])


@every_variant
def test_reading_with_a_cache_gives_the_same_logits(variant):
    model = shaken(**variant).eval()
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@every_variant
def test_every_parameter_gets_a_gradient(variant):
    model = shaken(**variant)
    idx = tokens(4, model.config.block_size + 1)
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    for name, parameter in model.named_parameters():
        needless = name.endswith("key.bias") or (variant.get("block_size") == 1 and ("query" in name or "key" in name))
        assert needless or parameter.grad.abs().max() > 0, name  # softmax does not see a shift of all its scores


@every_variant
def test_a_state_that_was_saved_and_loaded_gives_equal_logits(variant):
    model = tiny(**variant)
    again = models.build(model.config)
    again.load_state_dict(model.state_dict())
    idx = tokens(2, model.config.block_size)
    assert torch.equal(model(idx)[0], again(idx)[0])


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
@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_is_a_weighted_mean_of_the_values(cached, with_bias):
    torch.manual_seed(0)
    T, S, D = 5, 5 + cached, 4
    q, k, v = torch.randn(2, 3, T, D), torch.randn(2, 3, S, D), torch.randn(2, 3, S, D)
    bias = torch.randn(3, T, S) if with_bias else None
    expected = torch.empty_like(q)
    for t in range(T):
        seen = cached + t + 1
        scores = (q[:, :, t, None] * k[:, :, :seen]).sum(-1) / math.sqrt(D)
        if with_bias:
            scores = scores + bias[:, t, :seen]
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        expected[:, :, t] = (weights[..., None] * v[:, :, :seen]).sum(2)
    torch.testing.assert_close(attend(q, k, v, causal=True, bias=bias), expected)


def test_rotation_makes_scores_depend_on_distance_alone():
    position = tiny(position="rotary").position
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


def test_initial_weights_are_gpt2s():
    model = tiny(n_embd=128, n_layer=8, vocab_size=500)
    block = model.stack.blocks[0]
    assert abs(model.wte.weight.std() - 0.02) < 0.001
    assert abs(block.mlp.fc.weight.std() - 0.02) < 0.001
    assert abs(block.mlp.proj.weight.std() - 0.02 / 4) < 0.0003
    assert abs(block.attn.proj.weight.std() - 0.02 / 4) < 0.0003


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
        ({"position": "gps"}, "position=gps is not one of: none, learned, rotary"),
        ({"model": "rnn"}, "model=rnn is not one of: gpt"),
    ],
)
def test_a_bad_model_config_is_refused(keys, complaint):
    with pytest.raises(ValueError, match=f"^{complaint}"):
        ModelConfig(**keys)


def test_rotation_of_an_odd_head_is_refused():
    with pytest.raises(ValueError, match="must be even"):
        ModelConfig(position="rotary", n_embd=6, n_head=2)
