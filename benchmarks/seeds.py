"""Whether the ± of a difference in compare.py holds: 480 seeds of two variants of a very small model.

    nice python -m benchmarks.seeds

The true difference is the mean over all seeds. They are dealt to groups of sixteen, and for each group, t_test() gives
a difference with its ±. If the ± holds, the truth lies within one and within two of them as often as Student's t says.
Because the truth is a mean that contains the group, it lies nearer to the group than an independent one would, by a
factor of sqrt(1 - 1 / groups), which the expected shares take into account. Groups of four are more in number. In the
second half of the table, each run is compared with one of another seed, to show what equal seeds are good for.

The model has one layer of 32 features. Losses are kept in out/seeds.json, so an interrupted benchmark goes on.
"""

import json
import statistics
from pathlib import Path

from humptygpt import machine

if __name__ == "__main__":
    machine.start()  # before numpy and torch are loaded

from humptygpt.model import ModelConfig

import train
from benchmarks.training import DEMO
from compare import t_test
from humptygpt import cli
from humptygpt.training import evaluation
from humptygpt.training.optimizers import set_lr
from humptygpt.training.settings import TrainConfig
from humptygpt.training.start import Start

SEEDS = 480
STEPS = 150
OUT = Path("out/seeds.json")
TINY = {"n_layer": 1, "n_embd": 32, "block_size": 64, "max_iters": STEPS}
TINY |= {"dtype": "float32", "threads": 1, "vocab_size": 65}
VARIANTS = {"two heads": {"n_head": 2}, "one head": {"n_head": 1}}


def main() -> None:
    losses = json.loads(OUT.read_text()) if OUT.exists() else []
    while len(losses) < SEEDS:
        seed = len(losses) + 1
        losses.append([bits_per_byte(seed, keys) for keys in VARIANTS.values()])
        OUT.write_text(json.dumps(losses))
    for variant, bits in zip(VARIANTS, zip(*losses, strict=True), strict=True):
        spread = statistics.stdev(bits)
        print(f"{variant}: {statistics.mean(bits):.4f}, from seed to seed {spread:.4f}")
    print("seeds      group  difference     ±  within one, two  expected")
    for name, shift in ("same", 0), ("different", 16):
        pairs = [b - losses[i - shift][0] for i, (_, b) in enumerate(losses)]
        for size in (16, 4):
            print(f"{name:10} {size:5}  {coverage(pairs, size)}")


def bits_per_byte(seed: int, keys: dict) -> float:
    """Train with a seed and return the loss in bits per byte."""
    given = cli.read([str(DEMO)], ModelConfig, TrainConfig) | TINY | keys | {"seed": seed}
    config = cli.make(TrainConfig, given)
    run = train.setup(Start(config, cli.make(ModelConfig, given)))
    for step in range(STEPS):
        set_lr(run.optimizer, config.lr(step) / config.learning_rate)
        train.train_step(run)
        run.model.zero_grad()
        run.progress.iter += 1
    return evaluation.measures(run, run.net, 100)["val_bits_per_byte"]


def coverage(pairs: list[float], size: int) -> str:
    """Count how often the mean of all pairs lies within one and two ± of the difference of a group."""
    truth = statistics.mean(pairs)
    starts = range(0, len(pairs), size)
    tests = [t_test(pairs[start : start + size]) for start in starts]
    errors = [test["difference_error"] for test in tests]
    off = [abs(test["difference"] - truth) / test["difference_error"] for test in tests]
    found, expected = [], []
    for times in (1, 2):
        found.append(f"{sum(t < times for t in off) / len(off):.3f}")
        t = times / (1 - 1 / len(tests)) ** 0.5
        deviations = [-1.0, 1.0] * (size // 2)
        error = statistics.stdev(deviations) / size**0.5
        expected.append(f"{1 - t_test([t * error + each for each in deviations])['p']:.3f}")
    return f"{truth:+.4f}  {statistics.mean(errors):.4f}  {', '.join(found)}  {', '.join(expected)}"


if __name__ == "__main__":
    main()
