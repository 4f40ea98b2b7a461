"""Whether the ± of compare.py's difference holds: 480 seeds of two variants of a very small model.

    nice python -m benchmarks.seeds

Seeds are dealt to groups of sixteen. The true difference is the mean over all seeds. For each group, t_test() gives a
difference with its standard error, from pairs of runs with the same seed and, to see what the pairs are good for, from
pairs with different seeds. If the standard error holds, the truth lies within one and within two of them as often as
Student's t says. The truth contains the group itself, so a group of G is nearer to it, by the factor sqrt(1 - 1/G).
That is taken into account. Smaller groups of the same runs are more of a test, because there are more of them.

The model has one layer of 32 features. Losses are kept in out/seeds.json, so an interrupted run goes on.
"""

import json
import statistics
from dataclasses import replace
from pathlib import Path

from humptygpt import machine

if __name__ == "__main__":
    machine.start()  # before numpy and torch are loaded

import train
from benchmarks.training import DEMO
from compare import t_test
from humptygpt import cli, evaluation
from humptygpt.setup import Start
from humptygpt.settings import TrainConfig
from model import ModelConfig

SEEDS = 480
STEPS = 150
OUT = Path("out/seeds.json")
TINY = {"n_layer": 1, "n_embd": 32, "block_size": 64, "max_iters": STEPS}
TINY |= {"dtype": "float32", "muon_dtype": "float32", "threads": 1, "vocab_size": 65}
VARIANTS = {"two heads": {"n_head": 2}, "one head": {"n_head": 1}}


def main() -> None:
    losses = json.loads(OUT.read_text()) if OUT.exists() else []
    while len(losses) < SEEDS:
        seed = len(losses) + 1
        losses.append([bits_per_byte(seed, keys) for keys in VARIANTS.values()])
        OUT.write_text(json.dumps(losses))
    for variant, bits in zip(VARIANTS, zip(*losses, strict=True), strict=True):
        print(
            f"{variant}: {statistics.mean(bits):.4f}, from seed to seed {statistics.stdev(bits):.4f}"
        )
    for size in (16, 6, 3):
        for name, shift in (("same", 0), ("different", size)):
            pairs = [b - losses[i - shift][0] for i, (_, b) in enumerate(losses)]
            print(f"groups of {size}, {name} seeds: {coverage(pairs, size)}")


def bits_per_byte(seed: int, keys: dict) -> float:
    """Train with a seed and return the loss in bits per byte."""
    given = cli.read([str(DEMO)], ModelConfig, TrainConfig) | TINY | keys | {"seed": seed}
    config = cli.make(TrainConfig, given)
    run = train.setup(Start(config, cli.make(ModelConfig, given)))
    for step in range(STEPS):
        run.optimizer.set_lr(config.lr(step) / config.learning_rate)
        train.train_step(run, step)
    return evaluation.measures(run, run.net, 100)["val_bits_per_byte"]


if __name__ == "__main__":
    main()
