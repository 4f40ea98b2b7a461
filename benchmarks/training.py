"""The settings of the benchmarks that train."""

from dataclasses import replace
from pathlib import Path

import torch
from humptygpt.model import ModelConfig

from benchmarks.settings import BenchConfig
from humptygpt import cli
from humptygpt.cli import UserError
from humptygpt.data.open import open_data, prepare_missing
from humptygpt.device import pick_device
from humptygpt.formats.load import load_tokenizer
from humptygpt.training.settings import TrainConfig

CPU = torch.device("cpu")
DEMO = Path(__file__).parent.parent / "config" / "shakespeare_char.py"
# nanoGPT's preset for a laptop's CPU, from the command in its README
SHAPE = ModelConfig(
    block_size=64,
    n_layer=4,
    n_head=4,
    n_embd=128,
    dropout=0.0,
    bias=False,
    position="learned",
    activation="gelu",
    mlp_conv=0,
    qk_norm=False,
    init="gpt2",
    tie_weights=True,
)
PRESET = TrainConfig(
    batch_size=12,
    max_iters=2000,
    optimizer="adamw",
    learning_rate=1e-3,
    schedule="cosine",
    min_lr=1e-4,
    warmup_iters=100,
    beta2=0.99,
    grad_clip=1.0,
    eval_interval=250,
)


def read_configs(config: BenchConfig, default: Path | None = None) -> tuple[TrainConfig, ModelConfig]:
    """Read the settings of --config, or of the default config; without either, nanoGPT's CPU preset.

    Missing data is prepared. Raises UserError if it is not text.
    """
    train_config = PRESET
    model_config = SHAPE
    path = config.config or default
    if path:
        given = cli.read([str(path)], ModelConfig, TrainConfig)
        train_config = cli.make(TrainConfig, given)
        model_config = cli.make(ModelConfig, given)
    dtype = config.dtype or "auto"
    if config.what == "train" and not config.dtype and pick_device(config.device) == CPU:
        dtype = "float32"  # nanoGPT has no other dtype on a CPU
    on_gpu = pick_device(config.device).type == "cuda"  # where nanoGPT compiles
    train_config = replace(
        train_config,
        out_dir="out",
        device=config.device,
        dtype=dtype,
        compile=on_gpu,
    )
    prepare_missing(train_config, load_tokenizer)
    dataset = open_data(train_config.dataset, model_config, train_config.seed)
    if dataset.task != "language modelling":
        raise UserError(f"dataset={train_config.dataset} has sentence pairs, but what={config.what} is for text")
    # nanoGPT's model needs the vocabulary size before it is built
    vocab_size = model_config.vocab_size or dataset.tokenizer.vocab_size
    return train_config, replace(model_config, vocab_size=vocab_size)
