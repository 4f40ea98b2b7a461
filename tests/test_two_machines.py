"""Two machines, as docs/processes.md describes them: two namespaces of this one, which a cable connects.

Each has a network, a host name and a folder of its own. As on Debian, its name has the address 127.0.1.1 there.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY_RUN, read_rows
from test_distributed import losses

import train

pytestmark = pytest.mark.long
FOLDERS = [Path("first"), Path("second")]  # also the names of the machines
TORCHRUN = ["torchrun", "--nnodes=2", "--nproc_per_node=1", "--master_addr=first"]
RUN = [*TINY_RUN, "--gradient_accumulation_steps=2"]  # a micro-batch for each machine
NAME_IT = 'mount --bind hosts /etc/hosts && hostname $1 && shift && exec "$@"'
TIME = 120  # seconds until a test fails


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def namespaces():
    """Two network namespaces, with the addresses 10.77.0.1 and 10.77.0.2."""
    names = [f"humpty-{os.getpid()}-{folder}" for folder in FOLDERS]
    try:
        for name in names:
            ip("netns", "add", name)
        there = ["peer", "name", "eth0", "netns", names[1]]
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", *there)
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        subprocess.run(["unshare", "--uts", "--mount", "true"], check=True)
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root on Linux, to make namespaces: {error}")
    finally:
        for name in names if shutil.which("ip") else []:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def switch_off(namespace: str) -> None:
    for process in ip("netns", "pids", namespace).split():
        os.kill(int(process), signal.SIGKILL)


@pytest.fixture
def start(tiny, namespaces):
    """Start torchrun on both machines. What they print goes to first/log and second/log."""
    started = []
    for number, folder in enumerate(FOLDERS):
        shutil.copytree("data", folder / "data")
        hosts = ["127.0.0.1 localhost", f"127.0.1.1 {folder}"]
        hosts += ["10.77.0.1 first"] * number
        (folder / "hosts").write_text("\n".join(hosts) + "\n")

    def run(*argv: str) -> list[subprocess.Popen]:
        for number, folder in enumerate(FOLDERS):
            command = ["ip", "netns", "exec", namespaces[number], "unshare", "--uts"]
            command += ["--mount", "sh", "-c", NAME_IT, "sh", str(folder), *TORCHRUN]
            command += [f"--node_rank={number}", ROOT / "train.py", *argv]
            with (folder / "log").open("w") as log:
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=os.environ | {"GLOO_SOCKET_IFNAME": "eth0"},
                    stdout=log,
                    stderr=log,
                )
            started.append(process)
        return started

    yield run
    for namespace in namespaces:
        switch_off(namespace)
    for process in started:
        process.wait(30)


def complaints(number: int) -> list[str]:
    """Return the lines that train.py printed on a machine when it ended."""
    lines = (FOLDERS[number] / "log").read_text().splitlines()
    return [line for line in lines if line.startswith("train.py: ")]


def test_two_machines_have_every_digit_of_the_losses_of_one_process(start):
    assert train.main(RUN) == 0
    one = losses(read_rows(Path("out/run")))
    assert [machine.wait(TIME) for machine in start(*RUN)] == [0, 0]
    assert losses(read_rows(FOLDERS[0] / "out/run")) == one
    assert not (FOLDERS[1] / "out").exists()


@pytest.mark.parametrize("number", [0, 1])
def test_if_a_machine_fails_the_other_says_so_in_one_line_within_ten_seconds(start, namespaces, number):
    machines = start(*RUN, "--max_iters=1000000")
    metrics, deadline = FOLDERS[0] / "out/run/metrics.jsonl", time.monotonic() + TIME
    while not (metrics.exists() and metrics.read_text().count("\n") > 9):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    switch_off(namespaces[number])
    assert machines[1 - number].wait(10) == 1
    (line,) = complaints(1 - number)
    assert line.startswith("train.py: another process has ended or does not respond (")
