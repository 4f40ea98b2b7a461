"""What a run needs and says: its memory, a summary, a progress bar and lines during training, and advice at the end."""

import math
import shlex
import signal
import sys
from contextlib import suppress
from itertools import dropwhile
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

import model as models
from humptygpt.device import DTYPES, free_memory
from humptygpt.loggers import own_values
from humptygpt.machine import check_fits, discard_output
from humptygpt.optimizers import (
    Optimizer,
    freeze,
    make_optimizer,
    trained_parameters,
)
from humptygpt.run import Diverged, Run, RunFolder
from humptygpt.settings import TrainConfig
from humptygpt.tasks import WithoutValues, build_on_meta
from model import ModelConfig, count_parameters

ADVICE = (
    "use a smaller --batch_size with more --gradient_accumulation_steps, --checkpoint_activations=True, or a smaller"
    " model (--n_embd, --n_layer)"
)
FLOAT = 4  # bytes in a float32, the dtype of weights, gradients and optimizer state for any --dtype


def summary(run: Run) -> str:
    """Summarize a run: data, model, steps, evaluation and device."""
    config = run.config
    dataset = run.dataset
    eval_iters = config.eval_iters if config.eval_only else config.evaluated_batches()
    batch, evaluated = dataset.summary(config.batch_size, eval_iters)
    if config.gradient_accumulation_steps > 1:
        batch = f"{config.gradient_accumulation_steps} times {batch}"
    steps = config.max_iters
    if config.minutes and run.progress.iter:  # the position follows the clock
        steps = round(steps * run.progress.iter / run.progress.position)
    micro_batches = steps * config.gradient_accumulation_steps
    epochs = micro_batches / dataset.batches_per_epoch(config.batch_size)
    start = "" if config.init_from == "scratch" else f", from {config.init_from}"
    about = f"about {steps:,}" if config.minutes else f"{steps:,}"
    done = f"; {run.progress.iter:,} are done" if run.progress.iter else ""
    processes = f", {run.ranks.size} processes" if run.ranks.size > 1 else ""
    threads = torch.get_num_threads()
    if run.device.type == "cpu" and (not processes or threads > 1):
        processes = f", {threads} thread{'s' * (threads > 1)}{processes}"
    size = f", {len(dataset.train):,} tokens to train on" if dataset.splits else ""
    return (
        f"data: {dataset.meta['source']}{size},"
        f" vocabulary of {run.model.config.vocab_size:,}\n"
        f"model: {run.model.config.model}, {count_parameters(run.model):,} parameters{start}\n"
        f"steps: {about} of {batch}, {epochs:.1f} epochs{done}\n"
        f"evaluation: every {config.eval_interval:,} steps, on {evaluated}\n"
        f"device: {run.device}, {config.dtype}{processes}"
    )


def trained_part(run: Run) -> str:
    """Say how many parameters are trained, and what share of the model that is."""
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    part = trained / count_parameters(run.model)
    return f"training: {trained:,} parameters, {part:.1%} of the model"


# --------------------------------------------------------------------------------------
# During training


def progress_bar(run: Run) -> tqdm:
    return tqdm(
        total=run.config.max_iters,
        initial=run.progress.position,
        unit="step",
        bar_format="{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        dynamic_ncols=True,
        disable=None if run.ranks.first else True,
    )


def step(bar: tqdm, run: Run, row: dict) -> None:
    """Show a row of metrics: in the progress bar on a terminal, otherwise as a line."""
    norm = "inf" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
    text = (
        f"loss {row['train_loss']:.4f}, lr {row['lr']:.2e}, gradient norm {norm},"
        f" {row['tokens_per_second']:,} tokens/s"
    )
    text += "".join(f", {key} {x:.4g}" for key, x in own_values(row).items())
    if not bar.disable:
        bar.set_postfix_str(text)
        return
    steps = run.config.max_iters
    position = run.progress.position
    done = f" ({position / steps:.0%})" if run.config.minutes else f"/{steps}"
    left = run.clock.left(run.config)
    line(bar, f"iter {run.progress.iter}{done}: {text}, {left:.0f} s of training left")


