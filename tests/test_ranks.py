"""Forked ranks compute what one process computes, and end with it."""

import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_RUN, assert_same_weights, read_rows, started
from conftest import train_losses as losses
from humptygpt.model import ModelConfig

import train
from humptygpt import machine
from humptygpt import model as models
from humptygpt.cli import UserError
from humptygpt.data.dataset import TokenDataset, next_tokens
from humptygpt.data.open import CLASSES
from humptygpt.models.build import build
from humptygpt.models.checks import forking_problem
from humptygpt.training import evaluation, setup, step
from humptygpt.training import minutes as plan
from humptygpt.training.ranks import Ranks
from humptygpt.training.settings import TrainConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked")
SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=11)
OWN = "in training, model.py changes a buffer or draws random numbers of its own"
ERROR = ArithmeticError("of a user")
LONGER = ["--max_iters=20", "--dropout=0.2", "--eval_interval=20"]


@pytest.fixture(autouse=True)
def cores(monkeypatch):
    monkeypatch.setattr(setup, "usable_cores", lambda: 8)


def weights() -> dict[str, torch.Tensor]:
    return torch.load("out/run/ckpt.pt", weights_only=True)["model"]


@pytest.mark.parametrize(
    ("argv", "tolerance"),
    [
        (["--optimizer=adamw"], 1e-5),
        (["--optimizer=muon", "--threads=4"], 1e-3),
        (["--optimizer=normuon", "--mlp_conv=3", "--checkpoint_activations=True"], 1e-3),
        (["--optimizer=muon", "--n_members=3"], 1e-3),
        (["--dtype=bfloat16", "--optimizer=normuon"], 5e-3),
        (["--gradient_accumulation_steps=2", "--threads=4"], 1e-5),
    ],
)
def test_any_number_of_ranks_has_the_losses_of_one_dropout_included(run_train, argv, tolerance):
    expected = run_train(*LONGER, *argv, "--threads=1")
    rows = run_train(*LONGER, "--threads=2", *argv)
    assert losses(rows) == pytest.approx(losses(expected), abs=tolerance)
    assert rows[-1]["val_loss"] == pytest.approx(expected[-1]["val_loss"], abs=tolerance)


def test_the_same_seed_and_number_of_ranks_gives_the_same_bits(run_train):
    argv = [*LONGER, "--optimizer=normuon", "--threads=4"]
    rows, first = run_train(*argv), weights()
    assert run_train(*argv) == rows
    assert_same_weights(weights(), first)


def test_ranks_share_batches_of_sentence_pairs_whose_numbers_of_rows_differ(pairs, run_train):
    argv = ["--dataset=pairs", "--model=transformer", "--block_size=40", "--dropout=0.2"]
    expected = losses(run_train(*argv))
    found = losses(run_train(*argv, "--threads=3"))
    assert found == pytest.approx(expected, abs=1e-5)


def test_ranks_train_the_small_matrices_of_lora(run_train):
    assert train.main([*TINY_RUN, "--out_dir=out/base"]) == 0
    argv = ["--init_from=out/base", "--lora_rank=2", "--dropout=0.1"]
    expected = losses(run_train(*argv))
    assert losses(run_train(*argv, "--threads=2")) == pytest.approx(expected, abs=1e-5)


class HalfTargets(TokenDataset):
    """Of four rows the last two have no targets, and neither has any of the fourth step."""

    def batch(self, index, batch_size):
        rows = np.arange(index * batch_size, (index + 1) * batch_size)
        draws = [np.random.default_rng(row).integers(4, size=17) for row in rows]
        ignored = (rows % 4 > 1) | (rows // 4 == 3)
        return next_tokens(np.stack(draws), np.tile(ignored[:, None], 16))

    def val_batches(self, batch_size, eval_iters):
        yield self.batch(0, 4)


@pytest.mark.parametrize("smoothing", ["0", "0.1"])
@pytest.mark.parametrize(
    "keys",
    [
        ["--threads=2"],
        ["--batch_size=2", "--gradient_accumulation_steps=2"],
        ["--batch_size=2", "--gradient_accumulation_steps=2", "--threads=2"],
    ],
)
def test_rows_without_targets_do_not_count_however_a_batch_is_divided(tiny, monkeypatch, keys, smoothing):
    name = f"{__name__}:{HalfTargets.__name__}"
    monkeypatch.setitem(CLASSES, "language modelling", name)
    found = []
    for divided in (["--threads=1"], keys):
        argv = [f"--label_smoothing={smoothing}", *divided]
        assert train.main([*TINY_RUN, *argv]) == 0
        found.append(losses(read_rows(Path("out/run"))))
    assert found[0][3] == 0 and min(found[0][:3]) > 1
    assert found[1] == pytest.approx(found[0], abs=2e-6)


def test_a_run_may_go_on_with_another_number_of_ranks_and_says_so(run_train, capsys):
    expected = losses(run_train(*LONGER))
    first = losses(run_train(*LONGER, "--max_iters=8", "--lr_decay_iters=20", "--threads=2"))
    resume = ["--init_from=resume", "--out_dir=out/run", "--max_iters=20"]
    capsys.readouterr()
    assert train.main([*resume, "--threads=4"]) == 0
    assert "note: threads=4 instead of 2: losses stay the same" in capsys.readouterr().err
    found = losses(read_rows(Path("out/run")))
    assert found[:8] == first and found == pytest.approx(expected, abs=1e-4)


# --------------------------------------------------------------------------------------
# When they share


def run_of(config: TrainConfig, device: str = "cpu") -> SimpleNamespace:
    model = build(SMALL)
    return SimpleNamespace(
        config=config,
        model=model,
        net=model,
        device=torch.device(device),
        ranks=Ranks(torch.device(device)),
        task=evaluation.TEXT,
    )


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"batch_size": 4, "threads": 1}, 1),
        ({"batch_size": 4, "threads": 2}, 2),
        ({"batch_size": 4, "threads": 8}, 4),
        ({"batch_size": 6, "threads": 4}, 3),
        ({"batch_size": 5, "threads": 4}, 1),
        ({"batch_size": 1, "threads": 8}, 1),
    ],
)
def test_as_many_share_as_can_take_equally_many_rows(keys, expected, monkeypatch):
    run = run_of(TrainConfig(**keys))
    assert setup.count_ranks(run) == expected
    run.net = None  # compiled
    assert setup.count_ranks(run) == 1
    assert setup.count_ranks(run_of(TrainConfig(**keys), "mps")) == 1
    monkeypatch.setattr(sys, "platform", "darwin")
    assert setup.count_ranks(run_of(TrainConfig(**keys))) == 1


