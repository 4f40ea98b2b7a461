"""Compare runs: one table and one picture.

    python compare.py out/a out/b                      one row per run, in the order given; also writes out/compare.png
    python compare.py $(ls -dtr out/*)                 the same, sorted by the shell, oldest first
    python compare.py out/* --json=True > runs.json    the table as JSON, in full precision
    python compare.py out/article/*/* --group=True     one group per folder in out/article

A run is a folder written by train.py. Its row shows its lowest validation loss and the settings that differ between the
runs. Among them, _model.py is a checksum of model.py. If the tokenizers differ, compare bits per byte. Unfinished runs
are shown with their progress so far.

Losses are comparable only on the same text. If all runs were evaluated on part of the validation split during
training and on all of it at the end, the evaluation at the end counts. If the runs have no evaluation text in common, a
note says so, and no run is marked as the best.

With --group=True, runs in the same folder that differ only in the seed, such as idea/with-1 and idea/with-2, share one
row with the mean of their lowest losses. The same goes for idea/with/1 and idea/with/2. They may also differ in what
the machine chose, such as the dtype, which a note reports. Each row is compared in bits per byte with the first row of
its group, or with --baseline=NAME. The difference and its standard error, after ±, are over pairs of runs with the same
seed, which begin with the same weights and read the same text. p is the probability of a difference at least as large,
up or down, if only chance made it (Student's t for this number of pairs). Rows keep the order given. The shell sorts by
name, so 1-without comes before 2-with and is the baseline.
"""

import json
import math
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from humptygpt import cli, machine
from humptygpt.cli import TEXTS, UserError, note, one_line
from humptygpt.files import parse_json, write_whole
from humptygpt.loggers import read_metrics

MEASURED = "_measured"  # in config.json: the settings that the machine chose, not the user
# Settings to ignore, because they do not affect the trained model; _parameters already has its own column.
IGNORED = {
    "out_dir",
    "init_from",
    "eval_only",
    "eval_pairs",
    "always_save_checkpoint",
    "log_interval",
    "parallel",
    "threads",
    "backend",
    "log",
    "wandb_log",
    "wandb_project",
    "wandb_run_name",
    "_parameters",
    MEASURED,
}
# the entries of config.json that are checked
SCHEMA = {"max_iters": range(1, 2**53), "_parameters": range(2**53), f"{MEASURED}?": [str]}
EVALUATION = {"val_loss", "val_bits_per_byte", "val_text"}  # keys of every evaluation's row
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
    baseline: str | None = None  # row that each group is compared with; None: the first
    picture: str | None = "out/compare.png"  # PNG file for a plot; None: no plot
    json: bool = False  # print JSON, a list of objects, instead of a table

    @classmethod
    def choices(cls) -> dict:
        return {}

    def validate(self) -> None:
        if self.picture is not None and not self.picture.lower().endswith(".png"):
            raise ValueError(f"picture={self.picture} must end in .png")


def main(argv: list[str]) -> None:
    config = cli.make(CompareConfig, cli.read(argv, CompareConfig, positional="runs"))
    # out/* also matches files such as compare.png, written by an earlier call
    runs = read_runs([path for path in config.runs if not os.path.isfile(path)])
    grouped = config.group or config.baseline
    groups = group_seeds(runs, config.baseline) if grouped else {"": one_row_each(runs)}
    tables = {title: make_table(title, rows) for title, rows in groups.items()}
    if config.json:
        rows = [row for table in tables.values() for row in table]
        print(json.dumps(rows, indent=1))
    else:
        for title, table in tables.items():
            print(format_table(title, table))
    if config.picture:
        draw_comparison(Path(config.picture), groups, tables)
        print(f"{config.picture} written", file=sys.stderr)


# --------------------------------------------------------------------------------------
# Runs


@dataclass
class Run:
    folder: Path  # absolute
    settings: dict  # config.json
    rows: list[dict]  # metrics.jsonl

    @cached_property
    def last(self) -> dict:
        """The latest value of each metric."""
        last = {"iter": 0, "tokens": 0, "seconds": 0, "position": 0}
        for row in self.rows:
            last |= row
        return last

    @cached_property
    def evaluations(self) -> dict[str, dict]:
        """The evaluation with the lowest loss on each text, keyed by the text's checksum; the newest text comes last.

        An evaluation before the first step does not count, since it measures the model that the run started from.
        """
        best = {}
        for row in self.rows:
            row = {key.removeprefix("whole_"): value for key, value in row.items()}
            if row.keys() >= EVALUATION and row["iter"]:
                text = row["val_text"]
                earlier = best.pop(text, row)
                best[text] = min(earlier, row, key=lambda each: each["val_loss"])
        return best

    @property
    def state(self) -> str:
        if self.last.get("end") == "done":
            return "done"
        return f"at {100 * self.last['position'] // self.settings['max_iters']:.0f} %"


