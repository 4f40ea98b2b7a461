"""Compare runs: one table and one picture.

    python compare.py out/a out/b                      a row per run, in the order given; the picture goes to out/
    python compare.py $(ls -dtr out/*)                 the same, oldest first: the shell sorts them
    python compare.py out/* --csv=- > runs.csv         the table as data, in full precision
    python compare.py out/article/*/* --group=True     a group for each folder in out/article

A run is a folder that train.py wrote; one in progress is shown as far as it is. Its row has its lowest validation loss
and the settings in which it differs from most runs. Where tokenizers differ, compare bits per byte. A run counts as
running if it wrote metrics in the last two minutes, or in the last ten log_intervals.

With --group=True, runs of one folder that differ in nothing but the seed are one row, the mean of their lowest losses,
and each row is compared with the first one of its folder, in bits per byte: "within seeds" where the ranges of their
seeds overlap. Rows come in the order given. The shell sorts by name: 1-without, 2-with puts the baseline first.
"""

import csv
import dataclasses
import functools
import io
import json
import math
import os
import re
import shlex
import shutil
import statistics
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from humptygpt.checkpoint.metrics import read_metrics
from humptygpt.core import files
from humptygpt.core import settings as configurator
from humptygpt.core.errors import UserError
from humptygpt.core.schema import parse_json
from humptygpt.core.settings import nearest_path, setting

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
}
IGNORED |= {"log", "wandb_log", "wandb_project", "wandb_run_name"}
SETTINGS = {
    "max_iters": range(1, 2**53),
    "log_interval": range(1, 2**53),
    "early_stopping": range(2**53),
}
SETTINGS |= {"n_layer?": range(1, 10_000)}  # the model is built to count its parameters


@dataclass(frozen=True)
class CompareConfig:
    runs: tuple[str, ...] = setting(
        (), "folders of runs; bare arguments are added to them", "compare", path=True
    )
    group: bool = setting(
        False, "compare within each folder of runs, and merge runs that differ in the seed alone"
    )
    picture: str | None = setting(
        "out/compare.png", "PNG file of the losses; None: no picture", path=True
    )
    csv: str | None = setting(
        None, "CSV file of the table; -: stdout, with nothing else there", path=True
    )
    json: str | None = setting(
        None,
        "JSON file of the table, a list of objects; -: stdout, with nothing else there",
        path=True,
    )

    def __post_init__(self):
        if not self.runs:
            raise ValueError("no run to compare; try: python compare.py out/*")
        if self.picture is not None and not self.picture.lower().endswith(".png"):
            raise ValueError(f"picture={self.picture} must end in .png")
        if self.csv == self.json == "-":
            raise ValueError("csv=- and json=- cannot both have stdout; give one of them a file")


@dataclass
class Run:
    folder: Path
    settings: dict  # config.json
    rows: list[dict]  # metrics.jsonl
    idle: float  # seconds since it last wrote metrics

    def evaluations(self) -> list[dict]:
        return [row for row in self.rows if "val_loss" in row]


@dataclass
class Group:
    title: str | None  # the folder; None: all runs, each its own row
    runs: list[Run]  # one for each row of the table
    table: list[dict]
    marks: list[str]  # what to notice in a row, such as "best"
    differences: dict[str, list[str]]  # of the settings, see find_differences


