"""Compare runs: one table and one picture.

    python compare.py out/a out/b                      a row per run, in the order given; the picture goes to out/
    python compare.py $(ls -dtr out/*)                 the same, oldest first: the shell sorts them
    python compare.py out/* --json=- > runs.json       the table as data, in full precision
    python compare.py out/article/*/* --group=True     a group for each folder in out/article

A run is a folder that train.py wrote; one in progress is shown as far as it is. Its row has its lowest validation loss
and the settings in which the runs differ; _model.py is a checksum of that file. If tokenizers differ, compare bits per
byte. A run counts as running if it has written metrics in the last ten minutes, but not that it ended.

Losses compare only on the same text. If all runs were evaluated on a part of the validation split and at the end on all
of it, the latter counts. If there is no text that all of them were evaluated on, a note says so, and none is the best.

With --group=True, runs of one folder that differ in nothing but the seed, such as idea/with-1 and idea/with-2, are one
row, the mean of their lowest losses; so are idea/with/1 and idea/with/2. With --minutes, they may also differ in steps,
dropout and weight decay, which the clock chooses. Each row is compared in bits per byte with the first one of its
group, or with --baseline=NAME. The ranges of their seeds tell whether the difference means something. Rows come in the
order given. The shell sorts by name: 1-without, 2-with puts the baseline first.
"""

import io
import json
import math
import os
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from humptygpt import config as configurator
from humptygpt import machine
from humptygpt.config import UserError, note
from humptygpt.files import write_whole
from humptygpt.metrics import read_metrics
from humptygpt.schema import parse_json

# torch and matplotlib are imported where they are needed: they take seconds, and a misspelt key should not wait.

# Settings of where a run writes, how often, and where it logs: they do not affect what it learns
IGNORED = {
    "out_dir",
    "init_from",
    "eval_only",
    "always_save_checkpoint",
    "log_interval",
    "parallel",
    "backend",
    "log",
    "wandb_log",
    "wandb_project",
    "wandb_run_name",
    "_parameters",
}
# Settings that --minutes chooses by the time, apart from the sizes of the model and of a batch
BY_CLOCK = {"max_iters", "eval_interval", "warmup_iters", "dropout", "weight_decay"}
SETTINGS = {"max_iters": range(1, 2**53), "_parameters?": range(2**53)}
# the end of heads-1 and heads_seed=1, or all of 1
SEED = re.compile(r"(^|[-_])(seed[-_=]?)?\d+$")
BITS = "best_bits_per_byte"


@dataclass(frozen=True)
class CompareConfig:
    # compare
    runs: tuple[str, ...] = ()  # folders of runs; bare arguments are added to them
    group: bool = False  # compare within each folder of runs, and merge seeds
    baseline: str | None = None  # the row to compare with in each group; None: the first
    picture: str | None = "out/compare.png"  # PNG file of the losses; None: no picture
    json: str | None = None  # JSON file of the table, a list of objects; -: stdout

    @classmethod
    def choices(cls) -> dict:
        return {}

    def validate(self) -> None:
        if self.picture is not None and not self.picture.lower().endswith(".png"):
            raise ValueError(f"picture={self.picture} must end in .png")


@dataclass
class Run:
    folder: Path  # absolute
    settings: dict  # config.json
    rows: list[dict]  # metrics.jsonl
    idle: float  # seconds since it last wrote metrics


@dataclass
class Group:
    title: str | None  # None: all runs, each its own row
    runs: list[Run]  # the first of each row of the table
    table: list[dict]
    differing: list[str]  # the settings that differ between rows


def main(argv: list[str]) -> None:
    given = configurator.read(argv, CompareConfig, positional="runs")
    config = configurator.make(CompareConfig, given)
    outputs = (config.picture, config.json)
    # out/* includes what the last call wrote there
    runs = read_runs([folder for folder in config.runs if folder not in outputs])
    if config.group or config.baseline:
        groups = find_groups(runs, config.baseline)
    else:
        names = short_names([run.folder for run in runs])
        rows = [(name, [run]) for name, run in zip(names, runs, strict=True)]
        groups = [make_group(None, rows)]
    for group in groups:
        if "-" not in outputs:
            print(format_table(group), flush=True)
    if config.json:
        data = table_data(groups)
        write(config.json, f"{json.dumps(data, indent=1)}\n".encode())
    if config.picture:
        draw(groups, config.picture)


# --------------------------------------------------------------------------------------
# Runs


def read_runs(folders: list[str]) -> list[Run]:
    """Read the runs; a folder that is not a run is reported and skipped. Raises UserError if none is."""
    runs = []
    for folder in folders:
        try:
            runs.append(read_run(Path(folder)))
        except UserError as error:
            note(f"{error}; skipped")
    if not runs:
        raise UserError("no run to compare; try: python compare.py out/*")
    return runs


