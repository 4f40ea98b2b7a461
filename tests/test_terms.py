"""docs/terms.md: its examples in numbers are what the code computes."""

import math

import pytest
import torch
from humptygpt.model import (
    GPT,
    NORMS,
    ModelConfig,
    RotaryPosition,
    alibi_slopes,
    attend,
    count_parameters,
)
from torch.nn import functional as F

from humptygpt import cli
from humptygpt.cli import make
from humptygpt.generation.sampling import probabilities
from humptygpt.models.build import make_model_config
from humptygpt.training.optimizers import orthogonalize
from humptygpt.training.settings import TrainConfig

LOGITS = torch.tensor([[2.0, 1.0, 0.0]])
DEMO_FILE = str(cli.CONFIGS / "shakespeare_char.py")
DEMO_KEYS = {"vocab_size": 65} | cli.read([DEMO_FILE], ModelConfig, TrainConfig)
DEMO = make_model_config(DEMO_KEYS)


def close(*numbers: float, digits: int = 2):
    return pytest.approx(numbers, abs=0.5 * 10**-digits)


def test_softmax_temperature_and_filters():
    assert probabilities(LOGITS)[0].tolist() == close(0.665, 0.245, 0.090, digits=3)
    assert probabilities(LOGITS, 0.5)[0].tolist() == close(0.87, 0.12, 0.02)
    assert probabilities(LOGITS, 2.0)[0].tolist() == close(0.51, 0.31, 0.19)
    for kept in ({"top_p": 0.9}, {"min_p": 0.2}):
        assert probabilities(LOGITS, **kept)[0].tolist() == close(0.73, 0.27, 0.0)


def test_losses():
    logits, target = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([0])
    smoothed = F.cross_entropy(logits, target, label_smoothing=0.2)
    nats = smoothed, -math.log(0.9), -math.log(1 / 65)
    assert [*map(float, nats)] == close(0.33, 0.11, 4.17)
    demo = 1.4537
    assert (math.exp(demo), demo / math.log(2)) == close(4.28, 2.097)
    assert 3.2096 / math.log(2) / 2.2143 == pytest.approx(2.091, abs=0.0005)


def test_attention():
    q, keys = torch.tensor([[1.0, 0.0]]), torch.eye(2)
    values = torch.tensor([[10.0, 0.0], [20.0, 0.0]])
    y = attend(q[None, None], keys[None, None], values[None, None], torch.zeros(1))
    assert y[0, 0, 0, 0] == pytest.approx(13.3, abs=0.05)
    torch.manual_seed(0)
    q, keys = torch.randn(10_000, 64, 1), torch.randn(10_000, 8, 64)
    scores = (keys @ q)[..., 0]
    largest = [x.softmax(-1).amax(-1).mean() for x in (scores, scores / 8)]
    assert (float(scores.std()), *map(float, largest)) == close(8.0, 0.87, 0.36, digits=1)
    assert [16 * slope for slope in alibi_slopes(2)] == [1, 0.0625]
    angles = RotaryPosition(DEMO).sin[1, 32:].asin()
    assert (float(angles[0]), float(angles[-1])) == close(1.0, 0.00013, digits=5)


def test_layers_and_the_start_of_the_demo():
    x = torch.tensor([2.0, 4.0, 6.0])
    config = ModelConfig(n_embd=3)
    assert NORMS["layernorm"](config)(x).tolist() == close(-1.22, 0, 1.22)
    assert NORMS["rmsnorm"](config)(x).tolist() == close(0.46, 0.93, 1.39)
    assert torch.nn.Dropout(0.1)(torch.ones(1000)).max() == pytest.approx(1.11, abs=0.005)
    assert torch.tensor([3.14159, 1 + 1 / 256]).bfloat16().tolist() == [3.140625, 1]
    torch.manual_seed(0)
    idx = torch.randint(65, (4, 257))
    zero, random = GPT(DEMO), GPT(ModelConfig(vocab_size=65))
    losses = [model(idx[:, :-1], idx[:, 1:])[1].item() for model in (zero, random)]
    assert losses[0] == pytest.approx(math.log(65), abs=1e-5)
    assert losses[1] == pytest.approx(4.2, abs=0.05)
    assert (count_parameters(zero), zero.wte.weight.numel()) == (805_760, 8_320)


def test_training():
    config = make(TrainConfig, DEMO_KEYS | {"max_iters": 2400})
    rates = [config.lr(step) for step in (0, 10, 1205, 2400)]
    assert rates == close(0.00055, 0.006, 0.003, 0, digits=5)
    assert close(0.74, 2.4, digits=1) == (0.997**100, 2400 * 1024 / 1_003_854)
    torch.manual_seed(0)
    gradient = torch.randn(64, 32) * 0.6 ** torch.arange(8).repeat(4)
    update = orthogonalize(gradient[None])[0]
    sizes = torch.linalg.svdvals(update)
    assert sizes.min() > 0.6 and sizes.max() < 1.25