def main(argv: list[str]) -> None:
    config = configurator.make(
        CompareConfig, configurator.read(argv, CompareConfig, positional="runs")
    )
    outputs = (
        config.picture,
        config.csv,
        config.json,
    )  # out/* includes what the last call wrote there
    runs = read_runs([Path(folder) for folder in config.runs if folder not in outputs])
    groups = find_groups(runs) if config.group else [describe_runs(runs)]
    for group in groups:
        if keys := " and ".join(
            key for key in ("dataset", "eval_iters") if key in group.differences
        ):
            whose = f"the runs of {group.title}" if config.group else "the runs"
            print(
                f"note: {whose} differ in {keys}; losses compare only on the same validation text",
                file=sys.stderr,
            )
    if "-" not in outputs:
        print(format_table(groups, shutil.get_terminal_size((120, 24)).columns), flush=True)
    keys = dict.fromkeys(
        key for group in groups for key in group.differences if key != "parameters"
    )
    rows = [pair for group in groups for pair in zip(group.table, group.runs, strict=True)]
    data = [row | {key: run.settings.get(key) for key in keys} for row, run in rows]
    if config.csv:
        write(config.csv, to_csv(data).encode())
    if config.json:
        write(config.json, f"{json.dumps(data, indent=1)}\n".encode())
    if config.picture:
        draw(groups, config.picture)


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs in these folders; a folder that is not a run is reported and skipped. Raises UserError if none is."""
    runs, errors = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except UserError as error:
            errors.append(str(error))
    if not runs:
        others = f" (nor are {len(errors) - 1} others)" if errors[1:] else ""
        raise UserError(
            f"nothing to compare: {errors[0] if errors else 'no folder is given'}{others}"
        )
    print("".join(f"note: {error}; skipped\n" for error in errors), end="", file=sys.stderr)
    return runs


def read_run(folder: Path) -> Run:
    """Raises UserError for a folder that is not a run. Damaged lines of its metrics are reported and skipped."""
    metrics = folder / "metrics.jsonl"
    try:
        settings = parse_json((folder / "config.json").read_text(encoding="utf-8"), SETTINGS)
        if not all(f"{key}{value}".isprintable() for key, value in settings.items()):
            raise ValueError("it has unprintable characters")
        rows = read_metrics(metrics)
        idle = time.time() - metrics.stat().st_mtime
    except OSError as error:
        raise UserError(
            f"{folder} is not a run: {error.filename}: {error.strerror}{runs_near(folder)}"
        ) from error
    except ValueError as error:
        raise UserError(f"{folder} is not a run: its config.json is damaged: {error}") from error
    if damaged := rows[:-1].count(None):  # the last line may be one that is being written
        print(f"note: {metrics} has damaged lines, skipped: {damaged}", file=sys.stderr)
    # a run of an earlier version lacks the keys that came later, and was trained as their defaults have it
    return Run(folder, default_settings() | settings, [row for row in rows if row], idle)


def runs_near(folder: Path) -> str:
    """What to write instead of a folder that is not a run: the one it is in, those in it, or a name like it."""
    if os.path.isfile(folder) and os.path.exists(folder.parent / "config.json"):
        return f"; write {shlex.quote(str(folder.parent))}"
    if os.path.isdir(folder) and any(folder.glob("*/config.json")):
        return f"; for the runs in it write {shlex.quote(str(folder))}/*"
    return "" if os.path.exists(folder) else nearest_path(str(folder))


def describe(run: Run, name: str) -> dict:
    """The run's row of the table, in full precision; None for what is not available (yet)."""
    rows = [
        row for row in run.rows if "test_bleu" not in row
    ]  # that one follows the end of training
    last = rows[-1] if rows else {"iter": 0, "tokens": 0, "seconds": 0}
    best = min(run.evaluations(), key=lambda row: row["val_loss"], default={})
    return {
        "run": name,
        "folder": str(run.folder),
        "state": find_state(run, last, best),
        "parameters": count_parameters(run.settings),
        "iter": last["iter"],
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "tokens_per_second": last["tokens"] / last["seconds"] if last["seconds"] else None,
        "best_val_loss": best.get("val_loss"),
        "best_iter": best.get("iter"),
        "best_bits_per_byte": best.get("val_bits_per_byte"),
        "test_bleu": next(
            (row["test_bleu"] for row in reversed(run.rows) if "test_bleu" in row), None
        ),
    }


def find_state(run: Run, last: dict, best: dict) -> str:
    """done, running at 40 %, stopped at 300 of 2000: from the last row of metrics and its age."""
    it, steps = last["iter"], run.settings["max_iters"]
    if "val_loss" in last:  # training always ends with an evaluation
        since_best = sum(row["iter"] > best["iter"] for row in run.evaluations())
        if it >= steps:
            return "done"
        if 0 < run.settings["early_stopping"] <= since_best:
            return f"done early at {it} of {steps}"
    interval = run.settings["log_interval"] * last["seconds"] / max(1, it)
    if run.idle < 120 + 10 * interval:
        return f"running at {100 * it // steps} %"
    return f"stopped at {it} of {steps}"


