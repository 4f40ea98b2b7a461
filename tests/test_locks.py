"""Two at once: a folder has one writer, and the second is refused with the name of the first."""

import errno
import json
import os
import random
import re
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    TINY_RUN,
    WITHOUT_SAMPLE,
    assert_same_weights,
    make_text,
    read_rows,
    started_processes,
)

import compare
import prepare_data
import sample
import train
from humptygpt import checkpoint, files, machine, run_folder, tasks
from humptygpt.config import UserError
from humptygpt.files import Lock

ROOT = Path(__file__).parent.parent
OUT = Path("out/run")
HOLD = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
from humptygpt.files import Lock
with Lock(pathlib.Path(sys.argv[2]), "it", "wait"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(path: str):
    """Another process has this lock until the block ends."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, ROOT, path], **pipes, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()


def snapshot(folder: Path) -> dict:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def named(process: subprocess.Popen) -> str:
    """A regular expression for what names the holder."""
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}"
    return rf"is in use by process {process.pid} on {re.escape(socket.gethostname())} since {time}; "


@pytest.mark.parametrize("new", [True, False])
def test_a_second_run_in_a_folder_is_refused_by_the_name_of_the_first_and_changes_nothing(
    run_train, fails, new
):
    run_train()
    with held("out/run/.lock") as process:
        before = snapshot(OUT)
        line = fails(
            train.main,
            *(
                TINY_RUN
                if new
                else ["--init_from=resume", "--out_dir=out/run", "--max_iters=9"]
            ),
        )
        assert re.fullmatch(
            f"out_dir=out/run {named(process)}name another --out_dir, or wait until .*\n",
            line,
        )
        assert snapshot(OUT) == before


def test_only_what_writes_takes_a_lock_so_that_a_living_run_can_be_sampled_and_compared(
    run_train, monkeypatch
):
    run_train()
    monkeypatch.setattr(Lock, "acquire", lambda lock: 1 / 0)
    sample.main(
        ["--out_dir=out/run", "--device=cpu", "--max_new_tokens=5", "--num_samples=1"]
    )
    compare.main(["out/run", "--picture=None"])
    assert train.main(["--init_from=resume", "--out_dir=out/run", "--eval_only=True"]) == 0


def test_the_folder_is_locked_from_before_the_checkpoint_is_read_until_the_run_has_ended(
    run_train, monkeypatch
):
    def is_held() -> bool:
        with pytest.raises(UserError):
            Lock(OUT / ".lock", "it", "wait")
        return True

    run_train()
    checked = []
    load, finish = checkpoint.read, train.finish
    monkeypatch.setattr(
        checkpoint,
        "read",
        lambda *args, **keys: checked.append(is_held()) or load(*args, **keys),
    )
    monkeypatch.setattr(
        train, "finish", lambda *args: finish(*args) or checked.append(is_held())
    )
    assert train.main(["--init_from=resume", "--out_dir=out/run", "--max_iters=8"]) == 0
    assert checked == [True, True] and not (OUT / ".lock").exists()


def test_a_killed_process_leaves_no_lock_and_its_run_is_resumed(run_train, capsys):
    run_train()
    with held("out/run/.lock") as process:
        process.kill()
        process.wait()
    assert f"process {process.pid} on " in (OUT / ".lock").read_text()
    assert train.main(["--init_from=resume", "--out_dir=out/run", "--max_iters=8"]) == 0
    assert not (OUT / ".lock").exists()


def test_a_run_that_does_not_start_leaves_no_folder(tiny, fails):
    assert "vocab_size=3 is below" in fails(
        train.main, *TINY_RUN, "--out_dir=out/deep/run", "--vocab_size=3"
    )
    assert not Path("out").exists()


def test_a_second_preparation_of_a_name_is_refused_by_the_name_of_the_first_and_changes_nothing(
    tiny, fails
):
    with held("data/tiny/.lock") as process:
        before = snapshot(tiny)
        line = fails(
            prepare_data.main, "--input=tiny.txt", "--name=tiny", "--tokenizer=byte"
        )
        assert re.fullmatch(
            f"data/tiny {named(process)}wait until that has ended, or take another --name\n",
            line,
        )
        assert snapshot(tiny) == before
        assert train.main(TINY_RUN) == 0


def test_on_a_disk_without_locks_there_is_a_note(tmp_path, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(
        files, "fcntl", SimpleNamespace(flock=no_locks, LOCK_EX=2, LOCK_NB=4)
    )
    with Lock(tmp_path / "new/.lock", "data/x", "wait"):
        note = "note: data/x cannot be locked on this disk (No locks available); let no second process write there\n"
        assert capsys.readouterr().err == note
    assert not (tmp_path / "new").exists()


def test_on_windows_the_locked_byte_is_not_in_the_text_that_names_the_holder(
    tmp_path, monkeypatch
):
    locked = []

    def locking(file: int, mode: int, count: int) -> None:
        locked.append(os.lseek(file, 0, os.SEEK_CUR))
        if len(locked) > 1:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(
        files, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2), raising=False
    )
    with Lock(tmp_path / ".lock", "data/x", "wait"):
        with pytest.raises(
            UserError, match=f"^data/x is in use by process {os.getpid()} on "
        ):
            Lock(tmp_path / ".lock", "data/x", "wait")
        assert locked == [files.FAR] * 2 and (tmp_path / ".lock").stat().st_size < 1000
    assert not (tmp_path / ".lock").exists()


def test_where_no_folder_can_be_made_nobody_is_named_as_its_user(tiny, fails):
    if not Path("/proc/self").exists():
        pytest.skip("needs a folder in which nobody can make one")
    line = fails(train.main, *TINY_RUN, "--out_dir=/proc/x")
    assert (
        line == "cannot write /proc/x: No such file or directory; name another --out_dir\n"
    )


def test_a_lock_file_that_says_nothing_names_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(Lock, "acquire", lambda lock: lock.path.touch())
    with pytest.raises(UserError, match="it is in use by another process; wait"):
        Lock(tmp_path / ".lock", "it", "wait")


# --------------------------------------------------------------------------------------
# Fifty starts of two

SEEDS, SETTINGS = (
    (1, 2, 3),
    (["--val_fraction=0.2"], ["--val_fraction=0.3"], ["--tokenizer=byte"]),
)
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "fcntl.flock"}


def start(main, argv: list[str], number: int, call: int, signal) -> None:
    """Run a script's main; at the call-th thing that it does to a file, and at its end, it sends to signal."""
    torch.set_num_threads(1)
    run_folder.draw_losses = lambda *args: None
    tasks.TEXT = WITHOUT_SAMPLE
    for name in ("stdout", "stderr"):
        sys.stdout.flush()
        os.dup2(
            os.open(f"{number}.{name}", os.O_CREAT | os.O_WRONLY),
            getattr(sys, f"__{name}__").fileno(),
        )
    calls = 0

    def count(event: str, args: tuple) -> None:
        nonlocal calls
        if event in EVENTS:
            calls += 1
            if calls == call:
                signal.send(calls)

    sys.addaudithook(count)
    sys.argv = ["script.py", *argv]
    try:
        machine.run(main)
    finally:
        signal.send(calls)


@pytest.fixture
def processes():
    """They have torch loaded already."""
    return started_processes("test_locks")


def start_two(
    processes, main, commands: list[list[str]], calls: int
) -> list[tuple[int, str]]:
    """(exit code, stderr) of each; the second starts when the first has done this many things to files."""
    pairs, receiver, sender = [], *processes.Pipe(duplex=False)
    for number, argv in enumerate(commands):
        process = processes.Process(
            target=start, args=(main, argv, number, calls if number == 0 else 0, sender)
        )
        process.start()
        pairs.append(process)
        if number == 0 and calls:
            receiver.recv()
    for process in pairs:
        process.join()
    errors = [Path(f"{number}.stderr").read_text() for number in range(2)]
    for path in Path().glob("*.std*"):
        path.unlink()
    return [(process.exitcode, error) for process, error in zip(pairs, errors, strict=True)]


def count_calls(processes, main, argv: list[str]) -> int:
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=start, args=(main, argv, 0, 0, sender))
    process.start()
    process.join()
    assert process.exitcode == 0, Path("0.stderr").read_text()
    return receiver.recv()