def read_run(folder: Path) -> Run:
    """Read a run's folder; damaged lines of its metrics are reported and skipped. Raises UserError if it is no run."""
    metrics = folder / "metrics.jsonl"
    try:
        settings = parse_json((folder / "config.json").read_text("utf-8"), SETTINGS)
        if not all(f"{key}{value}".isprintable() for key, value in settings.items()):
            raise ValueError("it has unprintable characters")
        idle = time.time() - metrics.stat().st_mtime
    except (OSError, ValueError) as error:
        reason = error
        if isinstance(error, OSError):
            inside = any(folder.glob("*/config.json"))
            advice = f"; for the runs in it: python compare.py {folder}/*" if inside else ""
            reason = f"cannot read {error.filename}: {error.strerror}{advice}"
        raise UserError(f"{folder} is not a run: {reason}") from error
    rows = read_metrics(metrics)
    if None in rows:
        which = f"{rows.count(None)}, the first is line {rows.index(None) + 1}"
        note(f"{metrics} has damaged lines, skipped: {which}")
    # a run of an earlier version lacks the keys that came later, which change nothing at these values
    settings = default_settings() | {"mlp_conv": 0} | settings
    return Run(folder.absolute(), settings, [row for row in rows if row], idle)


def default_settings() -> dict:
    from humptygpt.settings import TrainConfig
    from model import ModelConfig

    return vars(ModelConfig()) | vars(TrainConfig())


def results(run: Run) -> dict[str, dict]:
    """Return {checksum of a text: the evaluation on it with the lowest loss}; the newest text comes last.

    An evaluation before the first step is left out, since it is of the model that the run started from.
    """
    # a run of an earlier version has no checksum; these settings decide which part of the text is evaluated
    unknown = (
        "{dataset} {block_size} {batch_size} {gradient_accumulation_steps}"
        " {eval_interval} {eval_iters}"
    ).format(**run.settings)
    best = {}
    for row in run.rows:
        row = {key.removeprefix("whole_"): value for key, value in row.items()}
        if "val_loss" in row and row["iter"]:
            text = str(row.get("val_text", unknown))
            best[text] = min(best.pop(text, row), row, key=lambda each: each["val_loss"])
    return best


def measure(run: Run, text: str | None) -> dict:
    """Return what a run's metrics say, in full precision; None for what is not available (yet).

    text: the checksum of that which counts; None: the newest.
    """
    last = {"iter": 0, "tokens": 0, "seconds": 0}
    for row in run.rows:
        last |= row
    found = results(run)
    best = found.get(text) or next(reversed(found.values()), {})
    steps = run.settings["max_iters"]
    position = last.get("position", last["iter"])
    evaluated = [row["iter"] for row in run.rows if "val_loss" in row]
    # a run of an earlier version does not say that it is done, but ends with an evaluation
    old = "position" not in last and evaluated[-1:] >= [steps]
    if old or last.get("end") == "done":
        state = "done"
    else:
        ended = "end" in last or run.idle >= 600
        state = f"{'stopped' if ended else 'running'} at {100 * position // steps:.0f} %"
    return {
        "state": state,
        "iter": last["iter"],
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "tokens_per_second": last["tokens"] / last["seconds"] if last["seconds"] else None,
        "best_iter": best.get("iter"),
        "best_val_loss": best.get("val_loss"),
        BITS: best.get("val_bits_per_byte"),
        "val_tokens": best.get("val_tokens"),
        "test_bleu": last.get("test_bleu"),
    }


# --------------------------------------------------------------------------------------
# Groups


def short_names(folders: list[Path]) -> list[str]:
    """Return the paths without the folders that all of them have in common."""
    common = os.path.commonpath([folder.parent for folder in folders])
    return [str(folder.relative_to(common)) for folder in folders]


def place(folder: Path) -> tuple[Path, str]:
    """Return group and variant of group/variant-1 or group/variant/1, whose number is that of the seed."""
    variant = SEED.sub("", folder.name)
    if variant:
        return folder.parent, variant
    return folder.parent.parent, folder.parent.name


