import copy
import math

import pytest
import torch
from conftest import fill_ngrams

import model as models
from humptygpt import optimizers as optim
from humptygpt.optimizers import OPTIMIZERS, SCHEDULES, AveragedWeights, learning_rate_at, make_optimizer, orthogonalize
from model import BLOCKS, EMBEDDINGS, MLPS, NORMS, POSITIONS, ModelConfig

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def tiny(**keys) -> models.GPT:
    torch.manual_seed(0)
    model = models.build(
        ModelConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 8, "vocab_size": 11} | keys)
    )
    fill_ngrams(model)
    return model


def train_some(model, optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        idx = torch.randint(11, (4, 9), generator=generator)
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()


@every_optimizer
@pytest.mark.parametrize(
    "keys",
    [
        {"bias": True},
        {"tie_weights": False},
        {"n_kv_head": 1},
        {"ngrams": 3, "ngram_rows": 40},
        *({"position": name} for name in POSITIONS),
        *({"norm": name} for name in NORMS),
        *({"block": name} for name in BLOCKS),
        *({"mlp": name, "bias": True} for name in MLPS),
        *({"model": "window_mlp", "window": 4, "n_embd": 1, "bias": True, "embedding": name} for name in EMBEDDINGS),
    ],
    ids=str,
)
def test_optimizer_groups_cover_every_parameter_once(name, keys):
    model = tiny(**keys)
    groups = make_optimizer(name, model, 1e-3).param_groups
    grouped = [p for group in groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))


@every_optimizer
def test_matrices_decay_and_vectors_do_not(name):
    for group in make_optimizer(name, tiny(bias=True), 1e-3, weight_decay=0.1).param_groups:
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}


def test_muon_moves_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = tiny(bias=True, tie_weights=False)
    names = {id(p): name for name, p in model.named_parameters()}
    moved = {
        rule: {
            names[id(p)]
            for group in make_optimizer("muon", model, 1e-3).param_groups
            if group["rule"] == rule
            for p in group["params"]
        }
        for rule in ("muon", "adamw")
    }
    assert len(moved["muon"]) == 2 * 6 and all("blocks" in n and n.endswith("weight") for n in moved["muon"])
    assert {"wte.weight", "lm_head.weight", "stack.position.wpe.weight", "stack.norm.weight"} <= moved["adamw"]


def test_muon_moves_the_hidden_layers_of_the_window_network_too():
    model = tiny(model="window_mlp", window=4)
    moved = make_optimizer("muon", model, 1e-3).param_groups[0]
    assert moved["rule"] == "muon" and [id(p) for p in moved["params"]] == [id(layer.weight) for layer in model.stack]


def test_adamw_is_that_of_torch():
    ours, theirs = tiny(), tiny()
    train_some(ours, make_optimizer("adamw", ours, 1e-2, (0.8, 0.95), weight_decay=0.3), 5)
    decay = [p for p in theirs.parameters() if p.dim() >= 2], [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": decay[0], "weight_decay": 0.3}, {"params": decay[1], "weight_decay": 0.0}]
    train_some(theirs, torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95)), 5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("fast", "tolerance"), [(False, 1e-3), (True, 5e-2)])
@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 64, 16), (2, 16, 64), (1, 1, 8)])
def test_orthogonalizing_brings_all_singular_values_near_1_and_keeps_the_directions(
    monkeypatch, shape, fast, tolerance
):
    monkeypatch.setattr(optim, "multiplies_bfloat16", lambda device: fast)
    torch.manual_seed(0)
    a, s, bh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    s = torch.rand_like(s) * 0.9 + 0.1
    u, s, vh = torch.linalg.svd(orthogonalize(a * s[:, None] @ bh), full_matrices=False)
    assert s.min() > 0.65 and s.max() < 1.25
    torch.testing.assert_close(u @ vh, a @ bh, atol=tolerance, rtol=1e-3)


def test_muons_first_step_is_the_orthogonalized_gradient(monkeypatch):
    monkeypatch.setattr(optim, "multiplies_bfloat16", lambda device: False)
    model = tiny()
    fc, square = model.stack.blocks[0].mlp.fc.weight, model.stack.blocks[1].attn.key.weight
    before = {p: p.detach().clone() for p in (fc, square)}
    optimizer = make_optimizer("muon", model, 1e-3, weight_decay=0.5, muon_learning_rate=0.1)
    idx = torch.arange(9)[None]
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    gradients = {p: p.grad.clone() for p in (fc, square)}
    optimizer.step()
    for p, lr in ((fc, 0.1 * math.sqrt(128 / 32)), (square, 0.1)):
        update = orthogonalize(gradients[p][None])[0]
        torch.testing.assert_close(p.detach(), before[p] * (1 - 0.1 * 0.5) - lr * update, atol=1e-4, rtol=1e-3)


