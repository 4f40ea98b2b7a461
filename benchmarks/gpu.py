"""python -m benchmarks --what=gpu: the demo, training and generation on a card, as one table.

--short=True does the same with small models and few steps, to show that all of it runs.
"""

import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from humptygpt.model import ModelConfig, flops_per_token

import train
from benchmarks.contenders import Isolated
from benchmarks.nanogpt import KEYS, NanoGPTTrainer
from benchmarks.ours import OurGenerator, OurTrainer
from benchmarks.settings import BenchConfig
from benchmarks.training import DEMO
from humptygpt import cli
from humptygpt.cli import UserError
from humptygpt.device import peak_flops, pick_device, pick_dtype
from humptygpt.models.build import build_on_meta
from humptygpt.training.loggers import read_metrics
from humptygpt.training.memory import training_memory
from humptygpt.training.settings import TrainConfig

TRAININGS = {  # {name: (config, settings)}; all others have one micro-batch a step, compiled
    "gpt2_124m": ("gpt2_124m", {}),
    "gpt2_350m": ("gpt2_350m", {}),
    "gpt2_124m, 8 micro-batches": ("gpt2_124m", {"gradient_accumulation_steps": 8}),
    "fineweb_normuon": ("fineweb_normuon", {}),
    "the demo": ("shakespeare_char", {}),
    "the demo, uncompiled": ("shakespeare_char", {"compile": False}),
}
COMPARED = ("gpt2_124m", "gpt2_350m")  # with nanoGPT, which has no NorMuon
WARMUP = 5  # steps before the counted ones
TIMED = 50
SHORT = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "vocab_size": 512}


def bench(config: BenchConfig) -> dict:
    device = pick_device(config.device)
    print(f"| what | measured | computed, or for comparison |\n|---|---|---|\n| {versions(device)} | | |")
    figures = {"demo": demo(config)}
    for name in TRAININGS:
        figures[name] = training(config, name, device)
    bandwidth = copy_bandwidth(device, 2**24 if config.short else 2**30)
    figures["bandwidth"] = bandwidth
    row("copying memory", f"{bandwidth / 1e9:.0f} GB/s", "read and written")
    for texts in (1, 16):
        figures[f"decode_{texts}"] = decoding(config, device, texts, bandwidth)
    return figures


def row(what: str, measured: str, beside: str = "") -> None:
    print(f"| {what} | {measured} | {beside} |", flush=True)


def versions(device: torch.device) -> str:
    """Describe the card, its driver and the software."""
    software = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device.type != "cuda":
        return f"{device}, {platform.processor() or platform.machine()}, {software}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split()[0]
    except (OSError, IndexError):
        driver = "unknown"
    card = torch.cuda.get_device_name(device)
    return f"{card}, driver {driver}, CUDA {torch.version.cuda}, {software}"


def demo(config: BenchConfig) -> dict:
    """Run the demo like a user, including data preparation and compilation."""
    script = Path(train.__file__)
    with TemporaryDirectory() as folder:
        command = [sys.executable, script, DEMO, f"--device={config.device}"]
        command += [f"--out_dir={folder}"]
        if config.short:
            command += ["--max_iters=4", "--n_layer=1", "--batch_size=1", "--block_size=32"]
            command += ["--eval_interval=2", "--eval_iters=1"]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise UserError(f"the demo ends with: {done.stderr.strip().splitlines()[-1]}")
        rows = read_metrics(Path(folder) / "metrics.jsonl")
        loss = min(each["val_loss"] for each in rows if each["kind"] == "eval")
    row("the demo, val loss", f"{loss:.4f} in {seconds:.0f} s", "1.4530 on machine D")
    return {"val_loss": loss, "seconds": seconds}


# --------------------------------------------------------------------------------------
# Training


class OurTrainerWithMemory(OurTrainer):
    def peak_memory(self) -> int:
        """Peak memory of tensors on the card in bytes; 0 on a CPU, which has no such counter."""
        on_gpu = self.device.type == "cuda"
        return torch.cuda.max_memory_allocated(self.device) if on_gpu else 0