def find_groups(runs: list[Run], baseline: str | None) -> list[Group]:
    """Sort the runs into groups, by folder; those of a variant that differ only in the seed are one row."""
    folders = {}
    for run in runs:
        folder, variant = place(run.folder)
        keys = run.settings.keys() - IGNORED - {"seed"}
        if run.settings["minutes"]:
            keys -= BY_CLOCK
        learnt = {key: run.settings[key] for key in keys}
        row = variant, json.dumps(learnt, sort_keys=True)
        folders.setdefault(folder, {}).setdefault(row, []).append(run)
    groups = []
    titles = short_names(list(folders))
    for title, folder in zip(titles, folders, strict=True):
        rows = []
        for (variant, _), seeds in folders[folder].items():
            alone = str(seeds[0].folder.relative_to(folder))
            rows.append((variant if len(seeds) > 1 else alone, seeds))
        names = [name for name, _ in rows]
        if baseline and baseline not in names:
            raise UserError(
                f"baseline={baseline} is not a row of {title}: {', '.join(names)}"
            )
        rows.sort(key=lambda row: row[0] != baseline)
        groups.append(make_group(title, rows))
    return groups


def make_group(title: str | None, rows: list[tuple[str, list[Run]]]) -> Group:
    """Make a table; rows: the name of each, and the runs that are merged into it."""
    runs = [run for _, seeds in rows for run in seeds]
    found = [texts for run in runs if (texts := results(run))] or [{}]
    common = [text for text in found[0] if all(text in texts for texts in found)]
    text = common[-1] if common else None
    table = [summarize(name, seeds, title, text) for name, seeds in rows]
    evaluated = [row for row in table if row[BITS]]
    if evaluated and not common:
        which = f"the runs of {title}" if title else "the runs"
        sizes = [
            f"{row['run']} on {row['val_tokens'] or 'unknown'} tokens" for row in evaluated
        ]
        problem = "were evaluated on different texts, so none is the best"
        note(f"{which} {problem}: {', '.join(sizes)}")
    elif evaluated:
        for row in table[1:]:
            if title and row[BITS] and table[0][BITS]:
                row["difference"] = row[BITS] - table[0][BITS]
        best = min(evaluated, key=lambda row: row[BITS])
        best["remark"] = "best"
    runs = [seeds[0] for _, seeds in rows]
    keys = {key for run in runs for key in run.settings} - IGNORED
    if title:
        keys.discard("seed")
    differing = []
    for key in sorted(keys):
        if len({shown_value(run, key) for run in runs}) > 1:
            differing.append(key)
    return Group(title, runs, table, differing)


def shown_value(run: Run, key: str) -> str:
    """Return a setting as the table shows it."""
    return str(run.settings.get(key, "—"))


def summarize(name: str, runs: list[Run], group: str | None, text: str | None) -> dict:
    """Return the row of runs that differ only in the seed: means, and the range of the bits per byte."""
    measured = [measure(run, text) for run in runs]
    states = Counter(figures.pop("state") for figures in measured)
    bits = [figures[BITS] for figures in measured if figures[BITS] is not None]
    row = {
        "group": group,
        "run": name,
        "folder": os.path.relpath(runs[0].folder),
        "state": ", ".join(
            f"{count} {state}" if group else state for state, count in states.items()
        ),
        "parameters": runs[0].settings.get("_parameters"),
        "seeds": len(bits),
        "lowest": min(bits) if len(bits) > 1 else None,
        "highest": max(bits) if len(bits) > 1 else None,
        "difference": None,
        "remark": "",
    }
    for key in measured[0]:
        values = [figures[key] for figures in measured if figures[key] is not None]
        row[key] = statistics.mean(values) if values else None
    return row


# --------------------------------------------------------------------------------------
# The table

COLUMNS = {  # key of a row: heading and format of a number, which stands at the right
    "run": ("run", ""),
    "parameters": ("parameters", ","),
    "seconds": ("seconds", ",.1f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "test_bleu": ("BLEU", ".2f"),
    "best_val_loss": ("val loss", ".4f"),
    "best_iter": ("iter", ".0f"),
    BITS: ("bits/byte", ".3f"),
    "lowest": ("lowest", ".3f"),
    "highest": ("highest", ".3f"),
    "difference": ("difference", "+.3f"),
    "remark": ("", ""),
    "state": ("state", ""),
}


def format_table(group: Group) -> str:
    """Return a line for each row; columns without a value are left out."""
    columns = []
    for key, (heading, form) in COLUMNS.items():
        values = [row[key] for row in group.table]
        if set(values) != {None}:
            texts = ["—" if number is None else format(number, form) for number in values]
            texts.insert(0, heading)
            width = max(map(len, texts))
            side = ">" if form else "<"
            columns.append([f"{text:{side}{width}}" for text in texts])
    settings = ["settings"]
    for run in group.runs:
        settings.append(
            " ".join(f"{key}={shown_value(run, key)}" for key in group.differing)
        )
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, settings, strict=True)]
    return "\n".join(["", group.title, *lines] if group.title else lines)


