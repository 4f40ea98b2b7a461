"""Devices and dtypes: the choices of auto, and refusals."""

import pytest
import torch

from humptygpt import device as devices
from humptygpt.cli import UserError
from humptygpt.device import peak_flops, pick_device, pick_dtype

CPU = torch.device("cpu")


def test_auto_picks_the_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto").type == "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto").type == "mps"
    assert pick_device("cpu") == CPU
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


AMD, INTEL = {"cpu_name": "AMD EPYC"}, {"cpu_name": "Intel Xeon"}
BFLOAT16, AMX = {"avx512_bf16": True}, {"avx512_bf16": True, "amx_bf16": True}
PROCESSORS = {
    "Zen 3": (AMD, "float32"),
    "Zen 4": (AMD | BFLOAT16, "bfloat16"),
    "Cascade Lake": (INTEL, "float32"),
    "Cooper Lake": (INTEL | BFLOAT16 | {"amx_bf16": False}, "float32"),
    "Sapphire Rapids": (INTEL | AMX, "bfloat16"),
    "a processor that torch knows nothing about": ({}, "float32"),
}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_processor_trains_in_the_dtype_that_it_multiplies_fastest(monkeypatch, processor):
    capabilities, expected = PROCESSORS[processor]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert devices.training_dtype(CPU) == expected
    assert devices.training_dtype(torch.device("mps")) == "float32"


def test_dtype_can_be_set_and_float16_needs_cuda():
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(UserError, match="dtype=float16 needs a CUDA device"):
        pick_dtype("float16", CPU)


def test_peak_flops_are_found_by_the_name_of_the_card(monkeypatch):
    cuda = torch.device("cuda")
    for name, peak in {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40": None,
        "NVIDIA L40S": 362e12,
        "NVIDIA A10": 125e12,
        "NVIDIA A10G": None,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA GB200": None,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA GeForce RTX 4090": 165e12,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "Quadro RTX 6000": None,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(cuda) == peak
    assert peak_flops(CPU) is None