def count_parameters(settings: dict) -> int | None:
    """Of the model built without memory for its weights; None where this version does not have these settings."""
    import torch

    import model as models

    if not settings.keys() <= default_settings().keys():
        return None
    try:
        with torch.device("meta"):
            return models.count_parameters(
                models.build(configurator.make(models.ModelConfig, settings))
            )
    except Exception:  # values of another version, or of someone's editor, can be wrong in any way
        return None


@functools.cache
def default_settings() -> dict:
    """Of this version."""
    from humptygpt.training.settings import TrainConfig
    from model import ModelConfig

    return {
        field.name: field.default
        for cls in (ModelConfig, TrainConfig)
        for field in dataclasses.fields(cls)
    }


def short_names(folders: list[Path]) -> list[str]:
    """Their paths without the folders that all of them have in common."""
    paths = [folder.absolute() for folder in folders]
    common = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(common)) for path in paths]


def describe_runs(runs: list[Run]) -> Group:
    names = short_names([run.folder for run in runs])
    table = [describe(run, name) for run, name in zip(runs, names, strict=True)]
    return Group(None, runs, table, mark_best(table), find_differences(runs, IGNORED))


def find_groups(runs: list[Run]) -> list[Group]:
    """The runs by folder; those of a folder that differ in nothing but the seed are one row."""
    folders: dict[str, dict[str, dict[str, Run]]] = {}  # title: settings: seed: run
    for run, title in zip(
        runs, short_names([run.folder.absolute().parent for run in runs]), strict=True
    ):
        settings = json.dumps(
            {key: run.settings[key] for key in sorted(run.settings.keys() - IGNORED - {"seed"})}
        )
        row = folders.setdefault(title, {}).setdefault(settings, {})
        first = row.setdefault(str(run.settings.get("seed")), run)
        if first is not run:
            print(
                f"note: {run.folder} has the settings and the seed of {first.folder}; skipped",
                file=sys.stderr,
            )
    return [
        make_group(title, [list(row.values()) for row in rows.values()])
        for title, rows in folders.items()
    ]


def make_group(title: str, rows: list[list[Run]]) -> Group:
    """rows: the runs that are merged into each."""
    firsts, table = [row[0] for row in rows], [{"group": title} | merge_seeds(row) for row in rows]
    names = Counter(row["run"] for row in table)
    for row, run in zip(table, firsts, strict=True):
        if names[row["run"]] > 1:  # each is named after its first run
            row["run"] = run.folder.absolute().name
    differences, sizes = (
        find_differences(firsts, IGNORED | {"seed"}),
        [row["parameters"] for row in table],
    )
    if all(sizes) and max(sizes) > 1.05 * min(
        sizes
    ):  # a few per cent matter less than what they are for
        differences["parameters"] = [f"{size:,}" for size in sizes]
    return Group(title, firsts, table, compare_with_first(table), differences)


def merge_seeds(runs: list[Run]) -> dict:
    """The row of runs that differ in the seed alone: means with the lowest and the highest, and the median time."""
    names = [run.folder.absolute().name for run in runs]
    shared = {
        re.sub(r"[-_.]?(seed)?[-_.=]?\d+$", "", name) for name in names
    }  # heads of heads-1, heads-2
    rows = [describe(run, name) for run, name in zip(runs, names, strict=True)]
    merged = {
        "run": (shared.pop() if len(shared) == 1 < len(names) else "") or names[0],
        "folder": str(runs[0].folder.parent),
        "seeds": sum(row["best_val_loss"] is not None for row in rows),
        "state": ", ".join(
            f"{count} {state}" for state, count in Counter(row["state"] for row in rows).items()
        ),
        "parameters": rows[0]["parameters"],
        "seconds": statistics.median(row["seconds"] for row in rows),
    }
    for key in ("test_bleu", "best_val_loss", "best_bits_per_byte"):
        values = [row[key] for row in rows if row[key] is not None]
        merged[key] = statistics.fmean(values) if values else None
        low, high = (min(values), max(values)) if len(values) > 1 else (None, None)
        merged |= {f"{key}_low": low, f"{key}_high": high}
    return merged


