"""Cores and memory that a process may use, threads that give way, and allocations that fail."""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare_data
import sample
from humptygpt.core import limits
from humptygpt.core import settings as configurator
from humptygpt.core.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Write what the system says of our control groups: our_groups, {file: content}."""

    def write(our_groups: str, files: dict[str, str]) -> None:
        (tmp_path / "cgroup").write_text(our_groups)
        for name, content in files.items():
            (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "fs" / name).write_text(content)

    monkeypatch.setattr(limits, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(limits, "OUR_GROUPS", tmp_path / "cgroup")
    return write


VERSION_1 = "5:cpuset:/\n4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n"


@pytest.mark.parametrize(
    ("our_groups", "files", "cores"),
    [
        ("0::/", {}, 8),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "300000 100000"}, 3),
        (
            "0::/a/b",
            {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000", "cpu.max": "max 100000"},
            2,
        ),
        ("0::/", {"cpu.max": "20000 100000"}, 1),
        ("0::/", {"cpu.max": "1600000 100000"}, 8),
        (
            VERSION_1,
            {"cpu/docker/abc/cpu.cfs_quota_us": "-1", "cpu/docker/abc/cpu.cfs_period_us": "100000"},
            8,
        ),
        (VERSION_1, {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 3),
    ],
)
def test_threads_are_as_many_as_affinity_and_quota_allow(
    groups, monkeypatch, our_groups, files, cores
):
    monkeypatch.setattr(limits, "affinity", lambda: set(range(8)))
    groups(our_groups, files)
    assert limits.usable_cores() == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinity")
def test_a_process_that_is_bound_to_one_core_has_one_thread_for_torch_and_one_worker():
    one = {min(os.sched_getaffinity(0))}
    code = (
        "from humptygpt.core import limits; limits.start(); import torch; print(torch.get_num_threads(),"
    )
    code += " limits.usable_cores())"
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))
    }
    bind = lambda: os.sched_setaffinity(0, one)  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=env,
        preexec_fn=bind,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "1 1\n", done.stderr


NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


@pytest.fixture
def environment(monkeypatch):
    """An environment in which nobody has chosen anything, and what start() changes is restored."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(limits, "load", None)
    monkeypatch.setattr(
        os, "environ", {key: value for key, value in os.environ.items() if key not in NAMES}
    )
    monkeypatch.setattr(limits, "affinity", lambda: set(range(8)))
    monkeypatch.setattr(limits, "cpu_quotas", lambda: iter([]))


def test_a_script_has_threads_that_give_way_and_what_the_user_chose_stays(environment, monkeypatch):
    limits.start()
    assert os.environ["GOMP_SPINCOUNT"] == str(limits.SPINS) and "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setattr(limits, "cpu_quotas", lambda: iter([2.5]))
    monkeypatch.setattr(os, "environ", {"OMP_WAIT_POLICY": "active"})
    limits.start()
    assert os.environ == {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "3"}
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "6", "GOMP_SPINCOUNT": "5"})
    limits.start()
    assert os.environ == {"OMP_NUM_THREADS": "6", "GOMP_SPINCOUNT": "5"}


@pytest.mark.parametrize("name", ["train", "sample", "bench", "prepare_data"])
def test_a_script_that_loads_torch_has_its_wait_policy_before_and_an_import_of_it_has_none(
    name, environment
):
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    guard = lines.index('if __name__ == "__main__":')
    needed = "NUMPY" if name == "prepare_data" else "TORCH"
    assert lines[guard + 1].startswith(f"    limits.start(limits.{needed})")
    assert not [
        line
        for line in lines[:guard]
        if line.startswith(("import torch", "from torch", "import numpy"))
    ]
    __import__(name)

    def main(argv: list[str]) -> None:
        pass

    with pytest.raises(SystemExit):
        configurator.run(main)  # of a module that is not __main__
    assert not set(NAMES) & os.environ.keys()