def line(bar: tqdm, text: str) -> None:
    """Print a line above the bar. A closed terminal or pipe does not end the training."""
    try:
        bar.write(text)
        sys.stdout.flush()
    except OSError:
        discard_output()


# --------------------------------------------------------------------------------------
# End of training


def closing(run: Run, rows: list[dict]) -> str:
    """Say what to do next, and how good the best model is. rows: all rows of the run's metrics."""
    progress = run.progress
    command = run.task.sample_command.format(out_dir_key(run))
    text = f"{run.task.sample_label}: {command}"
    if progress.best_iter == progress.iter:
        minutes, steps = run.config.minutes, run.config.max_iters
        twice = f"--max_iters={2 * steps}"
        # the position is beyond the end if a finished run is resumed with fewer minutes
        if minutes:
            twice = f"--minutes={2 * minutes * progress.position / steps:g}"
        text += f"\ntwice as long: python train.py --init_from=resume {out_dir_key(run)} {twice}"
    if progress.best_val_loss < math.inf:
        text += f"\nbest val loss {progress.best_val_loss:.4f} at iter {progress.best_iter}"
    start = next((row.get("val_loss", 0) for row in rows if not row["iter"]), 0)
    if 0 < start < progress.best_val_loss:
        text += f"\nthe model that the run started from was better: val loss {start:.4f}"
    return text


def stopped(run: Run, number: int) -> None:
    """Say which signal stopped the run, and how to resume it."""
    with suppress(OSError):  # stderr may be closed if its reader received the signal, too
        print(
            f"{signal.Signals(number).name}: saved {run.path} at iter {run.progress.iter};"
            f" resume: python train.py --init_from=resume {out_dir_key(run)}",
            file=sys.stderr,
        )


def diverged(folder: RunFolder, error: Diverged) -> None:
    path = folder.path / "ckpt.pt"
    good = f"{path} is the last good checkpoint"
    kept = good if path.exists() else "nothing has been saved yet"
    advice = "Try a lower --learning_rate, more --warmup_iters, --grad_clip=1.0 or --dtype=float32"
    print(f"train.py: the {error}; {kept}. {advice}", file=sys.stderr)


def out_dir_key(run: Run) -> str:
    """Return the --out_dir argument, quoted so that it can be pasted into a command."""
    return f"--out_dir={shlex.quote(run.config.out_dir)}"


# --------------------------------------------------------------------------------------
# Memory
#
# Everything is computed from the run's model on the meta device, before any tensor is allocated. Tracing a forward pass
# would be exact, but torch's tracing takes a second and 70 MB to load, and every run starts with this estimate.


class Memory(NamedTuple):
    """Bytes that one process needs."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float = 0  # FSDP: unsharded parameters and gradients held at once

    @property
    def total(self) -> float:
        return sum(self)

    @property
    def least(self) -> float:
        """Lower bound, so that no run that would fit is refused.

        A compiled model keeps fewer activations, and they are freed while the gradients are computed.
        """
        return self.weights + self.optimizer + max(self.gradients, self.activations / 3)


def model_on_meta(config: TrainConfig, model_config: ModelConfig) -> nn.Module:
    """Build a run's model on the meta device, and freeze the parameters that config freezes."""
    model = build_on_meta(model_config, vars(config))
    freeze(model, config.freeze)
    return model