def compare_with_first(table: list[dict]) -> list[str]:
    """Add to each row its difference from the first one, in bits per byte. Returns the marks."""
    marks = mark_best(table) if len(table) > 1 else [""]
    ranges = [[row[f"best_bits_per_byte{end}"] for end in ("", "_low", "_high")] for row in table]
    first, first_low, first_high = ranges[0]
    for i, (row, (bits, low, high)) in enumerate(zip(table, ranges, strict=True)):
        row |= {"difference": None, "within_seeds": None}
        if i and bits and first:
            row["difference"] = bits - first
            if None not in (low, first_low):
                row["within_seeds"] = low <= first_high and first_low <= high
            doubt = {True: "within seeds", False: "", None: "one seed"}[row["within_seeds"]]
            marks[i] = f"{bits - first:+.3f} {', '.join(filter(None, (marks[i], doubt)))}".rstrip()
    return marks


def mark_best(table: list[dict]) -> list[str]:
    """For each row "best" if it has the lowest bits per byte, else ""."""
    bits = [row["best_bits_per_byte"] for row in table]
    lowest = min(filter(None, bits), default=None)
    return ["best" if value and value == lowest else "" for value in bits]


def find_differences(runs: list[Run], ignored: set[str]) -> dict[str, list[str]]:
    """{key: its value in each run} of the settings that differ between runs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in ignored)
    values = {key: [str(run.settings.get(key, "—")) for run in runs] for key in keys}
    return {key: texts for key, texts in values.items() if len(set(texts)) > 1}


NUMBERS = {  # key of a row: heading and format of its column
    "parameters": ("parameters", ","),
    "seconds": ("seconds", ",.1f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "test_bleu": ("BLEU", ".2f"),
    "best_val_loss": ("val loss", ".4f"),
    "best_iter": ("iter", ""),
    "best_bits_per_byte": ("bits/byte", ".3f"),
    "best_bits_per_byte_low": ("lowest", ".3f"),
    "best_bits_per_byte_high": ("highest", ".3f"),
}


def format_table(groups: list[Group], width: int) -> str:
    """The table for a terminal of this many columns.

    State and settings stand beside the numbers, or where that leaves too little room, in a second block. Without
    --group, a setting that most runs agree on stands once, in the last line, and otherwise only in the rows that differ
    from it.
    """
    grouped, table = groups[0].title is not None, [row for group in groups for row in group.table]
    names = align(
        [shorten(name, max(16, width // 5)) for name in ("run", *(row["run"] for row in table))],
        "<",
    )
    states = align(["seeds" if grouped else "state", *(row["state"] for row in table)], "<")
    hidden = {"parameters", *(("best_val_loss",) if width < 130 else ())} if grouped else set()
    columns = format_numbers(table, [key for key in NUMBERS if key not in hidden])
    if any(marks := [mark for group in groups for mark in group.marks]):
        columns.append(align(["difference" if grouped else "", *marks], "<"))
    numbers, titles, settings, common = (
        ["  ".join(line) for line in zip(*columns, strict=True)],
        [""],
        ["settings"],
        {},
    )
    for group in groups:
        if not grouped:
            modes = {
                key: Counter(values).most_common(1)[0] for key, values in group.differences.items()
            }
            common = {key: value for key, (value, count) in modes.items() if 2 * count > len(table)}
        for i in range(len(group.table)):
            unusual = {
                key: texts[i]
                for key, texts in group.differences.items()
                if texts[i] != common.get(key)
            }
            settings.append(" ".join(f"{key}={value}" for key, value in unusual.items()))
            titles.append(group.title if grouped and i == 0 else "")
    wide = width - len("  ".join((names[0], numbers[0], states[0]))) >= (26 if grouped else 45)
    lines = []
    for block in (
        [(names, numbers, states, settings)]
        if wide
        else [(names, numbers), (names, states, settings)]
    ):
        for title, *cells, text in zip(titles, *block, strict=True):
            start = "  ".join((*cells, ""))
            lines += ["", title] if title else []
            lines += wrap(start + text, width, len(start))
        lines.append("")
    if common:
        lines += wrap(
            " ".join(("most runs:", *(f"{key}={value}" for key, value in common.items()))),
            width,
            11,
        )
    return "\n".join(lines).rstrip()


def format_numbers(table: list[dict], keys: list[str]) -> list[list[str]]:
    """A column for each key, a heading and a text per row; one that no row has a number for is left out."""
    columns = []
    for key in keys:
        heading, form = NUMBERS[key]
        values = [row.get(key) for row in table]
        if any(value is not None for value in values):
            texts = ("—" if value is None else format(value, form) for value in values)
            columns.append(align([heading, *texts], ">"))
    return columns


def align(texts: list[str], side: str) -> list[str]:
    """The texts padded to the length of the longest; side: "<" left, ">" right."""
    width = max(map(len, texts))
    return [f"{text:{side}{width}}" for text in texts]


def wrap(text: str, width: int, indent: int) -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def shorten(text: str, length: int) -> str:
    """The text, its middle left out where it is longer: names of runs often differ at the end."""
    return text if len(text) <= length else f"{text[: (length - 1) // 2]}…{text[-(length // 2) :]}"


def without_number(name: str) -> str:
    """What a picture calls 04_residual or 1-without, whose numbers only put them in order."""
    return re.sub(r"^\d+[-_.]", "", name).replace("_", " ")


def to_csv(data: list[dict]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, data[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(data)
    return file.getvalue()


def write(path: str, content: bytes) -> None:
    """Write a whole file, or where path is "-", to stdout."""
    if path == "-":
        print(content.decode(), end="", flush=True)
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.cannot_write(path, error) from error
    files.write_whole(Path(path), lambda file: file.write(content))
    print(f"{path} written", file=sys.stderr)


# Ten colours that most people with red-green colour blindness can tell apart, too; the next ten runs are dashed
BLUE, GREY = "#1f77b4", "#5f6b7a"
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
dot and line: mean and range of the seeds. bar: difference from the first row. bold: best
hollow: no clear difference, since the ranges overlap or there is one seed"""


