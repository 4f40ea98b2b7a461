import json
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_text
from humptygpt.model import ModelConfig

import prepare_data
from benchmarks import __main__ as bench
from benchmarks import (
    choices,
    contenders,
    generation,
    step_profile,
    step_time,
    time_to_loss,
    training,
)
from benchmarks.huggingface import HuggingFaceGenerator
from benchmarks.nanogpt import NanoGPTTrainer
from benchmarks.ours import OurTrainer

NANOGPT = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int = 8
    vocab_size: int = 8
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 8
    dropout: float = 0.0
    bias: bool = True

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets):
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.view(-1), ignore_index=-1)

    def generate(self, idx, max_new_tokens):
        for _ in range(max_new_tokens):
            idx = torch.cat([idx, self.table(idx[:, -1:]).argmax(dim=-1)], dim=1)
        return idx

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.SGD(self.parameters(), lr=learning_rate)
"""
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 40}
SMALL = ModelConfig(**SIZES, bias=True, activation="gelu_tanh")


@pytest.fixture
def text(folder):
    """data/shakespeare_char, a nanoGPT, and two configs."""
    Path("text.txt").write_text(make_text())
    prepare_data.main(["--input=text.txt", "--name=shakespeare_char"])
    Path("other").mkdir()
    Path("other/model.py").write_text(NANOGPT)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16}
    keys = shape | {"batch_size": 12, "muon_learning_rate": 0.02}
    Path("plain.py").write_text("".join(f"{k} = {v!r}\n" for k, v in keys.items()))
    Path("tiny.py").write_text(
        Path("plain.py").read_text()
        + "learning_rate = 1e-2\nwarmup_iters = 2\nposition = 'rotary'\noptimizer = 'muon'\n"
    )


class Here:
    """A contender in this process: others take seconds to start."""

    def __init__(self, cls, *arguments):
        self.contender = cls(*arguments)

    def call(self, method, *arguments):
        return getattr(self.contender, method)(*arguments)

    def begin(self, method, *arguments):
        future = Future()
        future.set_result(self.call(method, *arguments))
        return future


@pytest.fixture
def here(monkeypatch):
    for module in (step_time, time_to_loss, generation, choices):
        monkeypatch.setattr(module, "Isolated", Here)
    for module in (step_time, time_to_loss, step_profile):
        monkeypatch.setattr(module, "WARMUP", 2)


def run(capsys, *argv: str) -> dict:
    bench.main(list(argv))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# --------------------------------------------------------------------------------------
# Training


def test_steps_of_both_are_timed_in_processes_of_their_own_and_the_ratio_is_of_the_medians(text, capsys):
    result = run(capsys, "--nanogpt=other", "--steps=2", "--config=plain.py")
    ratio = result["nanogpt_ms"] / result["ours_ms"]
    assert result["speedup"] == pytest.approx(ratio, rel=0.05, abs=0.01)
    speed = 12 * 16 / result["ours_ms"] * 1000
    assert result["ours_tokens_per_second"] == pytest.approx(speed, rel=0.05)


def test_both_train_to_the_target_and_ours_for_as_long_as_nanogpt(text, here, monkeypatch, capsys):
    monkeypatch.setattr(time_to_loss, "PRESET", replace(training.PRESET, max_iters=300))

    def take_steps(self, first: int, count: int) -> list[float]:
        for it in range(first, first + count):
            self.step(it)
        return [0.002] * count

    monkeypatch.setattr(contenders.Trainer, "take_steps", take_steps)
    argv = ["--what=loss", "--nanogpt=other", "--config=tiny.py", "--target=2.6"]
    result = run(capsys, *argv, "--seeds=1", "--device=cpu")
    assert result["ours_seconds"] == pytest.approx(0.8 * result["nanogpt_seconds"])
    assert 0 < result["ours_seconds_to_target"] <= result["ours_seconds"]
    # a table of pairs cannot learn as much
    assert result["ours_val_loss"] < 2.6 < result["nanogpt_val_loss"]
    ratio = result["nanogpt_seconds"] / result["ours_seconds_to_target"]
    assert result["speedup"] == pytest.approx(ratio, rel=0.01)


def test_seconds_to_the_target_are_read_off_between_two_evaluations():
    losses = iter([4.0, 3.0, 2.0, 2.0])
    answers = {
        "take_steps": lambda first, count: [1.0] * count,
        "val_loss": lambda: next(losses),
    }
    figures = time_to_loss.train_to(lambda method, *given: answers[method](*given), 30, 10, target=2.75, name="x")
    assert figures == {"x_seconds": 30.0, "x_seconds_to_target": 22.5, "x_val_loss": 2.0}


def test_both_are_scored_by_one_function_on_the_whole_split(text):
    preset = replace(training.PRESET, batch_size=2, device="cpu", dtype="float32")
    shape = replace(training.SHAPE, vocab_size=24)
    for trainer in (OurTrainer(preset, shape), NanoGPTTrainer(preset, shape, "other")):
        # no two texts cost the same
        torch.nn.init.normal_(next(trainer.model.parameters()))
        val = trainer.dataset.val
        ids = torch.from_numpy(val.read(np.array([0]), len(val))[0])
        total = 0.0
        for first in range(0, len(ids) - 1, trainer.dataset.block_size):
            block = ids[None, first : first + trainer.dataset.block_size + 1]
            with torch.no_grad():
                logits = trainer.model(block[:, :-1], block[:, 1:])[0]
            total += F.cross_entropy(logits[0], block[0, 1:], reduction="sum").item()
        assert trainer.val_loss() == pytest.approx(total / (len(ids) - 1), rel=1e-4)


def test_the_profile_has_the_phases_of_a_step_and_its_operators(text, here, capsys):
    bench.main(["--what=profile", "--config=tiny.py", "--steps=2", "--device=cpu"])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    phases = ["batch", "forward", "backward", "clip", "optimizer"]
    assert list(result) == [f"{phase}_ms" for phase in phases]
    assert min(result.values()) > 0 and "aten::mm" in out


def test_bad_input_is_one_line(text, fails):
    for argv, complaint in {
        "--what=memory": "what=memory is not one of: train, loss, profile, sample, page, gpu",
        "--nanogpt=nothing": "nanogpt=nothing has no model.py",
        "--what=loss": "what=loss needs --nanogpt",
        "--what=page": "what=page needs --page",
        "--what=sample --prompt=1000": "prompt=1000 and new_tokens=32 are more than the 1024",
        "--nanogpt=other --config=tiny.py": "tiny.py is no GPT-2 trained by AdamW",
        "--device=cuda:77": "device=cuda:77 is not available",
    }.items():
        assert complaint in fails(bench.main, *argv.split())


# --------------------------------------------------------------------------------------
# Generation


def test_generation_is_timed_beside_what_is_installed_and_what_is_missing_is_named(here, text, monkeypatch, capsys):
    """--size=gpt2 is SMALL; no package but torch is there."""
    monkeypatch.setattr(generation, "shapes", lambda size: (SMALL, SMALL))
    find = lambda package: package if package == "torch" else None  # noqa: E731
    monkeypatch.setattr(generation.importlib.util, "find_spec", find)
    argv = ["--what=sample", "--new_tokens=4", "--rounds=2", "--texts=2", "--prompt=3"]
    bench.main([*argv, "--weights=int8", "--nanogpt=other"])
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]).keys() == {"threads", "ours"}
    assert "nanogpt is not timed: it has no int8" in out
    assert "llama_cpp is not timed: pip install xllamacpp gguf" in out
    result = run(capsys, *argv, "--nanogpt=other")
    for key in ("first_token_ms", "tokens_per_second"):
        ratio = result["ours"][key] / result["nanogpt"][key]
        assert result["nanogpt"]["ratio"][key] == pytest.approx(ratio, rel=0.01, abs=1e-3)


def test_figures_are_medians_over_rounds_and_steps():
    rounds = [[5.0, 0.1, 0.2], [9.0, 0.4, 0.2], [7.0, 0.2, 0.9]]
    # 4 texts in 0.2 s
    figures = generation.summary(rounds, texts=4)
    assert figures == {"first_token_ms": 7000, "tokens_per_second": 20}


def test_the_loop_around_hugging_faces_model_is_greedy_and_keeps_what_it_has_read():
    pytest.importorskip("transformers")
    config = bench.BenchConfig(what="sample", texts=3, prompt=5)
    run = HuggingFaceGenerator(SMALL, config)
    expected = run.idx
    for tokens in run.steps(6):
        with torch.no_grad():
            logits = run.model(expected).logits[:, -1:]
        expected = torch.cat([expected, logits.argmax(dim=-1)], dim=1)
        assert torch.equal(tokens, expected[:, -1:])
    assert expected.shape == (3, 11)


# --------------------------------------------------------------------------------------
# The machine


def test_what_train_py_does_is_marked_among_all_and_compared_with_the_best(text, here, monkeypatch, capsys):
    speeds = {"float32": 100, "bfloat16": 300}
    monkeypatch.setattr(
        choices.Contender,
        "operators",
        lambda self, choice: choice.threads * speeds[choice.dtype],
    )
    monkeypatch.setattr(choices.Contender, "processes", lambda self, choice: 600)
    monkeypatch.setattr(choices.Contender, "generate", lambda self, choice: 7)
    monkeypatch.setattr(choices, "DEMO", Path("tiny.py"))  # a small model, which is in order
    monkeypatch.setattr(choices, "SPINS", (7,))
    monkeypatch.setattr(choices, "THREADS", 2)
    monkeypatch.setattr(choices, "training_dtype", lambda device: "float32")
    monkeypatch.setenv("GOMP_SPINCOUNT", "8")
    bench.main(["--what=machine"])
    *lines, result = capsys.readouterr().out.splitlines()
    expected = {"operators": 600, "shared": 600, "ratio": 1.0, "beside_another": [1, 1]}
    assert json.loads(result) == expected | {"beside_busy_cores": 1.0}
    rows = [line.split() for line in lines if " spins " in line]
    assert len({tuple(row[:4]) for row in rows}) == 2 * 2 * 2
    (auto,) = (row for row in rows if row[-1] == "auto")
    assert auto[:5] == ["float32", "2", "threads", "8", "spins"]
    assert auto[5:11] == ["200", "200", "600", "600", "7", "7"]


def test_the_speed_is_that_of_the_calls_after_the_first(monkeypatch):
    now = 0.0
    durations = iter([9.0, 0.25, 0.25, 0.25])

    def call() -> None:
        nonlocal now
        now += next(durations)

    monkeypatch.setattr(choices.time, "perf_counter", lambda: now)
    monkeypatch.setattr(choices, "SECONDS", 0.6)
    assert choices.calls_per_second(call, 1) == 4
