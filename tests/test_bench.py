import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_text

import bench
import prepare_data
from humptygpt.tokenizer import GPT2Tokenizer
from model import flops_per_token

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
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.SGD(self.parameters(), lr=learning_rate)
"""


@pytest.fixture
def text(folder):
    """data/shakespeare_char, and folders of a nanoGPT and of a config."""
    Path("text.txt").write_text(make_text())
    prepare_data.main(["--input=text.txt", "--name=shakespeare_char"])
    Path("other").mkdir()
    Path("other/model.py").write_text(NANOGPT)
    Path("plain.py").write_text("n_layer = 1\nn_head = 2\nn_embd = 32\nblock_size = 16\n")
    Path("tiny.py").write_text(
        "n_layer = 1\nn_head = 2\nn_embd = 32\nblock_size = 16\nlearning_rate = 1e-2\nwarmup_iters = 2\n"
        "ngrams = 3\noptimizer = 'muon'\n"
    )


class Here:
    """A contender in this process: others take seconds to start."""

    def __init__(self, cls, *arguments):
        self.contender = cls(*arguments)

    def ask(self, method, *arguments):
        return getattr(self.contender, method)(*arguments)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(bench, "Apart", Here)
    monkeypatch.setattr(bench, "WARMUP", 2)


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_steps_of_both_are_timed_in_processes_of_their_own_and_the_ratio_is_of_the_medians(text, capsys):
    bench.main(["--nanogpt=other", "--steps=2", "--config=plain.py"])
    result = last_line(capsys)
    assert result["speedup"] == pytest.approx(result["nanogpt_ms"] / result["ours_ms"], rel=0.05, abs=0.01)
    assert result["ours_tokens_per_second"] == pytest.approx(12 * 16 / result["ours_ms"] * 1000, rel=0.05)


def test_alone_it_times_this_program(text, here, capsys):
    bench.main(["--steps=1", "--config=plain.py", "--dtype=bfloat16"])
    assert last_line(capsys).keys() == {"ours_ms", "ours_tokens_per_second"}


def test_where_the_peak_of_the_card_is_listed_mfu_is_reported(text, here, monkeypatch, capsys):
    monkeypatch.setattr(bench, "peak_flops", lambda device: 1e12)
    bench.main(["--steps=1", "--config=tiny.py"])
    result = last_line(capsys)
    model = bench.Ours(*bench.read_config(bench.BenchConfig(config="tiny.py", device="cpu"))).model
    speed = result["ours_tokens_per_second"]
    assert result["ours_mfu"] == pytest.approx(speed * flops_per_token(model) / 1e12, rel=0.01, abs=1e-4)


def test_both_train_to_the_target_and_ours_for_as_long_as_nanogpt(text, here, monkeypatch, capsys):
    monkeypatch.setattr(bench, "PRESET", replace(bench.PRESET, max_iters=300))
    monkeypatch.setattr(bench, "timed", lambda step: step() or 0.002)
    bench.main(["--what=loss", "--nanogpt=other", "--config=tiny.py", "--target=2.6", "--seeds=1", "--device=cpu"])
    out = capsys.readouterr().out
    assert out.startswith("seed 1: {")
    result = json.loads(out.splitlines()[-1])
    assert 0 < result["ours_seconds_to_target"] <= result["ours_seconds"]
    assert result["ours_steps"] == 240  # 0.8 of the other's time
    assert result["ours_val_loss"] < 2.6 and result["nanogpt_val_loss"] > 2.6  # a table of pairs cannot learn as much
    assert result["speedup"] == pytest.approx(result["nanogpt_seconds"] / result["ours_seconds_to_target"], rel=0.01)


def test_both_are_scored_by_one_function_on_the_whole_split_and_on_random_crops(text):
    def nats(model, ids) -> float:  # ids: (B, T + 1)
        with torch.no_grad():
            logits = model(ids[:, :-1], ids[:, 1:])[0]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()

    preset = replace(bench.PRESET, batch_size=2, device="cpu", dtype="float32")  # several batches in the split
    for run in (bench.Ours(preset, bench.SHAPE), theirs(preset)):
        torch.nn.init.normal_(next(run.model.parameters()))  # so that no two texts cost the same
        val, T = torch.from_numpy(run.dataset.val.read(np.array([0]), len(run.dataset.val))[0]), run.dataset.block_size
        whole = sum(nats(run.model, val[None, first : first + T + 1]) for first in range(0, len(val) - 1, T))
        assert run.val_loss() == pytest.approx(whole / (len(val) - 1), rel=1e-4)
        draw = np.random.default_rng(1337)
        crops = [val[i : i + T + 1] for _ in range(200) for i in draw.integers(len(val) - T, size=2)]
        assert run.crops_loss() == pytest.approx(nats(run.model, torch.stack(crops)) / 400 / T, rel=1e-4)


def theirs(config) -> bench.NanoGPT:
    return bench.NanoGPT(config, bench.SHAPE, Path("other"))


def test_our_steps_and_theirs_learn(text):
    preset = replace(bench.PRESET, device="cpu", dtype="float32")
    for run in (
        bench.Ours(preset, bench.SHAPE),
        theirs(replace(preset, learning_rate=1)),
    ):
        before = run.val_loss()
        assert len(run.take_steps(0, 30)) == 30
        assert run.val_loss() < before - 0.05


def test_the_profile_reports_the_parts_of_a_step_and_its_operators(text, capsys):
    bench.main(["--what=profile", "--config=tiny.py", "--steps=2", "--device=cpu"])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    parts = [result[f"{part}_ms"] for part in ("read_a_batch", "forward", "backward", "clip", "optimizer")]
    assert min(parts) > 0 and result["whole_step_ms"] > 0
    assert "aten::mm" in out


def test_preparing_is_timed_beside_tiktoken_alone(folder, monkeypatch, capsys):
    tok = GPT2Tokenizer([bytes([i]) for i in range(256)])
    monkeypatch.setattr(GPT2Tokenizer, "train", lambda: tok)
    Path("text.txt").write_text(make_text(100_000))
    script = Path("fake.py")  # stands for prepare_data.py, which would fetch GPT-2's vocabulary
    script.write_text(
        "held = b'x' * 80_000_000\nimport time\nlast = time.time() + 0.5\nwhile time.time() < last: pass\n"
    )
    monkeypatch.setattr(bench, "PREPARE", script)
    bench.main(["--what=prepare", "--input=text.txt"])
    result = json.loads(capsys.readouterr().out)
    assert result["peak_memory_mb"] > 80
    alone = result["tiktoken_alone_mb_per_second"] * result["cores"]
    assert result["efficiency"] == pytest.approx(result["mb_per_second"] / alone, rel=0.05, abs=0.01)


def test_reading_is_timed(text, capsys):
    bench.main(["--what=read", "--block_size=16", "--batches=50"])
    result = json.loads(capsys.readouterr().out)
    assert result["tokens_per_second"] > 1000 and result["growth_mb"] < 50


def test_bad_input_is_one_line(folder, fails):
    assert "what=memory is not one of: train, loss, profile, prepare, read" in fails(bench.main, "--what=memory")
    assert "what=prepare needs --input" in fails(bench.main, "--what=prepare")
    assert "batches=5 has no effect without what=read" in fails(bench.main, "--batches=5")
    assert "nanogpt=nothing has no model.py" in fails(bench.main, "--nanogpt=nothing")
    assert "what=loss needs --nanogpt" in fails(bench.main, "--what=loss")
    assert "target=0.0 must be above 0" in fails(bench.main, "--what=loss", "--target=0")
    assert "dtype=int8 is not one of: auto, float32" in fails(bench.main, "--dtype=int8")
    assert "steps=5 has no effect without what=train or profile" in fails(bench.main, "--what=read", "--steps=5")
    assert "steps=0 must be at least 1" in fails(bench.main, "--steps=0")
    assert "no data/shakespeare_char; run: python prepare_data.py shakespeare_char" in fails(bench.main)


def test_seconds_to_the_target_are_read_off_between_two_evaluations():
    losses = iter([4.0, 3.0, 2.0, 2.0])
    answers = {"take_steps": lambda first, count: [1.0] * count, "val_loss": lambda: next(losses)}
    answers["crops_loss"] = lambda: 2.5
    found = bench.train_to(lambda method, *given: answers[method](*given), steps=30, interval=10, target=2.75)
    assert found == {"seconds": 30.0, "seconds_to_target": 22.5, "val_loss": 2.0, "crops_loss": 2.5}


def test_a_run_that_cannot_start_is_one_line(text, fails):
    Path("other/model.py").write_text("raise ImportError('no such thing')")
    assert "failed in a process of its own: no such thing" in fails(
        bench.main, "--nanogpt=other", "--config=plain.py", "--steps=1"
    )
    assert "device=cuda:77 is not available" in fails(bench.main, "--device=cuda:77")
    assert "dtype=float16 needs a CUDA device" in fails(bench.main, "--dtype=float16", "--device=cpu")


def test_settings_that_do_not_count_here_are_refused(text, fails):
    Path("mean.py").write_text("ema_decay = 0.9\n")
    assert "ema_decay=0.9 is not timed here" in fails(bench.main, "--config=mean.py")


def test_what_nanogpt_cannot_be_is_not_timed_beside_it(text, fails):
    assert "tiny.py is no GPT-2 trained by AdamW" in fails(bench.main, "--nanogpt=other", "--config=tiny.py")
