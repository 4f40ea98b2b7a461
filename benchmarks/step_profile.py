"""python -m benchmarks --what=profile: the phases of a training step, and the operators that take longest."""

import statistics
import time
from dataclasses import replace

import torch

import train
from benchmarks.contenders import WARMUP
from benchmarks.ours import OurTrainer
from benchmarks.settings import BenchConfig
from benchmarks.training import DEMO, read_configs
from humptygpt.device import autocast, to_device
from humptygpt.training.step import clip


def bench(config: BenchConfig) -> dict:
    train_config, model_config = read_configs(config, DEMO)
    trainer = OurTrainer(replace(train_config, compile=False), model_config)
    trainer.take_steps(0, WARMUP)
    steps = [time_phases(trainer.run, it) for it in range(WARMUP, WARMUP + config.steps)]
    with torch.profiler.profile() as profile:
        trainer.take_steps(WARMUP, min(config.steps, 20))
    device = "device" if trainer.device.type == "cuda" else "cpu"
    print(profile.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=15))
    return {f"{phase}_ms": round(1000 * statistics.mean(step[phase] for step in steps), 3) for phase in steps[0]}


def time_phases(run: train.Run, it: int) -> dict[str, float]:
    """Take a step of one micro-batch in the same way as train_step(). Returns the seconds of each phase."""
    seconds = {}
    began = time.perf_counter()

    def end_phase(name: str) -> None:
        if run.device.type != "cpu":
            torch.accelerator.synchronize(run.device)
        seconds[name] = time.perf_counter() - began - sum(seconds.values())

    batch = to_device(run.dataset.batch(it, run.config.batch_size), run.device)
    end_phase("batch")
    with autocast(run.device, run.dtype):
        _, loss = run.model(**batch)
    end_phase("forward")
    loss.backward()
    end_phase("backward")
    clip(run)
    end_phase("clip")
    run.optimizer.step()
    run.model.zero_grad()
    end_phase("optimizer")
    return seconds
