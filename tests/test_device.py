"""Devices and dtypes: the choices of auto, and refusals."""

import json
from contextlib import nullcontext

import pytest
import torch

from humptygpt import device as devices
from humptygpt import machine
from humptygpt.cli import UserError
from humptygpt.device import (
    peak_flops,
    pick_device,
    pick_dtype,
    training_dtype,
)

CPU = torch.device("cpu")


def test_auto_picks_the_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto").type == "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for choice in ("mps", "cpu"):
        monkeypatch.setattr(devices, "faster", lambda what, choices, best=choice: best)
        assert pick_device("auto").type == choice
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == CPU


@pytest.mark.parametrize("name", ["cuda:7", "tpu", "meta"])
def test_a_device_that_is_not_available_is_refused(name):
    complaint = f"^device={name} is not available; use one of these, or auto: .*cpu"
    with pytest.raises(UserError, match=complaint):
        pick_device(name)


CARDS = {(9, 0): torch.bfloat16, (8, 0): torch.bfloat16, (7, 5): torch.float16}


@pytest.mark.parametrize("capability", CARDS)
def test_auto_dtype_is_what_the_card_multiplies(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_dtype("auto", torch.device("cuda")) == CARDS[capability]


def test_on_a_cpu_float32_generates_unless_another_dtype_is_asked_for():
    assert pick_dtype("auto", CPU) == torch.float32
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16


def test_the_dtype_of_a_machine_is_measured_once_for_a_version_of_torch(
    monkeypatch, tmp_path, capsys
):
    measured = ["bfloat16", "float32"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr(devices, "fastest_training", lambda choices: measured.pop(0))
    assert [training_dtype(CPU) for _ in range(3)] == ["bfloat16"] * 3
    assert capsys.readouterr().err == (
        "note: bfloat16 trains fastest on this machine; this is kept in"
        f" {tmp_path}/cache/humptygpt/measured.json\n"
    )
    monkeypatch.setattr(torch, "__version__", "9.0")
    assert training_dtype(CPU) == "float32" and not measured


def test_where_the_cache_cannot_be_written_the_dtype_is_measured_each_time_and_that_is_said(
    monkeypatch, tmp_path, capsys
):
    (tmp_path / "cache").write_text("a file, not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr(devices, "fastest_training", lambda choices: choices[1])
    assert [training_dtype(CPU) for _ in range(2)] == ["bfloat16"] * 2
    assert capsys.readouterr().err.count("dtype is measured at each start, because") == 2


def test_without_a_home_folder_the_dtype_is_measured_as_well(monkeypatch, capsys):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(devices.Path, "home", no_home)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr(devices, "fastest_training", lambda choices: choices[1])
    assert training_dtype(CPU) == "bfloat16"
    assert "because it cannot be kept: Could not determine" in capsys.readouterr().err


def test_a_damaged_file_of_measurements_is_replaced(monkeypatch, tmp_path):
    path = tmp_path / "humptygpt/measured.json"
    path.parent.mkdir()
    path.write_text("5")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr(devices, "fastest_training", lambda choices: choices[1])
    assert training_dtype(CPU) == "bfloat16"
    assert list(json.loads(path.read_text()).values()) == ["bfloat16"]


def test_the_shortest_steps_decide_and_a_tenth_is_not_enough(monkeypatch):
    now, calls = 0.0, 0
    seconds = {torch.float32: 1.0, torch.bfloat16: 0.8}

    def autocast(device, dtype):
        nonlocal now, calls
        calls += 1
        busy = 9 if calls % 4 else 1  # another program has the core most of the time
        now += seconds[dtype] * busy
        return nullcontext()

    monkeypatch.setattr(machine.time, "perf_counter", lambda: now)
    monkeypatch.setattr(devices, "autocast", autocast)
    for bfloat16, expected in ((0.8, "bfloat16"), (0.95, "float32"), (2.0, "float32")):
        seconds[torch.bfloat16] = bfloat16
        assert devices.fastest_training(["float32", "bfloat16"]) == expected


def test_dtype_can_be_set_and_float16_needs_cuda():
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(UserError, match="dtype=float16 needs a CUDA device"):
        pick_dtype("float16", CPU)


def test_peak_flops_are_found_by_the_name_of_the_card(monkeypatch):
    cuda = torch.device("cuda")
    for name, peak in {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40": 181e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA A10": 125e12,
        "NVIDIA A10G": 70e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA RTX A6000": 155e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA GB200": 2500e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA GeForce RTX 3060": 25.5e12,
        "NVIDIA GeForce RTX 4080": 97.5e12,
        "NVIDIA GeForce RTX 4080 SUPER": None,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "Quadro RTX 6000": None,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(cuda) == peak
    assert peak_flops(CPU) is None