def check_ends(ends: list[tuple[int, str]], what: str) -> int:
    """The number of those that ran; the others are refused in one line."""
    for code, error in ends:
        refused = (
            rf"script.py: {what} is in use by process \d+ on \S+ since [^;]+; [^\n]+\n"
        )
        assert code == 0 or (code == 2 and re.fullmatch(refused, error)), (code, error)
    ran = sum(code == 0 for code, _ in ends)
    assert ran > 0
    return ran


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="needs a forkserver")
def test_fifty_starts_of_two_runs_in_one_folder_never_mix(tiny, processes, capsys):
    draw, ran, refused, expected = random.Random(0), 0, 0, {}
    for seed in SEEDS:
        calls = count_calls(
            processes, train.main, [*TINY_RUN, f"--seed={seed}", f"--out_dir=out/{seed}"]
        )
        expected[seed] = (
            read_rows(Path(f"out/{seed}")),
            checkpoint.read(Path(f"out/{seed}/ckpt.pt"))["model"],
        )
    for number in range(50):
        commands = [[*TINY_RUN, f"--seed={seed}"] for seed in draw.sample(SEEDS, 2)]
        if number % 3 == 2:  # one of the two resumes what is there
            commands[draw.randrange(2)] = ["--init_from=resume", "--out_dir=out/run"]
        both = check_ends(
            start_two(processes, train.main, commands, draw.randrange(int(1.1 * calls))),
            "out_dir=out/run",
        )
        ran, refused = ran + both, refused + 2 - both
        assert_one_run(OUT, expected)
        assert {path.name for path in OUT.iterdir() if path.is_file()} == {
            *("ckpt.pt", "best.pt", "metrics.jsonl", "config.json", "command.txt")
        }
    with capsys.disabled():
        print(f"\n100 starts of runs: {ran} ran, {refused} were refused")


