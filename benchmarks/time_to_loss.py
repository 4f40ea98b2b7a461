"""python -m benchmarks --what=loss: time to a validation loss, for nanoGPT's CPU preset and for one of our configs."""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace

from tqdm import trange

from benchmarks.contenders import WARMUP, Isolated
from benchmarks.nanogpt import NanoGPTTrainer
from benchmarks.ours import OurTrainer
from benchmarks.settings import BenchConfig
from benchmarks.training import DEMO, PRESET, SHAPE, read_configs


def bench(config: BenchConfig) -> dict:
    rows = []
    for seed in range(1, config.seeds + 1):
        rows.append(compare_run(config, seed))
        print(f"seed {seed}: {json.dumps(rows[-1])}", flush=True)
    return {key: round(statistics.median(row[key] for row in rows), 4) for key in rows[0]}


def compare_run(config: BenchConfig, seed: int) -> dict[str, float]:
    """Train both with this seed. Returns the figures of train_to() for each, and the speedup."""
    ours, model_config = read_configs(config, DEMO)
    ours = replace(ours, seed=seed)
    preset = replace(PRESET, seed=seed, dataset=ours.dataset, device=config.device)
    shape = replace(SHAPE, vocab_size=model_config.vocab_size)
    nanogpt = Isolated(NanoGPTTrainer, preset, shape, config.nanogpt)
    row = train_to(nanogpt.call, preset.max_iters, 100, config.target, "nanogpt")
    trial = Isolated(OurTrainer, ours, model_config).call("take_steps", 0, 3 * WARMUP)
    # how many steps fit into the same time, with a margin in case other programs slow the machine down
    steps = int(0.8 * row["nanogpt_seconds"] / statistics.mean(trial[WARMUP:])) or 1
    ours = replace(ours, max_iters=steps, lr_decay_iters=None)
    row |= train_to(Isolated(OurTrainer, ours, model_config).call, steps, 5, config.target, "ours")
    row["speedup"] = row["nanogpt_seconds_to_target"] / row["ours_seconds_to_target"]
    return row


def train_to(call: Callable, steps: int, interval: int, target: float, name: str) -> dict[str, float]:
    """Train for this many steps, evaluating after every interval of them until the target is reached.

    Returns the seconds of all steps, the seconds to the target, and the loss at the end. The time to the target is
    interpolated linearly between evaluations; if the target was not reached, it is the time of all steps.
    """
    seconds = 0.0
    reached = None
    loss = math.inf
    for first in trange(0, steps, interval, disable=None):
        taken = sum(call("take_steps", first, min(interval, steps - first)))
        seconds += taken
        if reached is None:
            before = loss
            loss = call("val_loss")
            if loss <= target:
                reached = seconds - taken * (target - loss) / (before - loss)
    return {
        f"{name}_seconds": seconds,
        f"{name}_seconds_to_target": seconds if reached is None else reached,
        f"{name}_val_loss": call("val_loss"),
    }
