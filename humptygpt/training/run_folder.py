"""out_dir: what a run writes there beside its checkpoints, and what it finds there of an earlier run."""

import importlib
import itertools
import json
import re
import secrets
import sys
from pathlib import Path
from types import ModuleType

from humptygpt.checkpoint.metrics import read_metrics
from humptygpt.core import files
from humptygpt.core.errors import UserError
from humptygpt.core.locks import Lock

FILES = ["ckpt.pt", "best.pt", "adapter", "metrics.jsonl", "loss.png", "config.json"]
FILES += ["wandb_id", "tensorboard"]
FILES += ["ckpt", "ckpt.old", "best", "best.old"]  # sharded
ANOTHER = "name another --out_dir"


def lock_out_dir(out_dir: Path) -> Lock:
    """Lock the folder, from before its checkpoint is read until the run has ended. Raises UserError."""
    advice = f"{ANOTHER}, or wait until that run has ended"
    try:
        return Lock(out_dir / ".lock", f"out_dir={out_dir}", advice)
    except OSError as error:
        raise files.cannot_write(out_dir, error, f"; {ANOTHER}") from error


class RunFolder:
    """metrics.jsonl, loss.png, config.json and, if asked for, TensorBoard's files and a run on Weights & Biases.

    A new run moves an older one's files aside; a resumed one drops the metrics that came after its checkpoint. Either
    holds the lock of its folder: see lock_out_dir.
    """

    def __init__(self, path: Path, settings: dict, resumed_at: int):
        """settings: of the run, as in config.json. resumed_at: steps done; 0: a new run. Raises UserError."""
        self.path = path
        self.settings = settings
        self.rows = []
        try:
            path.mkdir(parents=True, exist_ok=True)
            if resumed_at:
                self.rows = rows_until(path / "metrics.jsonl", resumed_at)
            else:
                keep_earlier_run(path)
            files.remove_unfinished(path, FILES)
        except OSError as error:
            raise files.cannot_write(path, error, f"; {ANOTHER}") from error
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_text(path / "metrics.jsonl", lines)
        write_text(path / "config.json", json.dumps(settings, indent=1))
        self.loggers = []
        for name in chosen_loggers(settings):
            self.loggers.append(LOGGERS[name](path, settings, resumed_at))

    def record(self, row: dict) -> None:
        """Add a row of metrics."""
        self.rows.append(row)
        files.append(self.path / "metrics.jsonl", json.dumps(row))
        for logger in self.loggers:
            logger.log(row, step=row["iter"])

    def draw(self) -> None:
        draw_losses(self.rows, self.path / "loss.png", self.settings)

    def close(self) -> None:
        for logger in self.loggers:
            logger.finish()


class NoFolder:
    """What a process has instead of a RunFolder that writes nothing, since another one of the same run does."""

    def __init__(self, path: Path, settings: dict, resumed_at: int):
        self.path = path

    def record(self, row: dict) -> None:
        pass

    def draw(self) -> None:
        pass

    def close(self) -> None:
        pass


def write_text(path: Path, text: str) -> None:
    files.write_whole(path, lambda file: file.write(text.encode()))


def rows_until(metrics: Path, step: int) -> list[dict]:
    """Return the rows that a resumed run keeps: the test split is scored at the end, and again if there is more."""
    rows = itertools.takewhile(bool, read_metrics(metrics))
    return [row for row in rows if row["iter"] <= step and "test_bleu" not in row]


def keep_earlier_run(out_dir: Path) -> None:
    """Move an earlier run's files aside; killed in between, the next start moves the rest."""
    earlier = [name for name in FILES if (out_dir / name).exists()]
    metrics = out_dir / "metrics.jsonl"
    begun_only = metrics.exists() and not metrics.stat().st_size
    if (earlier and not begun_only) or files.being_moved(out_dir):
        kept = files.move_aside(out_dir, earlier)
        print(f"note: {out_dir} held an earlier run; it is now in {kept}", file=sys.stderr)


# --------------------------------------------------------------------------------------
# Loggers: what a run logs to beside metrics.jsonl


