"""Choose devices and dtypes: those that the user names, or the best that the machine has."""

import ctypes
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from humptygpt.cli import UserError, note
from humptygpt.files import parse_json, write_text
from humptygpt.machine import available_memory, fastest, read

THREADS = torch.get_num_threads()  # as many as there are cores
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# peak in FLOP/s of dense bfloat16 or float16 products summed in float32, from data sheets, except for GB200, L40, A10G,
# A6000, 4080 and 3060, whose figures are still to be checked; the first entry found in the card's name is used
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A6000": 155e12,
    "V100": 125e12,
    "T4": 65e12,
    "5090": 209e12,
    "4090": 165e12,
    "4080": 97.5e12,
    "3090": 71e12,
    "3060": 25.5e12,
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
        if name == "mps":  # many small operators may be faster on the CPU
            name = faster("device", ["cpu", "mps"])
    if name not in available:
        raise UserError(
            f"device={name} is not available; use one of these, or auto: {', '.join(available)}"
        )
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Find a dtype by name. Raises UserError for float16 on a device other than CUDA.

    "auto" is bfloat16 on CUDA, or float16 if the card cannot multiply bfloat16. On other devices it is float32: to
    generate, memory is the bottleneck, not arithmetic, and to train, training_dtype() measures it.
    """
    if name == "auto" and device.type == "cuda":
        name = "bfloat16" if multiplies_bfloat16(device) else "float16"
    if name == "float16" and device.type != "cuda":
        raise UserError(
            f"dtype=float16 needs a CUDA device, but this one is {device.type}; use float32 or bfloat16"
        )
    return DTYPES.get(name, torch.float32)


def training_dtype(device: torch.device) -> str:
    """The dtype in which this machine trains faster: float32 or, on a processor that can multiply it, bfloat16."""
    if not multiplies_bfloat16(device):
        return "float32"
    return faster("dtype", ["float32", "bfloat16"]) if device.type == "cpu" else "bfloat16"


def faster(what: str, choices: Sequence[str]) -> str:
    """Choose a device or a dtype by timing training steps, once for a processor and a version of torch.

    The result is kept in the user's cache folder, so that it is the same in all runs, on a busy machine too.
    what: dtype or device. choices: the first is taken unless another is clearly faster.
    """
    from filelock import FileLock  # late import: most scripts take no lock

    key = measured_key(what)
    kept = {}
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        path = cache / "humptygpt" / "measured.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # of two runs that start at once, the second waits
            with suppress(OSError, ValueError):
                kept = parse_json(path.read_bytes(), {})
            if kept.get(key) not in choices:
                kept[key] = fastest_training(choices)
                write_text(path, json.dumps(kept, indent=1))
                note(f"{kept[key]} trains fastest on this machine; this is kept in {path}")
    # a RuntimeError if there is no home folder, or a file system without locks
    except (OSError, RuntimeError, UserError) as error:
        note(
            f"the fastest {what} is measured at each start, because it cannot be kept: {error}"
        )
    return kept.get(key) or fastest_training(choices)


def fastest_training(choices: Sequence[str]) -> str:
    """Find the device or dtype in which feed-forward networks of three sizes train fastest.

    Dtypes are compared on one thread, so that other programs matter less; Apple's GPU competes with all of them.
    """
    nets = {
        C: nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))
        for C in (128, 256, 512)
    }

    def step(choice: str) -> None:
        device = torch.device("cpu" if choice in DTYPES else choice)
        for C, net in nets.items():
            x = torch.ones(2**25 // C**2, C, device=device)  # equally much work for each
            with autocast(device, DTYPES.get(choice, torch.float32)):
                y = net.to(device)(x)
            y.sum().backward()
        net[0].weight.grad.sum().item()  # waits for the GPU

    threads = torch.get_num_threads()
    torch.set_num_threads(threads if "mps" in choices else 1)
    try:
        best = fastest(choices, step)
    except (
        RuntimeError
    ):  # Apple's GPU in a virtual machine says that it is there, but has no memory
        best = choices[0]
    torch.set_num_threads(threads)
    return best


def measured_key(what: str) -> str:
    """Describe a measurement by the processor, its instruction sets and the version of torch."""
    name = re.search(r"^model name\s*: (.*)$", read(Path("/proc/cpuinfo")), re.MULTILINE)
    capabilities = torch.cpu.get_capabilities().items()
    flags = " ".join(sorted(flag for flag, value in capabilities if value is True))
    processor = name[1] if name else platform.processor()
    return f"{what}: {processor} ({flags}), torch {torch.__version__}"


def multiplies_bfloat16(device: torch.device) -> bool:
    """True if the hardware has bfloat16 matrix products. Without them, bfloat16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    has_products = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return device.type == "cpu" and bool(has_products)


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
