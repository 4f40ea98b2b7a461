"""A run as it goes: steps, losses, time, the signals that stop it, and what it writes beside its checkpoints."""

import importlib
import itertools
import json
import math
import os
import secrets
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from torch import Tensor

from humptygpt import checkpoint, files
from humptygpt.config import UserError, note
from humptygpt.device import peak_flops
from humptygpt.files import Lock
from humptygpt.metrics import read_metrics
from model import flops_per_token

STOPPING = (signal.SIGINT, signal.SIGTERM)
# seconds; timeout and some shells send a signal to a process and to its group
SAME_REQUEST = 1.0
# what a run writes; its checkpoints are last, as move_run needs them
FILES = [
    "adapter",
    "metrics.jsonl",
    "loss.png",
    "config.json",
    "command.txt",
    "wandb_id",
    "tensorboard",
    "snapshots",
    "best",  # sharded
    "best.old",
    "best.pt",
    "ckpt",
    "ckpt.old",
    "ckpt.pt",
]
OVERWRITTEN = "overwritten"  # the folder of the run before, until this one has a checkpoint
ANOTHER = "name another --out_dir"


class Diverged(Exception):
    """The loss or the gradient is not finite."""


@dataclass
class Progress:
    """Where a run stands. Saved in ckpt.pt, so that a resumed run is the uninterrupted one."""

    iter: int = 0  # steps done
    tokens: int = 0  # tokens trained on
    seconds: float = 0.0  # spent training: evaluating and saving are not counted
    best_val_loss: float = math.inf
    best_iter: int = 0
    evals_since_best: int = 0
    position: float = 0.0  # how far it is, in steps of max_iters: iter, or by the clock
    run_seconds: float = 0.0  # of a run by the clock: all of its commands took
    # of the steps since the last row of metrics
    losses: list[float] = field(default_factory=list)

    def record(self, val_loss: float) -> bool:
        """Count a validation loss, and return whether it is the lowest so far. Raises Diverged."""
        if not val_loss < 700:  # beyond that, e^loss overflows
            raise Diverged(f"validation loss is {val_loss} at iter {self.iter}")
        self.evals_since_best += 1
        if val_loss >= self.best_val_loss:
            return False
        self.best_val_loss = val_loss
        self.best_iter = self.iter
        self.evals_since_best = 0
        return True

    def stamp(self) -> dict:
        """Return what each row of metrics begins with."""
        return {
            "iter": self.iter,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "position": round(self.position, 3),
        }


class StepClock:
    """The progress of a run that is counted in steps. With --minutes, a plan.Clock counts it in time."""

    def start(self, run) -> None:
        """Begin to train; run: a train.Run."""

    def advance(self, position: float, config) -> float:
        """Return the position after a step, given the one before it, both in steps of config.max_iters."""
        return position + 1

    def leave_out(self, evaluation: float) -> None:
        """Do not count the time since advance(), which was an evaluation of so many seconds."""

    def seconds(self) -> float:
        """Return the time that counts for --minutes, earlier commands included."""
        return 0.0

    def time_left(self, progress: Progress, config) -> float:
        """Estimate the seconds of training that are left."""
        return (config.max_iters - progress.iter) * progress.seconds / progress.iter


class Meter:
    """Losses and gradient norms, which stay on the device until they are read; and the time."""

    def __init__(self, run):
        """run: a train.Run."""
        self.progress = run.progress
        self.skips_bad_steps = run.scaler.is_enabled()
        self.peak_flops = peak_flops(run.device)
        self.flops_per_token = flops_per_token(run.model) / run.process.size
        self.unread: list[tuple[Tensor, Tensor]] = []
        self.grad_norm = 0.0
        self.logged_seconds = self.progress.seconds
        self.logged_tokens = self.progress.tokens
        self.evaluation = 0.0  # seconds of the last one, with what it saved and showed
        self.started = time.perf_counter() - self.progress.seconds

    def restart_clock(self) -> None:
        """Leave out the time since read(), of an evaluation: it is not training."""
        self.evaluation = time.perf_counter() - self.started - self.progress.seconds
        self.started = time.perf_counter() - self.progress.seconds

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        self.unread.append((loss, grad_norm))

    def read(self) -> None:
        """Wait for the device and bring progress up to date. Raises Diverged."""
        first = self.progress.iter - len(self.unread) + 1
        for it, (loss, norm) in enumerate(self.unread, start=first):
            loss = float(loss)
            self.grad_norm = float(norm)
            at = f"at iter {it} (gradient norm {self.grad_norm})"
            if not math.isfinite(loss):
                raise Diverged(f"loss is {loss} {at}")
            if not math.isfinite(self.grad_norm) and not self.skips_bad_steps:
                raise Diverged(f"gradient is not finite {at}")  # the weights are lost
            self.progress.losses.append(loss)
        self.unread = []
        self.progress.seconds = time.perf_counter() - self.started

    def row(self, lr: float) -> dict:
        """Return a row of metrics; the next one begins."""
        progress = self.progress
        tokens = progress.tokens - self.logged_tokens
        speed = tokens / (progress.seconds - self.logged_seconds)
        row = progress.stamp() | {
            "train_loss": sum(progress.losses) / len(progress.losses),
            "lr": lr,
            "grad_norm": self.grad_norm if math.isfinite(self.grad_norm) else None,
            "tokens_per_second": round(speed),
        }
        if self.peak_flops:
            row["mfu"] = speed * self.flops_per_token / self.peak_flops
        self.logged_tokens = progress.tokens
        self.logged_seconds = progress.seconds
        progress.losses = []
        return row