def chosen_loggers(settings: dict) -> list[str]:
    """Return those of LOGGERS that a run logs to, each once; settings: of the run. Raises ValueError for another."""
    names = [name.strip() for name in settings["log"].split(",") if name.strip()]
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"log={settings['log']}: {name} is not one of: {', '.join(LOGGERS)}")
    if settings["wandb_log"]:
        names.append("wandb")
    return list(dict.fromkeys(names))


def import_logger(name: str) -> ModuleType:
    """Import what a logger needs. Raises UserError where the package is missing."""
    module, needed = {
        "tensorboard": ("torch.utils.tensorboard", "SummaryWriter"),
        "wandb": ("wandb", "init"),
    }[name]
    try:
        package = importlib.import_module(module)
        getattr(package, needed)  # not in a folder of that name, which wandb leaves behind
    except (ImportError, AttributeError) as error:
        raise UserError(f"log={name} needs the package {name}: pip install {name}") from error
    return package


class TensorBoard:
    """Files in out_dir/tensorboard, which `tensorboard --logdir=out` shows; with the methods of a wandb run."""

    def __init__(self, out_dir: Path, settings: dict, resumed_at: int):
        """What an earlier process logged after the step at which this one resumes is no longer shown."""
        purge_step = resumed_at + 1 if resumed_at else None
        folder = str(out_dir / "tensorboard")
        try:
            writer = import_logger("tensorboard").SummaryWriter
            self.writer = writer(folder, purge_step=purge_step)
        except OSError as error:
            raise files.cannot_write(folder, error) from error

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
    earlier = id_file.read_bytes() if resumed_at and id_file.exists() else b""
    run_id = earlier.decode() if re.fullmatch(rb"[0-9a-f]{8}", earlier) else secrets.token_hex(4)
    write_text(id_file, run_id)
    options = {
        "project": settings["wandb_project"],
        "name": settings["wandb_run_name"] or out_dir.name,
        "id": run_id,
        "resume": "allow",
        "dir": str(out_dir),
        "config": settings,
    }
    try:
        return wandb.init(**options)
    except wandb.Error as error:
        offline = "logging offline, to be sent by: wandb sync"
        print(f"note: wandb cannot be reached ({error}); {offline}", file=sys.stderr)
        return wandb.init(**options, mode="offline")


LOGGERS = {"tensorboard": TensorBoard, "wandb": start_wandb}

# --------------------------------------------------------------------------------------
# The plot


def draw_losses(rows: list[dict], path: Path, settings: dict) -> None:
    """Plot training and validation loss against steps. The numbers are in the legend, above the axes."""
    val = points(rows, "val_loss")
    if not val:
        return
    import matplotlib  # here, since it takes a second to load and the first step should not wait for it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    regularized = [
        f"{key}={settings[key]}" for key in ("dropout", "label_smoothing") if settings[key]
    ]
    label = "training"
    if regularized:
        label += f", with {' and '.join(regularized)}: not comparable"
    train = points(rows, "train_loss")
    marker = "o" if len(train) == 1 else None  # a line of one point cannot be seen
    style = {"color": "#9db4c8", "linewidth": 1, "markersize": 3.5}
    axes.plot(*zip(*train, strict=True), marker=marker, label=label, **style)
    step, lowest = min(val, key=lambda point: point[1])
    label = f"validation, lowest {lowest:.3f} at step {step:,}"
    style = {"color": "#c2410c", "linewidth": 1.8, "markersize": 3.5}
    axes.plot(*zip(*val, strict=True), marker="o", label=label, **style)
    axes.set(xlabel="steps", ylabel="loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    title = f"HumptyGPT: {path.parent.name}"
    figure.legend(title=title, title_fontsize="large", frameon=False, loc="outside upper center")
    files.write_whole(path, lambda file: figure.savefig(file, dpi=130, format="png"))
    plt.close(figure)


def points(rows: list[dict], key: str) -> list[tuple[int, float]]:
    return [(row["iter"], row[key]) for row in rows if key in row]
