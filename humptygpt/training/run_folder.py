"""out_dir: what a run writes there beside its checkpoints, and what it finds there of an earlier run."""

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

FILES = (
    "ckpt.pt",
    "best.pt",
    "adapter",
    "metrics.jsonl",
    "loss.png",
    "config.json",
    "wandb_id",
    "tensorboard",
)
FILES += ("ckpt", "ckpt.old", "best", "best.old")  # sharded


def lock_out_dir(out_dir: Path) -> Lock:
    """To be held from before its checkpoint is read until the run has ended. Raises UserError."""
    try:
        return Lock(
            out_dir / ".lock",
            f"out_dir={out_dir}",
            "name another --out_dir, or wait until that run has ended",
        )
    except OSError as error:
        raise files.cannot_write(out_dir, error, "; name another --out_dir") from error


class RunFolder:
    """metrics.jsonl, loss.png, config.json and, if asked for, TensorBoard's files and a run on Weights & Biases.

    A new run moves an older one's files aside; a resumed one drops the metrics that came after its checkpoint. Either
    holds the lock of its folder: see lock_out_dir.
    """

    def __init__(self, path: Path, settings: dict, resumed_at: int):
        """settings: of the run, as in config.json. resumed_at: steps done; 0: a new run. Raises UserError."""
        self.path, self.settings, self.rows = path, settings, []
        self.metrics = path / "metrics.jsonl"
        try:
            path.mkdir(parents=True, exist_ok=True)
            if resumed_at:
                # the test split is scored at the end, and again if there is more to come
                rows = itertools.takewhile(bool, read_metrics(self.metrics))
                self.rows = [
                    row for row in rows if row["iter"] <= resumed_at and "test_bleu" not in row
                ]
            else:
                keep_earlier_run(path)
            files.remove_unfinished(path, FILES)
        except OSError as error:
            raise files.cannot_write(path, error, "; name another --out_dir") from error
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        files.write_whole(self.metrics, lambda file: file.write(lines.encode()))
        content = json.dumps(settings, indent=1)
        files.write_whole(path / "config.json", lambda file: file.write(content.encode()))
        start = {"tensorboard": TensorBoard, "wandb": start_wandb}
        self.loggers = [
            start[name](path, settings, resumed_at) for name in chosen_loggers(settings)
        ]

    def record(self, row: dict) -> None:
        """Add a row of metrics."""
        self.rows.append(row)
        files.append(self.metrics, json.dumps(row))
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


def keep_earlier_run(out_dir: Path) -> None:
    """Move an earlier run's files aside; killed in between, the next start moves the rest."""
    found = [name for name in FILES if (out_dir / name).exists()]
    begun_only = (out_dir / "metrics.jsonl").exists() and not (
        out_dir / "metrics.jsonl"
    ).stat().st_size
    if (not found or begun_only) and not files.being_moved(out_dir):
        return
    kept = files.move_aside(out_dir, found)
    print(f"note: {out_dir} held an earlier run; it is now in {kept}", file=sys.stderr)


LOGGERS = ("tensorboard", "wandb")


def chosen_loggers(settings: dict) -> list[str]:
    """Of LOGGERS, those that a run logs to, each once; settings: of the run. Raises ValueError for another name."""
    names = [name.strip() for name in settings.get("log", "").split(",") if name.strip()]
    if unknown := [name for name in names if name not in LOGGERS]:
        raise ValueError(f"log={settings['log']}: {unknown[0]} is not one of: {', '.join(LOGGERS)}")
    return list(dict.fromkeys(names + ["wandb"] * settings["wandb_log"]))


def import_loggers(settings: dict) -> None:
    """Raises UserError where a package is missing."""
    for name in chosen_loggers(settings):
        {"tensorboard": import_tensorboard, "wandb": import_wandb}[name]()


def import_tensorboard() -> ModuleType:
    try:
        from torch.utils import tensorboard
    except ImportError as error:
        raise UserError(
            "log=tensorboard needs the package tensorboard: pip install tensorboard"
        ) from error
    return tensorboard


class TensorBoard:
    """Files in out_dir/tensorboard, which `tensorboard --logdir=out` shows; with the methods of a wandb run."""

    def __init__(self, out_dir: Path, settings: dict, resumed_at: int):
        """What an earlier process logged after the step at which this one resumes is no longer shown."""
        purge_step = resumed_at + 1 if resumed_at else None
        folder = str(out_dir / "tensorboard")
        try:
            self.writer = import_tensorboard().SummaryWriter(folder, purge_step=purge_step)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}") from error

    def log(self, row: dict, step: int) -> None:
        for key, value in row.items():
            if key != "iter" and type(value) in (int, float):
                self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


def import_wandb() -> ModuleType:
    """The package, and not a folder of that name, which it leaves behind and Python would import as well."""
    try:
        import wandb

        assert wandb.init
    except (ImportError, AttributeError) as error:
        raise UserError(
            "log=wandb, or wandb_log=True, needs the package wandb: pip install wandb"
        ) from error
    return wandb


def start_wandb(out_dir: Path, settings: dict, resumed_at: int):
    """The run on Weights & Biases, the same however often it is resumed here; offline where that cannot be reached."""
    wandb, id_file = import_wandb(), out_dir / "wandb_id"
    earlier = id_file.read_bytes() if resumed_at and id_file.exists() else b""
    run_id = earlier.decode() if re.fullmatch(rb"[0-9a-f]{8}", earlier) else secrets.token_hex(4)
    files.write_whole(id_file, lambda file: file.write(run_id.encode()))
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
        print(
            f"note: wandb cannot be reached ({error}); logging offline, to be sent by: wandb sync",
            file=sys.stderr,
        )
        return wandb.init(**options, mode="offline")


def draw_losses(rows: list[dict], path: Path, settings: dict) -> None:
    """The plot of a run: training and validation loss against steps. Its numbers are in the legend, above the axes."""
    val = [(row["iter"], row["val_loss"]) for row in rows if "val_loss" in row]
    if not val:
        return
    import matplotlib  # here, since it takes a second to load and the first step should not wait for it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    train = [(row["iter"], row["train_loss"]) for row in rows if "train_loss" in row]
    only_training = ("dropout", "label_smoothing")
    harder = " and ".join(f"{key}={settings[key]}" for key in only_training if settings[key])
    label = f"training, with {harder}: not comparable" if harder else "training"
    marker = "o" if len(train) == 1 else None  # a line of one point cannot be seen
    axes.plot(
        *zip(*train, strict=True),
        color="#9db4c8",
        linewidth=1,
        marker=marker,
        markersize=3.5,
        label=label,
    )
    best = min(val, key=lambda point: point[1])
    label = f"validation, lowest {best[1]:.3f} at step {best[0]:,}"
    axes.plot(
        *zip(*val, strict=True),
        color="#c2410c",
        linewidth=1.8,
        marker="o",
        markersize=3.5,
        label=label,
    )
    axes.set(xlabel="steps", ylabel="loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    title = f"HumptyGPT: {path.parent.name}"
    figure.legend(title=title, title_fontsize="large", frameon=False, loc="outside upper center")
    files.write_whole(path, lambda file: figure.savefig(file, dpi=130, format="png"))
    plt.close(figure)
