"""A run: its parts, how far it is, the signals that stop it, and its folder."""

import importlib.util
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from humptygpt import files, machine
from humptygpt.cli import UserError, check_least, note
from humptygpt.data.dataset import Dataset
from humptygpt.device import peak_flops
from humptygpt.formats import checkpoint
from humptygpt.formats.checkpoint import code_checksum
from humptygpt.model import count_parameters, flops_per_token
from humptygpt.training.evaluation import LINE_TOKENS, SAMPLE_TOKENS, Task, find_task
from humptygpt.training.loggers import (
    LOGGED,
    draw_losses,
    evaluations,
    read_metrics,
    start_wandb,
)
from humptygpt.training.optimizers import named_state, restore_state
from humptygpt.training.ranks import Ranks
from humptygpt.training.settings import TrainConfig

# seconds within which repeated signals count as one: `timeout` and some shells signal a process and then its group
SAME_REQUEST = 1.0
# the files of a run that are written whole
FILES = [
    "metrics.jsonl",
    "loss.png",
    "config.json",
    "wandb_id",
    "snapshots/*",
    "best.pt",
    "ckpt.pt",
]
# seconds reserved at the end of a run to load the best model, sample from it, draw the plot and exit
ENDING = 1.5


class Diverged(Exception):
    """The loss or the gradient is not finite."""


@dataclass
class Progress:
    """How far a run has come. It is saved in ckpt.pt, so that a resumed run matches an uninterrupted one."""

    iter: int = 0  # steps done
    tokens: int = 0  # tokens trained on
    seconds: float = 0.0  # training time, excluding evaluation and saving
    best_val_loss: float = math.inf
    best_answered: int = 0  # held-out questions of a chat that the best model answers
    best_iter: int = 0
    evals_since_best: int = 0
    # how far the run has come, from 0 to max_iters: equal to iter or, with --minutes, estimated from the clock
    position: float = 0.0
    # wall-clock time of the run, summed over all resumes
    run_seconds: float = 0.0
    # losses of the steps since the last row of metrics
    losses: list = field(default_factory=list)

    def validate(self) -> None:
        """Raise ValueError for a number that no run has."""
        check_least(self, 0, "iter", "tokens", "seconds", "best_iter", "evals_since_best")
        check_least(self, 0, "position", "run_seconds", "best_answered")
        if not math.isfinite(math.fsum(self.losses)):
            raise ValueError("a loss is not finite")

    def record(self, val_loss: float, answered: int, newest_is_best: bool) -> bool:
        """Record an evaluation. Returns True if it is the best so far. Raises Diverged if the loss is nan or huge.

        The best answers most held-out questions, or as many at the lowest loss. newest_is_best: neither says anything.
        """
        if not val_loss < 700:  # beyond that, e^loss overflows
            raise Diverged(f"validation loss is {val_loss} at iter {self.iter}")
        self.evals_since_best += 1
        better = (-answered, val_loss) < (-self.best_answered, self.best_val_loss)
        if not (better or newest_is_best):
            return False
        self.best_answered = answered
        self.best_val_loss = val_loss
        self.best_iter = self.iter
        self.evals_since_best = 0
        return True

    def stamp(self, kind: str) -> dict:
        """Return the entries that every row of metrics begins with. kind: as in loggers.ROW."""
        return {
            "kind": kind,
            "iter": self.iter,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "position": round(self.position, 3),
        }