# --------------------------------------------------------------------------------------
# SIGINT and SIGTERM, a request to stop at the end of a step


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Yield a list to which SIGINT and SIGTERM add themselves; a second one ends the program at once.

    A thread answers the user, because a handler of Python's waits for the end of a long call of torch.
    """
    caught = []
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    wakeup = signal.set_wakeup_fd(writer.fileno())
    handlers = {}
    for number in STOPPING:
        handlers[number] = signal.signal(
            number, lambda number, frame: caught.append(number)
        )
    threading.Thread(target=answer_signals, args=(reader,), daemon=True).start()
    try:
        yield caught
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        writer.close()


def answer_signals(reader: socket.socket) -> None:
    """Report the first signal, and exit at the second one. reader: gives the number of each as a byte."""
    first = None
    with reader:
        while received := reader.recv(1):
            number = received[0]
            if number not in STOPPING:
                continue
            if first is None:
                first = time.monotonic()
                name = signal.Signals(number).name
                line = f"\n{name}: finishing this step, then saving; a second one ends at once, unsaved\n"
                # the reader of our messages may have got it, too, and be gone
                with suppress(OSError):
                    os.write(2, line.encode())
            elif time.monotonic() - first > SAME_REQUEST:
                os._exit(128 + number)


# --------------------------------------------------------------------------------------
# out_dir: what a run writes there beside its checkpoints, and what it finds there of an earlier run


def lock_out_dir(out_dir: Path) -> Lock:
    """Lock the folder, from before its checkpoint is read until the run has ended. Raises UserError."""
    advice = f"{ANOTHER}, or wait until that run has ended"
    try:
        return Lock(out_dir / ".lock", f"out_dir={out_dir}", advice)
    except OSError as error:
        raise files.cannot_write(out_dir, error, f"; {ANOTHER}") from error


class RunFolder:
    """metrics.jsonl, loss.png, config.json, command.txt, and TensorBoard's files or a run on Weights & Biases.

    A new run replaces an earlier one's files; a resumed one drops the metrics and snapshots that came after its
    checkpoint. Either holds the lock of its folder: see lock_out_dir.
    """

    def __init__(self, path: Path, settings: dict, resumed_at: int, writes: bool = True):
        """settings: of the run, as in config.json. resumed_at: steps done; 0: a new run. Raises UserError.

        writes: False where another process of the same run does.
        """
        self.path = path
        self.writes = writes
        self.rows = []
        self.loggers = []
        if not writes:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            kept = path / OVERWRITTEN
            if not resumed_at and has_checkpoint(path):
                note(f"the earlier run stays in {kept} until this one has a checkpoint")
                # a run by its steps may have the other's plan for its config file
                plan = ["plan.py"] if settings.get("minutes") else []
                move_run(path, kept, plan + FILES)
            if resumed_at:
                if not checkpoint.stored(kept / "ckpt.pt").exists():
                    move_run(kept, path, ["plan.py", *FILES])  # a kill interrupted the move
                self.rows = rows_until(path / "metrics.jsonl", resumed_at)
            for snapshot in path.glob("snapshots/*.pt"):
                if int(snapshot.stem) >= resumed_at:  # the next step takes it again
                    snapshot.unlink()
            files.remove_unfinished(path, [*FILES, "snapshots/*"])
        except OSError as error:
            raise files.cannot_write(path, error, f"; {ANOTHER}") from error
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_text(path / "metrics.jsonl", lines)
        write_text(path / "config.json", json.dumps(settings, indent=1))
        files.append(path / "command.txt", shlex.join(["python", *sys.argv]))
        for name in chosen_loggers(settings):
            self.loggers.append(LOGGERS[name](path, settings, resumed_at))

    def record(self, row: dict) -> None:
        """Add a row of metrics."""
        if not self.writes:
            return
        self.rows.append(row)
        files.append(self.path / "metrics.jsonl", json.dumps(row))
        for logger in self.loggers:
            if "end" not in row:  # a resumed run takes that row back
                logger.log(row, step=row["iter"])

    def draw(self) -> None:
        draw_losses(self.rows, self.path / "loss.png")

    def remove_overwritten(self) -> None:
        """Remove the run before this one, now that this one has a checkpoint."""
        if self.writes:
            with suppress(OSError):  # the next checkpoint tries again
                files.remove(self.path / OVERWRITTEN)

    def close(self) -> None:
        for logger in self.loggers:
            logger.finish()


def write_text(path: Path, text: str) -> None:
    files.write_whole(path, lambda file: file.write(text.encode()))


def rows_until(metrics: Path, step: int) -> list[dict]:
    """Return the rows that a resumed run keeps: all until this step, without those that are written at the end."""
    rows = itertools.takewhile(bool, read_metrics(metrics))
    at_the_end = {"end", "whole_val_loss", "test_bleu"}
    return [row for row in rows if row["iter"] <= step and not at_the_end & row.keys()]


def has_checkpoint(out_dir: Path) -> bool:
    paths = (checkpoint.stored(out_dir / name) for name in ("ckpt.pt", "best.pt"))
    return any(path.exists() for path in paths)


def refuse_earlier_run(out_dir: Path) -> None:
    """Raise UserError if a new run would replace an earlier one."""
    if has_checkpoint(out_dir) or (out_dir / OVERWRITTEN).exists():
        raise UserError(
            f"{out_dir} has a run already; continue it with --init_from=resume, or replace it with --overwrite=True"
        )


def move_run(source: Path, target: Path, names: list[str]) -> None:
    """Move a run's files, its checkpoints last: while one is at its source, the run is there for the next start."""
    target.mkdir(exist_ok=True)
    for path in (source / name for name in names):
        # another run may be in a folder of such a name
        if path.exists() and not (path / "metrics.jsonl").exists():
            files.remove(target / path.name)
            path.replace(target / path.name)


