"""python -m benchmarks --what=sample: generation, compared with every other program that is installed."""

import importlib.util
import statistics
from dataclasses import replace

import torch
from humptygpt.model import ModelConfig
from tqdm import trange

from benchmarks.contenders import Generator, Isolated
from benchmarks.ctranslate2 import CTranslate2Generator
from benchmarks.huggingface import HuggingFaceGenerator
from benchmarks.llamacpp import LlamaCppGenerator
from benchmarks.nanogpt import NanoGPTGenerator
from benchmarks.ours import OurGenerator
from benchmarks.settings import BenchConfig
from benchmarks.training import DEMO, SHAPE
from humptygpt import cli
from humptygpt.cli import UserError
from humptygpt.training.settings import TrainConfig

RIVALS = {
    "nanogpt": NanoGPTGenerator,
    "transformers": HuggingFaceGenerator,
    "ctranslate2": CTranslate2Generator,
    "llama_cpp": LlamaCppGenerator,
}


def bench(config: BenchConfig) -> dict:
    ours, theirs = shapes(config.size)
    context = min(ours.block_size, theirs.block_size)
    if config.prompt + config.new_tokens > context:
        raise UserError(
            f"prompt={config.prompt} and new_tokens={config.new_tokens} are more than the {context} tokens"
            f" of context that size={config.size} has"
        )
    generators = {"ours": Isolated(OurGenerator, ours, config)}
    for name, cls in RIVALS.items():
        reason = obstacle(cls, config)
        if reason:
            print(f"{name} is not timed: {reason}")
        else:
            generators[name] = Isolated(cls, theirs, config)
    seconds = {name: [] for name in generators}
    for _ in trange(config.rounds, unit="round", disable=None):
        for name, generator in generators.items():
            seconds[name].append(generator.call("measure", config.new_tokens))
    figures = {name: summary(each, config.texts) for name, each in seconds.items()}
    for each in figures.values():
        each["ratio"] = {key: round(figures["ours"][key] / each[key], 3) for key in each}
    return {"threads": torch.get_num_threads()} | figures


def shapes(size: str) -> tuple[ModelConfig, ModelConfig]:
    """The configs of this size: our model, and the model of the other programs."""
    if size == "gpt2":
        shape = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}
        gpt2 = replace(SHAPE, **shape, vocab_size=50257, bias=True, activation="gelu_tanh")
        return gpt2, gpt2
    demo = cli.read([str(DEMO)], ModelConfig, TrainConfig)
    ours = cli.make(ModelConfig, demo | {"vocab_size": 65})
    return ours, replace(SHAPE, vocab_size=65)


def obstacle(cls: type[Generator], config: BenchConfig) -> str | None:
    """The reason why this program cannot be timed, or None."""
    missing = [package for package in cls.packages if not importlib.util.find_spec(package)]
    if missing:
        return f"pip install {' '.join(missing)}"
    if cls is NanoGPTGenerator and config.nanogpt is None:
        return "name a checkout by --nanogpt"
    if config.weights not in cls.dtypes:
        return f"it has no {config.weights}"
    if config.texts > cls.max_texts:
        return "it has one text at a time"
    return None


def summary(seconds: list[list[float]], texts: int) -> dict[str, float]:
    """Medians over all rounds. seconds: of each step in each round; the first step reads the prompt."""
    first = statistics.median(steps[0] for steps in seconds)
    later = statistics.median(step for steps in seconds for step in steps[1:])
    return {
        "first_token_ms": round(1000 * first, 3),
        "tokens_per_second": round(texts / later, 2),
    }
