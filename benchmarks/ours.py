"""This program as a contender."""

from collections.abc import Iterator

import torch
from humptygpt.model import ModelConfig
from torch import Tensor

import train
from benchmarks.contenders import Generator, Trainer
from benchmarks.settings import BenchConfig
from humptygpt.device import pick_device
from humptygpt.generation.generator import make_generator
from humptygpt.generation.sampling import Context, continue_texts
from humptygpt.models.build import build
from humptygpt.training.optimizers import set_lr
from humptygpt.training.run import Run
from humptygpt.training.settings import TrainConfig
from humptygpt.training.start import Start
from humptygpt.training.step import train_step


class OurTrainer(Trainer):
    """Training steps of train.py."""

    ours = True

    def __init__(self, config: TrainConfig, model_config: ModelConfig):
        self.run = train.setup(Start(config, model_config))
        self.config = config
        self.model = self.run.model
        self.dataset = self.run.dataset
        self.device = self.run.device

    def take_steps(self, first: int, count: int) -> list[float]:
        def take(run: Run) -> list[float]:
            return Trainer.take_steps(self, first, count)

        return self.run.ranks.each(take, self.run)

    def step(self, it: int) -> None:
        self.run.progress.iter = it
        set_lr(self.run.optimizer, self.config.lr(it) / self.config.learning_rate)
        losses, _, _ = train_step(self.run)
        self.run.model.zero_grad()
        losses["train_loss"].item()


class OurGenerator(Generator):
    """Generation by the code of sample.py."""

    ours = True
    dtypes = ("float32", "bfloat16", "int8")

    def load(self, model_config: ModelConfig, config: BenchConfig) -> None:
        dtype = getattr(torch, config.weights)
        self.device = pick_device(config.device if config.what == "gpu" else "cpu")
        model = build(model_config)
        self.model = make_generator(model, dtype, self.device)

    def steps(self, n: int) -> Iterator[tuple[list[int], Tensor]]:
        B, T = self.idx.shape
        context = Context(self.model, self.idx.tolist(), T + n, device=self.device)
        size = self.model.config.vocab_size
        return continue_texts(context, range(B), size, max_new_tokens=n, temperature=0.0)