def curve(run: Run) -> list[tuple[float, float]]:
    """(bytes of text read, bits per byte) at each evaluation: unlike tokens, bytes compare across tokenizers."""
    points = []
    for row in run.evaluations():
        if bits := row.get("val_bits_per_byte"):
            bytes_per_token = row["val_loss"] / math.log(2) / bits
            points.append((row["tokens"] * bytes_per_token, bits))
    return points


def draw(groups: list[Group], path: str) -> None:
    if not any(row["best_bits_per_byte"] for group in groups for row in group.table):
        print("note: no run has bits per byte yet, so there is no picture", file=sys.stderr)
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(layout="constrained")
    plot = draw_runs if groups[0].title is None else draw_groups
    plot(figure, groups)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, dpi=130, format="png")
    plt.close(figure)
    write(path, file.getvalue())


def draw_runs(figure, groups: list[Group]) -> None:
    """Left the curves of validation loss, right a bar per run for its lowest."""
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator, StrMethodFormatter

    (group,) = groups
    bests = [row["best_bits_per_byte"] for row in group.table]
    figure.set_size_inches(12, max(4.2, 1.2 + 0.3 * len(bests)))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    lowest, highest = min(filter(None, bests)), max(filter(None, bests))
    top = max(bits for run in group.runs for _, bits in curve(run))
    for i, (run, best) in enumerate(zip(group.runs, bests, strict=True)):
        color, marker, dashed = COLORS[i % len(COLORS)], "osD^v"[i % 5], i // len(COLORS) % 2 == 1
        x, y = zip(*points, strict=True) if (points := curve(run)) else ((), ())
        every = math.ceil(len(x) / 10) or 1
        left.plot(
            x, y, "--" if dashed else "-", color=color, marker=marker, markersize=4, markevery=every
        )
        right.barh(
            i,
            best or 0,
            color=color,
            hatch="///" if dashed else None,
            edgecolor="white",
            height=0.75,
        )
        if best:
            right.plot(
                0.04 * highest, i, color="white", marker=marker, markersize=8, markeredgecolor=color
            )
        label = f" {best:.3f}" if best else " not evaluated yet"
        right.text(
            best or 0, i, label, va="center", fontweight="bold" if best == lowest else "normal"
        )
    left.set_title("HumptyGPT", loc="left")
    # logarithmic, so that the first evaluations, far above the others, leave room for their differences
    margin = max(1.03, (top / lowest) ** 0.05)
    left.set(
        yscale="log", ylim=(lowest / margin, top * margin), ylabel="validation loss, bits per byte"
    )
    left.set(xlim=(0, None), xlabel="training text")
    left.yaxis.set_major_locator(MaxNLocator(10, steps=(1, 2, 5, 10)))
    left.yaxis.set_major_formatter(StrMethodFormatter("{x:.4g}"))
    left.yaxis.set_minor_locator(NullLocator())
    left.xaxis.set_major_formatter(EngFormatter("B"))
    left.grid(alpha=0.25)
    right.set(xlim=(0, 1.2 * highest), xlabel="lowest validation loss, bits per byte")
    right.set(ylim=(max(6, len(bests)) - 0.5, -0.5))
    right.set_yticks(range(len(bests)), [shorten(row["run"], 36) for row in group.table])


