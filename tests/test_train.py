"""Runs of train.py: their files and messages, their steps, stopping and resuming, and errors."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    TINY_RUN,
    WITHOUT_SAMPLE,
    assert_same_weights,
    exit_code,
    make_text,
    read_rows,
    started,
    started_processes,
    train_losses,
)
from test_snapshots import kept

import prepare_data
import sample
import train
from humptygpt import machine
from humptygpt import model as models
from humptygpt.formats import checkpoint
from humptygpt.training import evaluation, settings, setup
from humptygpt.training import run as runs
from humptygpt.training.memory import ADVICE
from humptygpt.training.optimizers import OPTIMIZERS, AdamW
from humptygpt.training.ranks import Ranks
from humptygpt.training.settings import TrainConfig
from humptygpt.training.start import read_settings

ROOT = Path(__file__).parent.parent
OUT = Path("out/run")
RESUME = ["--init_from=resume", "--out_dir=out/run"]


def weights(name: str = "ckpt.pt") -> dict[str, torch.Tensor]:
    return checkpoint.read(OUT / name)["model"]


def saved_step() -> int:
    return checkpoint.read(OUT / "ckpt.pt")["progress"]["iter"]


def resume(*argv: str) -> list[dict]:
    """Resume the run and return its rows of metrics."""
    assert train.main([*RESUME, *argv]) == 0
    return read_rows(OUT)


def values(key: str, rows: list[dict]) -> list[float]:
    return [row[key] for row in rows if key in row]


def evaluations(monkeypatch, *losses: float) -> None:
    """Let the evaluations of a run find these losses."""
    found = iter(losses)
    monkeypatch.setattr(evaluation, "validation_loss", lambda *args: (next(found), 0.1))


@pytest.fixture
def signal_in_step(monkeypatch):
    """Send a signal to this process in a step, counted from 1."""

    def arrange(at: int, number: int = signal.SIGTERM) -> None:
        step = train.train_step

        def step_and_signal(run):
            if run.progress.iter + 1 == at:
                signal.raise_signal(number)
            return step(run)

        monkeypatch.setattr(train, "train_step", step_and_signal)

    return arrange


# --------------------------------------------------------------------------------------
# The files and messages of a run


@pytest.mark.whole_ending
def test_a_run_leaves_checkpoints_metrics_picture_and_settings(run_train, capsys):
    rows = run_train("--eval_iters=None")
    out = capsys.readouterr().out
    assert [row["iter"] for row in rows] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert [row["tokens"] for row in rows] == [64 * row["iter"] for row in rows]
    *raw, end = map(json.loads, (OUT / "metrics.jsonl").read_text().splitlines())
    always = {"kind", "iter", "tokens", "seconds", "position"}
    logged = {"train_loss", "lr", "grad_norm", "tokens_per_second", "dtype", "threads"}
    evaluated = {"val_loss", "val_bits_per_byte", "val_perplexity"}
    evaluated |= {"val_tokens", "val_text"}
    for row, measured in zip(raw, [*[logged] * 3, evaluated] * 2, strict=True):
        assert row.keys() == always | measured
    assert end["end"] == "finished"
    last = raw[-1]
    meta = json.loads(Path("data/tiny/meta.json").read_text())
    # all tokens of the split but its first one are predicted
    assert last["val_tokens"] == meta["splits"]["val"]["tokens"] - 1
    assert last["val_perplexity"] == pytest.approx(math.exp(last["val_loss"]))
    assert last["val_bits_per_byte"] == pytest.approx(last["val_loss"] / math.log(2))
    assert (OUT / "loss.png").read_bytes().startswith(b"\x89PNG")
    settings = json.loads((OUT / "config.json").read_text())
    assert f"{settings['_parameters']:,} parameters" in out
    code = zlib.crc32(Path(models.__file__).read_bytes())
    assert int(settings["_model.py"], 16) == code
    assert out.splitlines()[-1] == f"best val loss {last['val_loss']:.4f} at iter 6"
    assert "python sample.py --out_dir=out/run" in out
    files = "best.pt ckpt.pt command.txt config.json loss.png metrics.jsonl snapshots"
    assert {path.name for path in OUT.iterdir()} == set(files.split())


def test_the_same_seed_gives_the_same_run_and_another_seed_another(run_train):
    first, second, other = run_train(), run_train(), run_train("--seed=2")
    assert first == second
    assert train_losses(first) != train_losses(other)


@pytest.mark.parametrize("always", [True, False])
def test_best_and_latest_are_saved_and_the_latest_always_or_at_a_lower_loss_and_the_end(run_train, monkeypatch, always):
    saved = []
    save = checkpoint.save

    def spy(path, entries):
        saved.append((path.name, entries["progress"]["iter"]))
        save(path, entries)

    monkeypatch.setattr(checkpoint, "save", spy)
    evaluations(monkeypatch, 3.0, 4.0, 5.0)
    run_train(f"--always_save_checkpoint={always}", "--max_iters=9")
    latest = [3, 6, 9] if always else [3, 9]
    assert saved == [("best.pt", 3), *(("ckpt.pt", step) for step in latest)]


def test_early_stopping_counts_evaluations_without_a_lower_loss_and_holds_on_resume(run_train, monkeypatch, capsys):
    stopped = "stopped early: the best model is that of iter "
    evaluations(monkeypatch, 3.0, 4.0, 2.0, 2.5, 2.0, 9.0)
    rows = run_train("--early_stopping=2", "--max_iters=60")
    assert rows[-1]["iter"] == 15
    out = capsys.readouterr().out
    assert f"{stopped}9\n" in out and out.endswith("best val loss 2.0000 at iter 9\n")
    assert resume() == rows
    capsys.readouterr()
    evaluations(monkeypatch, 3.0, 4.0)
    run_train("--early_stopping=1")  # no step is left
    assert stopped not in capsys.readouterr().out


def test_a_run_that_was_best_at_its_end_prints_the_command_that_takes_twice_as_long(run_train, monkeypatch, capsys):
    evaluations(monkeypatch, 3.0, 2.0, 1.0, 0.5, 2.0, 3.0)
    run_train()
    command = re.search("^twice as long: python train.py (.*)", capsys.readouterr().out, re.M)
    assert train.main(command[1].split()) == 0
    assert read_rows(OUT)[-1]["iter"] == 12
    run_train("--overwrite=True")
    assert "twice as long" not in capsys.readouterr().out.rpartition("iter 3:")[2]


def test_a_folder_with_a_space_is_quoted_in_what_to_do_next(tiny, capsys):
    assert train.main([*TINY_RUN, "--out_dir=out/my run"]) == 0
    line = "more of this: python sample.py --out_dir='out/my run'\n"
    assert line in capsys.readouterr().out


def test_evaluating_only_goes_without_dropout_and_writes_nothing(tiny, capsys):
    argv = [*TINY_RUN, "--eval_only=True", "--eval_iters=None", "--batch_size=1"]
    lines = set()
    for dropout in ("0.0", "0.5"):
        assert train.main([*argv, f"--dropout={dropout}"]) == 0
        out = capsys.readouterr().out
        assert "on 399 of 399 tokens\n" in out
        lines.add(out.splitlines()[-1])
    assert re.fullmatch(
        r"val loss \d\.\d{4} \(\d\.\d{3} bits per byte, perplexity [\d.]+\) at iter 0",
        *lines,
    )
    assert not Path("out").exists()


class Given(torch.nn.Module):
    """A network whose losses are given."""

    def forward(self, targets, loss):
        return None, loss


def evaluated(losses: torch.Tensor, sizes: list[int]) -> tuple:
    """Evaluate batches with these losses and these numbers of targets."""
    batches = [
        {"targets": torch.tensor([1] * size + [-1]), "loss": loss} for size, loss in zip(sizes, losses, strict=True)
    ]
    run = SimpleNamespace(
        config=TrainConfig(),
        net=Given(),
        dataset=SimpleNamespace(val_batches=lambda *args: batches),
        ranks=Ranks(torch.device("cpu")),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    return evaluation.validation_loss(run, run.net, None)


def test_the_standard_error_holds_for_a_text_whose_neighbouring_batches_are_alike():
    torch.manual_seed(1)
    found = []
    for _ in range(60):
        losses = torch.randn(101)
        losses[100] = math.nan  # a batch without targets
        for i in range(1, 100):  # neighbours correlate by 0.6, as scenes do
            losses[i] = 0.6 * losses[i - 1] + 0.8 * losses[i]
        found.append(evaluated(losses, [*[4] * 99, 2, 0]))
    means, errors = torch.tensor(found, dtype=torch.float64).T
    assert errors.square().mean().sqrt() == pytest.approx(means.std().item(), rel=0.2)


def test_only_an_evaluation_of_many_batches_has_a_standard_error(run_train, capsys):
    losses, sizes = torch.rand(95), torch.arange(1, 96)
    mean, error = evaluated(losses, sizes.tolist())
    assert error is None
    assert mean == pytest.approx((losses @ sizes.float() / sizes.sum()).item())
    for batch_size, has_one in (4, False), (1, True):  # 400 tokens of validation text
        options = ["--eval_iters=99", f"--batch_size={batch_size}", "--block_size=4"]
        last = run_train(*options)[-1]
        line = re.search(r"iter 6: val loss \d\.\d{4}( ± \d\.\d{4})? \(", capsys.readouterr().out)
        assert bool(line[1]) is has_one
        assert {"val_standard_error" in last, "val_bits_standard_error" in last} == {has_one}


@pytest.mark.parametrize(
    ("keys", "batches"),
    [
        ({"eval_interval": 600}, 180),  # without a backward pass, a batch takes a third
        ({"eval_interval": 200, "gradient_accumulation_steps": 4}, 240),
        ({"eval_interval": 1}, 20),
        ({"eval_interval": 600, "eval_iters": 3}, 3),
        ({"eval_interval": 5000, "max_iters": 100}, 30),
    ],
)
def test_an_evaluation_takes_a_tenth_of_the_time_or_what_is_given(keys, batches):
    assert TrainConfig(**keys).evaluated_batches() == batches


def test_at_its_end_a_run_evaluates_and_records_the_whole_split_if_that_takes_little(run_train, monkeypatch, capsys):
    monkeypatch.setattr(TrainConfig, "evaluated_batches", lambda self: 2)
    keys = ["--eval_iters=None", "--eval_interval=60"]
    line = "the whole validation split: "
    for short in ("--max_iters=30", "--eval_iters=2"):
        run_train(*keys, "--max_iters=60", short)
        assert line not in capsys.readouterr().out
    last = run_train(*keys, "--max_iters=60")[-1]
    found = re.search(line + r"(val loss \S+)", capsys.readouterr().out)[1]
    assert found == f"val loss {last['val_loss']:.4f}" and last["kind"] == "whole"
    assert last_row()["best_iter"] == last["best_iter"]
    for key in ("val_bits_per_byte", "val_text"):
        assert last_row()[f"best_{key}"] == last[key]
    assert train.main([*RESUME, "--eval_only=True"]) == 0
    assert found in capsys.readouterr().out
    run = train.setup(read_settings(RESUME))
    assert evaluation.cost_of_whole_split(run)
    run.ranks.by_torchrun = True
    assert not evaluation.cost_of_whole_split(run)


def test_a_larger_vocabulary_pads_the_model(run_train):
    run_train("--vocab_size=64")
    assert weights()["wte.weight"].shape == (64, 32)


# --------------------------------------------------------------------------------------
# A training step


def test_evaluation_does_not_disturb_training(run_train):
    often = run_train("--dropout=0.3", "--eval_interval=1")
    assert train_losses(often) == train_losses(run_train("--dropout=0.3", "--eval_interval=6", "--eval_iters=None"))


def test_each_batch_has_a_dropout_mask_of_its_own(tiny, run_train):
    # a text of one block, so that batches differ only by dropout
    (tiny / "input.txt").write_text(make_text(17 * 10 // 9 + 2))
    prepare_data.main(["tiny", "--overwrite=True"])
    still = ["--learning_rate=1e-30", "--weight_decay=0"]
    losses = train_losses(run_train("--dropout=0.5", *still))
    assert len(set(losses)) == 6


def test_the_gradient_is_clipped_and_its_norm_is_logged_as_it_was_before(run_train, monkeypatch):
    norms = []
    step = AdamW.step

    def spy(optimizer):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat([p.grad.flatten() for p in params]).norm().item())
        return step(optimizer)

    monkeypatch.setattr(AdamW, "step", spy)
    clipped = values("grad_norm", run_train("--grad_clip=0.5", "--threads=1"))
    logged = values("grad_norm", run_train("--grad_clip=0", "--threads=1"))
    assert norms == pytest.approx([0.5] * 6 + logged, rel=1e-3)
    assert clipped[0] == logged[0] and min(clipped) > 0.6


def test_the_learning_rate_follows_its_schedule(run_train):
    cosine = ["--schedule=cosine", "--min_lr=0.1"]
    decay = [0.1 + 0.1 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    rows = run_train("--learning_rate=0.3", *cosine)
    assert values("lr", rows) == pytest.approx([0.1, 0.2, *decay])
    assert {TrainConfig(decay_lr=False).lr(step) for step in range(9)} == {3e-3}


def test_bfloat16_trains_on_the_cpu(run_train):
    full, half = run_train(), run_train("--dtype=bfloat16")
    assert train_losses(half) != train_losses(full)
    assert train_losses(half) == pytest.approx(train_losses(full), rel=0.02)
    assert weights()["wte.weight"].dtype == torch.float32


def test_a_run_that_cannot_be_compiled_trains_uncompiled(run_train, monkeypatch, capsys):
    def broken(**batch):
        raise RuntimeError("no compiler here\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda model, dynamic: broken)
    rows = run_train("--compile=True")
    note = "note: torch.compile failed (no compiler here); training without it\n"
    assert note in capsys.readouterr().err
    assert rows == run_train("--compile=False")


@pytest.mark.parametrize(
    "argv, compiled",
    [
        (["--max_iters=2400"], False),
        (["--max_iters=20000"], True),
        (["--max_iters=2400", "--gradient_accumulation_steps=10"], True),
        (["--max_iters=2400", "--compile=True"], True),
        (["--max_iters=200000", "--compile=False"], False),
    ],
)
def test_on_a_gpu_a_run_is_compiled_if_it_is_long(tiny, monkeypatch, argv, compiled):
    found = []
    monkeypatch.setattr(setup, "compile_now", lambda *args: None)
    monkeypatch.setattr(train, "check_training_fits", lambda *args: None)
    run = train.setup(train.read_settings([*TINY_RUN, "--compile=False", *argv]))
    run.device = torch.device("cuda")
    if "compile" not in argv[-1]:
        run.config = replace(run.config, compile=None)
    run.ranks.wrap = lambda model, compiled, dynamic: found.append(compiled)
    setup.wrap_model(run)
    assert found == [compiled]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS out of memory")],
)
def test_out_of_memory_is_one_line_and_no_failure_of_the_compiler(tiny, monkeypatch, fails, error):
    def full(**batch):
        raise error

    monkeypatch.setattr(torch, "compile", lambda model, dynamic: full)
    line = fails(train.main, *TINY_RUN, "--compile=True")
    assert line.startswith("out of memory") and line.endswith(f"; {ADVICE}\n")


# --------------------------------------------------------------------------------------
# Stopping and resuming

DROPOUT_RUN = ["--dropout=0.2", "--optimizer=muon", "--max_iters=12", "--log_interval=3"]
DROPOUT_RUN += ["--eval_interval=4"]


@pytest.mark.parametrize(("at", "n_members"), [(1, 1), (4, 1), (5, 1), (5, 3), (9, 1), (12, 1)])
def test_a_signal_saves_and_the_resumed_run_is_the_uninterrupted_one(run_train, signal_in_step, capsys, at, n_members):
    argv = [*DROPOUT_RUN, f"--n_members={n_members}"]
    rows = run_train(*argv)
    whole, best = weights(), weights("best.pt")
    signal_in_step(at, signal.SIGINT)
    assert train.main([*TINY_RUN, *argv]) == 128 + signal.SIGINT
    command = "python train.py --init_from=resume --out_dir=out/run"
    assert f"at iter {at}; resume: {command}" in capsys.readouterr().err
    assert resume() == rows
    assert_same_weights(weights(), whole)
    assert_same_weights(weights("best.pt"), best)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_ctrl_c_saves_even_if_it_has_ended_the_reader_of_our_messages(tiny):
    command = [sys.executable, "-u", ROOT / "train.py", *TINY_RUN, "--max_iters=100000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with started(command, **pipes) as process:
        while not process.stdout.readline().startswith("iter 2/"):
            assert process.poll() is None
        process.stdout.close()
        process.send_signal(signal.SIGINT)
    assert process.returncode == 128 + signal.SIGINT
    assert saved_step() >= 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGHUP")
@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_saves_and_stops_unless_nohup_lets_us_ignore_it(tiny, signal_in_step, request, ignored):
    handler = signal.SIG_IGN if ignored else lambda *args: None
    before = signal.signal(signal.SIGHUP, handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    signal_in_step(2, signal.SIGHUP)
    assert train.main(TINY_RUN) == (0 if ignored else 128 + signal.SIGHUP)
    assert saved_step() == (6 if ignored else 2)


def quiet_train(*argv: str) -> None:
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115, needed to the end
    torch.set_num_threads(1)
    # conftest.short_ending patches only its own process
    runs.draw_losses = lambda *args: None
    evaluation.TEXT = WITHOUT_SAMPLE
    sys.exit(train.main([*TINY_RUN, *DROPOUT_RUN, "--max_iters=40", *argv]))


def die_at(call: int) -> None:
    """Train, and be killed at the call-th moment just before or after a file is flushed or replaced."""
    calls = iter(range(call + 1))

    def dying(act):
        def inner(*args):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            result = act(*args)
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return inner

    os.fsync, Path.replace = dying(os.fsync), dying(Path.replace)
    quiet_train()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("step", [19, pytest.param(1, marks=pytest.mark.long)])
def test_killed_at_any_moment_of_saving_a_run_resumes_exactly(tiny, step):
    processes = started_processes("test_train")  # with torch, so that forty start at once

    def run(target: Callable, *args) -> int:
        """Call a function in a process and return its exit code."""
        process = processes.Process(target=target, args=args)
        process.start()
        return exit_code(process)

    assert run(quiet_train) == 0
    rows, whole, snapshots = read_rows(OUT), weights(), kept(OUT)
    assert list(snapshots) == [0, 10, 30]
    for call in range(8, 44, step):
        shutil.rmtree(OUT)
        assert run(die_at, call) == -signal.SIGKILL
        keys = ["--init_from=resume"] if (OUT / "ckpt.pt").exists() else []
        assert run(quiet_train, *keys) == 0
        assert read_rows(OUT) == rows
        assert_same_weights(weights(), whole)
        assert kept(OUT) == snapshots


def test_settings_of_the_checkpoint_hold_unless_changed(run_train):
    run_train("--learning_rate=0.01", "--weight_decay=0.5", "--beta1=0.8")
    resume("--max_iters=8", "--weight_decay=0.25", "--beta2=0.5", "--dropout=0.1")
    settings = json.loads((OUT / "config.json").read_text())
    assert (settings["learning_rate"], settings["dropout"]) == (0.01, 0.1)
    hidden, *_, vectors = train.setup(read_settings(RESUME)).optimizer.param_groups
    assert (hidden["weight_decay"], vectors["weight_decay"]) == (0.25, 0.0)
    assert hidden["betas"] == (0.8, 0.5)


FIXED = ("n_layer=3", "n_embd=64", "bias=True", "vocab_size=99", "position=alibi")
FIXED += ("batch_size=2", "gradient_accumulation_steps=2", "seed=2", "optimizer=muon")


def test_what_may_not_change_on_resume_is_refused(run_train, fails):
    run_train("--max_iters=1")
    for change in FIXED:
        complaint = f"{change} cannot change on resume: the checkpoint has "
        assert complaint in fails(train.main, *RESUME, f"--{change}")


def test_a_key_that_nobody_has_thought_about_may_not_change_on_resume(run_train, fails, monkeypatch):
    @dataclass(frozen=True)
    class Newer(settings.TrainConfig):
        order: str = "random"

    run_train("--max_iters=1")
    for name in ("start", "resume"):
        monkeypatch.setattr(f"humptygpt.training.{name}.TrainConfig", Newer)
    complaint = "order=sorted cannot change on resume: the checkpoint has order=random;"
    assert fails(train.main, *RESUME, "--order=sorted").startswith(complaint)


def test_a_resumed_run_may_take_its_steps_in_smaller_parts(run_train):
    keys = ["--lr_decay_iters=9", "--eval_iters=None"]
    whole = train_losses(run_train("--max_iters=9", *keys))
    run_train(*keys)
    parts = ["--batch_size=2", "--gradient_accumulation_steps=2"]
    assert train_losses(resume(*parts, "--max_iters=9")) == pytest.approx(whole, rel=1e-4)


def test_a_checkpoint_from_before_a_key_existed_is_resumed_and_sampled(run_train, fails):
    run_train()
    for name in ("ckpt.pt", "best.pt"):
        saved = checkpoint.read(OUT / name)
        for key in ("n_kv_head", "window", "attention", "rope_factor"):
            del saved["model_config"][key]
        checkpoint.save(OUT / name, saved)
    sample.main(["--out_dir=out/run", "--device=cpu", "--max_new_tokens=5"])
    assert "window=4 cannot change on resume" in fails(train.main, *RESUME, "--window=4")
    resume("--max_iters=8")


def test_new_settings_are_checked_together_with_those_of_the_checkpoint(run_train):
    run_train("--learning_rate=0.01")
    resume("--max_iters=7", "--min_lr=0.005")


def test_a_run_that_has_no_step_left_says_so(run_train, capsys):
    run_train()
    resume("--max_iters=5")
    note = "note: all 6 steps are done; for more, use --max_iters=N"
    assert note in capsys.readouterr().err


def test_a_run_can_be_run_again_by_its_config_json_without_a_note(run_train, fails, capsys):
    rows = run_train("--n_layer=1", "--learning_rate=0.01")
    capsys.readouterr()
    assert train.main([f"{OUT}/config.json", "--out_dir=out/again"]) == 0
    assert capsys.readouterr().err == ""
    assert read_rows(Path("out/again")) == rows
    # the name of its dataset is obeyed, unless another input is given
    settings = {"input": "tiny.txt", "dataset": "mine", "max_iters": 5, "_made_up": 1}
    Path("mine.json").write_text(json.dumps(settings))
    assert read_settings(["mine.json"]).config.dataset == "mine"
    assert read_settings(["mine.json", "--input=b.txt"]).config.dataset == "b"
    Path("mine.json").write_text('{"n_experts": 8}')
    complaint = "mine.json: unknown key n_experts;"
    assert fails(train.main, "mine.json").startswith(complaint)


def test_without_a_terminal_each_logged_step_and_evaluation_is_a_line(run_train, capsys):
    run_train("--log_interval=2")
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split(" ")[1] for line in lines if line.startswith("iter ")]
    assert shown == ["2/6:", "3:", "4/6:", "6/6:", "6:"]


@pytest.mark.parametrize(
    ("cost", "steps"),
    [
        (0.01, ["0", "25", "50", "100"]),
        pytest.param(0.5, ["0", "25"], marks=pytest.mark.long),
        (0.7, ["0"]),
    ],
)
def test_the_model_writes_a_line_at_ever_longer_intervals_in_a_hundredth_of_the_time(
    run_train, signal_in_step, monkeypatch, capsys, cost, steps
):
    now = 0.0
    train_step = train.train_step

    def step(*args):
        nonlocal now
        now += 1
        return train_step(*args)

    def write(model, dataset, count: int = 3) -> str:
        nonlocal now
        assert not model.training  # so there is no dropout
        now += cost
        torch.rand(count)
        return f"  > {count}"

    def written() -> list[str]:
        return re.findall(r"^iter (\d+):  > 1$", capsys.readouterr().out, re.MULTILINE)

    keys = ["--max_iters=120", "--eval_interval=60", "--log_interval=7", "--dropout=0.5"]
    without = run_train(*keys)
    monkeypatch.setattr(train, "train_step", step)
    clock = SimpleNamespace(perf_counter=lambda: now, monotonic=lambda: now)
    monkeypatch.setattr(runs, "time", clock)
    monkeypatch.setattr(machine, "STARTED", 0.0)
    task = replace(WITHOUT_SAMPLE, evaluation_examples=write, final_examples=write)
    monkeypatch.setattr(evaluation, "TEXT", task)
    assert run_train(*keys) == without
    assert written() == steps
    assert last_row()["seconds"] == 120
    if cost > 0.1:
        return
    # an evaluation has just shown what the model writes
    run_train("--max_iters=120", "--eval_interval=50")
    assert written() == ["0", "25"]
    shutil.rmtree(OUT)
    signal_in_step(30)
    assert train.main([*TINY_RUN, *keys]) == 128 + signal.SIGTERM
    assert written() == ["0", "25"]
    assert resume() == without
    assert written() == ["50", "100"]


@pytest.mark.whole_ending
def test_weights_that_are_not_finite_end_a_run_and_start_none(run_train, monkeypatch, fails):
    step = train.train_step

    def ruin(run: runs.Run):
        found = step(run)
        run.model.wte.weight.data += math.nan if run.progress.iter == 24 else 0
        return found

    monkeypatch.setattr(train, "train_step", ruin)
    keys = ["--max_iters=30", "--eval_interval=10", "--log_interval=30"]
    assert train.main([*TINY_RUN, *keys]) == 1
    assert last_row()["end"] == "diverged"
    saved = checkpoint.read(OUT / "best.pt")
    assert saved["progress"]["iter"] <= 20  # before the loss was no number
    saved["model"]["wte.weight"][0] = math.nan
    checkpoint.save(OUT / "best.pt", saved)
    keys = ["--init_from=out/run", "--dataset=tiny", "--out_dir=out/tuned"]
    assert "has weights that are not finite" in fails(train.main, *keys)


def last_row() -> dict:
    return json.loads((OUT / "metrics.jsonl").read_text().splitlines()[-1])


def test_the_last_row_says_how_a_run_ended_and_how_good_its_best_model_is(run_train, signal_in_step, monkeypatch):
    rows = run_train("--n_layer=1", "--eval_iters=None")
    best = min(rows, key=lambda row: row.get("val_loss", 99))
    found = last_row()
    assert (found["end"], found["iter"], found["tokens"]) == ("finished", 6, 384)
    assert found["best_iter"] == best["iter"]
    for key in ("val_loss", "val_bits_per_byte", "val_text"):
        assert found[f"best_{key}"] == best[key]
    evaluations(monkeypatch, 3.0, 4.0)
    run_train("--early_stopping=1", "--max_iters=9")
    assert (last_row()["end"], last_row()["best_iter"]) == ("stopped early", 3)
    shutil.rmtree(OUT)
    evaluations(monkeypatch, 3.0, 2000.0)  # too large for a perplexity
    assert train.main(TINY_RUN) == 1
    assert saved_step() == 3
    assert (last_row()["end"], last_row()["best_val_loss"]) == ("diverged", 3.0)
    shutil.rmtree(OUT)
    signal_in_step(2)
    assert train.main(TINY_RUN) == 143
    assert last_row()["end"] == "interrupted" and "best_iter" not in last_row()


def test_a_run_records_its_commands(run_train, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--start=a b", "\udcff"])
    run_train()
    monkeypatch.setattr(sys, "argv", ["train.py", *RESUME])
    resume("--max_iters=7")
    assert (OUT / "command.txt").read_text().splitlines() == [
        r"python train.py '--start=a b' '\udcff'",
        f"python train.py {' '.join(RESUME)}",
    ]


@pytest.mark.parametrize(
    ("before", "after", "best", "loss"),
    [
        (30, 40, 6, 1.0),  # both are the whole split
        (2, None, 9, 2.0),
    ],
)
def test_on_resume_the_best_stays_the_best_unless_the_evaluation_set_changes(
    run_train, monkeypatch, capsys, before, after, best, loss
):
    drawn = []
    monkeypatch.setattr(runs, "draw_losses", lambda rows, path, best: drawn.append(best))
    evaluations(monkeypatch, 1.2, 1.0, 2.0)
    run_train(f"--eval_iters={before}")
    resume("--max_iters=9", f"--eval_iters={after}")
    out, errors = capsys.readouterr()
    assert out.endswith(f"best val loss {loss:.4f} at iter {best}\n")
    assert checkpoint.read(OUT / "best.pt")["progress"]["iter"] == drawn[-1] == best
    assert (last_row()["best_iter"], last_row()["best_val_loss"]) == (best, loss)
    changed = "the next evaluation begins a new best.pt, whose loss was 1.0000 on the earlier"
    assert (changed in errors) == (best == 9)


def test_a_resumed_run_says_if_its_learning_rate_rises(run_train, capsys):
    run_train("--max_iters=10", "--eval_interval=5")
    rises = "the learning rate rises from "
    resume()
    assert rises not in capsys.readouterr().err
    resume("--max_iters=20")
    note = f"note: {rises}3.0e-04 to 1.9e-03, because its schedule"
    assert note in capsys.readouterr().err


def test_a_run_that_was_never_evaluated_has_no_best_loss(tiny, signal_in_step, capsys):
    signal_in_step(1)
    assert train.main(TINY_RUN) == 143
    resume("--max_iters=1")
    sample.main(["--out_dir=out/run", "--device=cpu", "--max_new_tokens=5"])
    out, errors = capsys.readouterr()
    assert "best val loss" not in out + errors
    assert "out/run/ckpt.pt: iter 1, not evaluated yet" in errors


def test_fine_tuning_says_if_the_model_that_it_started_from_was_better(run_train, monkeypatch, capsys):
    run_train()
    line = "the model that the run started from was better: val loss 1.0000\n"
    for losses, better in (((1.0, 2.0, 1.5), True), ((1.0, 0.9, 1.5), False)):
        evaluations(monkeypatch, *losses)
        run_train("--init_from=out/run", "--out_dir=out/tuned")
        assert (line in capsys.readouterr().out) == better


def test_evaluating_only_neither_compiles_nor_loads_the_optimizer_state(run_train, monkeypatch):
    run_train()
    monkeypatch.setattr(setup, "wrap_model", lambda run: 1 / 0)
    resumed = [*RESUME, "--eval_only=True", "--compile=True"]
    assert train.main(resumed) == 0
    assert not train.setup(read_settings(resumed)).optimizer.state


def test_two_signals_within_a_second_are_one_request(tiny, signal_in_step):
    signal_in_step(1)
    signal_in_step(1)
    assert train.main(TINY_RUN) == 143
    assert saved_step() == 1


def test_a_model_without_its_training_state_cannot_be_resumed(run_train, fails):
    run_train()
    (OUT / "best.pt").replace(OUT / "ckpt.pt")
    complaint = "out/run/ckpt.pt holds a model but no optimizer state"
    assert complaint in fails(train.main, *RESUME)


def test_the_same_text_from_another_path_can_be_resumed(run_train, folder):
    run_train()
    source = f"--input={folder / 'tiny.txt'}"
    prepare_data.main([source, "--name=tiny", "--overwrite=True"])
    resume("--max_iters=7")


def test_a_run_that_moves_to_a_card_that_needs_a_scaler_gets_a_new_one(run_train, monkeypatch):
    run_train()
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler("cpu", init_scale=8.0))
    resume("--max_iters=7")
    assert checkpoint.read(OUT / "ckpt.pt")["scaler"]["scale"] == 8.0


def test_a_run_whose_data_was_replaced_resumes_on_them_by_another_name_or_says_how(run_train, tiny, fails):
    straight = run_train("--max_iters=9", "--lr_decay_iters=9")
    run_train("--lr_decay_iters=9")
    tiny.rename("data/kept")
    prepare_data.main(["--input=tiny.txt", "--name=tiny", "--tokenizer=byte"])
    advice = "if that is in another folder, add --dataset=NAME\n"
    assert fails(train.main, *RESUME).endswith(advice)
    assert resume("--max_iters=9", "--dataset=kept") == straight


# --------------------------------------------------------------------------------------
# When it goes wrong


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(run_train, capsys):
    run_train()
    good = weights()
    argv = [*RESUME, "--max_iters=30", "--learning_rate=1e20", "--decay_lr=False"]
    assert train.main([*argv, "--log_interval=10", "--eval_interval=30"]) == 1
    problem = r"the loss is (nan|inf) at iter [789] \(gradient norm .*\)"
    kept = "out/run/ckpt.pt is the last good checkpoint. Try a lower --learning_rate"
    assert re.search(f"{problem}; {kept}", capsys.readouterr().err)
    assert_same_weights(weights(), good)
    assert all(map(math.isfinite, train_losses(read_rows(OUT))))


BAD = {
    r"out_dir='out/a\tb' must be printable text": ["--out_dir=out/a\tb"],
    r"out_dir='out/\udcff' must be printable text": ["--out_dir=out/\udcff"],
    "rope_low_freq_factor=8 must be below rope_high_freq_factor=4": [
        "--position=rotary",
        "--rope_factor=2",
        "--rope_low_freq_factor=8",
    ],
    "n_embd=32 must be a multiple of n_head=3": ["--n_head=3"],
    "min_lr=1.0 must be at most learning_rate": ["--min_lr=1.0"],
    f"seed={2**63} must be at least 0 and below": [f"--seed={2**63}"],
    "init_from=nothing: there is no such file or folder": ["--init_from=nothing"],
    "vocab_size=3 must be at least": ["--vocab_size=3"],
    "cannot write blocked/run: Not a directory; choose another": ["--out_dir=blocked/run"],
    "name='data/tiny' must be the name of a folder in data/": ["--dataset=data/tiny"],
}


@pytest.mark.parametrize("complaint", BAD)
def test_bad_input_is_one_line_and_writes_nothing(tiny, fails, complaint):
    Path("blocked").write_text("a file where a folder should be")
    before = sorted(Path().rglob("*"))
    assert complaint in fails(train.main, *TINY_RUN, *BAD[complaint])
    assert sorted(Path().rglob("*")) == before


def test_a_key_without_effect_of_a_config_file_is_noted(run_train, capsys):
    Path("mine.py").write_text("rope_base = 5.0")
    run_train("mine.py", "--position=none")
    note = "note: rope_base=5.0 has no effect with position=none"
    assert note in capsys.readouterr().err


IN_VAIN = {
    "rope_base=5.0 position=none": [],
    "rope_low_freq_factor=2.0 rope_factor=1.0": ["--position=rotary"],
    "rope_original_context=64 rope_factor=1.0": ["--position=rotary"],
    "muon_momentum=0.5 optimizer=adamw": [],
    "backend=gloo processes=1": [],
    "warmup_iters=2 decay_lr=False": [],
    "n_hidden=64 mlp=none": [],
    "activation=relu mlp=none": [],
    "mlp_conv=3 mlp=none": [],
}
of_blocks = ("norm=none", "position=alibi", "init=zero", "tie_weights=False")
of_blocks += ("n_head=2", "qk_norm=True", "mlp_conv=3")
IN_VAIN |= {f"{key} model=window_mlp": ["--window=4"] for key in of_blocks}


@pytest.mark.parametrize("keys", IN_VAIN)
def test_a_key_that_a_command_sets_in_vain_is_refused(fails, keys):
    key, other = keys.split()
    argv = ["--dataset=missing", f"--{key}", *IN_VAIN[keys]]
    argv += [] if other == "processes=1" else [f"--{other}"]
    complaint = fails(train.main, *argv)
    assert complaint == f"{key} has no effect with {other}; leave it out\n"


def test_the_default_warmup_is_fitted_to_a_short_run_and_a_chosen_one_is_not(capsys):
    assert read_settings(["--max_iters=10"]).config.warmup_iters == 1
    note = "note: warmup_iters=100 would last all 10 steps; using warmup_iters=1"
    assert note in capsys.readouterr().err
    chosen = read_settings(["--max_iters=60", "--warmup_iters=70"])
    assert chosen.config.warmup_iters == 70
    for keys in (["--max_iters=10", "--decay_lr=False"], ["--max_iters=101"]):
        assert read_settings(keys).config.warmup_iters == 100


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("model", [["--model=window_mlp"], ["--model=number_mlp", "--n_embd=1"]])
def test_the_window_network_trains_and_resumes(run_train, optimizer, model):
    argv = [*model, "--window=12", "--n_hidden=24", "--bias=True", "--dropout=0.2"]
    argv += [f"--optimizer={optimizer}", "--learning_rate=1e-2", "--lr_decay_iters=60"]
    argv += ["--eval_interval=30"]
    rows = run_train(*argv, "--max_iters=60")
    assert rows[-1]["val_loss"] < rows[0]["train_loss"] - 0.2
    whole = weights()
    run_train(*argv, "--max_iters=30")
    resume("--max_iters=60")
    assert_same_weights(weights(), whole)


@pytest.mark.parametrize(
    ("key", "variants", "name"),
    [
        ("activation", models.ACTIVATIONS, "silu"),
        ("position", models.POSITIONS, "alibi"),
        ("block", models.BLOCKS, "post_norm"),
    ],
)
def test_a_new_variant_is_one_line_in_one_dictionary(run_train, monkeypatch, key, variants, name):
    monkeypatch.setitem(variants, "mine", variants[name])
    before = train_losses(run_train())
    assert train_losses(run_train(f"--{key}=mine")) != before
    resume("--max_iters=8")
    sample.main(["--out_dir=out/run", "--device=cpu", "--max_new_tokens=20"])


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.SGD,  # without a state
        lambda groups, config: torch.optim.SGD(groups, momentum=0.9),
        torch.optim.Adafactor,
        lambda groups, config: torch.optim.AdamW(groups, fused=True),
    ],
    ids=["SGD", "SGD with momentum", "Adafactor", "AdamW"],
)
def test_an_optimizer_of_torch_trains_and_is_resumed(run_train, monkeypatch, make):
    monkeypatch.setitem(OPTIMIZERS, "other", make)
    keys = ("--optimizer=other", "--lr_decay_iters=8", "--threads=2")
    whole = train_losses(run_train(*keys, "--max_iters=8"))
    run_train(*keys)
    assert train_losses(resume("--max_iters=8")) == whole


LONG_STEP = """
from humptygpt.training import run as runs
runs.SAME_REQUEST = 0
with runs.catch_signals():
    print("started", flush=True)
    while True:
        pass
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_a_second_ctrl_c_ends_a_long_step_at_once_and_the_first_one_says_so():
    command = [sys.executable, "-c", LONG_STEP]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with started(command, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline().startswith("SIGINT: finishing this step, then ")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=9) == 128 + signal.SIGINT


# --------------------------------------------------------------------------------------
# Errors of the user's own model


def test_an_in_place_error_in_an_edited_model_shows_its_line_and_a_traceback(tiny, folder):
    copy = folder / "copy"
    for name in ("humptygpt", "config"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy(ROOT / "train.py", copy)
    source = (ROOT / "model.py").read_text()
    line = "v = self.heads(self.v_proj(x)).sigmoid()"
    edited = source.replace("return self.heads(self.v_proj(x))\n", f"{line}; v.mul_(2); return v\n")
    assert edited != source
    (copy / "model.py").write_text(edited)
    command = [sys.executable, "copy/train.py", *TINY_RUN]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "modified by an inplace operation" in done.stderr.splitlines()[-1]
    assert "Traceback (most recent call last)" in done.stderr
    assert f"{copy}/model.py" in done.stderr and line in done.stderr