class Clock:
    """The time of a run: how long it has trained, and how far it is, in steps or, with --minutes, in time.

    So a run with --minutes ends on time even if other programs slow it down. Only the first rank reads its clock.
    """

    def __init__(self, progress: Progress, minutes: float | None = None):
        self.progress = progress
        # when the run began, had it never been interrupted
        self.began = machine.STARTED - progress.run_seconds
        self.end = self.began + 60 * minutes - ENDING if minutes else None  # of training
        self.evaluation = 0.0  # seconds that the last one took or, before that, an estimate
        self.line_seconds = []  # seconds that the model took to write each line
        self.start()

    def start(self, evaluations_at_end: float = 1.0) -> None:
        """Let training start now. evaluations_at_end: time to evaluate after the last step, in regular evaluations."""
        self.evaluations_at_end = evaluations_at_end
        self.started = time.perf_counter() - self.progress.seconds
        self.last_step = self.progress.seconds

    def read(self) -> None:
        """Note how long the run has trained, without what was left out."""
        self.progress.seconds = time.perf_counter() - self.started

    def leave_out(self) -> float:
        """Exclude the time since read(), which was not spent on training. Returns that time in seconds."""
        seconds = time.perf_counter() - self.started - self.progress.seconds
        self.started += seconds
        self.last_step = self.progress.seconds
        return seconds

    def total(self) -> float:
        """Seconds that the run has taken, with all that was left out."""
        return time.perf_counter() - self.began

    def advance(self, config: TrainConfig) -> float:
        """Return the position after a step, from 0 to config.max_iters; progress has the one before it."""
        position = self.progress.position
        if not self.end:
            return position + 1
        now = time.perf_counter() - self.started
        step = now - self.last_step
        self.last_step = now
        left = self.steps_left(config)
        if left < step / 2:
            return config.max_iters
        return position + (config.max_iters - position) * step / (left + step)

    def steps_left(self, config: TrainConfig) -> float:
        """Seconds left for training steps, without the evaluations and the sample at the end."""
        line = self.line_seconds[-1] if self.line_seconds else 0.0
        sample = line * SAMPLE_TOKENS / LINE_TOKENS
        at_end = self.evaluations_at_end * self.evaluation + max(self.evaluation, sample)
        left = self.end - time.perf_counter() - at_end
        before = math.ceil((config.max_iters - self.progress.position) / config.eval_interval)
        # at least half of the time is kept for steps; evaluations that no longer fit are skipped
        return max(left - (before - 1) * self.evaluation, left / 2)

    def left(self, config: TrainConfig) -> float:
        """Seconds until training ends."""
        if self.end:
            return self.end - time.perf_counter()
        steps = config.max_iters - self.progress.iter
        return steps * self.progress.seconds / self.progress.iter


@dataclass
class Run:
    """Everything that a training run consists of, assembled by setup()."""

    config: TrainConfig
    ranks: Ranks
    device: torch.device
    dtype: torch.dtype
    dataset: Dataset
    model: nn.Module
    net: nn.Module  # the model used in training, perhaps compiled or wrapped in DDP; weights are saved from `model`
    progress: Progress
    scaler: torch.amp.GradScaler
    clock: Clock
    metrics: dict[str, Callable] = field(default_factory=dict)  # METRICS of train.py
    optimizer: torch.optim.Optimizer | None = None  # None only until setup() has made it

    @property
    def task(self) -> Task:
        task = find_task(self.dataset.task)
        # no rank of a sharded run has the whole model, so none can generate examples
        if self.ranks.sharded:
            return replace(task, evaluation_examples=None, final_examples=None, count_right=None)
        if task.score and not self.model.has_cache:  # translations are written with a cache
            return Task(batches_vary=task.batches_vary)
        return task

    @property
    def is_last(self) -> bool:
        """True after the last planned step."""
        return self.progress.position >= self.config.max_iters

    @property
    def is_over(self) -> bool:
        stops_early = 0 < self.config.early_stopping <= self.progress.evals_since_best
        return stops_early or self.is_last

    def advance(self, tokens: int, signals: list[int]) -> tuple[bool, bool]:
        """Count a step and the tokens that it trained on.

        Returns whether an evaluation is due, and whether a rank has received a signal.
        """
        progress, interval = self.progress, self.config.eval_interval
        before = progress.position
        progress.iter += 1
        progress.tokens += tokens
        position = self.clock.advance(self.config) if self.ranks.first else 0.0
        board = torch.tensor([position, len(signals)], dtype=torch.float64)
        progress.position, stop = self.ranks.sum(board).tolist()
        due = self.is_last or before // interval < progress.position // interval
        return due, bool(stop)

    @property
    def folder(self) -> Path:
        return Path(self.config.out_dir)

    @property
    def path(self) -> Path:
        """Path of the run's latest checkpoint, which may not exist yet."""
        return self.folder / "ckpt.pt"

    def settings(self) -> dict[str, object]:
        """Return the content of config.json, which is also a config file that repeats the run on its prepared data.

        Keys that start with _ are ignored there. Once a run with --minutes has ended, the steps are those it took.
        """
        settings = {**asdict(self.config), **asdict(self.model.config)}
        for key in ("input", "overwrite", "threads"):
            del settings[key]
        if self.is_over and self.config.minutes:
            settings["minutes"] = None
            for key in ("max_iters", "lr_decay_iters", "warmup_iters", "eval_interval"):
                if settings[key]:
                    steps = settings[key] * self.progress.iter / self.progress.position
                    settings[key] = max(1, round(steps))
        return settings | {
            "_parameters": count_parameters(self.model),
            "_train_tokens": self.dataset.identity["train_tokens"],
            "_model.py": code_checksum(),
        }

    def state(self) -> dict:
        """Return the entries that ckpt.pt and best.pt have in common."""
        meta = self.dataset.meta
        data = {key: meta[key] for key in ("source", "questions") if key in meta}
        return {
            "train_config": asdict(self.config),
            "model_config": asdict(self.model.config),
            "tokenizer": self.dataset.tokenizer.state(),
            "task": self.dataset.task,
            "data": data | {"identity": self.dataset.identity},
            "progress": asdict(self.progress),
            "model": dict(self.model.state_dict()),
        }

    def latest_state(self) -> dict:
        """Return the entries of ckpt.pt."""
        return self.state() | {
            "optimizer": named_state(self.optimizer, self.model),
            "scaler": self.scaler.state_dict() or None,
        }

    def best_state(self) -> dict:
        """Return the entries of best.pt. LoRA weights are merged, so the file loads like any other model."""
        state = self.state() | {"model": self.weights()}
        state["train_config"]["lora_rank"] = 0
        return state

    def weights(self) -> dict[str, Tensor]:
        """Return the model's state dict, with LoRA weights merged."""
        if not self.config.lora_rank:
            return dict(self.model.state_dict())
        from humptygpt.models.lora import merged_state

        return merged_state(self.model)

    def restore(self, saved: dict) -> None:
        """Restore the optimizer and the scaler from a checkpoint. Raises UserError if it does not fit."""
        with files.refuse_damaged(self.path):
            state, receive = saved["optimizer"], self.ranks.receive
            if state or self.progress.iter:
                restore_state(self.optimizer, self.model, state, receive)
            if saved.get("scaler"):  # only with float16
                self.scaler.load_state_dict(saved["scaler"])