def assert_one_run(folder: Path, expected: dict) -> None:
    seed = json.loads((folder / "config.json").read_text())["seed"]
    rows, model = expected[seed]
    assert read_rows(folder) == rows
    latest, best = checkpoint.read(folder / "ckpt.pt"), checkpoint.read(folder / "best.pt")
    assert latest["train_config"]["seed"] == best["train_config"]["seed"] == seed
    assert_same_weights(latest["model"], model)


OWN = ["mine", "--input=own.txt", "--overwrite=True"]


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="needs a forkserver")
def test_fifty_starts_of_two_preparations_of_one_name_never_mix(folder, processes, capsys):
    draw, ran, refused, expected = random.Random(0), 0, 0, []
    Path("own.txt").write_text(make_text(9000))
    for settings in SETTINGS:
        calls = count_calls(processes, prepare_data.main, [*OWN, *settings])
        expected.append(
            {
                path.name: path.read_bytes()
                for path in Path("data/mine").iterdir()
                if path.is_file()
            }
        )
    for _ in range(50):
        commands = [[*OWN, *settings] for settings in draw.choices(SETTINGS, k=2)]
        both = check_ends(
            start_two(
                processes, prepare_data.main, commands, draw.randrange(int(1.1 * calls))
            ),
            "data/mine",
        )
        ran, refused = ran + both, refused + 2 - both
        found = {path.name: path.read_bytes() for path in Path("data/mine").iterdir()}
        assert found in expected
        assert not Path("data/mine/preparing").exists()
    with capsys.disabled():
        print(f"\n100 starts of preparations: {ran} ran, {refused} were refused")
