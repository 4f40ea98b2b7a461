"""Disks of any size: a full one is named in one line, and the files that were written before are good."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY_RUN, assert_same_weights
from prepared import contents

import prepare_data
import train
from humptygpt import files, machine
from humptygpt.cli import UserError
from humptygpt.formats import checkpoint

RUN = [*TINY_RUN, "--out_dir=disk/run", "--max_iters=8", "--eval_interval=2"]
PREPARE = ["--input=tiny.txt", "--name=mine"]


@pytest.fixture
def disk(folder):
    """A function that gives disk/ this many bytes, a multiple of the page size, and empties it."""
    path, mounted = folder / "disk", []
    path.mkdir()

    def resize(size: int, keep: bool = False) -> Path:
        if mounted and not keep:
            subprocess.run(["umount", path], check=True)
            mounted.clear()
        options = f"{'remount,' if mounted else ''}size={max(size, 4096)}"  # 0 would be without a limit
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True)
        if done.returncode:
            pytest.skip("this user may not mount a small disk")
        mounted.append(path)
        if not size:
            (path / "filler").write_bytes(bytes(4096))
        return path

    if sys.platform != "linux":
        pytest.skip("needs Linux's tmpfs")
    yield resize
    if mounted:
        subprocess.run(["umount", "--lazy", path], check=True)


def run(main, argv: list[str], capsys, monkeypatch) -> str | None:
    """The complaint of a script that ends for lack of space; None if it has enough."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    with pytest.raises(SystemExit) as stop:
        machine.run(main)
    lines = capsys.readouterr().err.splitlines()
    if not stop.value.code:
        return None
    complaints = [line for line in lines if not line.startswith("note: ")]
    assert (stop.value.code, len(complaints)) == (2, 1), lines
    assert re.match("script.py: .*(cannot write disk/|data/mine)", complaints[0])
    return complaints[0]


def size_of(folder: Path) -> int:
    """Bytes in whole pages of the files in a folder; the largest counts twice, as it is written beside the old one."""
    files = filter(Path.is_file, folder.rglob("*"))
    sizes = [-(-path.stat().st_size // 4096) * 4096 for path in files]
    return sum(sizes) + max(sizes)


# how many sizes are tried, from nothing to twice the size that is needed
COUNTS = [6, pytest.param(40, marks=pytest.mark.long)]


@pytest.mark.parametrize("count", COUNTS)
def test_on_a_disk_of_any_size_a_run_ends_well_or_in_one_line_and_resumes_with_more_space(
    tiny, disk, count, capsys, monkeypatch
):
    path = disk(10**8)
    assert run(train.main, RUN, capsys, monkeypatch) is None
    needed, whole = size_of(path), checkpoint.read(path / "run" / "ckpt.pt")["model"]
    outcomes = []
    for number in range(count):
        path = disk(2 * needed * number // (count - 1))
        complaint = run(train.main, RUN, capsys, monkeypatch)
        outcomes.append(complaint is None)
        if complaint:
            assert "No space left on device" in complaint
        for saved in path.glob("run/*.pt"):
            assert checkpoint.read(saved)["progress"]["iter"] in (2, 4, 6, 8)
        assert not list(path.rglob("*.tmp"))
        for line in (path / "run" / "metrics.jsonl").read_text().split("\n")[:-2]:
            json.loads(line)
        disk(10**8, keep=True)
        resume = ["--init_from=resume"] * (path / "run" / "ckpt.pt").exists()
        assert run(train.main, [*RUN, *resume], capsys, monkeypatch) is None
        assert_same_weights(checkpoint.read(path / "run" / "ckpt.pt")["model"], whole)
    assert outcomes[0] is False and outcomes[-1] is True and outcomes == sorted(outcomes)


@pytest.mark.parametrize("count", COUNTS)
def test_on_a_disk_of_any_size_a_preparation_ends_well_or_in_one_line_and_resumes_with_more_space(
    tiny, folder, disk, count, capsys, monkeypatch
):
    path = disk(10**8)
    (folder / "data" / "mine").symlink_to(path / "mine")
    (path / "mine").mkdir()
    assert run(prepare_data.main, PREPARE, capsys, monkeypatch) is None
    needed, whole = size_of(path), contents("mine")
    for number in range(count):
        path = disk(2 * needed * number // (count - 1))
        (path / "mine").mkdir()
        complaint = run(prepare_data.main, PREPARE, capsys, monkeypatch)
        assert (complaint is None) == ("meta.json" in contents("mine"))
        if complaint:
            assert "No space left on device" in complaint
        disk(10**8, keep=True)
        assert run(prepare_data.main, PREPARE, capsys, monkeypatch) is None
        assert contents("mine") == whole
    assert complaint is None


@pytest.mark.parametrize("room", [0, 1, 4096, 40_000])
def test_a_checkpoint_that_finds_no_room_says_so_and_not_what_follows_from_it(run_train, monkeypatch, room):
    class SmallDisk(io.FileIO):
        def write(self, data: bytes) -> int:
            nonlocal room
            if not room:
                room = 1 << 40  # somebody has made room since
                raise OSError(errno.ENOSPC, "No space left on device")
            written = super().write(bytes(data)[:room])
            room -= written
            return written

    run_train("--max_iters=1")
    path = Path("out/run/ckpt.pt")
    entries, before = checkpoint.read(path), path.read_bytes()
    assert room < len(before)
    del entries["format"]
    full = "No space left on device; the previous file is"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=full):
        patch.setattr(Path, "open", lambda *args: io.BufferedWriter(SmallDisk(*args)))
        checkpoint.save(path, entries)
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.tmp"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs named pipes")
def test_a_device_or_a_pipe_is_not_replaced_by_a_file(folder):
    os.mkfifo("pipe")
    for path in (Path("pipe"), Path("/dev/null"), folder):
        with pytest.raises(UserError, match=f"cannot write {path}: it is not a regular"):
            files.write_whole(path, lambda file: file.write(b"text"))
    assert Path("pipe").is_fifo()


def test_of_two_processes_that_write_a_file_at_once_both_succeed_and_one_wins(folder):
    def write(file) -> None:
        file.write(b"first")
        files.write_whole(Path("x"), lambda other: other.write(b"second, which is longer"))

    files.write_whole(Path("x"), write)
    assert [path.name for path in folder.iterdir()] == ["x"]
    assert Path("x").read_bytes() == b"first"


def test_what_a_kill_left_of_a_file_is_removed_by_the_next_run_and_what_is_not_ours_stays(
    run_train,
):
    run_train()
    ours = {"ckpt.pt.0123abcd.tmp", "best.pt.89abcdef.tmp"}
    others = {"ckpt.pt.mine.tmp", "mine.0123abcd.tmp"}
    for name in ours | others:
        Path("out/run", name).touch()
    assert train.main(["--init_from=resume", "--out_dir=out/run"]) == 0
    assert {path.name for path in Path("out/run").glob("*.tmp")} == others
