"""Compare runs: one table and one picture.

    python compare.py out/article/*                    a row per run, in the order given; the picture goes to out/
    python compare.py $(ls -dtr out/*)                 the same, oldest first: the shell sorts them
    python compare.py out/* --csv=- > runs.csv         the table as data, in full precision

A run is a folder that train.py wrote; one in progress is shown as far as it is. Its row has its lowest validation loss
and the settings in which it differs from most runs. Where tokenizers differ, compare bits per byte. A run counts as
running if it wrote metrics in the last two minutes, or in the last ten log_intervals.
"""

import csv
import dataclasses
import io
import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from humptygpt import configurator, files
from humptygpt.configurator import UserError, setting
from humptygpt.run_folder import read_metrics
from humptygpt.schema import parse_json

# torch and matplotlib are imported where they are needed: they take seconds, and a misspelt key should not wait.

# Settings of where a run writes, how often, and where it logs: they do not affect what it learns
IGNORED = {"out_dir", "init_from", "eval_only", "always_save_checkpoint", "log_interval", "backend"}
IGNORED |= {"wandb_log", "wandb_project", "wandb_run_name"}
SETTINGS = {"max_iters": range(1, 2**53), "log_interval": range(1, 2**53), "early_stopping": range(2**53)}
SETTINGS |= {"n_layer?": range(1, 10_000)}  # the model is built to count its parameters


@dataclass(frozen=True)
class CompareConfig:
    runs: tuple[str, ...] = setting((), "folders of runs; bare arguments are added to them", "compare")
    picture: str | None = setting("out/compare.png", "PNG file of the loss curves; None: no picture")
    csv: str | None = setting(None, "CSV file of the table; -: stdout, with nothing else there")
    json: str | None = setting(None, "JSON file of the table, a list of objects; -: stdout, with nothing else there")

    def __post_init__(self):
        if not self.runs:
            raise ValueError("no run to compare; try: python compare.py out/*")
        if self.picture is not None and not self.picture.endswith(".png"):
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


def main(argv: list[str]) -> None:
    config = configurator.make(CompareConfig, configurator.read(argv, CompareConfig, positional="runs"))
    outputs = (config.picture, config.csv, config.json)  # out/* includes what the last call wrote there
    runs = read_runs([Path(folder) for folder in config.runs if folder not in outputs])
    differences = find_differences(runs)
    if protocol := [key for key in ("dataset", "eval_iters") if key in differences]:
        keys = " and ".join(protocol)
        print(f"note: the runs differ in {keys}; losses compare only on the same validation text", file=sys.stderr)
    table = [describe(run, name) for run, name in zip(runs, name_runs(runs), strict=True)]
    if "-" not in outputs:
        print(format_table(table, differences, shutil.get_terminal_size((120, 24)).columns), flush=True)
    data = [row | {key: run.settings.get(key) for key in differences} for row, run in zip(table, runs, strict=True)]
    if config.csv:
        write(config.csv, to_csv(data).encode())
    if config.json:
        write(config.json, f"{json.dumps(data, indent=1)}\n".encode())
    if config.picture:
        draw(table, [curve(run) for run in runs], config.picture)


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
        raise UserError(f"nothing to compare: {errors[0] if errors else 'no folder is given'}{others}")
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
        raise UserError(f"{folder} is not a run: {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{folder} is not a run: its config.json is damaged: {error}") from error
    if damaged := rows[:-1].count(None):  # the last line may be one that is being written
        print(f"note: {metrics} has damaged lines, skipped: {damaged}", file=sys.stderr)
    return Run(folder, settings, [row for row in rows if row], idle)


def describe(run: Run, name: str) -> dict:
    """The run's row of the table, in full precision; None for what is not available (yet)."""
    rows = [row for row in run.rows if "test_bleu" not in row]  # that one follows the end of training
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
        "test_bleu": next((row["test_bleu"] for row in reversed(run.rows) if "test_bleu" in row), None),
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
    from train import TrainConfig

    names = {field.name for cls in (models.ModelConfig, TrainConfig) for field in dataclasses.fields(cls)}
    if not settings.keys() <= names:
        return None
    try:
        with torch.device("meta"):
            return models.count_parameters(models.build(configurator.make(models.ModelConfig, settings)))
    except Exception:  # values of another version, or of someone's editor, can be wrong in any way
        return None


def name_runs(runs: list[Run]) -> list[str]:
    """Their paths without the folders that all of them have in common."""
    paths = [run.folder.absolute() for run in runs]
    common = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(common)) for path in paths]


