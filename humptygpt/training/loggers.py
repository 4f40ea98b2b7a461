"""What a run logs: metrics.jsonl, with one JSON object per line, loss.png and, on request, Weights & Biases."""

import secrets
from collections.abc import Iterator
from pathlib import Path

from humptygpt.cli import note
from humptygpt.files import parse_json, write_text, write_whole

# schema of a row: the entries that are read back later
ROW = {
    "kind": {"train", "eval", "whole", "test", "end"},  # whole: best.pt on the whole split
    "iter": range(2**53),
    "tokens": range(2**53),
    "seconds": float,
    "position?": float,
    "train_loss?": float,
    "val_loss?": float,
    "val_bits_per_byte?": float,
    "val_text?": str,
    "best_iter?": range(2**53),
    "test_bleu?": float,
}

# the entries of rows; others are the model's own terms of the loss, and METRICS of train.py
LOGGED = {key.removesuffix("?") for key in ROW} | {"lr", "grad_norm", "end"}
LOGGED |= {"tokens_per_second", "dtype", "threads", "mfu"}


def read_metrics(path: Path) -> list[dict]:
    """Read the rows of a metrics.jsonl, if there is such a file. Damaged rows are skipped with a note.

    A last line without a line break is incomplete, because the run is still writing it or was killed; it is ignored.
    """
    rows = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parse_json(line, ROW))
        except ValueError as error:
            note(f"{path}:{number}: skipped a damaged row: {error}")
    return rows


def own_values(row: dict) -> dict[str, float]:
    """Return the terms and METRICS in a row of training, without those that are not finite."""
    if row["kind"] != "train":
        return {}
    return {key: x for key, x in row.items() if key not in LOGGED and x is not None}


def draw_losses(rows: list[dict], path: Path, best: int) -> None:
    """Plot training and validation loss against steps. The legend gives the loss of best.pt.

    Own values are plotted below, each in a panel. best: step of best.pt.
    """
    val = points(rows, "eval", "val_loss")
    if not val:
        return
    from matplotlib.figure import Figure

    own = dict.fromkeys(key for row in rows for key in own_values(row))
    labels = ["loss, nats per token", *own]
    figure = Figure(figsize=(7, 4.2 * len(labels)), layout="constrained")
    panels = figure.subplots(len(labels), squeeze=False)[:, 0]
    axes = panels[0]
    train = zip(*points(rows, "train", "train_loss"), strict=True)
    axes.plot(*train, label="training", color="#9db4c8", linewidth=1, marker=".", markersize=3)
    # rows may be missing; a loss at step 0 belongs to the model that the run started from
    step, loss = min(val, key=lambda point: (point[0] != best, point[0] == 0, point[1]))
    label = f"validation, best {loss:.3f} at step {step:,}"
    axes.plot(*zip(*val, strict=True), label=label, color="#c2410c", marker=".")
    for panel, label in zip(panels, labels, strict=True):
        if label in own:
            panel.plot(*zip(*points(rows, "train", label), strict=True), marker=".")
        panel.set(xlabel="steps", ylabel=label)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    title = f"HumptyGPT: {path.parent.name}"
    figure.legend(title=title, frameon=False, loc="outside upper center")
    write_whole(path, lambda file: figure.savefig(file, dpi=130, format="png"))


def points(rows: list[dict], kind: str, key: str) -> list[tuple[int, float]]:
    return [(row["iter"], row[key]) for row in rows if row["kind"] == kind and row.get(key) is not None]


def evaluations(rows: list[dict]) -> Iterator[tuple[int, dict]]:
    """Yield each evaluation in the rows of a run's metrics, after the step whose model it measured."""
    for row in rows:
        if row["kind"] in ("eval", "whole"):
            yield row.get("best_iter", row["iter"]), row


def start_wandb(out_dir: Path, settings: dict, resumed_at: int):
    """Start a run on Weights & Biases, or continue a resumed one. If wandb cannot be reached, log offline."""
    import wandb

    id_file = out_dir / "wandb_id"
    if not resumed_at or not id_file.exists():
        write_text(id_file, secrets.token_hex(4))
    options = {
        "project": settings["wandb_project"],
        "name": settings["wandb_run_name"] or Path(settings["out_dir"]).name,
        "id": id_file.read_text(),
        "resume": "allow",
        "dir": settings["out_dir"],
        "config": settings,
    }
    try:
        return wandb.init(**options)
    except wandb.Error as error:
        note(f"wandb cannot be reached ({error}); logging offline; to upload the log later: wandb sync")
        return wandb.init(**options, mode="offline")