def test_threads_share_operators_if_a_model_is_large_for_a_ranks_tokens():
    run = run_of(TrainConfig(batch_size=4, threads=2))
    most = setup.PARAMETERS_PER_TOKEN * 2 * 16
    missing = most - models.count_parameters(run.model)
    for extra, expected in ((0, 2), (1, 1)):
        run.model.more = torch.nn.Parameter(torch.zeros(missing + extra, device="meta"))
        assert setup.count_ranks(run) == expected


class Noisy(models.MLP):
    def forward(self, x, shared):
        return super().forward(x) + 0.1 * torch.randn_like(x)


class Counting(models.MLP):
    def __init__(self, config, layer):
        super().__init__(config)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, shared):
        self.calls += self.training
        return super().forward(x)


class Remembering(models.MLP):
    def __init__(self, config, layer):
        super().__init__(config)
        self.mean = torch.nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x, shared):
        if self.training:
            self.mean.lerp_(x.detach().mean(), 0.1)
        return super().forward(x - self.mean)


class Clamped(models.MLP):
    def __init__(self, config, layer):
        super().__init__(config)
        self.up_proj.weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))


class Bounded(models.GPT):
    """Adds a term over all positions, also those without a target."""

    def loss(self, logits, targets):
        return super().loss(logits, targets) + 0.1 * logits.logsumexp(-1).square().mean()


class Balanced(models.MLP):
    def forward(self, x, shared):
        return super().forward(x - x.mean(dim=(0, 1)))


@pytest.mark.parametrize(
    ("mlp", "problem"),
    [
        (Noisy, OWN),
        (Counting, OWN),
        (Remembering, OWN),
        (Clamped, "the gradient of a batch is not the sum of its rows' gradients"),
        (Balanced, "the gradient of a batch is not the sum of its rows' gradients"),
    ],
)
def test_a_model_whose_rows_cannot_be_divided_is_trained_as_a_whole_and_train_py_says_why(
    mlp, problem, run_train, monkeypatch, model_is_edited, capsys
):
    monkeypatch.setitem(models.MLPS, "plain", mlp)
    expected = run_train("--dropout=0.1")
    capsys.readouterr()
    rows = run_train("--dropout=0.1", "--threads=2")
    printed = capsys.readouterr()
    assert f"not the batch, which is slower: {problem}" in printed.err
    assert "2 threads" in printed.out
    assert losses(rows) == pytest.approx(losses(expected), abs=1e-5)


def test_a_term_over_all_positions_is_no_mean_of_rows_that_have_other_numbers_of_targets(
    monkeypatch,
):
    monkeypatch.setattr(models, "GPT", Bounded)
    assert forking_problem(build(SMALL)).startswith("the loss of a batch is not the mean")


class WithUnused(models.MLP):
    def __init__(self, config, layer):
        super().__init__(config)
        self.unused = torch.nn.Linear(4, 4)


def test_a_weight_that_no_rank_has_used_stays_as_it_is(run_train, monkeypatch):
    monkeypatch.setitem(models.MLPS, "plain", WithUnused)
    found = []
    for argv in (["--threads=1"], ["--threads=2"]):
        run_train("--weight_decay=0.5", *argv)
        found.append({name: x for name, x in weights().items() if "unused" in name})
    assert_same_weights(*found)


def test_dropout_and_smoothed_labels_are_no_problem():
    for keys in ({"dropout": 0.3}, {"label_smoothing": 0.1}, {"n_members": 2}):
        assert forking_problem(build(replace(SMALL, **keys))) is None


