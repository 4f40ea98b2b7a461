"""The files that a run writes beside its checkpoints, and the fate of an earlier run's files."""

import itertools
import json
import math
import shutil
import signal
import sys
import types
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from conftest import TINY_RUN, read_rows

import train
from humptygpt.formats import checkpoint
from humptygpt.training import evaluation
from humptygpt.training.loggers import draw_losses, read_metrics
from humptygpt.training.run import arrive, lock_out_dir
from humptygpt.training.start import read_settings

OUT = Path("out/run")
RESUME = ["--init_from=resume", "--out_dir=out/run"]
NEW_RUN = [key for key in TINY_RUN if key != "--overwrite=True"]


def files_of(folder: Path) -> dict[str, bytes]:
    paths = filter(Path.is_file, folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_new_run_in_the_folder_of_another_is_refused_and_one_that_writes_nothing_is_not(
    run_train, fails
):
    run_train()
    before = files_of(OUT)
    line = (
        "out/run already holds a run; continue it with --init_from=resume, start from it with"
        " --init_from=out/run and another --out_dir, or replace it with --overwrite=True\n"
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


class Killed(Exception):
    pass


def die_at(moment: int, patch: pytest.MonkeyPatch) -> None:
    """Be killed before a file is removed, moved or copied for the moment-th time."""
    calls = itertools.count()

    def dying(act):
        def inner(*args, **keys):
            if next(calls) == moment:
                raise Killed
            return act(*args, **keys)

        return inner

    for name in ("mkdir", "unlink", "rename", "replace", "rmdir"):
        patch.setattr(Path, name, dying(getattr(Path, name)))
    for name in ("rmtree", "copy"):
        patch.setattr(shutil, name, dying(getattr(shutil, name)))


@pytest.mark.parametrize("end", ["interrupted", "diverged", "finished"])
def test_a_run_that_overwrites_another_takes_its_place_if_it_has_ended_and_not_before(
    run_train, monkeypatch, capsys, end
):
    run_train("--seed=1")
    earlier = files_of(OUT)
    with monkeypatch.context() as patch:
        if end == "interrupted":
            patch.setattr(train, "catch_signals", lambda: nullcontext([signal.SIGINT]))
        if end == "diverged":
            patch.setattr(
                evaluation, "validation_loss", lambda *args: (math.nan, 0.1, None)
            )
        train.main([*TINY_RUN, "--seed=2"])
    printed = capsys.readouterr().err
    assert "note: this run is in out/run/next; when it has ended, it replaces" in printed
    finished = end == "finished"
    note = "note: the earlier run in out/run is now in out/run/previous\n"
    assert (note in printed) == finished
    assert (OUT / "next").exists() == (not finished)
    assert files_of(OUT / "previous" if finished else OUT).items() >= earlier.items()
    folder = OUT if finished else OUT / "next"
    assert read_metrics(folder / "metrics.jsonl")[-1]["end"] == end
    assert json.loads((folder / "config.json").read_text())["seed"] == 2
    if end == "interrupted":
        assert (
            "resume: python train.py --init_from=resume --out_dir=out/run/next" in printed
        )
        assert train.main(["--init_from=resume", "--out_dir=out/run/next"]) == 0
        assert files_of(OUT / "previous") == earlier and not (OUT / "next").exists()
        assert checkpoint.read(OUT / "ckpt.pt")["train_config"]["seed"] == 2
        assert "sample.py --out_dir=out/run\n" in capsys.readouterr().out
        return
    train.main([*TINY_RUN, "--seed=3"])  # in place of what is in next, too
    saved = checkpoint.read(OUT / "previous" / "ckpt.pt")["train_config"]
    assert saved["seed"] == (1 if end == "diverged" else 2)
    assert not (OUT / "next").exists()


def test_a_run_that_is_refused_changes_nothing_of_the_earlier_one(run_train, fails, capsys):
    run_train()
    before = files_of(OUT)
    fails(train.main, *TINY_RUN, "--n_head=3")
    fails(train.main, *TINY_RUN, "--n_embd=1000000")
    assert files_of(OUT) == before
    assert train.main([*RESUME, "--overwrite=True"]) == 0
    assert "note: overwrite=True has no effect" in capsys.readouterr().err
    assert not (OUT / "previous").exists()


def test_two_runs_are_whole_whenever_the_second_is_killed_while_it_takes_the_others_place(
    monkeypatch,
):
    names = ("ckpt.pt", "best.pt", "metrics.jsonl", "snapshots/0.pt")
    for folder, content in ((OUT, b"2"), (OUT / "previous", b"1"), (OUT / ".next", b"3")):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    (OUT / "previous/plan.py").write_bytes(b"1")
    (OUT / "plan.py").write_bytes(b"2")
    (OUT / "notes.txt").write_bytes(b"")
    shutil.copytree(OUT, "before")
    expected = {f"previous/{name}": b"2" for name in (*names, "plan.py")}
    expected |= dict.fromkeys(names, b"3") | {"plan.py": b"2", "notes.txt": b""}
    for moment in itertools.count():
        shutil.rmtree(OUT)
        shutil.copytree("before", OUT)
        with monkeypatch.context() as patch, suppress(Killed):
            die_at(moment, patch)
            arrive(OUT)
            break
        if moment:
            with lock_out_dir(OUT):
                assert files_of(OUT) == expected | {".lock": b""}
    assert files_of(OUT) == expected and moment > 9


def test_with_auto_a_run_is_resumed_if_there_is_a_checkpoint_and_else_begun(
    tiny, fails, capsys
):
    argv = [key for key in TINY_RUN if not key.startswith(("--warmup_iters", "--over"))]
    argv += ["--init_from=auto"]
    assert train.main(argv) == 0
    rows = read_rows(OUT)
    with lock_out_dir(OUT):
        start = read_settings([*argv, "--overwrite=True"])
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
    assert not (OUT / "next").exists()


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
def test_the_plot_shows_every_loss_and_names_that_of_best_pt(
    saved_figures, losses, best, named
):
    rows = [
        {"iter": 10 * it, "train_loss": loss, "val_loss": loss}
        for it, loss in enumerate(losses)
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
def test_wandb_gets_every_row_and_a_resumed_run_is_the_same_run(
    run_train, monkeypatch, capsys, online
):
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
    monkeypatch.setattr(evaluation, "validation_loss", lambda *args: (math.nan, 0.1, None))
    assert train.main([*TINY_RUN, "--wandb_log=True"]) == 1
    assert fake.finished == 1


def test_a_run_of_57d295e_is_resumed_whatever_it_was_logged_to(run_train):
    run_train()
    saved = checkpoint.read(OUT / "ckpt.pt")
    saved["train_config"]["log"] = "tensorboard"
    checkpoint.save(OUT / "ckpt.pt", saved)
    assert train.main([*RESUME, "--max_iters=8"]) == 0


def test_wandb_that_is_not_installed_is_named_before_anything_is_written(
    tiny, fails, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    complaint = "this needs the package wandb: pip install wandb\n"
    assert fails(train.main, *TINY_RUN, "--wandb_log=True") == complaint
    assert not OUT.exists()
