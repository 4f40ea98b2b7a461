"""What a run says: a summary, a progress bar and lines during training, and advice at the end."""

import math
import shlex
import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from humptygpt.machine import discard_output
from humptygpt.model import count_parameters
from humptygpt.training.loggers import own_values
from humptygpt.training.run import Diverged, Run, RunFolder


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


def show_step(bar: tqdm, run: Run, row: dict) -> None:
    """Show a row of metrics: in the progress bar on a terminal, otherwise as a line."""
    norm = "inf" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
    text = (
        f"loss {row['train_loss']:.4f}, lr {row['lr']:.2e}, gradient norm {norm}, {row['tokens_per_second']:,} tokens/s"
    )
    text += "".join(f", {key} {x:.4g}" for key, x in own_values(row).items())
    if not bar.disable:
        bar.set_postfix_str(text)
        return
    steps = run.config.max_iters
    position = run.progress.position
    done = f" ({position / steps:.0%})" if run.config.minutes else f"/{steps}"
    left = run.clock.left(run.config)
    show_line(bar, f"iter {run.progress.iter}{done}: {text}, {left:.0f} s of training left")


def show_line(bar: tqdm, text: str) -> None:
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
    key = out_dir_key(run.folder)
    command = run.task.sample_command.format(key)
    text = f"{run.task.sample_label}: {command}"
    if progress.best_iter == progress.iter:
        minutes, steps = run.config.minutes, run.config.max_iters
        twice = f"--max_iters={2 * steps}"
        # the position is beyond the end if a finished run is resumed with fewer minutes
        if minutes:
            twice = f"--minutes={2 * minutes * progress.position / steps:g}"
        text += f"\ntwice as long: python train.py --init_from=resume {key} {twice}"
    if run.config.minutes:
        settings = shlex.quote((run.folder / "config.json").as_posix())
        text += f"\nthe same steps again: python train.py {settings} --out_dir=out/again"
    if run.dataset.trains_on_all:
        text += "\nnothing is held out, so the last model counts as the best"
    elif progress.best_answered:
        text += f"\nbest by held-out questions answered: {progress.best_answered} at iter {progress.best_iter}"
    elif progress.best_val_loss < math.inf:
        text += f"\nbest val loss {progress.best_val_loss:.4f} at iter {progress.best_iter}"
    start = next((row.get("val_loss", 0) for row in rows if not row["iter"]), 0)
    if 0 < start < progress.best_val_loss and not progress.best_answered:
        text += f"\nthe model that the run started from was better: val loss {start:.4f}"
    return text


def stopped(run: Run, number: int) -> None:
    """Say which signal stopped the run, and how to resume it."""
    with suppress(OSError):  # stderr may be closed if its reader received the signal, too
        print(
            f"{signal.Signals(number).name}: saved {run.path} at iter {run.progress.iter};"
            f" resume: python train.py --init_from=resume {out_dir_key(run.folder)}",
            file=sys.stderr,
        )


def diverged(folder: RunFolder, error: Diverged) -> None:
    path = folder.path / "ckpt.pt"
    good = f"{path} is the last good checkpoint"
    kept = good if path.exists() else "nothing has been saved yet"
    advice = "Try a lower --learning_rate, more --warmup_iters, --grad_clip=1.0 or --dtype=float32"
    print(f"train.py: the {error}; {kept}. {advice}", file=sys.stderr)


def out_dir_key(folder: Path) -> str:
    """Return the --out_dir argument, quoted so that it can be pasted into a command."""
    return f"--out_dir={shlex.quote(folder.as_posix())}"
