"""Fixtures: an empty folder for each test, small datasets, and ways to run a script as a user does."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from texts import make_pairs, make_text
from torch import Tensor, nn

import prepare_data
import train
from humptygpt import device, machine
from humptygpt.data import builtin
from humptygpt.formats import checkpoint
from humptygpt.generation import generator as generation
from humptygpt.training import evaluation, settings, setup
from humptygpt.training import run as runs
from humptygpt.training.optimizers import make_optimizer
from humptygpt.training.settings import TrainConfig

WITHOUT_SAMPLE = replace(evaluation.TEXT, evaluation_examples=None, final_examples=None)
ROOT = Path(__file__).parent.parent
# models this small only wait for each other's threads, and a process that has had threads cannot be forked
torch.set_num_threads(1)
device.THREADS = 1
TINY_MODEL = ["--n_layer=2", "--n_embd=32", "--block_size=16"]
TINY_RUN = [
    *TINY_MODEL,
    "--dataset=tiny",
    "--device=cpu",
    "--out_dir=out/run",
    "--batch_size=4",
    "--max_iters=6",
    "--overwrite=True",
]
TINY_RUN += [
    "--eval_interval=3",
    "--log_interval=1",
    "--warmup_iters=2",
    "--eval_iters=2",
    "--dtype=float32",
]


def overfit(model: nn.Module, batch: dict[str, Tensor], steps: int, lr: float, until: float) -> float:
    """Train on one batch. Returns the loss after this many steps, or the first one below `until`."""
    config = TrainConfig(learning_rate=lr, weight_decay=0.0)
    optimizer = make_optimizer(config, model)
    for _ in range(steps):
        _, loss = model(**batch)
        if loss < until:
            break
        loss.backward()
        optimizer.step()
        model.zero_grad()
    return loss.item()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Run each test in a folder of its own, in which data/ and out/ appear."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def first_choices(monkeypatch):
    """Take float32, one thread and the CPU, so that runs that are compared do not depend on the machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the processes that a test starts
    monkeypatch.setattr(settings, "training_dtype", lambda device: "float32")
    monkeypatch.setattr(setup, "THREADS", 1)
    monkeypatch.setattr(generation, "fastest", lambda choices, run: choices[0])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def short_ending(request, monkeypatch):
    """Skip the plot and the samples of most runs, because they take longer than all of the steps."""
    if "whole_ending" not in request.keywords:
        monkeypatch.setattr(runs, "draw_losses", lambda *args: None)
        monkeypatch.setattr(evaluation, "TEXT", WITHOUT_SAMPLE)


@pytest.fixture
def made_once(folder, tmp_path_factory):
    """Call a function that fills the test's empty folder. Later tests in this process get a copy of what it left."""

    def made(make: Callable[[], object]) -> None:
        kept = tmp_path_factory.getbasetemp() / f"{make.__module__}.{make.__qualname__}"
        if kept.exists():
            shutil.copytree(kept, folder, dirs_exist_ok=True)
        else:
            make()
            shutil.copytree(folder, kept)

    return made


def with_constants(monkeypatch, name: str, **constants: object) -> None:
    """Give a built-in data set other constants."""
    read, module = builtin.data_set, builtin.data_set(name)
    vars(module).update(constants)
    monkeypatch.setattr(builtin, "data_set", lambda x: module if x == name else read(x))


def prepare_tiny() -> None:
    Path("tiny.txt").write_text(make_text())
    prepare_data.main(["--input=tiny.txt", "--name=tiny"])


@pytest.fixture
def tiny(folder, made_once):
    """data/tiny, prepared."""
    made_once(prepare_tiny)
    return folder / "data" / "tiny"


def prepare_pairs() -> None:
    Path("pairs.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in make_pairs()))
    prepare_data.main(["--input=pairs.tsv", "--name=pairs", "--tokenizer=byte"])


@pytest.fixture
def pairs(folder, made_once):
    """data/pairs, prepared from 60 sentence pairs."""
    made_once(prepare_pairs)
    return folder / "data" / "pairs"


# what playwright and tests/browsers.py say of a browser that has died
DIED = "Target crashed|has been closed|Browser closed|BrowserDied"


def pytest_collection_modifyitems(config, items):
    if "long" not in config.option.markexpr:  # pytest -m page means its short forms
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    for item in items:
        if item.get_closest_marker("page"):
            item.add_marker(pytest.mark.flaky(reruns=1, only_rerun=[DIED]))
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.timeout(3600))


@contextmanager
def started(command: list, **options) -> Iterator[subprocess.Popen]:
    """Start a process. It is killed if the block fails, and must end within a minute of the block."""
    process = subprocess.Popen(command, **options)
    try:
        yield process
        process.wait(60)
    finally:
        process.kill()
        with process:
            pass  # close its pipes


def exit_code(process: multiprocessing.Process, seconds: float = 60) -> int:
    """Wait for a process to end. It is killed if that takes longer."""
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def chromium():
    """Returns Chromium, another one if the last one has died. Skips the test if it or playwright is missing."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium, in which the page is opened")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives the browser")
    with playwright.sync_playwright() as started:
        browsers = []

        def chromium() -> playwright.Browser:
            if not (browsers and browsers[-1].is_connected()):
                arguments = {"executable_path": path, "args": ["--no-sandbox"]}
                browsers.append(started.chromium.launch(**arguments))
            return browsers[-1]

        yield chromium
        browsers[-1].close()


@pytest.fixture
def browser(chromium):
    return chromium()


@pytest.fixture
def fails(capsys, monkeypatch):
    """Run a script's main as its command line would. Returns its complaint: one line on stderr, exit code 2."""

    def run(main, *argv: str) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["script.py", *argv])
        with pytest.raises(SystemExit) as stop:
            machine.run(main)
        complaint = capsys.readouterr().err
        assert stop.value.code == 2, complaint
        assert complaint.count("\n") == 1 and complaint.startswith("script.py: "), complaint
        return complaint.removeprefix("script.py: ")

    return run


def train_tiny() -> None:
    prepare_tiny()
    train.main(TINY_RUN)


@pytest.fixture
def run_dir(made_once):
    """A trained run's folder."""
    made_once(train_tiny)
    return Path("out/run")


@pytest.fixture
def run_train(tiny):
    """Train a tiny model. Returns its rows of metrics, as from read_rows."""

    def run(*argv: str) -> list[dict]:
        code = train.main([*TINY_RUN, *argv])
        assert code == 0
        return read_rows(tiny.parent.parent / "out" / "run")

    return run


@pytest.fixture
def model_is_edited(monkeypatch):
    """Let model.py count as edited, because a test replaces parts of it."""
    monkeypatch.setattr(checkpoint, "SHIPPED_CODE", "another")


@pytest.fixture
def saved_figures(monkeypatch) -> list:
    """The matplotlib figures that are saved."""
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig

    def recorded(figure, *args, **keys):
        figures.append(figure)
        savefig(figure, *args, **keys)

    monkeypatch.setattr(Figure, "savefig", recorded)
    return figures


def read_rows(out_dir) -> list[dict]:
    """Read the rows of metrics.jsonl without the last one and without the numbers that depend on the clock."""
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}
        for row in rows
        if row["kind"] != "end"
    ]


def train_losses(rows: list[dict]) -> list[float]:
    return [row["train_loss"] for row in rows if "train_loss" in row]


def assert_same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def started_processes(module: str):
    """Make a context whose processes have loaded this module of tests, and torch with it, before they start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
        # starts the server, which imports the module only once
        process = context.Process(target=int)
        process.start()
        exit_code(process)
    return context
