"""python -m benchmarks --what=train: training steps of this program and of nanoGPT, in turn."""

import statistics
from dataclasses import replace

from tqdm import trange

from benchmarks import nanogpt
from benchmarks.contenders import WARMUP, Isolated
from benchmarks.nanogpt import NanoGPTTrainer
from benchmarks.ours import OurTrainer
from benchmarks.settings import BenchConfig
from benchmarks.training import SHAPE, read_configs
from humptygpt.cli import UserError

TURN = 10  # steps of one program before the other's turn


def bench(config: BenchConfig) -> dict:
    train_config, model_config = read_configs(config)
    train_config = replace(train_config, gradient_accumulation_steps=1)
    trainers = {"ours": Isolated(OurTrainer, train_config, model_config)}
    if config.nanogpt:
        gpt2 = replace(SHAPE, **{key: getattr(model_config, key) for key in nanogpt.KEYS})
        if model_config != gpt2 or train_config.optimizer != "adamw":
            raise UserError(f"config={config.config} is no GPT-2 trained by AdamW, which is all that nanoGPT can be")
        trainers["nanogpt"] = Isolated(NanoGPTTrainer, train_config, model_config, config.nanogpt)
    seconds = {name: [] for name in trainers}
    steps = WARMUP + config.steps
    for first in trange(0, steps, TURN, disable=None):
        for name, trainer in trainers.items():
            seconds[name] += trainer.call("take_steps", first, min(TURN, steps - first))
    tokens = train_config.batch_size * model_config.block_size
    figures = {}
    for name, each in seconds.items():
        median = statistics.median(each[WARMUP:])
        figures[f"{name}_ms"] = round(1000 * median, 2)
        figures[f"{name}_tokens_per_second"] = round(tokens / median)
    if config.nanogpt:
        figures["speedup"] = round(figures["nanogpt_ms"] / figures["ours_ms"], 3)
    return figures
