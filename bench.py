"""Measure speed on this machine and compare it with other programs. The last line of the output is a JSON object.

    python bench.py --what=train --nanogpt=../nanoGPT     HumptyGPT's and nanoGPT's training steps, in turn
    python bench.py --what=loss --nanogpt=../nanoGPT      the time to reach a loss, and the losses after equal time
    python bench.py --what=profile                        the time of each part of a training step
    python bench.py --what=sample --nanogpt=../nanoGPT    generation on a CPU, with every other program installed
    python bench.py --what=page --page=PAGE.html          keystrokes and training in a page of explain.py, in Chromium
    python bench.py --what=gpu --nanogpt=../nanoGPT       fifteen minutes on a GPU, reported as one table for RECORDS.md
    python bench.py --what=machine                        the demo with each dtype, way of sharing and way of waiting

train: both programs use the same shapes, math (nanoGPT's CPU preset and AdamW, or a --config) and text. The figures are
medians in milliseconds; `speedup` is nanoGPT's median divided by ours. Each runs in its own process, as users would run
it. nanoGPT computes in float32 on a CPU and in bfloat16 on a GPU, and so does HumptyGPT unless --dtype is given.
loss: for each seed, run nanoGPT's unchanged CPU preset, then --config for as many steps as should take 80% of nanoGPT's
time. One function scores both on the whole validation split, in blocks of each model's own block_size. Only training
time counts. The time to reach --target is interpolated between the evaluations before and after it; if the
target is not reached, the total time is used. `speedup` is nanoGPT's time divided by ours.
profile: the parts of a step (batch, forward, backward and so on) are measured one by one, without compilation.
sample: milliseconds to the first token, which is the time to read the prompt, and the tokens per second after that,
summed over all texts. nanoGPT, transformers, CTranslate2 and llama.cpp are measured as well. Missing programs are
listed; `pip install transformers ctranslate2 xllamacpp gguf` installs all but nanoGPT. All use random weights and the
same number of threads, and take turns. The figures are medians over the rounds, and `ratio` is ours divided by theirs.
With --size=gpt2, all run the same network. With --size=0.8M, HumptyGPT runs the demo's network and the others run
nanoGPT's CPU preset, with biases except in nanoGPT itself. All choose the most probable token, except nanoGPT, which
can only sample. HumptyGPT, nanoGPT and transformers stop after 20 seconds.
page: milliseconds from a key press until the page is painted, as medians and 95th percentiles. A character is appended
to a text or inserted at a random position. The text has 64 tokens, fills the context, or exceeds it by one token. The
run must use a character tokenizer. `pip install playwright` installs the package that drives the browser.
gpu: the time that the demo takes to reach its loss, including data preparation; milliseconds per step, tokens/s, MFU
and peak memory, next to the estimated memory, of training GPT-2 124M and 350M, 124M with 8 micro-batches a step, 124M
with NorMuon, and the demo, compiled and uncompiled; nanoGPT's speed if a checkout is given; tokens/s of decoding,
next to the limit set by the memory bandwidth. The device, dtype, compile and evaluation settings of a config are
ignored.
machine: the demo's tokens/s on a CPU, in training and of one text, alone and while a second process does the same.
Threads share each operator, or processes share a batch. Threads spin for different times before they sleep. The line of
what train.py does is marked. `operators` is the fastest of all ways in which threads share operators, `shared` what
train.py does, `ratio` is `shared` divided by `operators`, `beside_another` has the speeds of two trainings at once, as
parts of one alone, and `beside_busy_cores` is what train.py does divided by one thread, while each core is busy.
"""

import importlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from humptygpt import machine

if __name__ == "__main__":
    machine.start()  # before numpy and torch are loaded

from humptygpt import cli
from humptygpt.cli import check_above_0, check_choices, check_least

MODES = {  # {mode: the module in benchmarks/ whose bench() measures it}
    "train": "step_time",
    "loss": "time_to_loss",
    "profile": "step_profile",
    "sample": "generation",
    "page": "keystrokes",
    "gpu": "gpu",
    "machine": "choices",
}
NEEDED = {"loss": "nanogpt", "page": "page"}


@dataclass(frozen=True)
class BenchConfig:
    # benchmark
    what: str = "train"  # measurement to run: see above
    nanogpt: str | None = None  # a nanoGPT checkout to compare with
    config: str | None = None  # config file; None: nanoGPT's CPU preset, or the demo
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    dtype: str | None = None  # HumptyGPT's dtype; None: nanoGPT's if what=train, else auto
    # what=train, profile
    steps: int = 300  # timed steps
    # what=loss
    target: float = 1.88  # validation loss to reach
    seeds: int = 3  # runs of each program, alternating
    # what=sample
    size: str = "gpt2"  # model size
    weights: str = "float32"  # dtype of the weights
    texts: int = 1  # batch size: prompts continued in one batch
    prompt: int = 8  # prompt tokens per text
    new_tokens: int = 32  # tokens to generate after each prompt
    rounds: int = 3  # measurements of each program, alternating
    # what=page
    page: str | None = None  # HTML file made by explain.py
    keystrokes: int = 50  # timed keystrokes
    # what=gpu
    short: bool = False  # small models and few steps

    @classmethod
    def choices(cls) -> dict[str, Collection[str]]:
        return {
            "what": MODES,
            "dtype": ("auto", "float32", "bfloat16", "float16"),
            "size": ("0.8M", "gpt2"),
            "weights": ("float32", "bfloat16", "int8"),
        }

    def validate(self) -> None:
        check_choices(self)
        check_least(self, 1, "steps", "seeds", "texts", "prompt", "rounds", "keystrokes")
        check_least(self, 2, "new_tokens")
        check_above_0(self, "target")
        needed = NEEDED.get(self.what)
        if needed and getattr(self, needed) is None:
            raise ValueError(f"what={self.what} needs --{needed}=PATH")
        if self.nanogpt is not None and not (Path(self.nanogpt) / "model.py").exists():
            raise ValueError(
                f"nanogpt={self.nanogpt} has no model.py; give the folder of a checkout"
            )


def main(argv: list[str]) -> None:
    config = cli.make(BenchConfig, cli.read(argv, BenchConfig))
    mode = importlib.import_module(f"benchmarks.{MODES[config.what]}")
    print(json.dumps(mode.bench(config)))


if __name__ == "__main__":
    machine.run(main)
