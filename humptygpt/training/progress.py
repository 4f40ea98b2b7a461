"""Where a run stands: steps, losses, time, and the rows of metrics made of them; and the signals that stop it."""

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from torch import Tensor

STOPPING = (signal.SIGINT, signal.SIGTERM)
SAME_REQUEST = 1.0  # seconds; timeout and some shells send a signal to a process and to its group


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
    losses: list[float] = field(default_factory=list)  # of the steps since the last row of metrics

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

    def forget_best(self) -> None:
        self.best_val_loss = math.inf
        self.best_iter = 0
        self.evals_since_best = 0

    def stamp(self) -> dict:
        """Return what each row of metrics begins with."""
        return {"iter": self.iter, "tokens": self.tokens, "seconds": round(self.seconds, 3)}


class Meter:
    """Losses and gradient norms since the last row of metrics, left on the device until they are read; and the time."""

    def __init__(self, progress: Progress, skips_bad_steps: bool, peak_tokens: float | None):
        """skips_bad_steps: a GradScaler does. peak_tokens: per second at the peak of all cards; None: not known."""
        self.progress = progress
        self.skips_bad_steps = skips_bad_steps
        self.peak_tokens = peak_tokens
        self.losses = list(progress.losses)
        self.norms = [0.0] * len(progress.losses)
        self.logged_seconds = progress.seconds
        self.logged_tokens = progress.tokens
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time since read(): it is not training."""
        self.started = time.perf_counter() - self.progress.seconds

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        self.losses.append(loss)
        self.norms.append(grad_norm)

    def read(self) -> None:
        """Wait for the device and bring progress up to date. Raises Diverged."""
        self.losses = [float(loss) for loss in self.losses]
        self.norms = [float(norm) for norm in self.norms]
        self.progress.seconds = time.perf_counter() - self.started
        self.progress.losses = list(self.losses)
        first = self.progress.iter - len(self.losses) + 1
        for it, (loss, norm) in enumerate(zip(self.losses, self.norms, strict=True), start=first):
            if not math.isfinite(loss):
                raise Diverged(f"loss is {loss} at iter {it} (gradient norm {norm})")
            if not math.isfinite(norm) and not self.skips_bad_steps:  # the weights are lost
                raise Diverged(f"gradient is not finite at iter {it} (gradient norm {norm})")

    def row(self, lr: float) -> dict:
        """Return a row of metrics; the next one begins."""
        progress = self.progress
        speed = (progress.tokens - self.logged_tokens) / (progress.seconds - self.logged_seconds)
        row = progress.stamp() | {"train_loss": sum(self.losses) / len(self.losses), "lr": lr}
        row["grad_norm"] = self.norms[-1] if math.isfinite(self.norms[-1]) else None
        row["tokens_per_second"] = round(speed)
        if self.peak_tokens:
            row["mfu"] = speed / self.peak_tokens
        self.logged_tokens = progress.tokens
        self.logged_seconds = progress.seconds
        progress.losses = []
        self.losses = []
        self.norms = []
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
    handlers = {
        number: signal.signal(number, lambda number, frame: caught.append(number))
        for number in STOPPING
    }
    wakeup = signal.set_wakeup_fd(writer.fileno())
    thread = threading.Thread(target=answer_signals, args=(reader,), daemon=True)
    thread.start()
    try:
        yield caught
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        writer.close()
        thread.join()
        reader.close()


def answer_signals(reader: socket.socket) -> None:
    """Report the first signal, and exit at the second one. reader: gives the number of each as a byte."""
    first = None
    while received := reader.recv(1):
        number = received[0]
        if number not in STOPPING:
            continue
        if first is None:
            first = time.monotonic()
            name = signal.Signals(number).name
            line = (
                f"\n{name}: finishing this step, then saving; a second one ends at once, unsaved\n"
            )
            with suppress(OSError):  # the reader of our messages may have got it, too, and be gone
                os.write(2, line.encode())
        elif time.monotonic() - first > SAME_REQUEST:
            os._exit(128 + number)
