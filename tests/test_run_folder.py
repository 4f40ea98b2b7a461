"""The files that a run writes beside its checkpoints, and the fate of an earlier run's files."""

import json
import math
import signal
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import TINY_RUN, read_rows

import train
from humptygpt.cli import UserError
from humptygpt.training import evaluation
from humptygpt.training.loggers import draw_losses, read_metrics
from humptygpt.training.run import lock_out_dir
from humptygpt.training.start import read_settings

OUT = Path("out/run")
RESUME = ["--init_from=resume", "--out_dir=out/run"]
NEW_RUN = [key for key in TINY_RUN if key != "--overwrite=True"]


def files_of(folder: Path) -> dict[str, bytes]:
    paths = filter(Path.is_file, folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_new_run_in_the_folder_of_another_is_refused_and_one_that_writes_nothing_is_not(run_train, fails):
    run_train()
    before = files_of(OUT)
    line = (
        "out/run already holds a run; continue it with --init_from=resume, start from it with"
        " --init_from=out/run and another --out_dir, or set it aside with --overwrite=True\n"
    )
    assert fails(train.main, *NEW_RUN) == line
    for key in ("--eval_only=True", "--dry_run=True"):
        assert train.main([*NEW_RUN, key]) == 0
    assert files_of(OUT) == before
    (OUT / "ckpt.pt").unlink()
    assert fails(train.main, *NEW_RUN) == line
    assert fails(train.main, *RESUME).startswith("no checkpoint out/run/ckpt.pt; ")
    assert train.main([*NEW_RUN, "--init_from=out/run", "--out_dir=out/b"]) == 0
    # the rest is no run: it may be left of one without a checkpoint
    (OUT / "best.pt").unlink()
    assert train.main([*NEW_RUN, "--max_iters=3"]) == 0
    assert [row["iter"] for row in read_rows(OUT)] == [1, 2, 3, 3]


@pytest.mark.parametrize("end", ["interrupted", "diverged", "finished"])
def test_a_run_that_overwrites_another_sets_it_aside_before_its_first_step_however_it_ends(
    run_train, monkeypatch, capsys, end
):
    run_train("--seed=1")
    (OUT / "notes.txt").write_text("mine")
    earlier = files_of(OUT)
    with monkeypatch.context() as patch:
        if end == "interrupted":
            patch.setattr(train, "catch_signals", lambda: nullcontext([signal.SIGINT]))
        if end == "diverged":
            patch.setattr(evaluation, "validation_loss", lambda *args: (math.nan, 0.1))
        train.main([*TINY_RUN, "--seed=2"])
    (aside,) = OUT.parent.glob("run.*")
    assert files_of(aside) == earlier
    assert f"note: the earlier run in {OUT} is now in {aside}\n" in capsys.readouterr().err
    assert read_metrics(OUT / "metrics.jsonl")[-1]["end"] == end
    assert json.loads((OUT / "config.json").read_text())["seed"] == 2
    assert not (OUT / "notes.txt").exists()


def test_a_run_that_overwrites_another_keeps_the_folder_locked(run_train, monkeypatch):
    run_train()

    def locked_train(*args) -> None:
        assert list(OUT.parent.glob("run.*"))
        with pytest.raises(UserError, match="in use by another process"), lock_out_dir(OUT):
            pass

    monkeypatch.setattr(train, "train", locked_train)
    assert train.main(TINY_RUN) == 0
    assert not (OUT.parent / ".run.lock").exists()


def test_a_run_that_is_refused_changes_nothing_of_the_earlier_one(run_train, fails, capsys):
    run_train()
    before = files_of(OUT)
    fails(train.main, *TINY_RUN, "--n_head=3")
    fails(train.main, *TINY_RUN, "--n_embd=1000000")
    assert files_of(OUT) == before
    assert train.main([*RESUME, "--overwrite=True"]) == 0
    assert "note: overwrite=True has no effect" in capsys.readouterr().err
    assert not list(OUT.parent.glob("run.*"))


def test_with_auto_a_run_is_resumed_if_there_is_a_checkpoint_and_else_begun(tiny, fails, capsys):
    argv = [key for key in TINY_RUN if not key.startswith(("--warmup_iters", "--over"))]
    argv += ["--init_from=auto"]
    assert train.main(argv) == 0
    rows = read_rows(OUT)
    with lock_out_dir(OUT):
        start = read_settings([*argv, "--max_iters=300", "--overwrite=True"])
    assert start.saved and start.config.warmup_iters == 0
    assert "note: overwrite=True has no effect" in capsys.readouterr().err
    assert train.main([*argv, "--max_iters=9"]) == 0
    assert read_rows(OUT)[: len(rows)] == rows and len(read_rows(OUT)) > len(rows)
    complaint = fails(train.main, *argv, "--seed=1")
    assert complaint.startswith("seed=1 cannot change on resume: the checkpoint has")
    # the first evaluation saves best.pt before ckpt.pt, and the run may be killed between them
    (OUT / "ckpt.pt").unlink()
    assert train.main(argv) == 0
    assert read_rows(OUT) == rows
    assert [*OUT.parent.glob("run.*/best.pt")]


def test_a_metrics_line_that_a_kill_cut_short_is_dropped(run_train):
    rows = run_train()
    with (OUT / "metrics.jsonl").open("a") as file:
        file.write('{"iter": 7, "tok')
    assert train.main(RESUME) == 0
    assert read_rows(OUT) == rows


# --------------------------------------------------------------------------------------
# The plot


@pytest.mark.parametrize(
    ("losses", "best", "named"),
    [
        ([1.0, 5.0, 4.0, 6.0], 30, "6.000 at step 30"),  # of a smaller evaluation set
        ([1.0, 5.0, 4.0, 6.0], 99, "4.000 at step 20"),  # its row was damaged
        ([1.0], 0, "1.000 at step 0"),
    ],
)
def test_the_plot_shows_every_loss_and_names_that_of_best_pt(saved_figures, losses, best, named):
    rows = [
        {"kind": kind, "iter": 10 * it, f"{name}_loss": loss}
        for it, loss in enumerate(losses)
        for kind, name in (("train", "train"), ("eval", "val"))
    ]
    draw_losses(rows, Path("loss.png"), best)
    figure = saved_figures[-1]
    label = figure.legends[0].get_texts()[1].get_text()
    assert label == f"validation, best {named}"
    for line in figure.axes[0].lines:
        assert list(line.get_ydata()) == losses
        assert line.get_marker() != "None"  # a single point would be invisible


# --------------------------------------------------------------------------------------
# Weights & Biases, as far as it can be tested without the package


class FakeWandb(types.ModuleType):
    class Error(Exception):
        pass

    def __init__(self, online: bool):
        super().__init__("wandb")
        self.online, self.started, self.logged, self.finished = online, [], [], 0

    def init(self, mode: str | None = None, **options):
        if not self.online and mode != "offline":
            raise self.Error("no route to host")
        self.started.append({**options, "mode": mode})
        return self

    def log(self, row, step):
        assert self.finished < len(self.started), "a finished run takes no more rows"
        self.logged.append((step, row))

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("online", [True, False])
def test_wandb_gets_every_row_and_a_resumed_run_is_the_same_run(run_train, monkeypatch, capsys, online):
    fake = FakeWandb(online)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    rows = run_train("--wandb_log=True", "--wandb_project=p")
    train.main([*RESUME, "--max_iters=8"])
    first, second = fake.started
    assert first["id"] == second["id"]
    assert (first["project"], first["name"]) == ("p", "run")
    assert first["mode"] == (None if online else "offline")
    assert ("logging offline" in capsys.readouterr().err) == (not online)
    assert [step for step, _ in fake.logged][: len(rows)] == [row["iter"] for row in rows]
    assert fake.finished == 2
    run_train("--wandb_log=True")
    assert fake.started[-1]["id"] != first["id"]


def test_a_run_that_diverges_is_finished_on_wandb_too(tiny, monkeypatch, capsys):
    fake = FakeWandb(online=True)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(evaluation, "validation_loss", lambda *args: (math.nan, 0.1))
    assert train.main([*TINY_RUN, "--wandb_log=True"]) == 1
    assert fake.finished == 1


def test_wandb_that_is_not_installed_is_named_before_anything_is_written(tiny, fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    complaint = "this needs the package wandb: pip install wandb\n"
    assert fails(train.main, *TINY_RUN, "--wandb_log=True") == complaint
    assert not OUT.exists()
