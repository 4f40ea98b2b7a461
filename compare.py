"""Compare runs: one table and one picture.

    python compare.py out/a out/b                      one row per run, in the order given; also writes out/compare.png
    python compare.py $(ls -dtr out/*)                 the same, sorted by the shell, oldest first
    python compare.py out/* --json=True > runs.json    the table as JSON, in full precision
    python compare.py out/article/*/* --group=True     one group per folder in out/article
    python compare.py out/a out/b --plot=train_loss    curves of another number than the validation loss
    python compare.py out/rates/* --x=learning_rate --lines=n_embd        a sweep: the loss against a setting

A run is a folder written by train.py. Its row shows its lowest validation loss and the settings that differ between the
runs. Among them, _model.py is a checksum of model.py. If the tokenizers differ, compare bits per byte. Unfinished runs
are shown with their progress so far.

Losses are comparable only on the same text. If all runs were evaluated on part of the validation split during
training and on all of it at the end, the evaluation at the end counts. If the runs have no evaluation text in common, a
note says so, and no run is marked as the best.

With --group=True, runs in the same folder that differ only in the seed, such as idea/with-1 and idea/with-2, share one
row with the mean of their lowest losses. The same goes for idea/with/1 and idea/with/2. Each row is compared in
bits per byte with the first row of its group. The difference and its standard error, after ±, are over pairs of runs
with the same seed, which begin with the same weights and read the same text. p is the probability of a difference at
least as large, up or down, if only chance made it (Student's t for this number of pairs). Rows keep the order given.
The shell sorts by name, so 1-without comes before 2-with and is the baseline.

With --x=KEY, the picture is a sweep: the lowest bits per byte, or the last value of --plot, against a number. This is a
setting, such as learning_rate, or parameters, seconds, tokens (trained on) or train_tokens (in the training text, known
once a run has ended). --lines=KEY draws a line, and prints a table, for each value of a second setting. Runs that
differ only in the seed, in whatever folders, are one row and one point: their mean, with its standard error as a bar.
The table names all settings that differ. Each line is compared with the first, which has the smallest value of KEY or
comes first in the command: at each x and, in a last table, with each line at its own best x. A note says if a best is
at the edge of what was tried.
"""

import json
import math
import os
import re
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from humptygpt import cli, machine
from humptygpt.cli import TEXTS, UserError, note, one_line
from humptygpt.files import parse_json, write_whole
from humptygpt.training.loggers import evaluations, read_metrics

