"""Devices and dtypes: what the machine has, or what the user says."""

import ctypes
import os
import re
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from humptygpt.core.errors import UserError
from humptygpt.core.limits import available_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Dense bfloat16 or float16 peak in FLOP/s, from the makers' data sheets, by words of the card's name; the first counts.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "4090": 165e12,
    "3090": 71e12,
}


def pick_device(name: str) -> torch.device:
    """auto: CUDA, else Apple's GPU, else the CPU. Raises UserError for a device that is not there."""
    counts = {
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    usable = [kind for kind, count in counts.items() if count]
    if name == "auto":
        return torch.device(usable[0])
    kind, _, index = name.partition(":")
    if kind not in usable or index not in ("", *map(str, range(counts[kind]))):
        raise UserError(
            f"device={name} is not available; this machine and this torch have: {', '.join(usable)}; auto picks one"
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
    if device.type == "cuda":
        # from pinned memory, which must be contiguous, the copy overlaps with the GPU's work
        return {
            name: value.contiguous().pin_memory().to(device, non_blocking=True)
            for name, value in batch.items()
        }
    return {name: value.to(device) for name, value in batch.items()}


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of the card; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next(
        (peak for words, peak in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", name)), None
    )


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on the device; those of a CPU are divided among torchrun's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def keep_freed_memory() -> None:
    """Ask glibc to keep freed blocks for the next step instead of giving them back to the system.

    Otherwise every large activation is mapped and cleared again in each step: a tenth of the time of a small model on a
    CPU. With another C library nothing happens.
    """
    set_malloc(mmap_threshold=32 << 20, trim_threshold=2**31 - 1)  # the most that glibc accepts


def give_back_freed_memory() -> None:
    """Ask glibc to give freed blocks of a megabyte and more back to the system at once.

    Of a sharded model, whole weights come and go, and the holes between what stays would take as much memory again.
    """
    set_malloc(mmap_threshold=1 << 20, trim_threshold=1 << 20)


def set_malloc(mmap_threshold: int, trim_threshold: int) -> None:
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(-3, mmap_threshold)  # as malloc.h numbers them
    mallopt(-1, trim_threshold)
