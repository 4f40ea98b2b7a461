"""The examples of docs/variants.md, typed into a copy of the repository, train, resume and write."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, train_losses
from humptygpt.model import GPT, ModelConfig
from test_explain import NODE, Node
from texts import make_text
from torch import nn

import train
from humptygpt import cli
from humptygpt import model as models
from humptygpt.models import ensemble
from humptygpt.training.settings import TrainConfig

ROOT = Path(__file__).parent.parent
EXAMPLES = (ROOT / "docs/variants.md").read_text(encoding="utf-8")
# the settings that choose each example; those without a setting are in force in all
CASES = {
    "norm": ["--norm=scale"],
    "linear": ["--attention=linear"],
    "latent": ["--attention=latent"],
    "gated": ["--attention=gated"],
    "exclusive": ["--attention=exclusive"],
    "value_residual": ["--attention=value_residual"],
    "value_embedding": ["--attention=value_embedding"],
    "differential": ["--attention=differential"],
    "window": ["--window=4"],
    "moe": ["--mlp=moe"],
    "lion": ["--optimizer=lion", "--learning_rate=1e-4"],
    "averaged": ["--optimizer=averaged"],
    "schedule": ["--schedule=sqrt", "--warmup_iters=0"],
    "copy": ["--dataset=copy"],
}
# those with a state or a schedule of their own are also stopped and resumed
RESUMED = ["lion", "averaged", "copy"]
# those with weights, values or losses of their own: also by two ranks that recompute activations, and resumed by one
WHOLE = ["value_residual", "value_embedding", "differential", "moe", "window"]
SIZES = ["--n_layer=2", "--n_embd=32", "--block_size=16", "--device=cpu", "--dtype=float32"]
STEPS = ["--max_iters=10", "--eval_interval=5", "--eval_iters=2", "--log_interval=1"]
# in one process, because each start takes seconds
ALL = """
import dataclasses, json, signal, sys
import explain, export, sample, train
from humptygpt.cli import UserError
from humptygpt.training import evaluation
from humptygpt.training import run as runs

no_samples = {"evaluation_examples": None, "final_examples": None}
evaluation.TEXT = dataclasses.replace(evaluation.TEXT, **no_samples)

stops = False
draw = runs.draw_losses


def stop(run, before):
    if stops and run.progress.iter == 6:
        signal.raise_signal(signal.SIGINT)
    return 0.0


train.METRICS["stop"] = stop
for name, keys in json.loads(sys.argv[1]).items():
    runs.draw_losses = draw if name == "norm" else lambda *args: None
    assert train.main([*keys, f"--out_dir=out/{name}"]) == 0
    if name in sys.argv[3:]:
        stops, out = True, f"--out_dir=out/{name}_stopped"
        assert train.main([*keys, out]) == 128 + signal.SIGINT
        stops = False
        assert train.main(["--init_from=resume", out]) == 0
    source = [f"--out_dir=out/{name}", "--checkpoint=latest"]
    if name == "averaged":
        import average

        source = ["--init_from=out/averaged/average.pt"]
    sample.main([*source, "--max_new_tokens=9", "--device=cpu"])
    if name in json.loads(sys.argv[2]):
        stops, out = True, f"--out_dir=out/{name}_ranks"
        ranks = ["--threads=2", "--checkpoint_activations=True"]
        assert train.main([*keys, out, *ranks]) == 128 + signal.SIGINT
        stops = False
        assert train.main(["--init_from=resume", "--threads=1", out]) == 0
        explain.main([out])
        try:
            export.main([out, "--to=out/exported"])
        except UserError:
            continue
        raise AssertionError(f"{name} was not refused")