# Settings to ignore, because they do not affect the trained model; _parameters already has its own column.
IGNORED = {
    "out_dir",
    "eval_only",
    "always_save_checkpoint",
    "log_interval",
    "parallel",
    "backend",
    "wandb_log",
    "wandb_project",
    "wandb_run_name",
    "_parameters",
    "_train_tokens",
}
# the entries of config.json that are checked
SCHEMA = {"max_iters": range(1, 2**53), "_parameters": range(2**53)}
SEED = re.compile(r"[/_-](seed[-_=]?)?\d+$")  # the seed in a path: -1, _seed=1, /1
BITS = "best_bits_per_byte"
# The rows of a table: (name, runs that share the row because they differ only in the seed)
Rows = list[tuple[str, list["Run"]]]
COLUMNS = {  # key of a row: (heading, number format); numbers are right-aligned
    "run": ("run", ""),
    "parameters": ("parameters", ","),
    "seconds": ("seconds", ",.1f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "test_bleu": ("BLEU", ".2f"),
    "best_val_loss": ("val loss", ".4f"),
    "best_iter": ("iter", ".0f"),
    BITS: ("bits/byte", ".3f"),
    "difference": ("difference", "+.3f"),
    "difference_error": ("±", ".3f"),
    "p": ("p", ".3f"),
    "remark": ("", ""),
    "state": ("state", ""),
    "settings": ("settings", ""),
}


@dataclass(frozen=True)
class CompareConfig:
    # compare
    runs: TEXTS = ()  # run folders; the --runs= prefix is optional
    group: bool = False  # compare the runs in each folder, averaging over seeds
    plot: str | None = None  # plot this number of metrics.jsonl; None: bits per byte
    x: str | None = None  # plot a sweep of this number: learning_rate, parameters, ...
    lines: str | None = None  # with x: a line for each value of this setting
    picture: str | None = "out/compare.png"  # .png, .svg or .pdf file; None: no plot
    json: bool = False  # print JSON, a list of objects, instead of a table

    @classmethod
    def choices(cls) -> dict:
        return {}

    def validate(self) -> None:
        if self.picture and not self.picture.lower().endswith((".png", ".svg", ".pdf")):
            raise ValueError(f"picture={self.picture} must end in .png, .svg or .pdf")


def main(argv: list[str]) -> None:
    config = cli.make(CompareConfig, cli.read(argv, CompareConfig, positional="runs"))
    runs = read_runs(config.runs)
    known = set().union(*(run.values for run in runs))
    for key in {config.plot, config.x, config.lines} - {None}:
        cli.check_key(key, known, " (a key of config.json or metrics.jsonl)")
    groups = group_runs(runs, config)
    tables = make_tables(groups, config)
    if config.json:
        print(json.dumps([row for table in tables.values() for row in table], indent=1))
    else:
        print(*map(format_table, tables, tables.values()), sep="\n")
    if config.picture:
        earlier = ", in place of an earlier one" if os.path.exists(config.picture) else ""
        draw(groups, config)
        print(f"{config.picture} written{earlier}", file=sys.stderr)


# --------------------------------------------------------------------------------------
# Runs


@dataclass
class Run:
    folder: Path  # absolute
    settings: dict  # config.json
    rows: list[dict]  # metrics.jsonl

    @cached_property
    def values(self) -> dict:
        """The settings, the latest value of each metric, and the sizes of the model and of the training text."""
        values = self.settings | {
            "parameters": self.settings["_parameters"],
            "train_tokens": self.settings.get("_train_tokens"),
            **dict.fromkeys(("iter", "tokens", "seconds", "position"), 0),
        }
        for row in self.rows:
            # a run's latest val_loss is comparable with its earlier ones, which are of part of the split
            if row["kind"] != "whole":
                values |= row
        return values

    @cached_property
    def evaluations(self) -> dict[str, dict]:
        """The evaluation with the lowest loss on each text, keyed by the text's checksum; the newest text comes last.

        An evaluation before the first step does not count, since it measures the model that the run started from.
        """
        best = {}
        for step, row in evaluations(self.rows):
            if step and row.keys() >= {"val_loss", "val_bits_per_byte", "val_text"}:
                text = row["val_text"]
                found = {
                    "best_iter": step,
                    "best_val_loss": row["val_loss"],
                    BITS: row["val_bits_per_byte"],
                }
                best[text] = min(best.pop(text, found), found, key=lambda each: each["best_val_loss"])
        return best

    @property
    def state(self) -> str:
        if self.values.get("end") in ("finished", "stopped early", "done"):
            return "done"
        return f"at {100 * self.values['position'] // self.settings['max_iters']:.0f} %"


def read_runs(folders: TEXTS) -> list[Run]:
    """Read the runs; a folder that is not a run is reported and skipped. Raises UserError if there are no runs."""
    runs = []
    for folder in machine.expand(folders):
        # out/* also matches files such as compare.png, written by an earlier call
        if os.path.isfile(folder):
            continue
        try:
            path = Path(folder)
            settings = parse_json((path / "config.json").read_bytes(), SCHEMA)
            runs.append(Run(path.absolute(), settings, read_metrics(path / "metrics.jsonl")))
        except (OSError, ValueError) as error:
            note(f"skipped {folder}, which is not a run: {one_line(error)}")
    if not runs:
        raise UserError("no runs to compare; try: python compare.py out/*")
    return runs


# --------------------------------------------------------------------------------------
# Rows and tables


def group_runs(runs: list[Run], config: CompareConfig) -> dict[str, Rows]:
    """Return {title of a table: its rows}.

    With config.group, there is a table for each folder, and runs in the same folder share a row if the user chose the
    same but for the seed. With config.x, there is a table for each value of config.lines, and runs in any folder may
    share a row. Otherwise each run has a row.
    """
    common = os.path.commonpath([run.folder.parent for run in runs])
    variants = {}
    sort_by = (config.lines, config.x)
    for run in sorted(runs, key=lambda run: [numbers([run.values], k) for k in sort_by]):
        path = Path(SEED.sub("", str(run.folder)))
        if config.x or config.lines:
            line = f"{config.lines}={run.values.get(config.lines)}"
            place = (line if config.lines else "all runs", common, "")
        elif config.group:
            place = (os.path.relpath(path.parent), path.parent, path)
        else:
            place = ("", common, run.folder)
        keys = run.settings.keys() - IGNORED - {"seed"}
        chosen = str([(key, run.settings[key]) for key in sorted(keys)])
        variants.setdefault((*place, chosen), []).append(run)
    groups = {}
    for (title, parent, path, _), seeds in variants.items():
        name = path if path and seeds[1:] else seeds[0].folder
        groups.setdefault(title, []).append((os.path.relpath(name, parent), seeds))
    return groups


def differing(runs: list[Run]) -> set[str]:
    """Name the settings that differ, without those that do not affect the model."""
    keys = set().union(*(run.settings for run in runs)) - IGNORED
    return {key for key in keys if len({str(run.settings.get(key)) for run in runs}) > 1}


def make_tables(groups: dict[str, Rows], config: CompareConfig) -> dict[str, list[dict]]:
    """Return {title: rows of measurements}, in which each row is compared with the first one of its group.

    With config.lines, it is compared with the row of the first line that has the same x, and one more table has the
    best row of each line.
    """
    everything = [row for rows in groups.values() for row in rows]
    settings = everything[0][1][0].settings
    tables, bases, bests = {}, {}, []
    for title, rows in groups.items():
        table = make_table(title, rows, everything if config.lines else rows)
        tables[title] = table
        for row, (_, runs) in zip(table, rows, strict=True):
            row["x"] = mean([run.values for run in runs], config.x)
            if title:
                base = bases.setdefault(row["x"] if config.lines else title, row)
                row |= difference(row, base)
        for best in (row for row in table if row["remark"] and row["x"] is not None):
            at = f"{title}: {config.x}={best['x']:.8g}"
            tried = [row["x"] for row in table if row[BITS]]
            if config.x in settings and best["x"] in (min(tried), max(tried)):
                note(f"{at} is the best, but at the edge of what was tried; try more")
            bests.append(best | {"run": at, "remark": ""})
    if bests[1:]:
        tables["each at its best"] = [row | difference(row, bests[0]) for row in bests]
    return tables


def difference(row: dict, base: dict) -> dict[str, float | None]:
    """Return the entries that say how far a row is from its base in bits per byte, over pairs of the same seed."""
    seeds, first = row["bits_of_seeds"], base["bits_of_seeds"]
    if row is base or not (seeds and first and row["comparable"]):
        return {}
    pairs = [seeds[seed] - first[seed] for seed in seeds if seed in first]
    if len(pairs) > 1:
        return t_test(pairs)
    return {"difference": row[BITS] - base[BITS], "difference_error": None, "p": None}


def make_table(title: str, rows: Rows, compared: Rows) -> list[dict]:
    """Measure the rows, all on a text that the rows with which they are compared have in common.

    title: the name of a group; "": no groups, one row per run.
    """
    every = [run.evaluations for _, runs in compared for run in runs if run.evaluations]
    common = [text for text in [*every, ()][0] if all(text in each for each in every)]
    table = [measure(title, name, runs, (common or [None])[-1]) for name, runs in rows]
    if measured := [row for row in table if row[BITS] and common]:
        min(measured, key=lambda row: row[BITS])["remark"] = "best"
    elif every and not common:
        note(f"the runs{title and f' in {title}'} were evaluated on different texts, so none is marked as the best")
    first = [runs[0] for _, runs in rows]
    keys = sorted(differing(first))
    for row, run in zip(table, first, strict=True):
        row["settings"] = " ".join(f"{key}={run.settings.get(key)}" for key in keys)
        row |= {key: run.settings.get(key) for key in keys}
    return table


def measure(title: str, name: str, runs: list[Run], text: str | None) -> dict:
    """Make one row from runs that differ only in the seed, with their means.

    text: checksum of the text whose evaluations count; None: the newest text of each run.
    """
    for run in runs:
        newest = next(reversed(run.evaluations.values()), {})
        run.values |= run.evaluations.get(text, newest)
    values = [run.values for run in runs]
    bits = {each.get("seed"): each[BITS] for each in values if BITS in each}
    states = Counter(run.state for run in runs)
    counted = (f"{title and f'{count} '}{state}" for state, count in states.items())
    means = {key: mean(values, key) for key in ("iter", "tokens", *COLUMNS)}
    return means | {
        "group": title or None,
        "run": name,
        "folder": os.path.relpath(runs[0].folder),
        "state": ", ".join(counted),
        "tokens_per_second": means["tokens"] / means["seconds"] if means["seconds"] else None,
        "seeds": len(bits),
        "bits_of_seeds": bits,
        "comparable": text is not None,
        "remark": "",
    }


def t_test(pairs: list[float]) -> dict[str, float]:
    """Compute the mean of these differences, its standard error, and the two-sided p of Student's t-test."""
    difference = statistics.mean(pairs)
    freedom = len(pairs) - 1
    error = np.std(pairs) / freedom**0.5
    # with t / sqrt(freedom) = tan(angle), the density of Student's distribution over the angle is a power of its cosine
    angles = np.arange(20_000) / 40_000 * np.pi
    angle = math.atan2(abs(difference), error * freedom**0.5)
    p = np.average(angles >= angle, weights=np.cos(angles) ** (freedom - 1))
    return {"difference": difference, "difference_error": error, "p": p}


def mean(rows: list[dict], key: str) -> float | None:
    """Average the numbers of a key over the rows that have one. Returns None if no row has one."""
    values = numbers(rows, key)
    return statistics.mean(values) if values else None


def numbers(rows: list[dict], key: str | None) -> list[float]:
    return [row[key] for row in rows if type(row.get(key)) in (int, float)]


def format_table(title: str, table: list[dict]) -> str:
    """Format the table as text, with a line for each row. Columns that have no value in any row are left out."""
    columns = []
    for key, (heading, form) in COLUMNS.items():
        values = [row[key] for row in table]
        if set(values) != {None}:
            cells = [
                heading,
                *("—" if value is None else f"{value:{form}}" for value in values),
            ]
            width = max(map(len, cells))
            columns.append([f"{cell:{'>' if form else '<'}{width}}" for cell in cells])
    lines = [one_line("  ".join(cells)).rstrip() for cells in zip(*columns, strict=True)]
    return "\n".join(["", title, *lines] if title else lines)


# --------------------------------------------------------------------------------------
# The picture


def draw(groups: dict[str, Rows], config: CompareConfig) -> None:
    """Draw the curves of each group in a panel, with their lowest losses in the legend, or a sweep in a single panel.

    matplotlib takes a second to import, so only this function imports it.
    """
    from cycler import cycler
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    # ten colours that most people with red-green colour blindness can tell apart; the next ten rows are dashed
    looks = cycler(linestyle=["-", "--"]) * style.library["petroff10"]["axes.prop_cycle"]
    titles = ["mean over seeds ± standard error"] if config.x else groups
    figure = Figure((12, 5 * len(titles)), layout="constrained")
    for number, title in enumerate(titles, 1):
        panel = figure.add_subplot(len(titles), 1, number, prop_cycle=looks)
        if config.x:
            draw_sweep(panel, groups, config)
        else:
            for name, runs in groups[title]:
                best = mean([run.values for run in runs], config.plot or BITS)
                label = f"{name}  {best:#.4g}" if best else name
                panel.plot(
                    *curve(runs, config.plot or "val_bits_per_byte"),
                    label=label,
                    marker="o",
                    markersize=4,
                )
            # logarithmic, so that high losses of first evaluations do not hide the differences between later ones
            panel.set_yscale("log" if panel.dataLim.y0 > 0 else "linear")
            panel.xaxis.set_major_formatter(EngFormatter("B"))
        panel.set(
            title=title,
            xlabel=config.x or "training text",
            ylabel=config.plot or "validation loss, bits per byte",
        )
        panel.yaxis.set_major_formatter("{x:.4g}")
        panel.yaxis.set_minor_formatter("{x:.4g}")
        panel.grid(which="both", alpha=0.25)
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1))
    picture = Path(config.picture)
    form = picture.suffix[1:]
    write_whole(picture, lambda file: figure.savefig(file, dpi=130, format=form))