def read_runs(folders: list[str]) -> list[Run]:
    """Read the runs; a folder that is not a run is reported and skipped. Raises UserError if there are no runs."""
    runs = []
    for folder in folders:
        try:
            settings = parse_json(Path(folder, "config.json").read_bytes(), SCHEMA)
            rows = read_metrics(Path(folder, "metrics.jsonl"))
            runs.append(Run(Path(folder).absolute(), settings, rows))
        except (OSError, ValueError) as error:
            note(f"skipped {folder}, which is not a run: {one_line(error)}")
    if not runs:
        raise UserError("no runs to compare; try: python compare.py out/*")
    return runs


# --------------------------------------------------------------------------------------
# Rows and tables


def one_row_each(runs: list[Run]) -> Rows:
    """Name each run by the part of its path that the runs do not share."""
    common = os.path.commonpath([run.folder.parent for run in runs])
    return [(str(run.folder.relative_to(common)), [run]) for run in runs]


def group_seeds(runs: list[Run], baseline: str | None) -> dict[str, Rows]:
    """Group the runs by folder. Runs in the same folder share a row if the user chose the same but for the seed.

    The baseline, if there is one, becomes the first row of each group.
    """
    variants = {}
    for run in runs:
        path = Path(SEED.sub("", str(run.folder)))
        keys = run.settings.keys() - IGNORED - {"seed", *run.settings.get(MEASURED, ())}
        chosen = str([(key, run.settings[key]) for key in sorted(keys)])
        variants.setdefault((path, chosen), []).append(run)
    groups = {}
    for (path, _), seeds in variants.items():
        name = path if len(seeds) > 1 else seeds[0].folder
        rows = groups.setdefault(os.path.relpath(path.parent), [])
        rows.append((str(name.relative_to(path.parent)), seeds))
        for key in sorted(differing([run.settings for run in seeds]) - {"seed"}):
            note(
                f"the machine chose {key} differently for the runs of {name}; for a fair comparison, set it"
            )
    for title, rows in groups.items():
        rows.sort(key=lambda row: row[0] != baseline)
        if baseline and rows[0][0] != baseline:
            names = ", ".join(name for name, _ in rows)
            raise UserError(
                f"baseline={baseline} is not a row of {title}; its rows: {names}"
            )
    return groups


def differing(settings: list[dict]) -> set[str]:
    """Name the keys whose values differ, without those that do not affect the model."""
    keys = set().union(*settings) - IGNORED
    return {key for key in keys if len({str(each.get(key)) for each in settings}) > 1}


def make_table(title: str, rows: Rows) -> list[dict]:
    """Measure the rows, all on the same text, and compare them.

    title: the name of a group, whose rows are compared with its first row; "": no groups, one row per run.
    """
    evaluated = [run.evaluations for _, runs in rows for run in runs if run.evaluations]
    texts = evaluated[0] if evaluated else ()
    common = [text for text in texts if all(text in each for each in evaluated)]
    table = [measure(title, name, runs, (common or [None])[-1]) for name, runs in rows]
    if common:
        measured = [row for row in table if row[BITS]]
        min(measured, key=lambda row: row[BITS])["remark"] = "best"
        for row in measured:
            if title and table[0][BITS] and row is not table[0]:
                row |= difference(row, table[0])
    elif evaluated:
        where = f" in {title}" if title else ""
        note(
            f"the runs{where} were evaluated on different texts, so none is marked as the best"
        )
    settings = [runs[0].settings for _, runs in rows]
    keys = sorted(differing(settings))
    for row, each in zip(table, settings, strict=True):
        row["settings"] = " ".join(f"{key}={each.get(key)}" for key in keys)
        row |= {key: each.get(key) for key in keys}
    return table


def measure(title: str, name: str, runs: list[Run], text: str | None) -> dict:
    """Make one row from runs that differ only in the seed, with their means.

    text: checksum of the text whose evaluations count; None: the newest text of each run.
    """
    last = [run.last for run in runs]
    best = [
        run.evaluations.get(text) or next(reversed(run.evaluations.values()), {})
        for run in runs
    ]
    bits = {
        run.settings.get("seed"): row["val_bits_per_byte"]
        for run, row in zip(runs, best, strict=True)
        if row
    }
    states = Counter(run.state for run in runs)
    counted = [f"{count} {state}" for state, count in states.items()]
    seconds = mean(last, "seconds")
    return {
        "group": title or None,
        "run": name,
        "folder": os.path.relpath(runs[0].folder),
        "state": ", ".join(counted if title else states),
        "parameters": runs[0].settings["_parameters"],
        "iter": mean(last, "iter"),
        "tokens": mean(last, "tokens"),
        "seconds": seconds,
        "tokens_per_second": mean(last, "tokens") / seconds if seconds else None,
        "test_bleu": mean(last, "test_bleu"),
        "best_iter": mean(best, "iter"),
        "best_val_loss": mean(best, "val_loss"),
        BITS: mean(best, "val_bits_per_byte"),
        "seeds": len(bits),
        "bits_of_seeds": bits,
        "difference": None,
        "difference_error": None,
        "p": None,
        "comparable": text is not None,
        "remark": "",
    }