@pytest.mark.parametrize(
    ("others", "threads", "noted"),
    [(0.0, 4, False), (0.4, 4, False), (1.2, 4, True), (1.2, 2, False), (3.9, 1, True)],
)
def test_others_that_load_our_cores_are_noted_where_they_leave_too_little(
    monkeypatch, others, threads, noted
):
    times = iter(
        [(0.0, 100.0, 5.0), (10.0, 100.0 + 10 * others + 7.0, 12.0)]
    )  # the clock, busy, ours
    monkeypatch.setattr(limits.Load, "read", lambda self: next(times))
    monkeypatch.setattr(limits, "affinity", lambda: set(range(4)))
    monkeypatch.setattr(limits, "usable_cores", lambda: threads)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(limits, "load", limits.Load())
    note = f"other processes use {others:.1f} of the 4 cores; alone, this would be faster"
    assert limits.load_note() == (note if noted else None)


def test_sampling_and_preparation_note_a_busy_machine_too(run_train, monkeypatch, capsys):
    run_train()
    monkeypatch.setattr(limits, "load", types.SimpleNamespace(others=lambda: 2.0))
    monkeypatch.setattr(limits, "affinity", lambda: {0, 1})
    note = "note: other processes use 2.0 of the 2 cores; alone, this would be faster\n"
    sample.main(["--out_dir=out/run", "--device=cpu", "--num_samples=1", "--max_new_tokens=1"])
    assert note in capsys.readouterr().err
    monkeypatch.setattr(prepare_data, "SMALL", 1)
    prepare_data.main(["--input=tiny.txt", "--name=mine", "--workers=1"])
    assert note in capsys.readouterr().err


def test_others_that_use_what_our_threads_leave_are_not_noted(monkeypatch):
    monkeypatch.setattr(limits, "affinity", lambda: {0, 1})
    monkeypatch.setattr(limits, "load", types.SimpleNamespace(others=lambda: 1.0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun does for two processes
    assert limits.load_note() is None
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert (
        limits.load_note() == "other processes use 1.0 of the 2 cores; alone, this would be faster"
    )


def test_time_of_our_own_is_not_load_of_others():
    load = limits.Load()
    clock, busy, ours = load.read()
    while sum(os.times()[:4]) < load.before[2] + 0.05:
        pass
    after = load.read()
    assert after[0] > clock and after[1] >= busy and after[2] > ours


# --------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize(
    ("our_groups", "files", "available"),
    [
        ("0::/", {}, 8000),
        ("0::/", {"memory.max": "max", "memory.current": "7000"}, 8000),
        ("0::/", {"memory.max": "5000", "memory.current": "3000"}, 2000),
        (
            "0::/",
            {
                "memory.max": "5000",
                "memory.current": "4500",
                "memory.stat": "anon 1\ninactive_file 900\n",
            },
            1400,
        ),
        (
            "0::/",
            {
                "memory.max": "5000",
                "memory.current": "4500",
                "memory.stat": "active_file 700\nanon 1\n",
            },
            1200,
        ),
        (
            "0::/a",
            {
                "a/memory.max": "9000",
                "a/memory.current": "1",
                "memory.max": "100",
                "memory.current": "90",
            },
            10,
        ),
        (
            VERSION_1,
            {
                "memory/memory.limit_in_bytes": str(2**63 - 4096),
                "memory/memory.usage_in_bytes": "1",
            },
            8000,
        ),
        (
            VERSION_1,
            {"memory/memory.limit_in_bytes": "600", "memory/memory.usage_in_bytes": "700"},
            0,
        ),
    ],
)
def test_available_memory_is_that_of_the_machine_and_of_every_control_group(
    groups, monkeypatch, our_groups, files, available
):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=8000))
    groups(our_groups, files)
    assert limits.available_memory() == available


@pytest.mark.skipif(sys.platform == "win32", reason="needs ulimit")
def test_available_memory_obeys_ulimit(monkeypatch):
    import resource

    import psutil

    used = psutil.Process().memory_info().vms
    monkeypatch.setattr(
        resource, "getrlimit", lambda which: (used + 5_000_000, resource.RLIM_INFINITY)
    )
    assert 0 < limits.available_memory() <= 5_000_000


