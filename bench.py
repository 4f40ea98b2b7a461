"""How fast: steps of this trainer and of a nanoGPT checkout, side by side on this machine.

    python bench.py --what=train --nanogpt=../nanoGPT

Same shapes, same math (nanoGPT's CPU preset, AdamW, float32), same text; a step of one, then a step of the other. The
last line is one JSON object: medians in milliseconds, and `speedup`, nanoGPT's median over ours.
"""

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
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
from train import TrainConfig, train_step

# nanoGPT's preset for a laptop's CPU, as the command in its README sets it
SHAPE = {"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0, "bias": False}
PRESET = TrainConfig(batch_size=12, learning_rate=1e-3, beta2=0.99, weight_decay=0.1, grad_clip=1.0)


@dataclass(frozen=True)
class BenchConfig:
    # --- benchmark
    what: str = "train"  # train: time the steps of training
    nanogpt: str | None = None  # a nanoGPT checkout to stand beside; None: this program alone
    steps: int = 300  # steps of each that are counted, after 20 that are not

    def __post_init__(self):
        if self.what != "train":
            raise ValueError(f"what={self.what} is not one of: train")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if self.nanogpt is not None and not (Path(self.nanogpt) / "model.py").exists():
            raise ValueError(f"nanogpt={self.nanogpt} has no model.py; give the folder of a checkout")


def main(argv: list[str]) -> None:
    config = configurator.make(BenchConfig, configurator.read(argv, BenchConfig))
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
    print(json.dumps(result))


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


if __name__ == "__main__":
    configurator.run(main)
