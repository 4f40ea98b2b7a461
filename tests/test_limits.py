"""Cores and memory that a process may use, threads that give way, and allocations that fail."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN

from humptygpt import device, machine

ROOT = Path(__file__).parent.parent


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Write what the system says of our control groups: the path of ours, {file: content}."""

    def write(path: str, files: dict[str, str]) -> None:
        (tmp_path / "cgroup").write_text(f"1:name=systemd:/x\n0::{path}\n")
        for name, content in files.items():
            (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "fs" / name).write_text(content)

    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(machine, "OUR_GROUPS", tmp_path / "cgroup")
    return write


NESTED = {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}


@pytest.mark.parametrize(
    ("path", "files", "cores"),
    [
        ("/", {}, 8),
        ("/", {"cpu.max": "300000 100000"}, 3),
        ("/a/b", NESTED, 2),
        ("/", {"cpu.max": "20000 100000"}, 1),
        ("/", {"cpu.max": "1600000 100000"}, 8),
        ("/of/the/host", {"cpu.max": "50000 100000"}, 1),
    ],
)
def test_threads_are_as_many_as_affinity_and_quota_allow(groups, monkeypatch, path, files, cores):
    monkeypatch.setattr(machine, "affinity", lambda: 8)
    groups(path, files)
    assert machine.usable_cores() == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinity")
def test_a_process_that_is_bound_to_one_core_has_one_thread_for_torch_and_one_worker():
    one = {min(os.sched_getaffinity(0))}
    code = "from humptygpt import machine; machine.start(); import torch;"
    code += " print(torch.get_num_threads(), machine.usable_cores())"
    chosen = ("OMP_", "MKL_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(chosen)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=env,
        preexec_fn=lambda: os.sched_setaffinity(0, one),
        capture_output=True,
        text=True,
    )
    assert done.stdout == "1 1\n", done.stderr


NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


@pytest.fixture
def environment(monkeypatch):
    """An environment in which nobody has chosen anything, and what start() changes is restored."""
    others = {key: value for key, value in os.environ.items() if key not in NAMES}
    monkeypatch.setattr(os, "environ", others)
    monkeypatch.setattr(machine, "affinity", lambda: 8)
    monkeypatch.setattr(machine, "read_numbers", lambda *names: [])


def test_a_script_has_threads_that_give_way_and_what_the_user_chose_stays(environment, monkeypatch):
    machine.start()
    assert os.environ["GOMP_SPINCOUNT"] == str(machine.SPINS)
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setattr(machine, "read_numbers", lambda *names: [250, 100])
    monkeypatch.setattr(os, "environ", {"OMP_WAIT_POLICY": "active"})
    machine.start()
    assert os.environ == {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "3"}
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "6", "GOMP_SPINCOUNT": "5"})
    machine.start()
    assert os.environ == {"OMP_NUM_THREADS": "6", "GOMP_SPINCOUNT": "5"}


@pytest.mark.parametrize("name", ["train", "sample", "score", "prepare_data"])
def test_a_script_that_loads_torch_has_its_wait_policy_before_and_an_import_of_it_has_none(name, environment):
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    guard = lines.index('if __name__ == "__main__":')
    assert lines[guard + 1].startswith("    machine.start()")
    loads_threads = ("import torch", "from torch", "import numpy")
    assert not any(line.startswith(loads_threads) for line in lines[:guard])
    __import__(name)

    def main(argv: list[str]) -> None:
        pass

    with pytest.raises(SystemExit):
        machine.run(main)  # main is not in the module __main__
    assert not set(NAMES) & os.environ.keys()


# --------------------------------------------------------------------------------------
# Memory

INNER = {"a/memory.max": "9000", "a/memory.current": "1"}


@pytest.mark.parametrize(
    ("path", "files", "available"),
    [
        ("/", {}, 8192),
        ("/", {"memory.max": "5000", "memory.current": "3000"}, 2000),
        ("/a", INNER | {"memory.max": "100", "memory.current": "90"}, 10),
        ("/", {"memory.max": "600", "memory.current": "700"}, 0),
    ],
)
@pytest.mark.parametrize("stat", ["", "anon 1\ninactive_file 90\nactive_file 7\n"])
def test_available_memory_is_that_of_the_machine_and_of_every_control_group(
    groups, monkeypatch, tmp_path, path, files, available, stat
):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16 kB\nMemAvailable:    8 kB\n")
    monkeypatch.setattr(machine, "MEMINFO", meminfo)
    groups(path, files | {"memory.stat": stat})
    cached = 97 if stat and 0 < available < 8192 else 0
    assert machine.available_memory() == available + cached


def test_if_the_memory_is_unknown_as_on_windows_everything_fits(groups, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "none")
    monkeypatch.setattr(os, "sysconf_names", {})
    groups("/", {})
    assert device.free_memory(torch.device("cpu")) > 2**50


FAILURES = {
    "out of memory": lambda: torch.empty(2**50),
    "out of memory, numpy": lambda: np.empty(2**50, np.uint8),
    "out of memory, Python": lambda: bytes(2**62),
    "out of memory on the GPU": lambda: fail(torch.OutOfMemoryError("CUDA out of memory.")),
}


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("line", FAILURES)
def test_an_allocation_that_fails_is_one_line_with_the_way_out(line, fails):
    def main(argv: list[str]) -> None:
        with machine.memory_advice("take less"):
            FAILURES[line]()

    expected = line.partition(",")[0]
    assert fails(lambda argv: FAILURES[line]()) == "out of memory\n"
    assert fails(main) == f"{expected}; take less\n"


def test_other_errors_pass():
    for error in (RuntimeError("a bug"), OSError("a bug"), ValueError("out of memory")):
        with (
            pytest.raises(type(error), match=str(error)),
            machine.memory_advice("take less"),
        ):
            raise error


@pytest.mark.parametrize("script", ["prepare_data.py", "sample.py"])
def test_ctrl_c_while_imports_run_shows_nothing(folder, script):
    interrupt = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    (folder / "numpy.py").write_text(interrupt)
    done = subprocess.run(
        [sys.executable, ROOT / script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(folder)},
        # a shell lets what runs in the background ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.skipif(sys.platform == "win32", reason="needs streams that are closed")
@pytest.mark.parametrize(
    ("closed", "keys", "code", "told"),
    [
        ((0, 1, 2), [], 0, ""),
        ((0, 1), ["--seeds=1"], 2, "train.py: unknown key seeds; did you mean seed?\n"),
        ((2,), ["--seeds=1"], 2, ""),
    ],
)
def test_a_run_whose_streams_are_closed_trains_and_what_is_refused_has_its_exit_code(tiny, closed, keys, code, told):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *TINY_RUN, *keys],
        capture_output=True,
        text=True,
        preexec_fn=lambda: [*map(os.close, closed)],
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "", told)
    assert Path("out/run/ckpt.pt").exists() == (code == 0)
