"""How fast, beside others on this machine. The last line is one JSON object.

    python bench.py --what=train --nanogpt=../nanoGPT     steps of ours and of nanoGPT's, alternating
    python bench.py --what=loss --nanogpt=../nanoGPT      how long to a loss, and which loss in equal time
    python bench.py --what=profile                        where a step's time goes
    python bench.py --what=sample --nanogpt=../nanoGPT    generation on a CPU, beside every other program installed
    python bench.py --what=page --page=PAGE.html          keystrokes in a page of explain.py, in an installed Chromium
    python bench.py --what=gpu --nanogpt=../nanoGPT       five minutes on a card, as one table for RECORDS.md

train: same shapes, same math (nanoGPT's CPU preset and AdamW, or a --config), same text; medians in milliseconds, and
`speedup`, nanoGPT's median over ours. Each runs in a process of its own, as its users have it; nanoGPT computes in
float32 on a CPU and in bfloat16 on a GPU, and ours too unless --dtype says otherwise.
loss: nanoGPT's CPU preset as it is, then --config with as many steps as should take 0.8 of its seconds, for each seed.
Both are scored by the same function on the whole validation split, in blocks of their own block_size. Seconds are those
of training alone; those to --target are interpolated between the evaluations around it (all, where it is not reached),
and `speedup` is their ratio.
profile: batch, forward, backward and so on, measured one by one, without compiling.
sample: milliseconds to the first token, which are those of reading the prompt, and tokens per second after it, all
texts together, beside nanoGPT, transformers, CTranslate2 and llama.cpp. Those that are missing are named; `pip install
transformers ctranslate2 xllamacpp gguf` installs all but the first. All have random weights and as many threads, and
take turns; the figures are medians over the rounds, and `ratio` is ours divided by theirs. gpt2 is the same network for
all; as 0.8M ours is the demo's, and the others' that of nanoGPT's CPU preset, all but nanoGPT's own with bias terms.
All take the most probable token, but nanoGPT can only sample. Ours, nanoGPT and transformers stop after 20 seconds.
page: milliseconds from the press of a key until the page has been painted, medians and 95th percentiles: a character
appended to a text of 64 tokens, one typed anywhere in it, and the same where the context is full, so that all tokens
move. It is for runs whose tokens are characters. `pip install playwright` installs what drives the browser.
gpu: the demo to its loss, data and compiling included; tokens/s and MFU of training GPT-2 124M and 350M, beside nanoGPT
where a checkout is given, and their peak memory beside the formula; tokens/s of decode beside what memory can give.
A --config's own device, dtype, compile and evaluation settings do not count here.
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

MODES = {  # the module of benchmarks/ whose bench() answers
    "train": "step_time",
    "loss": "time_to_loss",
    "profile": "step_profile",
    "sample": "generation",
    "page": "keystrokes",
    "gpu": "gpu",
}
NEEDED = {"loss": "nanogpt", "page": "page"}
COUNTS_WITH = {  # keys: the values of --what with which they do something
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
    what: str = "train"  # what to measure: see above
    nanogpt: str | None = None  # a nanoGPT checkout to compare with
    config: str | None = None  # config file; None: nanoGPT's CPU preset, or the demo
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    dtype: str | None = None  # of ours; None: nanoGPT's in train, else auto
    # what=train, profile
    steps: int = 300  # timed steps
    # what=loss
    target: float = 1.88  # the validation loss to be reached
    seeds: int = 3  # runs of each, one of ours after one of nanoGPT's
    # what=sample
    size: str = "gpt2"  # of the model
    weights: str = "float32"  # dtype of the weights
    compile: bool = False  # ours: compile the step of one token
    texts: int = 1  # that are continued together
    prompt: int = 8  # tokens of each text
    new_tokens: int = 32  # tokens of each text after the prompt
    rounds: int = 3  # measurements of each, one of ours after one of each other
    # what=page
    page: str | None = None  # an HTML file that explain.py made
    keystrokes: int = 50  # that are timed
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
