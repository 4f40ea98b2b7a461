import pytest
import torch

import model as models
from model import ModelConfig
from optim import cosine, make_optimizer, parameter_groups


@pytest.mark.parametrize("keys", [{}, {"bias": True}, {"tie_weights": False}, {"norm": "none", "position": "none"}])
def test_optimizer_groups_cover_every_parameter_once(keys):
    model = models.build(ModelConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=11, **keys))
    grouped = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))


def test_matrices_decay_and_vectors_do_not():
    model = models.build(ModelConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=11, bias=True))
    for group in parameter_groups(model, 0.1):
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}


def test_a_step_is_adamws():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 3, bias=False)
    w, g = layer.weight.detach().clone(), torch.randn(3, 3)
    layer.weight.grad = g.clone()
    make_optimizer(layer, 0.1, (0.9, 0.99), weight_decay=0.5).step()
    torch.testing.assert_close(layer.weight.detach(), w * (1 - 0.1 * 0.5) - 0.1 * g / (g.abs() + 1e-8))


def test_the_learning_rate_rises_and_falls_as_nanogpts():
    rate = [cosine(it, 1.0, warmup_iters=10, lr_decay_iters=110, min_lr=0.1) for it in range(130)]
    assert rate[0] == pytest.approx(1 / 11)  # never 0, or the first step would be wasted
    assert rate[:11] == sorted(rate[:11]) and rate[10] == 1.0
    assert rate[60] == pytest.approx(0.55)
    assert rate[10:] == sorted(rate[10:], reverse=True)
    assert set(rate[110:]) == {0.1}


def test_a_run_shorter_than_its_warmup_has_rates_too():
    assert [cosine(it, 1.0, warmup_iters=4, lr_decay_iters=2, min_lr=0.1) for it in range(5)] == [0.2, 0.4, 0.6, 0.8, 0.1]
