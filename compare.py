"""Several runs -> one table and one picture.

    python compare.py out/article/*                    a row for each run, in the order given; the picture in out/
    python compare.py $(ls -dtr out/*)                 the same, oldest first: the shell orders them
    python compare.py out/* --csv=- > runs.csv         the table as data, in full precision

A run is a folder that train.py wrote; one that is still going is shown as far as it is. Its row tells the settings in
which it differs from what most of the runs have, and its lowest validation loss. Where tokens differ, only bits per
byte compare. A run counts as running if it wrote in the last two minutes, or in ten times its log_interval.
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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from humptygpt import configurator, files
from humptygpt.configurator import UserError, setting

# torch and matplotlib are imported where they are needed: they take seconds, and a misspelt key should not wait.

# Settings that say where a run writes, how often and to whom, but nothing about what it trains
NO_DIFFERENCE = {"out_dir", "init_from", "eval_only", "always_save_checkpoint", "log_interval", "backend"}
NO_DIFFERENCE |= {"wandb_log", "wandb_project", "wandb_run_name"}


@dataclass(frozen=True)
class CompareConfig:
    runs: tuple[str, ...] = setting((), "the folders of the runs; bare arguments are those", group="compare")
    picture: str | None = setting("out/compare.png", "where the picture goes, a PNG; None: draw none")
    csv: str | None = setting(None, "where the table goes as CSV; -: to stdout, with nothing else there")
    json: str | None = setting(
        None, "where the table goes as JSON, a list with an object a run; -: to stdout, alone there"
    )

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
    quiet: float  # seconds since it last wrote metrics


def main(argv: list[str]) -> None:
    config = configurator.make(CompareConfig, configurator.read(argv, CompareConfig, positional="runs"))
    runs, notes = [], []
    for folder in config.runs:
        if folder in (config.picture, config.csv, config.json):  # out/* holds what the last call wrote there
            continue
        try:
            runs.append(read_run(Path(folder)))
        except UserError as error:
            notes.append(str(error))
    if not runs:
        others = f" (nor are {len(notes) - 1} others)" if notes[1:] else ""
        raise UserError(f"nothing to compare: {notes[0] if notes else 'no folder is given'}{others}")
    for note in notes:
        print(f"note: {note}; left out", file=sys.stderr)

    differences = find_differences(runs)
    protocol = [key for key in ("dataset", "eval_iters") if key in differences]
    if protocol:
        keys = " and ".join(protocol)
        print(f"note: {keys} not the same in all; losses compare only on the same validation text", file=sys.stderr)
    table = [describe(run, name) for run, name in zip(runs, name_runs(runs), strict=True)]
    if "-" not in (config.csv, config.json):
        print(layout(table, differences, shutil.get_terminal_size((120, 24)).columns), flush=True)
    data = [row | {key: run.settings.get(key) for key in differences} for row, run in zip(table, runs, strict=True)]
    for path, text in ((config.csv, to_csv), (config.json, lambda data: json.dumps(data, indent=1) + "\n")):
        if path == "-":
            print(text(data), end="", flush=True)
        elif path:
            write(Path(path), text(data).encode())
    if config.picture:
        draw(table, [curve(run) for run in runs], Path(config.picture))


# --------------------------------------------------------------------------------------
# A folder -> what is known of the run


def read_run(folder: Path) -> Run:
    """Raises UserError for a folder that is no run."""
    metrics = folder / "metrics.jsonl"
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        quiet = time.time() - metrics.stat().st_mtime
    except OSError as error:
        path = error.filename if folder.is_dir() else folder
        raise UserError(f"{folder} is no run: {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{folder} is no run: its config.json is damaged") from error
    needed = ("max_iters", "log_interval", "early_stopping")
    if not isinstance(settings, dict) or any(type(settings.get(key)) is not int for key in needed):
        raise UserError(f"{folder} is no run: its config.json is not one of train.py")
    rows = []
    for line in lines:
        with suppress(ValueError):  # the last line of a run that is going may be half-written
            rows.append(json.loads(line))
    rows = [row for row in rows if isinstance(row, dict) and {"iter", "tokens", "seconds"} <= row.keys()]
    return Run(folder, settings, rows, quiet)


def describe(run: Run, name: str) -> dict:
    """A row of the table, in full precision; None where something is not known (yet)."""
    rows = [row for row in run.rows if "test_bleu" not in row]  # which comes behind the end
    last = rows[-1] if rows else {"iter": 0, "tokens": 0, "seconds": 0}
    best = min(evaluations(run), key=lambda row: row["val_loss"], default={})
    return {
        "run": name,
        "folder": str(run.folder),
        "state": state(run, last, best),
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


def evaluations(run: Run) -> list[dict]:
    return [row for row in run.rows if "val_loss" in row]


def state(run: Run, last: dict, best: dict) -> str:
    """done, running at 40 %, stopped at 300 of 2000; the last row of metrics tells, and how long ago it was written."""
    it, steps = last["iter"], run.settings["max_iters"]
    if "val_loss" in last:  # the end is always evaluated
        since_best = sum(row["iter"] > best["iter"] for row in evaluations(run))
        if it >= steps:
            return "done"
        if 0 < run.settings["early_stopping"] <= since_best:
            return f"done early at {it} of {steps}"
    interval = run.settings["log_interval"] * last["seconds"] / max(1, it)
    if run.quiet < 120 + 10 * interval:
        return f"running at {100 * it // steps} %"
    return f"stopped at {it} of {steps}"


def count_parameters(settings: dict) -> int | None:
    """From the model, built without memory for its weights; None where this program does not know the settings."""
    import torch

    import model as models
    from train import TrainConfig

    known = {field.name for cls in (models.ModelConfig, TrainConfig) for field in dataclasses.fields(cls)}
    if not settings.keys() <= known:
        return None
    try:
        with torch.device("meta"):
            return models.count_parameters(models.build(configurator.make(models.ModelConfig, settings)))
    except Exception:  # values of another version, or of someone's editor, can be wrong in any way
        return None


def name_runs(runs: list[Run]) -> list[str]:
    """Their folders without what all of them begin with."""
    paths = [Path(os.path.abspath(run.folder)) for run in runs]  # noqa: PTH100, resolve() would follow links
    common = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(common)) for path in paths]


def find_differences(runs: list[Run]) -> dict[str, list[str]]:
    """{key: its value in each run} of the settings that are not the same in all."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in NO_DIFFERENCE)
    values = {key: [str(run.settings.get(key, "—")) for run in runs] for key in keys}
    return {key: texts for key, texts in values.items() if len(set(texts)) > 1}