FAILURES = {
    "out of memory: 4,503,599.6 GB more were requested, ": lambda: torch.empty(
        2**50, dtype=torch.float32
    ),
    "out of memory: 1,125,899.9 GB more were requested, ": lambda: np.empty(2**50, np.uint8),
    "out of memory, ": lambda: bytes(2**62),
    "out of memory on the GPU: 2.15 GB more were requested": lambda: fail(
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"
        )
    ),
    "out of memory, 0": lambda: fail(
        ImportError("libx.so: failed to map segment from shared object")
    ),
}


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("line", FAILURES)
def test_an_allocation_that_fails_is_one_line_with_the_way_out(line, monkeypatch, fails):
    monkeypatch.setattr(limits, "available_memory", lambda: 0)
    assert fails(lambda argv: FAILURES[line]()).startswith(line)

    def main(argv: list[str]) -> None:
        with limits.memory_advice("take less"):
            FAILURES[line]()

    if not line.endswith("0"):  # an import is no allocation that a smaller setting would help
        assert fails(main).endswith("; take less\n")


def test_other_errors_pass():
    for error in (RuntimeError("a bug"), OSError("a bug"), ValueError("out of memory")):
        with pytest.raises(type(error), match=str(error)), limits.memory_advice("take less"):
            raise error


@pytest.mark.skipif(sys.platform != "linux", reason="needs ulimit -v")
@pytest.mark.parametrize("script", ["train.py", "sample.py", "prepare_data.py"])
def test_where_memory_does_not_suffice_to_load_what_is_imported_that_is_one_line(script):
    command = f"ulimit -v 60000; exec {sys.executable} {ROOT / script} --out_dir=out/none"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}: ") and done.stderr.count("\n") == 1, done.stderr


def test_where_memory_does_not_suffice_to_start_that_is_reported_before_anything_is_loaded(
    environment, monkeypatch
):
    monkeypatch.setattr(limits, "available_memory", lambda: 100_000_000)
    line = "150.0 MB of memory are needed to start, and 100.0 MB are free"
    with pytest.raises(limits.OutOfMemory, match=f"^{line}$"):
        limits.start(limits.TORCH)
    limits.start(limits.NUMPY)
    monkeypatch.setattr(limits, "available_memory", lambda: 10**9)
    monkeypatch.setattr(limits, "addresses", lambda: 80_000_000)
    with pytest.raises(
        limits.OutOfMemory,
        match=r"^90\.0 MB of virtual memory are needed to start, and 80\.0 MB are free$",
    ):
        limits.start(limits.NUMPY)


def test_a_package_that_is_missing_is_one_line_with_the_command_that_installs_all(folder):
    (folder / "torch.py").write_text("import nothing_of_this_name")
    env = os.environ | {"PYTHONPATH": str(folder)}
    for script in ("train.py", "sample.py"):
        done = subprocess.run(
            [sys.executable, ROOT / script], capture_output=True, text=True, env=env
        )
        line = "the package nothing_of_this_name is not installed here; pip install -r requirements.txt"
        assert (done.returncode, done.stderr) == (2, f"{script}: {line}\n")


@pytest.mark.skipif(sys.platform != "linux", reason="needs control groups")
def test_in_a_control_group_an_allocation_fails_where_the_group_would_kill_the_process(monkeypatch):
    import resource

    import psutil

    limit = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, value: limit.append((which, *value)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=10**9))
    for available in (math.inf, 10**9):
        monkeypatch.setattr(limits, "group_memory", lambda available=available: available)
        limits.limit_memory()
    assert not limit
    monkeypatch.setattr(limits, "group_memory", lambda: 3 * 10**8)
    monkeypatch.setattr(limits, "usable_cores", lambda: 4)
    limits.limit_memory()
    memory = psutil.Process().memory_info()
    ((which, soft, hard),) = limit
    assert which == resource.RLIMIT_DATA and hard == resource.getrlimit(resource.RLIMIT_DATA)[1]
    assert soft == pytest.approx(
        memory.rss - memory.shared + 3 * 10**8 + 4 * limits.STACK, abs=10**7
    )


# --------------------------------------------------------------------------------------
# Others


def test_a_full_disk_under_the_output_is_one_line(fails):
    if not Path("/dev/full").is_char_device():
        pytest.skip("needs /dev/full")

    def main(argv: list[str]) -> None:
        with Path("/dev/full").open("w") as file:
            print("text", file=file, flush=True)

    assert fails(main) == "cannot write the output: No space left on device\n"


def test_under_torchrun_the_line_is_in_its_report(tmp_path, monkeypatch, fails):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    line = fails(lambda argv: fail(UserError("no such data")))
    assert (
        json.loads((tmp_path / "error.json").read_text())["message"]["message"]
        == f"script.py: {line}".rstrip()
    )
