"""A folder has one writer at a time. A second one is refused."""

import json
import random
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    TINY_RUN,
    WITHOUT_SAMPLE,
    assert_same_weights,
    exit_code,
    read_rows,
    started,
    started_processes,
)

import compare
import prepare_data
import sample
import train
from humptygpt import files, machine
from humptygpt.cli import UserError
from humptygpt.formats import checkpoint
from humptygpt.training import evaluation
from humptygpt.training import run as runs

OUT = Path("out/run")
LONGER = ["--init_from=resume", "--out_dir=out/run", "--max_iters=8"]
HOLD = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
from humptygpt.files import locked
with locked(pathlib.Path(sys.argv[2]), "it", "wait"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(path: str):
    """Another process holds this lock until the block ends."""
    command = [sys.executable, "-c", HOLD, ROOT, path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with started(command, **pipes, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()


@contextmanager
def refused(folder: str, fails):
    """Yield a function that runs a command, which a lock on the folder refuses; nothing in it changes."""

    def snapshot() -> dict:
        paths = filter(Path.is_file, Path(folder).rglob("*"))
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}

    with held(folder):
        before = snapshot()

        def check(main, argv: list[str], advice: str) -> None:
            line = rf"\S*{folder} is in use by another process; {advice}\n"
            assert re.fullmatch(line, fails(main, *argv))
            assert snapshot() == before

        yield check


def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(run_train, fails):
    run_train()
    advice = "choose another --out_dir, or wait until that run has ended"
    with refused("out/run", fails) as check:
        check(train.main, TINY_RUN, advice)
        check(train.main, LONGER, advice)


def test_a_second_preparation_of_a_name_is_refused_likewise_and_training_on_it_is_not(tiny, fails):
    argv = ["--input=tiny.txt", "--name=tiny", "--tokenizer=byte"]
    with refused("data/tiny", fails) as check:
        advice = "wait until it has finished, or choose another --name"
        check(prepare_data.main, argv, advice)
        assert train.main(TINY_RUN) == 0


def test_only_a_training_takes_a_lock_so_that_a_living_run_can_be_sampled_and_compared(run_train, monkeypatch):
    run_train()
    monkeypatch.setattr(files, "locked", lambda *args: 1 / 0)
    sample.main(["--out_dir=out/run", "--device=cpu", "--max_new_tokens=5"])
    compare.main(["out/run", "--picture=None"])
    assert train.main([*LONGER, "--eval_only=True"]) == 0


def test_the_folder_is_locked_from_before_the_checkpoint_is_read_until_the_run_has_ended(run_train, monkeypatch):
    run_train()
    seen = []

    def checked(function):
        def inner(*args, **keys):
            with (
                pytest.raises(UserError, match="it is in use by another process; wait"),
                files.locked(OUT, "it", "wait"),
            ):
                pass
            seen.append(function)
            return function(*args, **keys)

        return inner

    monkeypatch.setattr(checkpoint, "read", checked(checkpoint.read))
    monkeypatch.setattr(train, "finish", checked(train.finish))
    assert train.main(LONGER) == 0
    assert len(seen) == 2 and not (OUT.parent / ".run.lock").exists()


def test_a_killed_process_leaves_no_lock_and_its_run_is_resumed(run_train):
    run_train()
    with held("out/run") as process:
        process.kill()
        process.wait(30)
    assert (OUT.parent / ".run.lock").exists()
    assert train.main(LONGER) == 0
    assert not (OUT.parent / ".run.lock").exists()


# --------------------------------------------------------------------------------------
# Fifty starts of two runs

SEEDS = (1, 2, 3)


def start(argv: list[str], number: int) -> None:
    torch.set_num_threads(1)
    runs.draw_losses = lambda *args: None
    evaluation.TEXT = WITHOUT_SAMPLE
    sys.stderr = Path(f"{number}.stderr").open("w")  # noqa: SIM115, open as long as the process
    sys.argv = ["train.py", *argv]
    machine.run(train.main)


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="needs a forkserver")
def test_fifty_starts_of_two_runs_in_one_folder_never_mix(tiny):
    processes = started_processes("test_locks")
    draw = random.Random(0)
    expected = {}
    for seed in SEEDS:
        argv = [*TINY_RUN, f"--seed={seed}", "--out_dir=out/alone"]
        began = time.perf_counter()
        process = processes.Process(target=start, args=(argv, 0))
        process.start()
        assert exit_code(process) == 0
        duration = time.perf_counter() - began
        saved = checkpoint.read(Path("out/alone/ckpt.pt"))
        expected[seed] = read_rows(Path("out/alone")), saved["model"]
    codes = []
    for number in range(50):
        commands = [[*TINY_RUN, f"--seed={seed}"] for seed in draw.sample(SEEDS, 2)]
        if number % 3 == 2:  # one of the two resumes the run that is there
            commands[draw.randrange(2)] = LONGER[:2]
        two = []
        for argv in commands:
            process = processes.Process(target=start, args=(argv, len(two)))
            process.start()
            two.append(process)
            time.sleep(draw.uniform(0, 1.1 * duration) if len(two) == 1 else 0)
        for index, process in enumerate(two):
            codes.append(exit_code(process))
            error = Path(f"{index}.stderr").read_text().splitlines()[-1:]
            line = "train.py: out_dir=out/run is in use by "
            assert process.exitcode == 0 or error[0].startswith(line), error
        assert 0 in codes[-2:]
        assert_one_run(expected)
    assert codes.count(0) < 100  # some were refused


def assert_one_run(expected: dict) -> None:
    names = {"ckpt.pt", "best.pt", "metrics.jsonl", "config.json", "command.txt"}
    assert {path.name for path in OUT.iterdir() if path.is_file()} == names
    seed = json.loads((OUT / "config.json").read_text())["seed"]
    rows, model = expected[seed]
    assert read_rows(OUT) == rows
    latest, best = checkpoint.read(OUT / "ckpt.pt"), checkpoint.read(OUT / "best.pt")
    assert latest["train_config"]["seed"] == best["train_config"]["seed"] == seed
    assert_same_weights(latest["model"], model)
