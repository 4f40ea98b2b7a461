"""Pictures of losses: of one run, and of several runs side by side.

matplotlib takes a second to import, so only the functions that draw import it.
"""

import math
from pathlib import Path

from humptygpt.files import write_whole

# Ten colours that most people with red-green colour blindness can tell apart; the next ten rows are dashed
COLORS = (
    "#1f77b4",
    "#d95f02",
    "#2a9d4b",
    "#c0267e",
    "#7a5cc8",
    "#8c564b",
    "#e0a100",
    "#17a2b8",
    "#5f6b7a",
    "#9acd32",
)


def draw_losses(rows: list[dict], path: Path) -> None:
    """Plot training and validation loss against steps. The legend gives the lowest validation loss."""
    val = points(rows, "val_loss")
    if not val:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    train = zip(*points(rows, "train_loss"), strict=True)
    style = {"color": "#9db4c8", "linewidth": 1, "markersize": 1.8, "marker": "o"}
    axes.plot(*train, label="training", **style)
    # a loss before the first step belongs to the model that the run starts from
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
    write_whole(path, lambda file: figure.savefig(file, dpi=130, format="png"))


def points(rows: list[dict], key: str) -> list[tuple[int, float]]:
    return [(row["iter"], row[key]) for row in rows if key in row]


def draw_comparison(groups: dict, tables: dict[str, list[dict]]):
    """Draw a panel for each table of compare.py: the curves of its rows, with their lowest losses in the legend.

    groups: {title: [(name, runs)]}, with as many entries as the rows of the table. Returns a figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure((12, 5 * len(tables)), layout="constrained")
    panels = figure.subplots(len(tables), squeeze=False)[:, 0]
    for panel, (title, table) in zip(panels, tables.items(), strict=True):
        for i, (row, (_, runs)) in enumerate(zip(table, groups[title], strict=True)):
            style = {"color": COLORS[i % 10], "linestyle": "-" if i < 10 else "--"}
            panel.plot(*curve(runs), label=label(row), marker="o", markersize=4, **style)
        # logarithmic, so that the high losses of the first evaluations do not hide the differences between later ones
        panel.set(title=title, yscale="log", ylabel="validation loss, bits per byte")
        panel.yaxis.set_major_formatter("{x:.4g}")
        panel.yaxis.set_minor_formatter("{x:.4g}")
        panel.xaxis.set_major_formatter(EngFormatter("B"))
        panel.grid(which="both", alpha=0.25)
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.supxlabel("training text")
    return figure


def label(row: dict) -> str:
    text = row["run"]
    if row["best_bits_per_byte"]:
        text += f"  {row['best_bits_per_byte']:.3f}"
    if row["lowest"]:
        text += f" ({row['lowest']:.3f} to {row['highest']:.3f})"
    return text


def curve(runs: list) -> tuple[list[float], list[float]]:
    """Bytes of text read and bits per byte at each evaluation. Unlike tokens, they are comparable across tokenizers."""
    read, bits = [], []
    for run in runs:
        for row in run.rows:
            if per_byte := row.get("val_bits_per_byte"):
                read.append(row["tokens"] * row["val_loss"] / math.log(2) / per_byte)
                bits.append(per_byte)
        read.append(math.nan)  # a gap between two seeds
        bits.append(math.nan)
    return read, bits
