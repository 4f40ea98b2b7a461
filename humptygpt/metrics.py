"""Metrics of runs: metrics.jsonl, with one JSON object per line, and plots of its losses.

matplotlib takes a second to import, so only the function that draws imports it.
"""

from pathlib import Path

from humptygpt.config import note
from humptygpt.files import write_whole
from humptygpt.schema import parse_json

# schema of a row: the entries that are read back later
ROW = {
    "iter": range(2**53),
    "tokens": range(2**53),
    "seconds": float,
    "position?": float,
    "train_loss?": float,
    "val_loss?": float,
    "val_bits_per_byte?": float,
    "val_text?": str,
    "whole_iter?": range(2**53),
    "whole_val_loss?": float,
    "whole_val_bits_per_byte?": float,
    "whole_val_text?": str,
    "test_bleu?": float,
}


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


# --------------------------------------------------------------------------------------
# Plots


def draw_losses(rows: list[dict], path: Path) -> None:
    """Plot training and validation loss against steps. The legend gives the lowest validation loss."""
    val = points(rows, "val_loss")
    if not val:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    train = zip(*points(rows, "train_loss"), strict=True)
    axes.plot(
        *train, label="training", color="#9db4c8", linewidth=1, marker=".", markersize=3
    )
    # a loss at step 0 belongs to the model that the run started from; it counts only if there is no other
    step, lowest = min(val, key=lambda point: (point[0] == 0, point[1]))
    label = f"validation, lowest {lowest:.3f} at step {step:,}"
    axes.plot(*zip(*val, strict=True), label=label, color="#c2410c", marker=".")
    axes.set(xlabel="steps", ylabel="loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if accuracy := points(rows, "pairs_accuracy"):
        right = axes.twinx()
        label = "pairs in which the right text is likelier"
        right.plot(*zip(*accuracy, strict=True), label=label, color="#15803d", marker=".")
        right.yaxis.set_major_formatter("{x:.0%}")
    title = f"HumptyGPT: {path.parent.name}"
    figure.legend(title=title, frameon=False, loc="outside upper center")
    write_whole(path, lambda file: figure.savefig(file, dpi=130, format="png"))


def points(rows: list[dict], key: str) -> list[tuple[int, float]]:
    return [(row["iter"], row[key]) for row in rows if key in row]
