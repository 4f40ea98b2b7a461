"""Update rules, the parameters that each of them trains, and the schedules of the learning rate."""

import copy
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_model import every_variant, tiny

from humptygpt.training import optimizers as optim
from humptygpt.training.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    Optimizer,
    group_parameters,
    named_state,
    orthogonalize,
    restore_state,
    set_lr,
)
from humptygpt.training.settings import TrainConfig

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def make_optimizer(model, name: str = "adamw", **keys) -> Optimizer:
    settings = {"optimizer": name, "weight_decay": 0.0} | keys
    return optim.make_optimizer(TrainConfig(**settings), model)


def train_some(model, optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        idx = torch.randint(11, (4, 9), generator=generator)
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
        model.zero_grad()


@every_variant
def test_optimizer_groups_cover_every_parameter_once(variant):
    model = tiny(**variant)
    groups = group_parameters(model).values()
    grouped = [pair for members in groups for pair in members.items()]
    assert sorted(name for name, _ in grouped) == sorted(dict(model.named_parameters()))
    assert all(model.get_parameter(name) is p for name, p in grouped)


@every_optimizer
def test_weight_decay_is_for_matrices_and_embeddings_only(name):
    for group in make_optimizer(tiny(bias=True), name, weight_decay=0.1).param_groups:
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}


def names_that_muon_trains(model) -> set[str]:
    names = {p: name for name, p in model.named_parameters()}
    groups = make_optimizer(model, "muon").param_groups
    return {names[p] for group in groups if "momentum" in group for p in group["params"]}


def test_muon_trains_the_matrices_of_the_blocks_and_adamw_the_rest():
    names = names_that_muon_trains(tiny(bias=True, tie_weights=False))
    assert len(names) == 2 * 6
    assert all("blocks" in name and name.endswith("weight") for name in names)


def test_muon_trains_the_hidden_layers_of_the_window_mlp():
    names = names_that_muon_trains(tiny(model="window_mlp", window=4))
    assert names == {"layers.0.weight", "layers.1.weight"}


@every_optimizer
def test_each_group_has_its_own_highest_learning_rate_and_all_are_scaled_alike(name):
    peaks = {"learning_rate": 0.01, "muon_learning_rate": 0.02}
    optimizer = make_optimizer(tiny(), name, **peaks)
    for scale in (0.1, 1.0):
        set_lr(optimizer, scale)
        for group in optimizer.param_groups:
            peak = "muon_learning_rate" if "momentum" in group else "learning_rate"
            assert group["lr"] == scale * peaks[peak]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 64, 16), (2, 16, 64), (1, 1, 8)])
def test_orthogonalize_moves_all_singular_values_near_1_and_keeps_the_singular_vectors(shape, dtype, tolerance):
    torch.manual_seed(0)
    a, s, bh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    s = torch.rand_like(s) * 0.9 + 0.1
    x = orthogonalize(a * s[:, None] @ bh, dtype).float()
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    assert s.min() > 0.65 and s.max() < 1.25
    torch.testing.assert_close(u @ vh, a @ bh, atol=tolerance, rtol=1e-3)


