"""Messages of train.py: a summary before training, a progress bar and lines during it, and advice after it."""

import math
import os
import shlex
import signal
import sys
from contextlib import suppress

import torch
from tqdm import tqdm

from humptygpt.checkpoint import stored
from humptygpt.config import note
from humptygpt.evaluation import evaluation_line
from humptygpt.run_folder import Diverged, RunFolder
from model import count_parameters

MANY_EPOCHS = 5  # warn about overfitting when fine-tuning for more epochs than this


def summary(run) -> str:
    """Summarize a train.Run: data, model, steps, evaluation and device."""
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
    if config.init_from != "scratch" and epochs > MANY_EPOCHS:
        note(f"{epochs:.0f} epochs: a model fine-tuned on so little text soon memorises it")
    start = "" if config.init_from == "scratch" else f", from {config.init_from}"
    about = f"about {steps:,}" if config.minutes else f"{steps:,}"
    done = f"; {run.progress.iter:,} are done" if run.progress.iter else ""
    processes = f", {run.process.size} processes" if run.process.size > 1 else ""
    if run.device.type == "cpu":
        threads = torch.get_num_threads()
        processes = f", {threads} thread{'s' * (threads > 1)}{processes}"
    return (
        f"data: {dataset.meta['source']}, {len(dataset.train):,} tokens to train on,"
        f" vocabulary of {run.model.config.vocab_size:,}\n"
        f"model: {run.model.config.model}, {count_parameters(run.model):,} parameters{start}\n"
        f"steps: {about} of {batch}, {epochs:.1f} epochs{done}\n"
        f"evaluation: every {config.eval_interval:,} steps, on {evaluated}\n"
        f"device: {run.device}, {config.dtype}{processes}"
    )


def trained_part(run) -> str:
    """Say how many parameters are trained, and what share of the model that is."""
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    part = trained / count_parameters(run.model)
    return f"training: {trained:,} parameters, {part:.1%} of the model"


# --------------------------------------------------------------------------------------
# During training


def progress_bar(run) -> tqdm:
    return tqdm(
        total=run.config.max_iters,
        initial=run.progress.position,
        unit="step",
        dynamic_ncols=True,
        disable=None if run.process.first else True,
    )


def step(bar: tqdm, run, row: dict) -> None:
    """Show a row of metrics: in the progress bar on a terminal, otherwise as a line."""
    norm = "inf" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
    text = (
        f"loss {row['train_loss']:.4f}, lr {row['lr']:.2e}, gradient norm {norm},"
        f" {row['tokens_per_second']:,} tokens/s"
    )
    if not bar.disable:
        bar.set_postfix_str(text)
        return
    steps = run.config.max_iters
    position = run.progress.position
    done = f" ({position / steps:.0%})" if run.config.minutes else f"/{steps}"
    left = run.clock.time_left(run)
    line(bar, f"iter {run.progress.iter}{done}: {text}, {left:.0f} s of training left")


def evaluated(bar: tqdm, run, row: dict, improved: bool) -> None:
    best = ", the best so far" if improved else ""
    line(bar, f"iter {run.progress.iter}: {evaluation_line(row)}{best}")


def line(bar: tqdm, text: str) -> None:
    """Print a line above the bar. A closed terminal or pipe does not end the training."""
    try:
        bar.write(text)
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115, stays open


# --------------------------------------------------------------------------------------
# End of training


def closing(run, rows: list[dict]) -> str:
    """Say what to do next, and how good the best model is. rows: all rows of the run's metrics."""
    progress = run.progress
    command = run.task.sample_command.format(out_dir_key(run))
    text = f"{run.task.sample_label}: {command}"
    if progress.best_val_loss < math.inf:
        text += f"\nbest val loss {progress.best_val_loss:.4f} at iter {progress.best_iter}"
    start = next((row.get("val_loss", 0) for row in rows if not row["iter"]), 0)
    if 0 < start < progress.best_val_loss:
        text += f"\nthe model that the run started from was better: val loss {start:.4f}"
    return text


def stopped(run, number: int) -> None:
    """Say which signal stopped the run, and how to resume it."""
    with suppress(OSError):  # stderr may be closed if its reader received the signal, too
        print(
            f"{signal.Signals(number).name}: saved {run.path} at iter {run.progress.iter};"
            f" resume: python train.py --init_from=resume {out_dir_key(run)}",
            file=sys.stderr,
        )


def diverged(folder: RunFolder, error: Diverged) -> None:
    path = stored(folder.path / "ckpt.pt")
    good = f"{path} is the last good checkpoint"
    kept = good if path.exists() else "nothing has been saved yet"
    advice = "Try a lower --learning_rate, more --warmup_iters, --grad_clip=1.0 or --dtype=float32"
    print(f"train.py: the {error}; {kept}. {advice}", file=sys.stderr)


def out_dir_key(run) -> str:
    """Return the --out_dir argument, quoted so that it can be pasted into a command."""
    return f"--out_dir={shlex.quote(run.config.out_dir)}"