def draw_groups(figure, groups: list[Group]) -> None:
    """A panel per group: for each row the mean and the range of its seeds, and a bar from the first row's to it."""
    across = min(len(groups), 2 if len(groups) == 4 else 3)
    down, rows = math.ceil(len(groups) / across), max(len(group.table) for group in groups)
    figure.set_size_inches(10, 0.7 + down * (0.6 + 0.27 * rows))
    for number, group in enumerate(groups, start=1):
        panel = figure.add_subplot(down, across, number)
        first = group.table[0]["best_bits_per_byte"]
        for y, (row, mark) in enumerate(zip(group.table, group.marks, strict=True)):
            color, bits, label = BLUE if y else GREY, row["best_bits_per_byte"], "not evaluated yet"
            if bits:
                panel.plot(
                    [first or bits, bits],
                    [y, y],
                    color=color,
                    linewidth=8,
                    alpha=0.3,
                    solid_capstyle="butt",
                )
                ends = [row[f"best_bits_per_byte_{end}"] or bits for end in ("low", "high")]
                panel.plot(ends, [y, y], color=color)
                clear = y == 0 or row["within_seeds"] is False
                panel.plot(bits, y, "o", color=color, markerfacecolor=color if clear else "white")
                label = (
                    f"{bits:.3f}"
                    if row["difference"] is None
                    else f"{bits:.3f}  {row['difference']:+.3f}"
                )
            font = {"fontsize": 8, "fontweight": "bold" if "best" in mark else "normal"}
            panel.text(1.03, y, label, transform=panel.get_yaxis_transform(), va="center", **font)
        panel.margins(x=0.1)
        low, high = panel.get_xlim()
        around = max(0, 0.04 * high - (high - low)) / 2  # so that small differences look small
        panel.set(xlim=(low - around, high + around), ylim=(len(group.table) - 0.5, -0.5))
        panel.set_yticks(
            range(len(group.table)),
            [shorten(without_number(row["run"]), 22) for row in group.table],
        )
        panel.set_title(without_number(group.title), loc="left", fontsize=10)
        panel.locator_params(axis="x", nbins=4)
        panel.tick_params(labelsize=8)
    figure.supxlabel(CAPTION, fontsize=8)


if __name__ == "__main__":
    configurator.run(main)
