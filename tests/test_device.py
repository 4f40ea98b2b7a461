import pytest
import torch

from humptygpt.configurator import UserError
from humptygpt.device import autocast, keep_freed_memory, peak_flops, pick_device, pick_dtype, pick_dtype_to_write

CPU = torch.device("cpu")


def test_auto_takes_the_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto").type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == CPU


@pytest.mark.parametrize("name", ["cuda:7", "tpu", "meta", "gpu", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match=f"^device={name} is not there; this machine and this torch have: .*cpu"):
        pick_device(name)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)]
)
def test_dtype_follows_the_card(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_dtype("auto", torch.device("cuda")) == dtype


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx2", torch.float32)],
)
def test_dtype_follows_what_the_processor_can_multiply(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capabilities: True}, raising=False)
    assert pick_dtype("auto", CPU) == dtype
    assert pick_dtype_to_write("auto", CPU) == torch.float32
    assert pick_dtype_to_write("bfloat16", CPU) == torch.bfloat16
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in an older torch
    assert pick_dtype("auto", CPU) == torch.float32


def test_dtype_can_be_set_and_float16_needs_cuda():
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(UserError, match="dtype=float16 needs a CUDA device"):
        pick_dtype("float16", CPU)


def test_autocast_multiplies_in_the_dtype_asked_for():
    a = torch.ones(2, 2)
    with autocast(CPU, torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert (a @ a).dtype == torch.float32


def test_peaks_are_known_by_the_cards_name(monkeypatch):
    cuda = torch.device("cuda")
    for name, peak in {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40": None,
        "NVIDIA H100 PCIe": 756e12,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(cuda) == peak
    assert peak_flops(CPU) is None


def test_keeping_freed_memory_is_harmless_anywhere(monkeypatch):
    keep_freed_memory()
    monkeypatch.setattr("ctypes.CDLL", lambda name: (_ for _ in ()).throw(OSError("no such library")))
    assert keep_freed_memory() is None