class Meter:
    """Measures losses, gradient norms and speed. Numbers stay on the device until read() is called."""

    def __init__(self, run: Run):
        self.run = run
        self.progress = run.progress
        self.peak_flops = peak_flops(run.device)
        self.flops_per_token = flops_per_token(run.model) / run.ranks.size
        self.unread = []  # (number of the step, losses, gradient norm) since read()
        self.grad_norm = 0.0
        self.own = {}  # the model's own terms of the loss, and METRICS, in the latest step
        self.logged_seconds = self.progress.seconds
        self.logged_tokens = self.progress.tokens

    def add(self, losses: dict[str, Tensor], grad_norm: Tensor) -> None:
        self.unread.append((self.progress.iter, losses, grad_norm))

    def read(self) -> None:
        """Wait for the device and update progress. Raises Diverged if a loss or gradient is not finite."""
        for it, losses, norm in self.unread:
            values = {key: float(x) for key, x in losses.items()}
            loss = values.pop("train_loss")
            # JSON has no nan
            self.own = {key: x if math.isfinite(x) else None for key, x in values.items()}
            self.grad_norm = float(norm)
            at = f"at iter {it} (gradient norm {self.grad_norm})"
            if not math.isfinite(loss):
                raise Diverged(f"loss is {loss} {at}")
            # the weights are ruined, unless the scaler has skipped the step
            if not math.isfinite(self.grad_norm) and not self.run.scaler.is_enabled():
                raise Diverged(f"gradient is not finite {at}")
            self.progress.losses.append(loss)
        self.unread = []
        self.run.clock.read()

    def row(self, lr: float) -> dict:
        """Make a row of metrics for the steps since the last row."""
        progress = self.progress
        tokens = progress.tokens - self.logged_tokens
        speed = tokens / (progress.seconds - self.logged_seconds)
        row = progress.stamp("train") | {
            "train_loss": sum(progress.losses) / len(progress.losses),
            "lr": lr,
            "grad_norm": self.grad_norm if math.isfinite(self.grad_norm) else None,
            "tokens_per_second": round(speed),
            "dtype": self.run.config.dtype,
            "threads": self.run.config.threads,
        }
        if self.peak_flops:
            row["mfu"] = speed * self.flops_per_token / self.peak_flops
        self.logged_tokens = progress.tokens
        self.logged_seconds = progress.seconds
        progress.losses = []
        if taken := LOGGED & self.own.keys():
            raise UserError(f"metrics.jsonl has a {taken.pop()} already; rename yours")
        return row | self.own


