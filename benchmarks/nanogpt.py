"""nanoGPT, from a checkout: https://github.com/karpathy/nanoGPT."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from humptygpt.model import ModelConfig
from torch import Tensor, nn

from benchmarks.contenders import Generator, Trainer
from benchmarks.settings import BenchConfig
from humptygpt.data.open import open_data
from humptygpt.device import autocast, pick_device, pick_dtype, to_device
from humptygpt.training.settings import TrainConfig

KEYS = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "vocab_size")


def build_gpt(checkout: str, config: ModelConfig) -> nn.Module:
    """Build the GPT from the checkout's model.py with the shape of the config."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(checkout) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks up its own module there
    spec.loader.exec_module(module)
    shape = {key: getattr(config, key) for key in KEYS}
    return module.GPT(module.GPTConfig(**shape))


class NanoGPTTrainer(Trainer):
    """nanoGPT's model, optimizer, loop body and way of drawing batches from one file of uint16."""

    def __init__(self, config: TrainConfig, model_config: ModelConfig, checkout: str):
        self.config = config
        self.device = pick_device(config.device)
        on_gpu = self.device.type == "cuda"
        # nanoGPT has only float32 on a CPU
        self.dtype = pick_dtype("auto" if on_gpu else "float32", self.device)
        self.dataset = open_data(config.dataset, model_config, config.seed)
        self.tokens = self.dataset.folder / "train.bin"
        torch.manual_seed(config.seed)
        self.model = build_gpt(checkout, model_config).to(self.device)
        self.net = self.model
        if on_gpu:
            torch.set_float32_matmul_precision("high")  # TF32, like nanoGPT
            self.net = torch.compile(self.model)
        self.optimizer = self.model.configure_optimizers(
            config.weight_decay,
            config.learning_rate,
            (config.beta1, config.beta2),
            device_type=self.device.type,
        )
        self.next_batch = self.get_batch()

    def get_batch(self) -> Tensor:
        """Draw a batch, (2, B, T): token ids and targets."""
        T = self.dataset.block_size
        # nanoGPT opens the file for each batch
        data = np.memmap(self.tokens, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - T, (self.config.batch_size,))
        crops = np.stack([data[i : i + T + 1] for i in starts]).astype(np.int64)
        batch = torch.from_numpy(np.stack([crops[:, :-1], crops[:, 1:]]))
        return to_device({"batch": batch}, self.device)["batch"]

    def step(self, it: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr(it)
        with autocast(self.device, self.dtype):
            _, loss = self.net(*self.next_batch)
        self.next_batch = self.get_batch()
        loss.backward()
        if self.config.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()


class NanoGPTGenerator(Generator):
    """nanoGPT's generate(), called for one token at a time. That costs nothing extra, because it has no cache."""

    def load(self, model_config: ModelConfig, config: BenchConfig) -> None:
        self.model = build_gpt(config.nanogpt, model_config).eval()

    def steps(self, n: int) -> Iterator[Tensor]:
        idx = self.idx
        for _ in range(n):
            idx = self.model.generate(idx, 1)
            yield idx
