"""Measure speed on this machine and compare it with other programs. The last line of the output is a JSON object.

    python -m benchmarks --what=train --nanogpt=../nanoGPT  HumptyGPT's and nanoGPT's training steps, in turn
    python -m benchmarks --what=loss --nanogpt=../nanoGPT   the time to reach a loss, and the losses after equal time
    python -m benchmarks --what=profile                     the time of each part of a training step
    python -m benchmarks --what=sample --nanogpt=../nanoGPT generation on a CPU, with other programs
    python -m benchmarks --what=page --page=PAGE.html       keystrokes and training in a page of explain.py, in Chromium
    python -m benchmarks --what=gpu --nanogpt=../nanoGPT    fifteen minutes on a GPU, as one table for RECORDS.md
    python -m benchmarks --what=machine                     the demo with each dtype, way of sharing and way of waiting

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
import sys

from humptygpt import machine

if __name__ == "__main__":
    machine.start()  # before numpy and torch are loaded
    sys.argv[0] = "-m benchmarks"  # for messages

from benchmarks.settings import MODES, BenchConfig
from humptygpt import cli


def main(argv: list[str]) -> None:
    config = cli.make(BenchConfig, cli.read(argv, BenchConfig))
    mode = importlib.import_module(f"benchmarks.{MODES[config.what]}")
    print(json.dumps(mode.bench(config)))


if __name__ == "__main__":
    machine.run(main)