def training_memory(config: TrainConfig, model: nn.Module, processes: int = 1) -> Memory:
    """Estimate the memory that each process needs. model: from model_on_meta()."""
    weights = FLOAT * count_parameters(model)
    gradients = FLOAT * sum(p.numel() for p in trained_parameters(model).values())
    trained = make_optimizer(config, model)
    # a guess: a class from elsewhere makes its state in the first step
    optimizer = 2 * gradients
    if isinstance(trained, Optimizer):
        with WithoutValues():
            trained.make_state()
        optimizer = sum(
            x.nbytes for state in trained.state.values() for x in state.values()
        )
    activations = activation_bytes(config, model, processes)
    if processes == 1 or config.parallel == "ddp":
        return Memory(weights, gradients, optimizer, activations)
    # a process that accumulates several micro-batches holds unsharded gradients
    if config.gradient_accumulation_steps <= processes:
        gradients /= processes
    # gathered at once: the parameters outside the blocks, such as the embedding, and two blocks with their gradients
    blocks = [
        FLOAT * count_parameters(module)
        for module in model.modules()
        if isinstance(module, models.Block)
    ]
    buffers = weights - sum(blocks) + 4 * max(blocks, default=0)
    return Memory(
        weights / processes, gradients, optimizer / processes, activations, buffers
    )


def activation_bytes(config: TrainConfig, model: nn.Module, processes: int) -> float:
    """Estimate the bytes that an uncompiled model keeps for its backward pass.

    Of each token, a block keeps some eight float32 vectors of width C, among them the residual stream and its norms,
    eight in the dtype of matrix products, around attention, and in that dtype its hidden neurons twice, before and
    after their activation, or four times with a gate. Frozen matrices do without their inputs. The head has float32
    logits, the logarithms of their probabilities and their gradient. RECORDS.md has measured peaks beside this.
    """
    shape = model.config
    C = shape.n_embd
    size = DTYPES[config.dtype].itemsize
    hidden = shape.n_hidden or (8 * C / 3 if shape.mlp == "gated" else 4 * C)
    tensors = {"none": 0, "gated": 4}.get(shape.mlp, 2)
    block = FLOAT * 8 * C + size * (8 * C + tensors * hidden)
    if config.lora_rank:
        block *= 0.7
    # frozen layers before the first trained one keep nothing
    parts = (x for x in model.modules() if isinstance(x, nn.Embedding | models.Block))
    kept = dropwhile(lambda part: not trained_parameters(part), parts)
    blocks = sum(isinstance(part, models.Block) for part in kept)
    layers = blocks * block
    if config.checkpoint_activations and blocks:  # one block at a time is recomputed
        layers = block + blocks * FLOAT * C
    head = shape.n_members * 3 * FLOAT * shape.vocab_size
    return config.rows(processes) * shape.block_size * (layers + head)


def memory_report(
    config: TrainConfig, model_config: ModelConfig, device: torch.device, processes: int
) -> str:
    """Describe the parameters, FLOPs and memory of a run."""
    model = model_on_meta(config, model_config)
    memory = training_memory(config, model, processes)
    micro_batches = config.gradient_accumulation_steps
    tokens = micro_batches * config.batch_size * model_config.block_size
    flops = models.flops_per_token(model)
    free = free_memory(device)
    fits = "it fits" if memory.total <= free else f"it does not fit; {ADVICE}"
    entries = ", ".join(
        f"{name} {size / 1e9:.3g}" for name, size in memory._asdict().items() if size
    )
    each = ""
    if processes > 1:
        each = f" per process ({processes} processes, {config.parallel.upper()})"
    return (
        f"model: {model_config.model}, {count_parameters(model):,} parameters, {flops:,} FLOPs per token\n"
        f"step: {tokens:,} tokens, {micro_batches} x {config.batch_size} x {model_config.block_size},"
        f" {flops * tokens:.3g} FLOPs\n"
        f"memory{each}, in GB: {entries}; {memory.total / 1e9:.3g} in all,"
        f" {free / 1e9:.3g} free on {device}: {fits}"
    )


def check_training_fits(
    config: TrainConfig,
    model_config: ModelConfig,
    device: torch.device,
    processes: int = 1,
) -> None:
    """Raise UserError if a run needs more memory than is free."""
    model = model_on_meta(config, model_config)
    training = (
        f"training {count_parameters(model):,} parameters with batch_size={config.batch_size} and"
        f" block_size={model_config.block_size} takes at least"
    )
    least = training_memory(config, model, processes).least
    check_fits(training, least, free_memory(device), ADVICE)