# --------------------------------------------------------------------------------------
# Loggers: what a run logs to beside metrics.jsonl


def chosen_loggers(settings: dict) -> list[str]:
    """Return those of LOGGERS that a run logs to, each once; settings: of the run. Raises ValueError for another."""
    names = [name.strip() for name in settings["log"].split(",") if name.strip()]
    for name in names:
        if name not in LOGGERS:
            raise ValueError(
                f"log={settings['log']}: {name} is not one of: {', '.join(LOGGERS)}"
            )
    if settings["wandb_log"]:
        names.append("wandb")
    return list(dict.fromkeys(names))


def import_logger(name: str) -> ModuleType:
    """Import what a logger needs. Raises UserError where the package is missing."""
    module = "wandb" if name == "wandb" else "torch.utils.tensorboard"
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"log={name} needs the package {name}: pip install {name}"
        ) from error


class TensorBoard:
    """Files in out_dir/tensorboard, which `tensorboard --logdir=out` shows; with the methods of a wandb run."""

    def __init__(self, out_dir: Path, settings: dict, resumed_at: int):
        """What an earlier process logged after the step at which this one resumes is no longer shown."""
        writer = import_logger("tensorboard").SummaryWriter
        self.writer = writer(str(out_dir / "tensorboard"), purge_step=resumed_at + 1)

    def log(self, row: dict, step: int) -> None:
        for key, value in row.items():
            if key != "iter" and type(value) in (int, float):
                self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


def start_wandb(out_dir: Path, settings: dict, resumed_at: int):
    """Start the run on Weights & Biases, the same whenever it is resumed; offline where that cannot be reached."""
    wandb = import_logger("wandb")
    id_file = out_dir / "wandb_id"
    if not resumed_at or not id_file.exists():
        write_text(id_file, secrets.token_hex(4))
    options = {
        "project": settings["wandb_project"],
        "name": settings["wandb_run_name"] or out_dir.name,
        "id": id_file.read_text(),
        "resume": "allow",
        "dir": str(out_dir),
        "config": settings,
    }
    try:
        return wandb.init(**options)
    except wandb.Error as error:
        offline = "logging offline, to be sent by: wandb sync"
        note(f"wandb cannot be reached ({error}); {offline}")
        return wandb.init(**options, mode="offline")


LOGGERS = {"tensorboard": TensorBoard, "wandb": start_wandb}

# --------------------------------------------------------------------------------------
# The plot


def draw_losses(rows: list[dict], path: Path) -> None:
    """Plot training and validation loss against steps. The numbers are in the legend, above the axes."""
    val = points(rows, "val_loss")
    if not val:
        return
    from matplotlib.figure import Figure  # here: it takes a second to load

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    train = points(rows, "train_loss")
    style = {"color": "#9db4c8", "linewidth": 1, "markersize": 1.8, "marker": "o"}
    axes.plot(*zip(*train, strict=True), label="training", **style)
    # a loss before the first step is that of the model from which the run starts
    step, lowest = min(val, key=lambda point: (point[0] == 0, point[1]))
    label = f"validation, lowest {lowest:.3f} at step {step:,}"
    style = {"color": "#c2410c", "linewidth": 1.8, "markersize": 3.5, "marker": "o"}
    axes.plot(*zip(*val, strict=True), label=label, **style)
    axes.set(xlabel="steps", ylabel="loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    title = f"HumptyGPT: {path.parent.name}"
    figure.legend(
        title=title, title_fontsize="large", frameon=False, loc="outside upper center"
    )
    files.write_whole(path, lambda file: figure.savefig(file, dpi=130, format="png"))


def points(rows: list[dict], key: str) -> list[tuple[int, float]]:
    return [(row["iter"], row[key]) for row in rows if key in row]