@pytest.mark.parametrize("shape", [(3, 8, 32), (3, 32, 8), (3, 16, 16)])
def test_polynomials_that_are_multiplied_first_compute_the_iteration(shape):
    """float64 takes the iteration for every shape."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = orthogonalize(x.double(), torch.float64).float()
    torch.testing.assert_close(orthogonalize(x), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("name", "scale"), [("attn.k_proj", 1), ("mlp.up_proj", 2)])
def test_muon_updates_by_the_orthogonalized_nesterov_momentum(name, scale):
    """scale: the square root of rows / columns."""
    keys = {"muon_momentum": 0.9, "muon_learning_rate": 0.1, "weight_decay": 0.5}
    model = tiny()
    optimizer = make_optimizer(model, "muon", **keys)
    p = model.get_parameter(f"stack.blocks.1.{name}.weight")
    first, second = torch.randn(2, *p.shape)
    for gradient in (first, second):
        before = p.detach().clone()
        p.grad = gradient.clone()
        optimizer.step()
    momentum = 0.9 * (0.1 * first) + 0.1 * second
    update = orthogonalize((0.9 * momentum + 0.1 * second)[None])[0]
    expected = before * (1 - 0.1 * 0.5) - 0.1 * scale * update
    torch.testing.assert_close(p.detach(), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("name", "axis"), [("up_proj", 0), ("down_proj", 1)])
def test_normuon_moves_all_neurons_at_one_speed_and_each_matrix_as_fast_as_muon(name, axis):
    """axis: the axis of the matrix that numbers its neurons."""
    moved = {}
    for rule in ("muon", "normuon"):
        model = tiny()
        p = model.get_parameter(f"stack.blocks.0.mlp.{name}.weight")
        torch.manual_seed(1)
        p.grad = torch.randn(p.shape) * torch.logspace(-2, 1, 128).unsqueeze(1 - axis)
        before = p.detach().clone()
        make_optimizer(model, rule, muon_learning_rate=0.1).step()
        moved[rule] = p.detach() - before
    muon, normuon = moved.values()
    torch.testing.assert_close(normuon.norm(), muon.norm(), atol=0, rtol=1e-4)
    speeds = normuon.norm(dim=1 - axis)
    assert speeds.max() / speeds.min() < 1.01
    speeds = muon.norm(dim=1 - axis)
    assert speeds.max() / speeds.min() > 2


def test_the_second_moment_of_a_neuron_is_a_moving_average():
    updates = torch.full((1, 4, 2), 3.0)
    second_moment = [torch.full((4, 1), 1.0)]
    optim.normalize_neurons(updates, second_moment, 0.75)
    torch.testing.assert_close(second_moment[0], torch.full((4, 1), 0.75 * 1 + 0.25 * 9))


@every_optimizer
def test_parameters_without_a_gradient_do_not_change(name):
    model = tiny()
    optimizer = make_optimizer(model, name, weight_decay=0.1)
    before = copy.deepcopy(model.state_dict())
    model.stack.norm.weight.grad = torch.ones(32)
    optimizer.step()
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"stack.norm.weight"}


WTE, UP = "wte.weight", "stack.blocks.0.mlp.up_proj.weight"
MISSHAPEN = {"momentum_buffer": torch.zeros(3, 3)}
DOUBLE = {"exp_avg": torch.zeros(11, 32, dtype=torch.float64)}
DAMAGES = {
    f"it lacks optimizer.{WTE}.exp_avg, which": lambda state: state.pop(WTE),
    "it has optimizer.other, which": lambda state: state.update(other=DOUBLE),
    f"optimizer.{UP}.momentum_buffer must": lambda state: state[UP].update(MISSHAPEN),
    f"optimizer.{WTE}.exp_avg must": lambda state: state[WTE].update(DOUBLE),
}


def receive(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value


@pytest.mark.parametrize("complaint", DAMAGES)
def test_the_state_of_another_model_is_refused(complaint):
    model = tiny()
    optimizer = make_optimizer(model, "muon")
    train_some(model, optimizer, 1)
    saved = copy.deepcopy(named_state(optimizer, model))
    restore_state(optimizer, model, saved, receive)
    DAMAGES[complaint](saved)
    with pytest.raises(ValueError, match=complaint):
        restore_state(optimizer, model, saved, receive)


@every_optimizer
def test_the_state_of_a_parameter_follows_its_name(name):
    model = tiny()
    optimizer = make_optimizer(model, name)
    train_some(model, optimizer, 3)
    saved = named_state(optimizer, model)
    other = make_optimizer(model, name)
    restore_state(other, model, dict(reversed(saved.items())), receive)
    torch.testing.assert_close(named_state(other, model), saved, atol=0, rtol=0)


def test_a_step_and_a_checkpoint_load_no_compiler():
    code = """if True:
        import sys, torch
        from humptygpt.training import optimizers
        from humptygpt.training.settings import TrainConfig
        from humptygpt.models.build import build
        from model import ModelConfig
        for name in optimizers.OPTIMIZERS:
            model = build(ModelConfig(n_layer=1, n_embd=16, vocab_size=9))
            optimizer = optimizers.make_optimizer(TrainConfig(optimizer=name), model)
            idx = torch.zeros(1, 4, dtype=torch.int64)
            model(idx, idx)[1].backward()
            optimizer.step()
            saved = optimizers.named_state(optimizer, model)
            optimizers.restore_state(optimizer, model, saved, lambda value, like: value)
        print("torch._dynamo" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def rate(it: int, schedule: str, **keys: int) -> float:
    keys = {"warmup_iters": 10, "lr_decay_iters": 110} | keys
    return TrainConfig(schedule=schedule, learning_rate=1.0, min_lr=0.1, **keys).lr(it)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_warms_up_and_decays(schedule):
    lr = [rate(it, schedule) for it in range(130)]
    assert lr[0] == pytest.approx(1 / 11)  # not 0, or the first step would be wasted
    assert lr[:11] == sorted(lr[:11]) and lr[10] == 1.0
    assert lr[10:] == sorted(lr[10:], reverse=True)
    assert set(lr[110:]) == {0.1}


@pytest.mark.parametrize(
    ("schedule", "halfway", "at_nine_tenths"),
    [("cosine", 0.55, 0.1220), ("linear", 0.55, 0.19), ("wsd", 1.0, 0.55)],
)
def test_the_shape_of_the_decay_is_that_of_its_source(schedule, halfway, at_nine_tenths):
    assert rate(60, schedule) == pytest.approx(halfway)
    assert rate(100, schedule) == pytest.approx(at_nine_tenths, abs=1e-4)


def test_a_run_shorter_than_its_warmup_has_learning_rates():
    lr = [rate(it, "cosine", warmup_iters=4, lr_decay_iters=2) for it in range(5)]
    assert lr == [0.2, 0.4, 0.6, 0.8, 0.1]