def find_differences(runs: list[Run]) -> dict[str, list[str]]:
    """{key: its value in each run} of the settings that differ between runs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in IGNORED)
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
}


def format_table(table: list[dict], differences: dict[str, list[str]], width: int) -> str:
    """The table for a terminal of this many columns.

    State and settings stand beside the numbers, or where that leaves too little room, in a second block. A setting that
    most runs agree on stands once, in the last line, and otherwise only in the rows that differ from it.
    """
    modes = {key: Counter(values).most_common(1)[0] for key, values in differences.items()}
    common = {key: value for key, (value, count) in modes.items() if 2 * count > len(table)}
    names = align([shorten(name, max(16, width // 5)) for name in ("run", *(row["run"] for row in table))], "<")
    states = align(["state", *(row["state"] for row in table)], "<")
    numbers, settings = format_numbers(table), ["settings"]
    for i in range(len(table)):
        unusual = [f"{key}={values[i]}" for key, values in differences.items() if values[i] != common.get(key)]
        settings.append(" ".join(unusual))
    wide = width - len("  ".join((names[0], numbers[0], states[0]))) >= 45
    lines = []
    for block in [(names, numbers, states, settings)] if wide else [(names, numbers), (names, states, settings)]:
        for *cells, text in zip(*block, strict=True):
            start = "  ".join((*cells, ""))
            lines += wrap(start + text, width, len(start))
        lines.append("")
    if common:
        lines += wrap(" ".join(("most runs:", *(f"{key}={value}" for key, value in common.items()))), width, 11)
    return "\n".join(lines).rstrip()


def format_numbers(table: list[dict]) -> list[str]:
    """The heading of the numbers and a line per row; a column that no row has a number for is left out."""
    columns = []
    for key, (heading, form) in NUMBERS.items():
        values = [row[key] for row in table]
        if any(value is not None for value in values):
            texts = ("—" if value is None else format(value, form) for value in values)
            columns.append(align([heading, *texts], ">"))
    bits = [row["best_bits_per_byte"] for row in table]
    if lowest := min(filter(None, bits), default=None):
        columns.append(align(["", *("best" if value == lowest else "" for value in bits)], "<"))
    return ["  ".join(line) for line in zip(*columns, strict=True)]


def align(texts: list[str], side: str) -> list[str]:
    """The texts padded to the length of the longest; side: "<" left, ">" right."""
    width = max(map(len, texts))
    return [f"{text:{side}{width}}" for text in texts]


def wrap(text: str, width: int, indent: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def shorten(text: str, length: int) -> str:
    """The text, its middle left out where it is longer: names of runs often differ at the end."""
    return text if len(text) <= length else f"{text[: (length - 1) // 2]}…{text[-(length // 2) :]}"


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
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    files.write_whole(Path(path), lambda file: file.write(content))
    print(f"{path} written", file=sys.stderr)


# Ten colours that most people with red-green colour blindness can tell apart, too; the next ten runs are dashed
COLORS = ("#1f77b4", "#d95f02", "#2a9d4b", "#c0267e", "#7a5cc8", "#8c564b", "#e0a100", "#17a2b8", "#5f6b7a", "#9acd32")


def curve(run: Run) -> list[tuple[float, float]]:
    """(bytes of text read, bits per byte) at each evaluation: unlike tokens, bytes compare across tokenizers."""
    points = []
    for row in run.evaluations():
        if bits := row.get("val_bits_per_byte"):
            bytes_per_token = row["val_loss"] / math.log(2) / bits
            points.append((row["tokens"] * bytes_per_token, bits))
    return points


def draw(table: list[dict], curves: list[list[tuple[float, float]]], path: str) -> None:
    """Left the curves of validation loss, right a bar per run for its lowest."""
    bests = [row["best_bits_per_byte"] for row in table]
    if not any(bests):
        print("note: no run has bits per byte yet, so there is no picture", file=sys.stderr)
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    size = (12, max(4.2, 1.2 + 0.3 * len(table)))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained", width_ratios=(3, 2))
    lowest, highest = min(filter(None, bests)), max(filter(None, bests))
    for i, (points, best) in enumerate(zip(curves, bests, strict=True)):
        color, marker, dashed = COLORS[i % len(COLORS)], "osD^v"[i % 5], i // len(COLORS) % 2 == 1
        x, y = zip(*points, strict=True) if points else ((), ())
        left.plot(x, y, "--" if dashed else "-", color=color, marker=marker, markersize=4, markevery=0.1)
        right.barh(i, best or 0, color=color, hatch="///" if dashed else None, edgecolor="white", height=0.75)
        if best:
            right.plot(0.04 * highest, i, color="white", marker=marker, markersize=8, markeredgecolor=color)
        label = f" {best:.3f}" if best else " not evaluated yet"
        right.text(best or 0, i, label, va="center", fontweight="bold" if best == lowest else "normal")
    above = max(0.6 * (highest - lowest), 0.12 * lowest)  # the first evaluations, all alike, are above the axes
    left.set_title("HumptyGPT", loc="left")
    left.set(xlim=(0, None), xlabel="training text", ylabel="validation loss, bits per byte")
    left.set(ylim=(lowest - 0.08 * above, highest + above))
    left.xaxis.set_major_formatter(EngFormatter("B"))
    left.grid(alpha=0.25)
    right.set(xlim=(0, 1.2 * highest), xlabel="lowest validation loss, bits per byte")
    right.set(ylim=(max(6, len(table)) - 0.5, -0.5))
    right.set_yticks(range(len(table)), [shorten(row["run"], 36) for row in table])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, dpi=130, format="png")
    plt.close(figure)
    write(path, file.getvalue())


if __name__ == "__main__":
    configurator.run(main)