# --------------------------------------------------------------------------------------
# Signals request a stop at the end of a step


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Yield a list that collects signals. A second signal ends the program at once, without saving.

    Only the main thread can catch them.
    """
    caught = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    first_at = 0.0

    def catch(number: int, frame) -> None:
        nonlocal first_at
        caught.append(number)
        if len(caught) == 1:
            first_at = time.monotonic()
            name = signal.Signals(number).name
            line = f"\n{name}: finishing this step, then saving; a second signal ends the run at once without saving\n"
            # stderr may be closed: the process that reads it received the same signal
            with suppress(OSError):
                os.write(2, line.encode())
        elif time.monotonic() - first_at > SAME_REQUEST:
            os._exit(128 + number)

    handlers = {
        number: signal.signal(number, catch)
        for number in machine.STOPPING
        # A signal that is ignored stays ignored, such as SIGHUP under nohup. SIGINT is the exception, because shells
        # let background jobs ignore it.
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------
# The folder of a run, out_dir


def lock_out_dir(out_dir: Path) -> AbstractContextManager[None]:
    """Lock out_dir. A run holds the lock from before it reads its checkpoint until it has ended.

    Raises UserError if another process holds the lock, or the folder cannot be written to.
    """
    advice = "choose another --out_dir, or wait until that run has ended"
    return files.locked(out_dir, f"out_dir={out_dir}", advice)


def refuse_earlier_run(out_dir: Path) -> None:
    """Raise UserError if a new run would replace an earlier one."""
    if checkpoint.has_checkpoint(out_dir):
        source = shlex.quote(f"--init_from={out_dir}")
        raise UserError(
            f"{out_dir} already holds a run; continue it with --init_from=resume, start from it with {source} and"
            " another --out_dir, or set it aside with --overwrite=True"
        )


def set_aside(out_dir: Path) -> None:
    """Rename the folder of an earlier run, so that a new one can have its name. Raises UserError if that fails."""
    aside = out_dir.with_name(f"{out_dir.name}.{datetime.now():%Y%m%d-%H%M%S-%f}")
    with files.refuse_unwritable(out_dir):
        files.move(out_dir, aside)
        out_dir.mkdir()
    note(f"the earlier run in {out_dir} is now in {aside}")


class RunFolder:
    """Writes metrics.jsonl, loss.png, config.json and command.txt of a run, and logs to wandb if chosen.

    A new run sets an earlier one aside. A resumed run drops metrics and snapshots that are newer than its checkpoint.
    The run holds the lock from lock_out_dir().
    """

    def __init__(self, run: Run):
        """Raises UserError if a file cannot be written."""
        self.path = path = run.folder
        resumed_at = run.progress.iter
        self.writes = run.ranks.first
        self.rows = []
        self.wandb = None
        if not self.writes:
            return
        if not importlib.util.find_spec("matplotlib"):
            note("there will be no loss.png, because matplotlib is not installed")
        if not resumed_at and checkpoint.has_checkpoint(path):
            set_aside(path)
        with files.refuse_unwritable(path):
            if resumed_at:
                # all rows up to the checkpoint, except those written at the end of a run
                self.rows = [
                    row
                    for row in read_metrics(path / "metrics.jsonl")
                    if row["iter"] <= resumed_at and row["kind"] in ("train", "eval")
                ]
            for snapshot in (path / "snapshots").glob("*.pt"):
                # to be taken again
                if snapshot.stem.isdecimal() and int(snapshot.stem) >= resumed_at:
                    files.remove(snapshot)
            files.remove_unfinished(path, FILES)
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        files.write_text(path / "metrics.jsonl", lines)
        self.write_settings(run)
        files.append(path / "command.txt", shlex.join(["python", *sys.argv]))
        if run.config.wandb_log:
            self.wandb = start_wandb(path, run.settings(), resumed_at)

    def write_settings(self, run: Run) -> None:
        files.write_text(self.path / "config.json", json.dumps(run.settings(), indent=1))

    def record(self, row: dict) -> None:
        """Add a row of metrics, and send it to wandb if chosen."""
        if not self.writes:
            return
        self.rows.append(row)
        files.append(self.path / "metrics.jsonl", json.dumps(row))
        if self.wandb:
            values = {f"{row['kind']}/{key}": value for key, value in row.items()}
            self.wandb.log(values, step=row["iter"])

    def draw(self, run: Run) -> None:
        """Draw loss.png, if matplotlib is installed."""
        if importlib.util.find_spec("matplotlib"):
            draw_losses(self.rows, self.path / "loss.png", run.progress.best_iter)

    def end(self, run: Run, how: str) -> None:
        """Write the last row of metrics: how the run ended, and its best loss, with a checksum of the text it is on."""
        best = {}
        # the best model's loss on the whole validation split comes last
        for step, row in evaluations(self.rows):
            if step == run.progress.best_iter > 0:
                kept = ("val_loss", "val_bits_per_byte", "val_text")
                best = {"best_iter": step} | {f"best_{key}": row[key] for key in kept}
        self.record(run.progress.stamp("end") | {"end": how} | best)

    def close(self) -> None:
        if self.wandb:
            self.wandb.finish()