def training(config: BenchConfig, name: str, device: torch.device) -> dict:
    """Time steps of one of TRAININGS on the demo's text, also for nanoGPT if a checkout is given."""
    file, settings = TRAININGS[name]
    keys = cli.read([str(DEMO.parent / f"{file}.py")], ModelConfig, TrainConfig)
    keys |= {"dataset": "shakespeare_char", "gradient_accumulation_steps": 1}
    keys |= {"device": config.device, "eval_iters": None, "compile": device.type == "cuda"}
    keys |= settings
    keys.setdefault("vocab_size", 65)
    if config.short:
        keys |= SHORT | {"batch_size": 2}
    train_config = cli.make(TrainConfig, keys)
    model_config = cli.make(ModelConfig, keys)
    steps = 3 if config.short else TIMED
    tokens = train_config.batch_size * model_config.block_size
    tokens *= train_config.gradient_accumulation_steps
    try:
        trainer = Isolated(OurTrainerWithMemory, train_config, model_config)
        seconds = median_step(trainer, steps)
        peak = trainer.call("peak_memory")
        trainer.end()
    except (UserError, torch.OutOfMemoryError) as error:
        row(f"{name}, training", f"not measured: {str(error).splitlines()[0]}")
        return {}
    figures = {"tokens_per_second": round(tokens / seconds), "peak_memory": peak}
    figures["ms_per_step"] = round(1000 * seconds, 2)
    beside = []
    model = build_on_meta(model_config)
    if flops := peak_flops(device):
        figures["mfu"] = flops_per_token(model) * tokens / seconds / flops
        beside.append(f"MFU {figures['mfu']:.1%}")
    if config.nanogpt and name in COMPARED:
        shape = ModelConfig(**{key: getattr(model_config, key) for key in KEYS})
        theirs = Isolated(NanoGPTTrainer, train_config, shape, config.nanogpt)
        nanogpt = tokens / median_step(theirs, steps)
        theirs.end()
        figures["nanogpt_tokens_per_second"] = round(nanogpt)
        beside.append(f"nanoGPT {nanogpt:,.0f} tokens/s")
    speed = f"{figures['tokens_per_second']:,} tokens/s, {figures['ms_per_step']} ms a step"
    row(f"{name}, training, batch {train_config.batch_size}", speed, ", ".join(beside))
    dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
    train_config = replace(train_config, dtype=dtype)
    computed = training_memory(train_config, model).least
    measured = f"{peak / 1e9:.2f} GB" if device.type == "cuda" else "not on a CPU"
    row(f"{name}, peak memory", measured, f"at least {computed / 1e9:.2f} GB")
    return figures | {"computed_memory": computed}


def median_step(trainer: Isolated, steps: int) -> float:
    """Median seconds per step."""
    return statistics.median(trainer.call("take_steps", 0, WARMUP + steps)[WARMUP:])


# --------------------------------------------------------------------------------------
# Generation


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second, read and written, while copying this many bytes within the device."""
    x = torch.zeros(size // 4, device=device)
    times = []
    for _ in range(10):
        began = time.perf_counter()
        y = x.clone()
        y[-1].item()  # wait for a GPU
        times.append(time.perf_counter() - began)
    return 2 * size / statistics.median(times)


def decoding(config: BenchConfig, device: torch.device, texts: int, bandwidth: float) -> dict:
    """Time tokens after a prompt of 8, and compare the weights that each step reads with the memory bandwidth."""
    dtype = pick_dtype("auto", device)
    name = str(dtype).removeprefix("torch.")
    keys = cli.read([str(DEMO.parent / "gpt2_124m.py")], ModelConfig, TrainConfig)
    if config.short:
        keys |= SHORT
    model_config = cli.make(ModelConfig, keys)
    asked = replace(config, weights=name, texts=texts, new_tokens=8 if config.short else 128)
    generator = Isolated(OurGenerator, model_config, asked)
    steps = generator.call("measure", asked.new_tokens)
    generator.end()
    seconds = statistics.median(steps[1:])
    model = build_on_meta(model_config)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    read = sum(m.weight.numel() for m in linears) * dtype.itemsize
    figures = {
        "tokens_per_second": round(texts / seconds, 1),
        "of_bandwidth": read / seconds / bandwidth,
    }
    speed = f"{figures['tokens_per_second']:,} tokens/s"
    beside = f"weights at {read / seconds / 1e9:.1f} GB/s"
    row(f"gpt2_124m, decode, {name}, {texts} texts", speed, beside)
    return figures
