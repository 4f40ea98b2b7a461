"""Choose devices and dtypes: those that the user names, or by a rule the best that the machine has."""

import ctypes
import os
import re
import sys
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from humptygpt.cli import UserError
from humptygpt.machine import available_memory

THREADS = torch.get_num_threads()  # as many as there are cores
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# peak in FLOP/s of dense bfloat16 or float16 products summed in float32, from data sheets; the first entry found in the
# card's name is used
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
    "5090": 209e12,
    "4090": 165e12,
    "3090": 71e12,
}


def pick_device(name: str) -> torch.device:
    """Find a device by name. "auto" is CUDA, else Apple's GPU, else the CPU. Raises UserError if it is unavailable."""
    cards = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    available = ["cuda", *cards] if cards else []
    if torch.backends.mps.is_available():
        available.append("mps")
    available.append("cpu")
    if name == "auto":
        name = available[0]
    if name not in available:
        raise UserError(f"device={name} is not available; use one of these, or auto: {', '.join(available)}")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Find a dtype by name. Raises UserError for float16 on a device other than CUDA.

    "auto" is the fastest for generation: float32 except on CUDA, because elsewhere memory is the bottleneck, not
    arithmetic.
    """
    if name == "auto":
        name = training_dtype(device) if device.type == "cuda" else "float32"
    if name == "float16" and device.type != "cuda":
        raise UserError(f"dtype=float16 needs a CUDA device, but this one is {device.type}; use float32 or bfloat16")
    return DTYPES[name]


def training_dtype(device: torch.device) -> str:
    """The dtype of matrix products in which a device trains fastest.

    On a CPU, it is bfloat16 with AMX, or with AVX-512 BF16 unless it is an Intel, which without AMX trains in bfloat16
    at 0.7 of float32's speed. RECORDS.md, "Speed of a training step", has the machines on which this was measured.
    """
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return "bfloat16" if major >= 8 else "float16"
    if device.type != "cpu":
        return "float32"
    has = torch.cpu.get_capabilities()
    intel = "Intel" in has.get("cpu_name", "")
    fast = has.get("amx_bf16") or (has.get("avx512_bf16") and not intel)
    return "bfloat16" if fast else "float32"


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Compute matrix products in dtype, and sums and norms in float32. With float32, nothing changes."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    on_gpu = device.type == "cuda"
    if on_gpu:
        # a copy from pinned memory, which must be contiguous, overlaps with the GPU's work; torch reuses the memory for
        # a later batch once the copy is done
        batch = {name: value.contiguous().pin_memory() for name, value in batch.items()}
    return {name: value.to(device, non_blocking=on_gpu) for name, value in batch.items()}


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of the card; None if it is unknown."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for words, peak in PEAK_FLOPS.items():
            # variants of a card have peaks of their own
            if re.search(rf"\b{words}\b(?! (Ti|SUPER|D|Laptop))", name):
                return peak
    return None


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on the device. On a CPU, torchrun's processes share it evenly."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def tune_malloc() -> None:
    """Let glibc keep freed memory for the next step.

    By default, every large activation is mapped and zeroed anew in each step. On a CPU, this takes a tenth of a small
    model's step, and a sixth with a large vocabulary.
    """
    if sys.platform != "linux":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD in malloc.h
    mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own, however large
    mallopt(-8, 1)  # M_ARENA_MAX: all threads allocate from the same memory
