"""How fast, side by side with others on this machine. The last line is one JSON object.

    python bench.py --what=train --nanogpt=../nanoGPT     a step of ours, a step of nanoGPT's, in turn
    python bench.py --what=prepare --input=FILE.txt       prepare_data.py with GPT-2's tokens, and tiktoken alone
    python bench.py --what=read --dataset=NAME            batches out of token files, on one core

train: same shapes, same math (nanoGPT's CPU preset, AdamW, float32), same text; medians in milliseconds, and `speedup`,
nanoGPT's median over ours. prepare: MB/s of both, the most memory that all processes together held, and `share`, our
speed over that of tiktoken on one core times the number of cores. read: tokens per second, and what memory grew by.
"""

import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import trange

import configurator
import model as models
from configurator import UserError
from dataset import TokenDataset
from device import keep_freed_memory
from model import ModelConfig
from optim import make_optimizer
from tokenizer import BytePairTokenizer
from train import TrainConfig, train_step

# nanoGPT's preset for a laptop's CPU, as the command in its README sets it
SHAPE = {"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0, "bias": False}
PRESET = TrainConfig(batch_size=12, learning_rate=1e-3, beta2=0.99, weight_decay=0.1, grad_clip=1.0)
PREPARE = Path(__file__).with_name("prepare_data.py")


@dataclass(frozen=True)
class BenchConfig:
    # --- benchmark
    what: str = "train"  # train, prepare or read, as told above
    nanogpt: str | None = None  # a nanoGPT checkout to stand beside; None: this program alone
    steps: int = 300  # what=train: steps of each that are counted, after 20 that are not
    input: str | None = None  # what=prepare: a text file, the larger the better
    dataset: str = "shakespeare_char"  # what=read: a folder in data/
    block_size: int = 1024  # what=read: tokens in a row
    batch_size: int = 12  # what=read: rows in a batch
    batches: int = 100_000  # what=read: how many are read

    def __post_init__(self):
        if self.what not in BENCHMARKS:
            raise ValueError(f"what={self.what} is not one of: {', '.join(BENCHMARKS)}")
        for key in ("steps", "block_size", "batch_size", "batches"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if self.what == "prepare" and self.input is None:
            raise ValueError("what=prepare needs --input=FILE.txt")
        belong = {"nanogpt": "train", "steps": "train", "input": "prepare", "dataset": "read", "block_size": "read"}
        for key, what in (belong | {"batch_size": "read", "batches": "read"}).items():
            if self.what != what and getattr(self, key) != getattr(BenchConfig, key):
                raise ValueError(f"{key}={getattr(self, key)} goes with --what={what} only")
        if self.nanogpt is not None and not (Path(self.nanogpt) / "model.py").exists():
            raise ValueError(f"nanogpt={self.nanogpt} has no model.py; give the folder of a checkout")


def main(argv: list[str]) -> None:
    config = configurator.make(BenchConfig, configurator.read(argv, BenchConfig))
    print(json.dumps(BENCHMARKS[config.what](config)))


# --------------------------------------------------------------------------------------
# Training


def bench_train(config: BenchConfig) -> dict:
    folder = Path("data/shakespeare_char")
    if not (folder / "meta.json").exists():
        raise UserError(f"no {folder}; run: python prepare_data.py shakespeare_char")
    steppers = {"ours": our_step(folder)}
    if config.nanogpt:
        steppers["nanogpt"] = nanogpt_step(Path(config.nanogpt), folder)
    times = {name: [] for name in steppers}
    for it in trange(config.steps + 20, disable=not sys.stderr.isatty()):
        for name, step in steppers.items():
            began = time.perf_counter()
            step(it)
            if it >= 20:
                times[name].append(1000 * (time.perf_counter() - began))
    result = {f"{name}_ms": round(statistics.median(ms), 2) for name, ms in times.items()}
    if config.nanogpt:
        result["speedup"] = round(statistics.median(times["nanogpt"]) / statistics.median(times["ours"]), 3)
    return result


def our_step(folder: Path) -> Callable[[int], float]:
    """A function that trains one step as train.py does and returns the loss."""
    keep_freed_memory()
    dataset = TokenDataset(folder, SHAPE["block_size"], seed=1)
    model = models.build(ModelConfig(**SHAPE, vocab_size=dataset.tokenizer.vocab_size))
    optimizer = make_optimizer("adamw", model, PRESET.learning_rate, (PRESET.beta1, PRESET.beta2), PRESET.weight_decay)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    cpu = torch.device("cpu")
    return lambda it: float(train_step(it, model, dataset, optimizer, scaler, PRESET, cpu, torch.float32)[0])


def nanogpt_step(checkout: Path, folder: Path) -> Callable[[int], float]:
    """The same for nanoGPT: its model and optimizer, and the body of its loop with its way of drawing batches."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    vocab_size = TokenDataset(folder, SHAPE["block_size"], seed=1).tokenizer.vocab_size
    model = module.GPT(module.GPTConfig(**SHAPE, vocab_size=vocab_size))
    optimizer = model.configure_optimizers(
        PRESET.weight_decay, PRESET.learning_rate, (PRESET.beta1, PRESET.beta2), device_type="cpu"
    )
    block_size, batch_size = SHAPE["block_size"], PRESET.batch_size

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        data = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r")  # opened anew for each batch, as there
        starts = torch.randint(len(data) - block_size, (batch_size,))
        x = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in starts])
        return x, y

    def step(it: int) -> float:
        _, loss = model(*get_batch())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), PRESET.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


# --------------------------------------------------------------------------------------
# Data


def bench_prepare(config: BenchConfig) -> dict:
    """prepare_data.py on the whole text; every 8 seconds it stands still while tiktoken encodes a part on one core."""
    shutil.rmtree("data/bench", ignore_errors=True)
    tokenizer = BytePairTokenizer.gpt2()
    with Path(config.input).open(encoding="utf-8") as file:
        texts = [file.read(1 << 18) for _ in range(80)]  # 20 MB
    size = sum(len(text.encode()) for text in texts)
    encode_alone = lambda: [tokenizer.engine.encode_ordinary(text) for text in texts]  # noqa: E731
    began, most, alone = time.perf_counter(), 0, []
    command = [sys.executable, str(PREPARE), "bench", f"--input={config.input}", "--tokenizer=gpt2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            most = max(most, sum(map(resident_bytes, family(process.pid))))
            if time.perf_counter() - began > 8 * (len(alone) + 1) + sum(alone):
                paused = family(process.pid)
                for pid in paused:
                    os.kill(pid, signal.SIGSTOP)
                alone.append(timed(encode_alone))
                for pid in reversed(paused):
                    os.kill(pid, signal.SIGCONT)
            time.sleep(0.05)
    if process.returncode:
        raise UserError(f"prepare_data.py ended with {process.returncode}")
    speed = Path(config.input).stat().st_size / (time.perf_counter() - began - sum(alone)) / 1e6
    alone = alone or [timed(encode_alone)]
    core = size / statistics.mean(alone) / 1e6
    return {
        "mb_per_second": round(speed, 2),
        "tiktoken_alone_mb_per_second": round(core, 2),
        "cores": os.cpu_count(),
        "share": round(speed / core / os.cpu_count(), 3),
        "most_memory_mb": round(most / 1e6),
    }


def timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def family(pid: int) -> list[int]:
    """A process and all that it started, as Linux lists them."""
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [each for child in path.read_text().split() for each in family(int(child))]
    return found


def resident_bytes(pid: int) -> int:
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def bench_read(config: BenchConfig) -> dict:
    """Batches in the order of training. Memory that the process owns is told from mapped pages of the files."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    dataset = TokenDataset(Path("data") / config.dataset, config.block_size, seed=1337)
    dataset.batch(0, config.batch_size)
    first = time.perf_counter() - began
    for index in range(100):
        dataset.batch(index, config.batch_size)
    before, began = own_memory(), time.perf_counter()
    for index in trange(config.batches, disable=not sys.stderr.isatty()):
        dataset.batch(index, config.batch_size)
    seconds = time.perf_counter() - began
    return {
        "tokens_per_second": round(config.batches * config.batch_size * config.block_size / seconds),
        "first_batch_seconds": round(first, 3),
        "growth_mb": round((own_memory() - before) / 1e6, 1),
    }


def own_memory() -> int:
    """Resident bytes that are not pages of files, as Linux counts them."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


BENCHMARKS = {"train": bench_train, "prepare": bench_prepare, "read": bench_read}


if __name__ == "__main__":
    configurator.run(main)