"""


@pytest.fixture
def edited(folder) -> Path:
    """A copy of the repository with all examples in it, in which each case has been trained."""
    for name in ("humptygpt", "config", "explain"):
        shutil.copytree(ROOT / name, folder / name)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    for kind, text in re.findall("```(python|diff)\n(.*?)```", EXAMPLES, re.DOTALL):
        first, code = text.split("\n", 1)
        path = folder / first.removeprefix("--- ").removeprefix("# ")
        if path.suffix == ".py" and first[0] in "-#":
            source = path.read_text(encoding="utf-8") if path.exists() else ""
            path.parent.mkdir(exist_ok=True)
            path.write_text(apply(kind, source, code))
    (folder / "text.txt").write_text(make_text(4000))
    keys = {name: [*SIZES, *STEPS, *case] for name, case in CASES.items()}
    for name in keys.keys() - {"copy"}:
        keys[name] += ["--input=text.txt", "--dataset=text"]
    done = subprocess.run(
        [sys.executable, "-c", ALL, json.dumps(keys), json.dumps(WHOLE), *RESUMED],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # what the start says if a model does not hold what it should
    for words in ("cannot learn", "computes other", "fails", "sees later"):
        assert words not in done.stderr
    return folder


def apply(kind: str, source: str, example: str) -> str:
    """Put an example at the end of a file, or below METRICS in train.py; a diff where its lines are."""
    if kind == "diff":
        lines = example.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] != "+")
        assert source.count(before) == 1, before
        return source.replace(before, "".join(x[1:] for x in lines if x[0] != "-"))
    if (line := "METRICS = {}\n") in source:
        return source.replace(line, f"{line}\n\n{example}\n\n")
    return f"{source}\n\n{example}"


def rows_of(folder: Path, name: str) -> list[dict]:
    lines = (folder / f"out/{name}/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_example_is_one_of_the_cases_or_in_force_in_all():
    """So that a new example is run."""
    named = set(re.findall(r"^[A-Z]+\[\"(\w+)\"\]", EXAMPLES, re.MULTILINE))
    chosen = {key.partition("=")[2] for case in CASES.values() for key in case}
    assert named - chosen == {"update_ratio"}


def losses_of(folder: Path, name: str) -> list[float]:
    keys = ("train_loss", "val_loss")
    return [row[key] for row in rows_of(folder, name) for key in keys if key in row]


def test_every_example_learns_in_its_own_way_logs_its_numbers_and_resumes_exactly(edited):
    losses = {name: losses_of(edited, name) for name in CASES}
    assert all(found[-1] < found[0] for found in losses.values())
    assert len({found[-1] for found in losses.values()}) == len(CASES)
    for name in RESUMED:
        assert losses_of(edited, f"{name}_stopped") == losses[name]
    for name in WHOLE:
        assert losses_of(edited, f"{name}_ranks") == pytest.approx(losses[name], abs=1e-5)
    first, *_, last = [row for row in rows_of(edited, "norm") if "train_loss" in row]
    assert 0 < first["update_ratio"] < 1
    assert last["second"] == pytest.approx(first["second"] / 10, rel=0.3)
    # the balance of two blocks, in which experts are chosen about equally often
    assert rows_of(edited, "moe")[0]["balance"] == pytest.approx(0.02, rel=0.1)
    if NODE is None:
        pytest.skip("needs node, which runs the page's JavaScript")
    pages = Node(edited)
    for name in WHOLE:
        path = edited / f"out/{name}_ranks/explain.html"
        problem = pages.ask("problem", path=str(path)) or "none"
        assert problem.startswith("This page would show other numbers"), name
    pages.process.stdin.close()


# --------------------------------------------------------------------------------------
# What each place for an idea promises, whatever the idea


class WithTerm(GPT):
    """A GPT whose loss has a term that falls over the run."""

    name = "own"

    def forward(self, idx, targets=None, cache=None, progress=1.0):
        logits, loss = super().forward(idx, targets, cache)
        return logits, loss, {self.name: (1 - progress) * self.term()}

    def term(self):
        return self.wte.weight.square().mean()


class OfTheBatch(WithTerm):
    """Its term is not the mean of the terms of the rows."""

    weight = 1.0

    def forward(self, idx, targets=None, cache=None, progress=1.0):
        logits, loss, terms = super().forward(idx, targets, cache, progress)
        if loss is not None:
            terms = {"own": self.weight * loss.square()}
        return logits, loss, terms


def terms(rows: list[dict]) -> list[float]:
    return [row["own"] for row in rows if "own" in row]


@pytest.mark.parametrize("keys", [["--threads=2"], ["--n_members=2"]])
def test_a_term_reaches_ranks_and_members_and_stays_out_of_the_losses(run_train, monkeypatch, keys):
    plain = run_train()
    monkeypatch.setattr(models, "GPT", WithTerm)
    monkeypatch.setattr(ensemble, "GPT", WithTerm)
    monkeypatch.setattr(WithTerm, "term", lambda self: 0 * self.wte.weight.sum() + 3)
    rows = run_train(*keys)
    assert terms(rows) == pytest.approx([3 * (1 - step / 6) for step in range(6)])
    if keys == ["--threads=2"]:
        assert train_losses(rows) == pytest.approx(train_losses(plain), abs=1e-5)


def test_a_term_changes_what_is_learned(run_train, monkeypatch):
    plain = run_train()
    monkeypatch.setattr(models, "GPT", WithTerm)
    assert run_train()[-1]["val_loss"] != plain[-1]["val_loss"]


@pytest.mark.parametrize("weight", [1.0, 1e-3])
def test_a_term_of_a_whole_batch_is_computed_on_it_and_a_note_says_so(
    run_train, monkeypatch, model_is_edited, capsys, weight
):
    monkeypatch.setattr(models, "GPT", OfTheBatch)
    monkeypatch.setattr(OfTheBatch, "weight", weight)
    expected = terms(run_train())
    capsys.readouterr()
    assert terms(run_train("--threads=2")) == pytest.approx(expected, rel=1e-4)
    complaint = "threads share each operator, not the batch, which is slower: the loss of"
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lr", "val_loss", "kind", "end"])
def test_a_term_may_not_have_the_name_of_a_column(tiny, fails, monkeypatch, name):
    monkeypatch.setattr(models, "GPT", WithTerm)
    monkeypatch.setattr(WithTerm, "name", name)
    complaint = f"metrics.jsonl has a {name} already; rename yours\n"
    assert fails(train.main, *TINY_RUN) == complaint


def test_a_metric_is_due_every_log_interval_steps_and_sees_the_update(run_train, monkeypatch):
    def largest(run, before):
        assert all(p.grad is not None for p in run.model.parameters())
        weights = run.model.named_parameters()
        return max((p - before[name]).abs().max() for name, p in weights)

    monkeypatch.setitem(train.METRICS, "largest", largest)
    rows = run_train("--log_interval=2", "--learning_rate=1e-3")
    found = [row["largest"] for row in rows if "train_loss" in row]
    assert len(found) == 3
    rates = [row["lr"] for row in rows if "train_loss" in row]
    assert found == pytest.approx(rates, rel=0.3)  # an element moves by about the rate


def test_a_metric_that_is_not_finite_is_null(run_train, monkeypatch, capsys):
    monkeypatch.setitem(train.METRICS, "own", lambda run, before: float("nan"))
    assert terms(run_train()) == [None] * 6
    assert "own" not in capsys.readouterr().out


def test_an_optimizer_checks_its_own_settings(tiny, fails, monkeypatch):
    monkeypatch.setattr(
        TrainConfig,
        "validate",
        lambda self: cli.check_least(self, 7, "beta1"),
    )
    assert "beta1=0.9 must be at least 7" in fails(train.main, *TINY_RUN)


def test_several_last_layers_of_a_branch_count_as_one_when_weights_are_drawn(monkeypatch):
    class Experts(nn.Module):
        def __init__(self, config, layer):
            super().__init__()
            self.experts = nn.ModuleList(models.MLP(config) for _ in range(4))

    monkeypatch.setitem(models.MLPS, "own", Experts)
    config = ModelConfig(n_embd=64, vocab_size=11, mlp="own")
    weight = GPT(config).stack.blocks[0].attn.o_proj.weight
    assert weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.1)


class Rare(GPT):
    """It has a weight that is used for few texts."""

    def __init__(self, config):
        super().__init__(config)
        self.rare = nn.Parameter(torch.ones(1))

    def forward(self, idx, targets=None, cache=None):
        logits, loss = super().forward(idx, targets, cache)
        scale = 1 + (idx[0, 0] == 4) * (self.rare.sum() - 1)
        return logits, None if loss is None else loss * scale


def test_a_weight_of_few_texts_is_not_said_to_be_lost(run_train, monkeypatch, capsys):
    monkeypatch.setattr(models, "GPT", Rare)
    run_train()
    assert "cannot learn" not in capsys.readouterr().err


def test_a_compiled_training_has_the_losses_and_names_of_an_eager_one_and_few_graphs(run_train, monkeypatch, capsys):
    def names() -> set[str]:
        return set(torch.load("out/run/ckpt.pt")["model"])

    expected = train_losses(run_train("--dropout=0.2", "--dtype=float32"))
    # without the compiler behind it, which takes a minute
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.utils.counters.clear()
    eager = names()
    found = train_losses(run_train("--compile=True", "--dtype=float32", "--dropout=0"))
    assert names() == eager
    assert found == pytest.approx(train_losses(run_train("--dropout=0")), rel=1e-5)
    assert found != expected
    assert "failed" not in capsys.readouterr().err
    run_train("--compile=True", "--dropout=0.2")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] < 12
