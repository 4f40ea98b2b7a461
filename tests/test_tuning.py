"""What depends on the machine is recorded, and kept by a resumed run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN

import sample
import train
from humptygpt.generation import generator as decoding
from humptygpt.generation.generator import fastest
from humptygpt.training.ranks import Ranks
from humptygpt.training.settings import TrainConfig
from humptygpt.training.setup import tune

CPU = torch.device("cpu")
AUTO = [arg for arg in TINY_RUN if "dtype" not in arg]


@pytest.fixture
def fast_choices(monkeypatch):
    """A processor that trains fastest in bfloat16, with two cores.

    No threads are started, because tests that fork would wait for them.
    """
    numbers = [1]
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: numbers[-1])
    monkeypatch.setattr(decoding, "THREADS", 2)
    monkeypatch.setattr("humptygpt.training.setup.THREADS", 2)
    monkeypatch.setattr("humptygpt.training.settings.training_dtype", lambda device: "bfloat16")
    monkeypatch.setattr("humptygpt.training.setup.usable_cores", lambda: 2)


@pytest.mark.parametrize("seconds, expected", [([10, 9.5, 20], 0), ([10, 9, 8], 2), ([10, 8, 9.0], 1)])
def test_the_first_choice_stays_unless_another_is_a_tenth_faster(seconds, expected, monkeypatch):
    now = 0.0
    calls = [0] * 3

    def run(choice: int) -> None:
        nonlocal now
        calls[choice] += 1
        # the first call, which compiles or allocates, is slow; some calls are disturbed
        now += seconds[choice] / 1000 + (calls[choice] in (1, 3)) / 5

    monkeypatch.setattr(decoding.time, "perf_counter", lambda: now)
    assert fastest([0, 1, 2], run) == expected


def test_what_was_chosen_is_in_all_files_of_the_run_and_a_resumed_run_keeps_it(tiny, fast_choices, monkeypatch, capsys):
    train.main(AUTO)
    assert "device: cpu, bfloat16, 2 processes\n" in capsys.readouterr().out
    chosen = {"dtype": "bfloat16", "threads": 2}
    settings = json.loads(Path("out/run/config.json").read_text())
    saved = torch.load("out/run/ckpt.pt", weights_only=True)["train_config"]
    assert chosen.items() <= saved.items() and settings["dtype"] == "bfloat16"
    rows = list(map(json.loads, Path("out/run/metrics.jsonl").read_text().splitlines()))
    losses = [row for row in rows if "train_loss" in row]
    assert {(row["dtype"], row["threads"]) for row in losses} == {("bfloat16", 2)}

    monkeypatch.setattr("humptygpt.training.setup.THREADS", 1)
    monkeypatch.setattr("humptygpt.training.settings.training_dtype", lambda device: "float32")
    resume = ["--init_from=resume", "--out_dir=out/run", "--max_iters=8"]
    train.main(resume)
    assert "device: cpu, bfloat16, 2 processes\n" in capsys.readouterr().out
    train.main([*resume, "--max_iters=9", "--dtype=float32", "--threads=1"])
    printed = capsys.readouterr()
    assert "device: cpu, float32, 1 thread\n" in printed.out
    assert "threads=1 instead of 2: losses stay the same only up to" in printed.err


def test_what_the_user_sets_stays(fast_choices):
    config = TrainConfig(dtype="float32", threads=1)
    assert tune(config, Ranks(CPU)) == config
    assert torch.get_num_threads() == 1


def test_more_threads_than_cores_are_not_used(fast_choices):
    assert tune(TrainConfig(threads=64), Ranks(CPU)).threads == 2


def test_a_run_of_several_processes_records_no_threads(fast_choices):
    """Resumed, it may have fewer processes, with more threads each."""

    class Second(Ranks):
        rank, size = 1, 2

    assert tune(TrainConfig(), Second(CPU)).threads is None


@pytest.mark.parametrize(("limit", "threads"), [(1e4, 2), (1e5, 1)])
def test_sample_py_generates_on_all_cores_with_a_large_model_and_load_keeps_the_callers(
    limit, threads, run_train, fast_choices, monkeypatch
):
    run_train("--threads=1")
    monkeypatch.setattr(decoding, "THREADED_FROM", limit)
    torch.set_num_threads(3)
    sample.load("out/run", device="cpu")
    assert torch.get_num_threads() == 3
    sample.main(["--out_dir=out/run", "--device=cpu", "--max_new_tokens=3"])
    assert torch.get_num_threads() == threads


def test_omp_num_threads_is_obeyed():
    code = "import torch, humptygpt.device as d; print(d.THREADS, torch.get_num_threads())"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "1 1\n", done.stderr