def curve(runs: list[Run], plot: str) -> zip:
    """Return the bytes of text read and the value of `plot` in each row that has it.

    Bytes are comparable across tokenizers. An evaluation tells how many bytes a token has.
    """
    points = []
    for run in runs:
        if bits := run.values.get(BITS):
            bytes_per_token = run.values["best_val_loss"] / math.log(2) / bits
            for row in run.rows:
                read = row["tokens"] * bytes_per_token
                if row["kind"] != "whole":
                    points += [(read, value) for value in numbers([row], plot)]
        points.append((math.nan, math.nan))  # a gap between two seeds
    return zip(*points, strict=True)


def draw_sweep(panel, groups: dict[str, Rows], config: CompareConfig) -> None:
    """Draw a line for each group, with a point for each row."""
    ticks = set()
    for title, rows in groups.items():
        points = []
        for _, runs in rows:
            values = [run.values for run in runs]
            x, y = (numbers(values, key) for key in (config.x, config.plot or BITS))
            if x and y:
                # the standard error over seeds; 0 for a single one
                error = np.std(y) / max(1, len(y) - 1) ** 0.5
                points.append((np.mean(x), np.mean(y), error))
        x, y, errors = np.reshape(sorted(points), (-1, 3)).T
        ticks.update(x)
        panel.errorbar(x, y, errors, label=title, marker="o", capsize=3)
    if len(ticks) < 2:
        raise UserError(f"x={config.x} is not a number with two values, in evaluated runs")
    if max(ticks) > 3 * min(ticks) > 0:
        panel.set_xscale("log")
    if len(ticks) <= 10:
        panel.set_xticks(sorted(ticks))
        panel.xaxis.minorticks_off()
    panel.xaxis.set_major_formatter("{x:,.8g}")


if __name__ == "__main__":
    machine.run(main)