def test_muon_remembers_the_gradients_before_and_looks_one_ahead(monkeypatch):
    monkeypatch.setattr(optim, "multiplies_bfloat16", lambda device: False)
    model = tiny()
    square = model.stack.blocks[1].attn.key.weight
    optimizer = make_optimizer("muon", model, 1e-3, muon_momentum=0.9, muon_learning_rate=0.1)
    first, second = torch.randn(32, 32), torch.randn(32, 32)
    for gradient in (first, second):
        before = square.detach().clone()
        square.grad = gradient.clone()
        optimizer.step()
    mean = 0.9 * (0.1 * first) + 0.1 * second
    torch.testing.assert_close(optimizer.state[square]["mean"], mean)
    update = orthogonalize((0.9 * mean + 0.1 * second)[None])[0]
    torch.testing.assert_close(square.detach(), before - 0.1 * update, atol=1e-4, rtol=1e-3)


@every_optimizer
def test_parameters_without_a_gradient_stay_as_they_are(name):
    model = tiny(position="rotary")
    optimizer = make_optimizer(name, model, 1e-2, weight_decay=0.1)
    before = copy.deepcopy(model.state_dict())
    model.stack.norm.weight.grad = torch.ones(32)
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"stack.norm.weight"}


@every_optimizer
def test_an_optimizer_goes_on_from_its_state(name):
    straight, stopped = tiny(), tiny()
    train_some(straight, optimizer := make_optimizer(name, straight, 1e-2), 3)
    train_some(straight, optimizer, 3, seed=1)
    train_some(stopped, first := make_optimizer(name, stopped, 1e-2), 3)
    second = make_optimizer(name, stopped, 1e-2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train_some(stopped, second, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), stopped.parameters(), strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_rises_and_falls(schedule):
    rate = [learning_rate_at(it, schedule, 1.0, warmup_iters=10, lr_decay_iters=110, min_lr=0.1) for it in range(130)]
    assert rate[0] == pytest.approx(1 / 11)  # never 0, or the first step would be wasted
    assert rate[:11] == sorted(rate[:11]) and rate[10] == 1.0
    assert rate[10:] == sorted(rate[10:], reverse=True)
    assert set(rate[110:]) == {0.1}
    halfway = {"cosine": 0.55, "linear": 0.55, "wsd": 1.0}[schedule]
    assert rate[60] == pytest.approx(halfway)
    at_four_fifths_and_half = {"cosine": 0.1220, "linear": 0.19, "wsd": 0.55}[schedule]
    assert rate[100] == pytest.approx(at_four_fifths_and_half, abs=1e-4)


def test_a_run_shorter_than_its_warmup_has_rates_too():
    rates = [learning_rate_at(it, "cosine", 1.0, warmup_iters=4, lr_decay_iters=2, min_lr=0.1) for it in range(5)]
    assert rates == [0.2, 0.4, 0.6, 0.8, 0.1]


def test_the_tables_of_ngrams_move_by_adagrad_where_they_were_read():
    model = tiny(ngrams=3, ngram_rows=800)
    optimizer = make_optimizer("adamw", model, 1e-3, ngram_learning_rate=0.1)
    table = model.ngrams.table.weight
    expected, squares = table.detach().clone(), torch.zeros(801)
    for seed in range(3):
        idx = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(seed // 2))  # one batch comes twice
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        gradient = table.grad.to_dense()
        squares += gradient.square().mean(dim=1)
        expected -= 0.1 * gradient / (squares.sqrt()[:, None] + 1e-12)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(table, expected)
    untouched = squares == 0
    assert untouched.any() and not untouched.all()
    assert torch.equal(table[untouched], torch.zeros(int(untouched.sum()), 32))


def test_averaged_weights_are_the_moving_mean_of_those_of_all_steps():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    averaged, expected = AveragedWeights(model, decay=0.5), 0.0
    for step in range(1, 12):
        model.weight.data.fill_(float(step))
        averaged.update(step)
        share = 1 - min(0.5, (1 + step) / (10 + step))  # more of the newest at first
        expected += share * (step - expected)
    with averaged.in_place():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 11.0