def test_minutes_times_steps_of_the_ranks_that_train(tiny, monkeypatch):
    counts = []

    def counted(run):
        counts.append(run.ranks.size)
        return step.train_step(run)

    monkeypatch.setattr(plan, "train_step", counted)
    argv = ["--dataset=tiny", "--dtype=float32", "--threads=2"]
    monkeypatch.setattr(machine, "STARTED", time.perf_counter())
    assert train.main([*argv, "--minutes=0.1", "--n_layer=1", "--n_embd=32"]) == 0
    assert set(counts) == {2}


# --------------------------------------------------------------------------------------
# What goes wrong


@pytest.fixture
def fail_for(monkeypatch):
    """A function that lets the loss of training raise an exception for what it is given to choose."""
    loss = models.GPT.loss

    def replace_loss(chosen) -> None:
        def failing(self, logits, targets):
            if self.training and len(targets) < 4 and chosen(targets):
                raise type(ERROR)(*ERROR.args)
            return loss(self, logits, targets)

        monkeypatch.setattr(models.GPT, "loss", failing)

    return replace_loss


@pytest.mark.parametrize("alone", [True, False])
def test_an_exception_of_the_first_rank_is_shown_as_python_shows_it(run_train, fail_for, alone):
    ours = os.getpid()
    fail_for(lambda targets: not alone or os.getpid() == ours)
    with pytest.raises(ArithmeticError) as caught:
        run_train("--threads=2")
    assert caught.traceback[-1].name == "failing"


def test_an_exception_that_only_another_rank_meets_is_shown_with_its_line(run_train, fail_for, capsys):
    ours = os.getpid()
    fail_for(lambda targets: os.getpid() != ours)
    with pytest.raises(SystemExit) as caught:
        run_train("--threads=2")
    assert caught.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "ArithmeticError: of a user"
    assert sum("in failing" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory; use"),
        (UserError("a mistake"), "a mistake"),
    ],
)
def test_what_only_another_rank_lacks_is_one_line(tiny, fails, fail_for, monkeypatch, error, line):
    ours = os.getpid()
    monkeypatch.setattr(sys.modules[__name__], "ERROR", error)
    fail_for(lambda targets: os.getpid() != ours)
    assert fails(train.main, *TINY_RUN, "--threads=2").startswith(line)


TALKING = f"""
import logging, sys
sys.path[:0] = [{str(ROOT)!r}]
import train
from humptygpt import machine, model
from humptygpt.training import setup

loss = model.GPT.loss


def talking(self, logits, targets):
    if self.training and self.config.vocab_size > 11:
        print("on stdout:", len(targets))
        print("on stderr", file=sys.stderr)
        logging.warning("in the log")
        breakpoint()
    return loss(self, logits, targets)


model.GPT.loss = talking
setup.usable_cores = lambda: 2
sys.breakpointhook = lambda: print("stopped")
logging.basicConfig()
machine.run(train.main)
"""


def test_only_the_first_rank_prints_logs_and_stops_at_a_breakpoint(tiny):
    command = [sys.executable, "-c", TALKING, *TINY_RUN, "--threads=2", "--max_iters=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = done.stdout + done.stderr
    for words in ("on stdout: 2\n", "on stderr\n", "in the log\n", "stopped\n"):
        assert said.count(words) == 3


def test_a_rank_that_is_killed_ends_the_run_in_one_line(tiny, monkeypatch):
    def killing(run):
        if run.progress.iter == 4 and not run.ranks.first:
            os.kill(os.getpid(), signal.SIGKILL)
        return step.train_step(run)

    monkeypatch.setattr(train, "train_step", killing)
    with pytest.raises(UserError, match="was ended from outside; the last checkpoint"):
        train.main([*TINY_RUN, "--threads=2"])
    monkeypatch.setattr(train, "train_step", step.train_step)
    assert train.main(["--init_from=resume", "--out_dir=out/run"]) == 0


@pytest.fixture
def command(tiny):
    """train.py, started by a command with two ranks, after its first step."""
    argv = [sys.executable, "-u", ROOT / "train.py", *TINY_RUN, "--max_iters=100000"]
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    options |= {"env": env, "start_new_session": True}
    with started([*argv, "--threads=2"], **options) as process:
        while not process.stdout.readline().startswith("iter 2/"):
            assert process.poll() is None
        yield process
        process.kill()


def other_rank_of(started: subprocess.Popen) -> int:
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text()
    (rank,) = map(int, children.split())
    return os.pidfd_open(rank)


@pytest.mark.skipif(machine.usable_cores() < 2, reason="needs two cores")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_other_ranks_end_with_the_first(command, number):
    rank = other_rank_of(command)
    command.send_signal(number)
    poll = select.poll()
    poll.register(rank, select.POLLIN)
    assert poll.poll(30_000)


@pytest.mark.skipif(machine.usable_cores() < 2, reason="needs two cores")
def test_ctrl_c_which_all_ranks_receive_saves_and_stops(command):
    os.killpg(command.pid, signal.SIGINT)
    rest = command.stdout.read()
    assert "SIGINT: saved out/run/ckpt.pt at iter" in rest and "Traceback" not in rest
    assert command.wait(30) == 128 + signal.SIGINT
