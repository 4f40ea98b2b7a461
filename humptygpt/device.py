"""Devices and dtypes: what the machine has, or what the user says."""

import ctypes
import os
import re
import sys
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from humptygpt.config import UserError
from humptygpt.machine import available_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Dense bfloat16 or float16 peak in FLOP/s, from the makers' data sheets, by words of the card's name; the first counts.
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
    """auto: CUDA, else Apple's GPU, else the CPU. Raises UserError for a device that is not there."""
    cards = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    available = ["cuda", *cards] if cards else []
    if torch.backends.mps.is_available():
        available.append("mps")
    available.append("cpu")
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise UserError(
            f"device={name} is not available; this machine and this torch have: {', '.join(available)}; auto picks one"
        )
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the processor or the CUDA card multiplies it, float16 on an older card, else float32."""
    if name == "auto":
        if multiplies_bfloat16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    if name == "float16" and device.type != "cuda":
        raise UserError(
            f"dtype=float16 needs a CUDA device, and this is {device.type}; use float32 or bfloat16"
        )
    return DTYPES[name]


def sample_dtype(name: str, device: torch.device) -> torch.dtype:
    """As pick_dtype(), for generation: token by token, a CPU waits for memory, not for matrix products."""
    if name == "auto" and device.type == "cpu":
        return torch.float32
    return pick_dtype(name, device)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 matrix products. Where it has none, bfloat16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    has_products = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return device.type == "cpu" and bool(has_products)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Matrix products in dtype, sums and norms in float32; nothing changes with float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    on_gpu = device.type == "cuda"
    if on_gpu:
        # from pinned memory, which must be contiguous, the copy overlaps with the GPU's work; torch keeps it, and gives
        # it to a later batch when the copy is done
        batch = {name: value.contiguous().pin_memory() for name, value in batch.items()}
    return {name: value.to(device, non_blocking=on_gpu) for name, value in batch.items()}


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of the card; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next(
        (peak for words, peak in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", name)),
        None,
    )


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on the device; those of a CPU are divided among torchrun's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def tune_malloc(sharded: bool) -> None:
    """Set what glibc does with freed blocks of memory: it keeps them for the next step, or not if the model is sharded.

    Otherwise every large activation is mapped and cleared again in each step: a tenth of the time of a small model on a
    CPU, a sixth where the vocabulary is large. Of a sharded model, whole weights come and go, and the holes between
    what stays would take as much memory again; so blocks of a megabyte and more go back to the system at once.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # a Linux without glibc
        return
    # as malloc.h numbers them: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX
    if sharded:
        mallopt(-1, 1 << 20)
        mallopt(-3, 1 << 20)
    else:
        mallopt(-1, 2**31 - 1)
        mallopt(-4, 0)  # no block is mapped by itself, however large