def difference(row: dict, first: dict) -> dict[str, float]:
    """Compare a row with the first of its group, if possible over pairs of runs with the same seed."""
    others = first["bits_of_seeds"]
    seeds = row["bits_of_seeds"].items()
    pairs = [bits - others[seed] for seed, bits in seeds if seed in others]
    return t_test(pairs) if len(pairs) > 1 else {"difference": row[BITS] - first[BITS]}


def t_test(pairs: list[float]) -> dict[str, float]:
    """Compute the mean of these differences, its standard error, and the two-sided p of Student's t-test."""
    difference = statistics.mean(pairs)
    error = statistics.stdev(pairs) / len(pairs) ** 0.5
    freedom = len(pairs) - 1
    # with t / sqrt(freedom) = tan(angle), the density of Student's distribution over the angle is a power of its cosine
    steps = 20_000
    density = [math.cos(i / steps * math.pi / 2) ** (freedom - 1) for i in range(steps)]
    angle = math.atan2(abs(difference), error * freedom**0.5)
    p = sum(density[round(angle / math.pi * 2 * steps) :]) / sum(density)
    return {"difference": difference, "difference_error": error, "p": p}


def mean(rows: list[dict], key: str) -> float | None:
    """Average the values of a key over the rows that have it. Returns None if no row has it."""
    values = [row[key] for row in rows if key in row]
    return statistics.mean(values) if values else None


def format_table(title: str, table: list[dict]) -> str:
    """Format the table as text, with a line for each row. Columns that have no value in any row are left out."""
    columns = []
    for key, (heading, form) in COLUMNS.items():
        values = [row[key] for row in table]
        if set(values) != {None}:
            cells = [heading]
            cells += ["—" if value is None else format(value, form) for value in values]
            width = max(map(len, cells))
            side = ">" if form else "<"
            columns.append([f"{cell:{side}{width}}" for cell in cells])
    lines = [one_line("  ".join(cells)).rstrip() for cells in zip(*columns, strict=True)]
    return "\n".join(["", title, *lines] if title else lines)


# --------------------------------------------------------------------------------------
# The picture


def draw_comparison(
    path: Path, groups: dict[str, Rows], tables: dict[str, list[dict]]
) -> None:
    """Draw a panel for each table: the curves of its rows, with their lowest losses in the legend.

    groups: {title: its rows}. matplotlib takes a second to import, so only this function imports it.
    """
    from cycler import cycler
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    # ten colours that most people with red-green colour blindness can tell apart; the next ten rows are dashed
    looks = cycler(linestyle=["-", "--"]) * style.library["petroff10"]["axes.prop_cycle"]
    figure = Figure((12, 5 * len(tables)), layout="constrained")
    panels = figure.subplots(len(tables), squeeze=False)[:, 0]
    for panel, (title, table) in zip(panels, tables.items(), strict=True):
        panel.set_prop_cycle(looks)
        for row, (name, runs) in zip(table, groups[title], strict=True):
            label = f"{name}  {row[BITS]:.3f}" if row[BITS] else name
            panel.plot(*curve(runs), label=label, marker="o", markersize=4)
        # logarithmic, so that the high losses of the first evaluations do not hide the differences between later ones
        panel.set(title=title, yscale="log", ylabel="validation loss, bits per byte")
        panel.yaxis.set_major_formatter("{x:.4g}")
        panel.yaxis.set_minor_formatter("{x:.4g}")
        panel.xaxis.set_major_formatter(EngFormatter("B"))
        panel.grid(which="both", alpha=0.25)
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.supxlabel("training text")
    write_whole(path, lambda file: figure.savefig(file, dpi=130, format="png"))


def curve(runs: list[Run]) -> Iterator[tuple[float, ...]]:
    """Return the bytes of text read and the bits per byte at each evaluation. Both are comparable across tokenizers."""
    points = []
    for run in runs:
        for row in run.rows:
            if (bits := row.get("val_bits_per_byte")) and "val_loss" in row:
                read = row["tokens"] * row["val_loss"] / math.log(2) / bits
                points.append((read, bits))
        points.append((math.nan, math.nan))  # a gap between two seeds
    return zip(*points, strict=True)


if __name__ == "__main__":
    machine.run(main)