# --------------------------------------------------------------------------------------
# Rows -> text


def layout(table: list[dict], differences: dict[str, list[str]], width: int) -> str:
    """The table for a terminal so many columns wide.

    A row tells a setting only where it is not what most runs have; that stands once, in the first line. Where the
    numbers leave no room for the settings, they go below them.
    """
    counted = {key: Counter(values).most_common(1)[0] for key, values in differences.items()}
    usual = {key: value for key, (value, times) in counted.items() if 2 * times > len(table)}
    lowest = min((row["best_bits_per_byte"] for row in table if row["best_bits_per_byte"] is not None), default=None)
    cells = [["run", "parameters", "seconds", "tokens/s", "val loss", "iter", "bits/byte     "]]
    translated = any(row["test_bleu"] is not None for row in table)
    if translated:
        cells[0].append("BLEU")
    notes = [("state", "settings")]
    for i, row in enumerate(table):
        name = shorten(row["run"], max(16, width // 5))
        seconds = show(row["seconds"], ",.0f" if row["seconds"] >= 100 else ".3g")
        speed = show(row["tokens_per_second"], ",.0f")
        loss, at, bits = row["best_val_loss"], row["best_iter"], row["best_bits_per_byte"]
        mark = " best" if bits is not None and bits == lowest else "     "
        numbers = seconds, speed, show(loss, ".4f"), show(at, ""), show(bits, ".3f") + mark
        cells.append([name, show(row["parameters"], ","), *numbers])
        if translated:
            cells[-1].append(show(row["test_bleu"], ".2f"))
        settings = [f"{key}={values[i]}" for key, values in differences.items() if values[i] != usual.get(key)]
        notes.append((row["state"], " ".join(settings)))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    used = sum(widths) + 2 * len(widths)
    state_width = max(len(state) for state, _ in notes)
    below = width - used < state_width + 30
    lines = []
    if usual:
        lines += [*wrap("most have: " + " ".join(f"{key}={value}" for key, value in usual.items()), width, 4), ""]
    for (name, *numbers), (state, settings) in zip(cells, notes, strict=True):
        line = "  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])])
        if below:
            lines += [line.rstrip(), *wrap(f"    {state}  {settings}", width, 4)]
        else:
            lines += wrap(f"{line}  {state.ljust(state_width)}  {settings}", width, used + state_width + 2)
    return "\n".join(lines)


def wrap(text: str, width: int, indent: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def show(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)


def shorten(text: str, most: int) -> str:
    """The text with its middle left out where it is longer: names of runs often differ at the end."""
    return text if len(text) <= most else f"{text[: (most - 1) // 2]}…{text[-(most // 2) :]}"


def to_csv(data: list[dict]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, data[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(data)
    return file.getvalue()


def write(path: Path, content: bytes) -> None:

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    files.write_whole(path, lambda file: file.write(content))
    print(f"{path} written", file=sys.stderr)


# --------------------------------------------------------------------------------------
# Rows -> picture

# Ten colours that stay apart for most who see red and green alike; the next ten runs are dashed
COLORS = ("#1f77b4", "#d95f02", "#2a9d4b", "#c0267e", "#7a5cc8", "#8c564b", "#e0a100", "#17a2b8", "#5f6b7a", "#9acd32")


def curve(run: Run) -> list[tuple[float, float]]:
    """(bytes of text read, bits per byte) at each evaluation: a byte is the same to every tokenizer."""
    points = []
    for row in evaluations(run):
        if bits := row.get("val_bits_per_byte"):
            bytes_per_token = row["val_loss"] / math.log(2) / bits
            points.append((row["tokens"] * bytes_per_token, bits))
    return points


def draw(table: list[dict], curves: list[list[tuple[float, float]]], path: Path) -> None:
    """Left the way down, right how far each run came."""
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
        every = max(1, len(points) // 8)
        left.plot(x, y, color=color, marker=marker, markersize=4, markevery=every, linestyle="--" if dashed else "-")
        right.barh(i, best or 0, color=color, hatch="///" if dashed else None, edgecolor="white", height=0.75)
        if best:
            right.plot(0.04 * highest, i, color="white", marker=marker, markersize=6)
        label = f" {best:.3f}" if best else " not evaluated yet"
        right.text(best or 0, i, label, va="center", fontweight="bold" if best == lowest else "normal")
    # not from the top, where all curves are alike: from a little above the place where the worst one ends
    above = max(0.6 * (highest - lowest), 0.12 * lowest)
    left.set(ylim=(lowest - 0.08 * above, highest + above), ylabel="validation loss, bits per byte")
    left.set(xlim=(0, None), xlabel="text read")
    left.xaxis.set_major_formatter(EngFormatter("B"))
    left.grid(alpha=0.25)
    right.set(xlim=(0, 1.2 * highest), xlabel="the lowest, bits per byte")
    right.set(ylim=(max(6, len(table)) - 0.5, -0.5), yticks=range(len(table)))
    right.set_yticklabels([shorten(row["run"], 36) for row in table])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, dpi=130, format="png")
    plt.close(figure)
    write(path, file.getvalue())


if __name__ == "__main__":
    configurator.run(main)
