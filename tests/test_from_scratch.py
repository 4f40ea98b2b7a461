"""from_scratch.py computes the same numbers as model.py, and learns the rhyme."""

import random
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import from_scratch
from humptygpt import model as models
from humptygpt.models.build import build
from humptygpt.training.optimizers import make_optimizer
from humptygpt.training.settings import TrainConfig

SIZES = {"n_embd": 8, "n_layer": 2, "block_size": 6}
TOKENS = [3, 1, 4, 1, 5, 9, 2]


def tensor(vectors, what):
    """Stack the numbers or the gradients of vectors. A norm's scale is a single vector."""
    rows = torch.tensor([getattr(x, what) for x in vectors], dtype=torch.float64)
    return rows[0] if len(rows) == 1 else rows


@pytest.fixture
def both():
    """Make weights for from_scratch.py, and the GPT of model.py with the same weights."""
    random.seed(0)
    weights = from_scratch.new_gpt(**SIZES)
    for rows in weights.values():
        for x in rows:
            x.numbers = [number + random.gauss(0, 0.1) for number in x.numbers]
    settings = {"vocab_size": len(from_scratch.ALPHABET), "n_head": 2, "activation": "relu"}
    model = build(models.ModelConfig(**SIZES | settings)).double()
    state = {f"{name}.weight": tensor(rows, "numbers") for name, rows in weights.items()}
    model.load_state_dict(state | {"lm_head.weight": state["wte.weight"]})
    return weights, model


def step(weights, model):
    """Compute the losses of both on the same tokens, and the gradients of model."""
    scores = from_scratch.gpt(TOKENS[:-1], weights, n_layer=2, n_head=2)
    losses = [from_scratch.cross_entropy(x, token) for x, token in zip(scores, TOKENS[1:], strict=True)]
    logits, loss = model(torch.tensor([TOKENS[:-1]]), torch.tensor([TOKENS[1:]]))
    loss.backward()
    return scores, losses, logits[0], loss


def test_logits_loss_and_gradients_are_those_of_model_py(both):
    weights, model = both
    scores, losses, logits, loss = step(weights, model)
    torch.testing.assert_close(tensor(scores, "numbers"), logits, rtol=0, atol=1e-9)
    from_scratch.adamw([], losses, step=1, lr=0)
    mean = sum(x.numbers[0] for x in losses) / len(losses)
    assert mean == pytest.approx(loss.item(), abs=1e-9)
    for name, rows in weights.items():
        expected = model.get_parameter(f"{name}.weight").grad
        torch.testing.assert_close(tensor(rows, "gradient"), expected, rtol=0, atol=1e-9)


def test_a_step_of_adamw_ends_in_the_weights_of_the_trainer(both):
    weights, model = both
    config = TrainConfig(learning_rate=0.01, weight_decay=0.1)
    optimizer = make_optimizer(config, model)
    for number in (1, 2):
        _, losses, _, _ = step(weights, model)
        kinds = {0.0: [], 0.1: []}  # norms do not decay
        for name, rows in weights.items():
            kinds[0.0 if "norm" in name else 0.1] += rows
        for decay, rows in kinds.items():
            from_scratch.adamw(rows, losses, number, lr=0.01, decay=decay)
        optimizer.step()
        model.zero_grad()
    for name, rows in weights.items():
        expected = model.get_parameter(f"{name}.weight")
        torch.testing.assert_close(tensor(rows, "numbers"), expected, rtol=0, atol=1e-9)


def test_the_page_and_the_ladder_name_chapters_that_it_has():
    page = (ROOT / "explain/sections.js").read_text(encoding="utf-8")
    ladder = (ROOT / "docs/ladder.md").read_text(encoding="utf-8")
    listed = re.search(r"under the article's titles:(.*?)\.", ladder, re.DOTALL).group(1)
    chapters = re.findall('chapter: "(.*?)"', page) + " ".join(listed.split()).split(", ")
    source = (ROOT / "from_scratch.py").read_text(encoding="utf-8")
    assert len(chapters) == 20
    for chapter in chapters:
        assert re.search(rf"^# {re.escape(chapter)}(:|(?<=[?]))", source, re.M), chapter


def test_the_pages_sections_are_in_the_articles_order_and_end_with_how_the_model_came_to_be():
    page = (ROOT / "explain/sections.js").read_text(encoding="utf-8")
    source = (ROOT / "from_scratch.py").read_text(encoding="utf-8")
    chapters = re.findall('chapter: "(.*?)"', page)
    assert chapters == sorted(chapters, key=lambda name: source.index(f"# {name}"))
    assert re.findall('^    id: "(.*?)"', page, re.M)[-2:] == ["learned", "step"]


@pytest.mark.long
def test_without_any_package_it_learns_the_rhyme_and_recites_it():
    command = [sys.executable, "-I", "-S", str(ROOT / "from_scratch.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert from_scratch.RHYME in printed
