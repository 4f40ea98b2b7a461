"""Measure speed on this machine, also that of other programs. The last line of the output is one JSON object.

    python bench.py --what=train --nanogpt=../nanoGPT     steps of ours and of nanoGPT's, alternating
    python bench.py --what=loss --nanogpt=../nanoGPT      the time to a loss, and the losses in equal time
    python bench.py --what=profile                        the time of each part of a step
    python bench.py --what=sample --nanogpt=../nanoGPT    generation on a CPU, with every other program installed
    python bench.py --what=page --page=PAGE.html          keystrokes in a page of explain.py, in an installed Chromium
    python bench.py --what=gpu --nanogpt=../nanoGPT       five minutes on a GPU, as one table for RECORDS.md

train: both have the same shapes, math (nanoGPT's CPU preset and AdamW, or a --config) and text. The figures are medians
in milliseconds, and `speedup` is nanoGPT's median divided by ours. Each runs in a process of its own, as its users run
it. nanoGPT computes in float32 on a CPU and in bfloat16 on a GPU, and so does ours unless --dtype is given.
loss: nanoGPT's CPU preset as it is, then --config with as many steps as should take 0.8 of its seconds, for each seed.
One function scores both on the whole validation split, in blocks of their own block_size. Seconds count training only.
Seconds to --target are interpolated between the evaluations before and after it; if it is not reached, they are all
seconds. `speedup` is their ratio.
profile: batch, forward, backward and so on, measured one by one, without compiling.
sample: milliseconds to the first token, which is the time to read the prompt, and tokens per second after it, all texts
together, also for nanoGPT, transformers, CTranslate2 and llama.cpp. Missing programs are named; `pip install
transformers ctranslate2 xllamacpp gguf` installs all but nanoGPT. All have random weights and as many threads, and take
turns. The figures are medians over the rounds, and `ratio` is ours divided by theirs. With --size=gpt2 all run the same
network. With 0.8M ours is the demo's, and the others run nanoGPT's CPU preset, with biases except for nanoGPT itself.
All take the most probable token, except nanoGPT, which can only sample. Ours, nanoGPT and transformers stop after 20
seconds.
page: milliseconds from the press of a key until the page has been painted, medians and 95th percentiles. A character is
appended to a text of 64 tokens, typed anywhere in it, and typed when the context is full, so that all tokens move. The
tokens of the run must be characters. `pip install playwright` installs the package that drives the browser.
gpu: the time of the demo to its loss, including data and compiling; tokens/s, MFU and peak memory of training GPT-2
124M and 350M, with the memory that the formula predicts, and of nanoGPT if a checkout is given; tokens/s of decoding,
with the limit that the memory bandwidth sets. The device, dtype, compile
and evaluation settings of a config are ignored.
"""

import importlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from humptygpt import machine

if __name__ == "__main__":
    machine.start()  # before numpy and torch are loaded

from humptygpt import config as configurator
from humptygpt.config import UserError, check_above_0, check_choices, check_least

MODES = {  # {mode: the module of benchmarks/ whose bench() measures it}
    "train": "step_time",
    "loss": "time_to_loss",
    "profile": "step_profile",
    "sample": "generation",
    "page": "keystrokes",
    "gpu": "gpu",
}
NEEDED = {"loss": "nanogpt", "page": "page"}
COUNTS_WITH = {  # {keys: the values of --what with which they have an effect}
    "nanogpt": "train loss sample gpu",
    "config dtype": "train loss profile",
    "device": "train loss profile gpu",
    "steps": "train profile",
    "target seeds": "loss",
    "size weights compile texts prompt new_tokens rounds": "sample",
    "page keystrokes": "page",
    "short": "gpu",
}
IN_VAIN = {
    key: ("what", tuple(MODES.keys() - modes.split()))
    for keys, modes in COUNTS_WITH.items()
    for key in keys.split()
}


@dataclass(frozen=True)
class BenchConfig:
    # benchmark
    what: str = "train"  # the measurement: see above
    nanogpt: str | None = None  # a nanoGPT checkout to compare with
    config: str | None = None  # config file; None: nanoGPT's CPU preset, or the demo
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    dtype: str | None = None  # dtype of ours; None: nanoGPT's in train, else auto
    # what=train, profile
    steps: int = 300  # timed steps
    # what=loss
    target: float = 1.88  # the validation loss to reach
    seeds: int = 3  # runs of each, alternating
    # what=sample
    size: str = "gpt2"  # size of the model
    weights: str = "float32"  # dtype of the weights
    compile: bool = False  # ours: compile the step of one token
    texts: int = 1  # texts continued together
    prompt: int = 8  # tokens of each text
    new_tokens: int = 32  # tokens of each text after the prompt
    rounds: int = 3  # measurements of each, alternating
    # what=page
    page: str | None = None  # an HTML file that explain.py made
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
    given = configurator.read(argv, BenchConfig)
    config = configurator.make(BenchConfig, given)
    for why in configurator.in_vain(given, vars(config), IN_VAIN).values():
        raise UserError(f"{why}; leave it out")
    mode = importlib.import_module(f"benchmarks.{MODES[config.what]}")
    print(json.dumps(mode.bench(config)))


if __name__ == "__main__":
    machine.run(main)