def table_data(groups: list[Group]) -> list[dict]:
    """Return the rows of all groups, with the settings in which any of them differ."""
    keys = dict.fromkeys(key for group in groups for key in group.differing)
    return [
        row | {key: run.settings.get(key) for key in keys}
        for group in groups
        for row, run in zip(group.table, group.runs, strict=True)
    ]


def write(path: str, content: bytes) -> None:
    """Write a whole file, or where path is "-", to stdout."""
    if path == "-":
        print(content.decode(), end="", flush=True)
        return
    write_whole(Path(path), lambda file: file.write(content))
    print(f"{path} written", file=sys.stderr)


# --------------------------------------------------------------------------------------
# The picture

BLUE = "#1f77b4"
GREY = "#5f6b7a"
# Ten colours that most people with red-green colour blindness can tell apart, too; the next ten runs are dashed
COLORS = (
    BLUE,
    "#d95f02",
    "#2a9d4b",
    "#c0267e",
    "#7a5cc8",
    "#8c564b",
    "#e0a100",
    "#17a2b8",
    GREY,
    "#9acd32",
)
CAPTION = """lowest validation loss, bits per byte: further left is better; the scales of the panels differ
dot and line: mean and range of the seeds. bar: difference from the first row"""


def draw(groups: list[Group], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    if groups[0].title is None:
        draw_runs(figure, groups[0])
    else:
        draw_groups(figure, groups)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, dpi=130, format="png")
    write(path, file.getvalue())


def curve(run: Run) -> tuple[list[float], list[float]]:
    """Return bytes of text read and bits per byte at each evaluation: unlike tokens, they compare across tokenizers."""
    read, bits = [], []
    for row in run.rows:
        if per_byte := row.get("val_bits_per_byte"):
            per_token = row["val_loss"] / math.log(2)
            read.append(row["tokens"] * per_token / per_byte)
            bits.append(per_byte)
    return read, bits


def draw_runs(figure, group: Group) -> None:
    """Draw the curves of validation loss at the left, and the lowest of each at the right."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure.set_size_inches(12, max(4.2, 1.2 + 0.3 * len(group.runs)))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    colors = [COLORS[i % len(COLORS)] for i in range(len(group.runs))]
    for i, run in enumerate(group.runs):
        style = "-" if i < len(COLORS) else "--"
        left.plot(*curve(run), style, color=colors[i], marker="o", markersize=4)
    # logarithmic, so that the first evaluations, far above the others, leave room for their differences
    left.set(yscale="log", ylabel="validation loss, bits per byte", xlabel="training text")
    left.yaxis.set_major_locator(MaxNLocator(10, steps=(1, 2, 5, 10)))
    left.yaxis.set_major_formatter("{x:.4g}")
    left.minorticks_off()
    left.xaxis.set_major_formatter(EngFormatter("B"))
    left.grid(alpha=0.25)
    draw_group(right, group, colors)
    right.set_xlabel("lowest validation loss, bits per byte")


def draw_groups(figure, groups: list[Group]) -> None:
    """Draw a panel per group."""
    heights = [0.6 + 0.27 * len(group.table) for group in groups]
    figure.set_size_inches(6, 0.7 + sum(heights))
    panels = figure.subplots(len(groups), squeeze=False, height_ratios=heights)
    for (panel,), group in zip(panels, groups, strict=True):
        draw_group(panel, group, [GREY, *[BLUE] * (len(group.runs) - 1)])
    figure.supxlabel(CAPTION, fontsize=8)


def draw_group(panel, group: Group, colors: list[str]) -> None:
    """Draw for each row the mean and the range of its seeds, and a bar from the first row's mean to it."""
    labels = []
    for y, (row, color) in enumerate(zip(group.table, colors, strict=True)):
        bits = row[BITS]
        if not bits:
            labels.append(row["run"])
            continue
        labels.append(f"{row['run']}  {bits:.3f}")
        difference = row["difference"] or 0
        panel.barh(y, -difference, left=bits, color=color, alpha=0.3, height=0.4)
        panel.plot([row["lowest"] or bits, row["highest"] or bits], [y, y], color=color)
        panel.plot(bits, y, "o", color=color)
    panel.use_sticky_edges = False  # or bars would leave no margin
    panel.margins(x=0.1)
    panel.set_ylim(len(labels) - 0.5, -0.5)
    panel.set_yticks(range(len(labels)), labels)
    panel.set_title(group.title, loc="left", fontsize=10)
    panel.locator_params(axis="x", nbins=4)
    panel.tick_params(labelsize=8)


if __name__ == "__main__":
    machine.run(main)
