"""What a run leaves beside its checkpoints, and what it does with an earlier run's files."""

import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, assert_same_weights, read_rows

import train
from humptygpt.checkpoint import checkpoint
from humptygpt.training import evaluation
from humptygpt.training.evaluation import Loss
from humptygpt.training.run_folder import TensorBoard, draw_losses

OUT, ROOT = Path("out/run"), Path(__file__).parent.parent


def test_a_new_run_keeps_every_earlier_one(run_train, capsys):
    run_train("--seed=1")
    first = checkpoint.read(OUT / "ckpt.pt")["model"]
    run_train("--seed=2")
    assert "is now in out/run/previous-1" in capsys.readouterr().err
    run_train("--seed=3")
    assert_same_weights(checkpoint.read(OUT / "previous-1" / "ckpt.pt")["model"], first)
    assert (OUT / "previous-2" / "best.pt").exists()


def test_killed_while_it_moves_an_earlier_run_aside_nothing_of_it_is_lost(
    run_train, monkeypatch
):
    run_train("--seed=1")
    first = checkpoint.read(OUT / "ckpt.pt")["model"]
    replace = Path.replace
    killed = lambda path, to: replace(path, to) if path.name == "ckpt.pt" else 1 / 0  # noqa: E731
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(ZeroDivisionError):
        run_train("--seed=2")
    monkeypatch.setattr(Path, "replace", replace)
    run_train("--seed=2")
    assert_same_weights(checkpoint.read(OUT / "previous-1" / "ckpt.pt")["model"], first)
    assert (OUT / "previous-1" / "metrics.jsonl").exists()
    assert not (OUT / "previous.new").exists()


def test_a_metrics_line_that_a_kill_cut_short_is_dropped(run_train):
    rows = run_train()
    with (OUT / "metrics.jsonl").open("a") as file:
        file.write('{"iter": 7, "tok')
    assert train.main(["--init_from=resume", "--out_dir=out/run"]) == 0
    assert read_rows(OUT) == rows


def test_a_full_disk_between_checkpoints_is_one_line(tiny, fails, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def save(path: Path, entries: dict, save=checkpoint.save) -> None:
        save(path, entries)
        if path.name == "ckpt.pt":
            monkeypatch.setattr(Path, "open", full)

    monkeypatch.setattr(checkpoint, "save", save)
    assert "cannot write out/run/metrics.jsonl: No space left on device" in fails(
        train.main, *TINY_RUN
    )


# --------------------------------------------------------------------------------------
# The picture


@pytest.fixture
def figure(saved_figures):
    """The figure that draw_losses makes of these losses, at every tenth step, drawn."""

    def make(train_losses: list[float], val_losses: list[float]):
        rows = []
        for it, losses in enumerate(zip(train_losses, val_losses, strict=True), start=1):
            rows.append({"iter": 10 * it, "train_loss": losses[0]})
            rows.append({"iter": 10 * it, "val_loss": losses[1]})
        draw_losses(rows, Path("loss.png"))
        return saved_figures[-1]

    return make


FALLING = [4.0 / it for it in range(1, 30)]
SHAPES = [FALLING, FALLING[::-1], [2.0] * 29, [2.0, 1.0] * 14, [3.0]]


@pytest.mark.parametrize("losses", SHAPES)
def test_all_points_are_in_the_axes_and_no_number_stands_on_a_line(figure, losses):
    drawn = figure(losses, [loss + 0.2 for loss in losses])
    (axes,) = drawn.axes
    for line in axes.lines:
        inside = [
            axes.bbox.contains(*axes.transData.transform(point))
            for point in line.get_xydata()
        ]
        assert all(inside) and len(inside) == len(losses)
        assert line.get_marker() != "None"  # a single point would be invisible
    (legend,) = drawn.legends
    assert not axes.texts and not legend.get_window_extent().overlaps(axes.bbox)
    lowest = 10 * (1 + losses.index(min(losses)))
    assert (
        legend.get_texts()[1].get_text()
        == f"validation, lowest {min(losses) + 0.2:.3f} at step {lowest}"
    )


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
    train.main(["--init_from=resume", "--out_dir=out/run", "--max_iters=8"])
    first, second = fake.started
    assert (
        first["id"] == second["id"] and first["project"] == "p" and first["name"] == "run"
    )
    assert first["mode"] == (None if online else "offline")
    assert ("logging offline" in capsys.readouterr().err) == (not online)
    assert [step for step, _ in fake.logged][: len(rows)] == [row["iter"] for row in rows]
    assert fake.finished == 2
    run_train("--wandb_log=True")
    assert fake.started[-1]["id"] != first["id"]


def test_a_run_that_diverges_is_finished_on_wandb_too(tiny, monkeypatch, capsys):
    fake = FakeWandb(online=True)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: Loss(math.nan, 0.1))
    assert train.main([*TINY_RUN, "--log=wandb"]) == 1
    assert fake.finished == 1


def test_wandb_that_is_not_installed_is_named(tiny, fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = fails(train.main, *TINY_RUN, "--wandb_log=True")
    assert "log=wandb needs the package wandb: pip install wandb" in line
    assert fails(train.main, *TINY_RUN, "--log=wandb") == line


# --------------------------------------------------------------------------------------
# TensorBoard


def test_tensorboard_has_the_numbers_of_the_metrics_and_a_resumed_run_continues_in_it(
    run_train,
):
    pytest.importorskip(
        "tensorboard", reason="needs tensorboard: pip install -r requirements-dev.txt"
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def logged() -> dict[str, list[tuple]]:
        events = EventAccumulator("out/run/tensorboard").Reload()
        scalars = {}
        for key in events.Tags()["scalars"]:
            scalars[key] = [(event.step, event.value) for event in events.Scalars(key)]
        return scalars

    def expected() -> dict[str, list[tuple]]:
        scalars = {}
        for line in Path("out/run/metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            for key in row.keys() - {"iter"}:
                scalars.setdefault(key, []).append((row["iter"], pytest.approx(row[key])))
        return scalars

    run_train("--log=tensorboard")
    assert len(expected()["lr"]) == 6 and logged() == expected()
    # a process that was killed after its last checkpoint: what it logged since is logged again
    TensorBoard(Path("out/run"), {}, 6).log({"iter": 7, "train_loss": 99.0}, 7)
    assert train.main(["--init_from=resume", "--out_dir=out/run", "--max_iters=8"]) == 0
    assert len(expected()["lr"]) == 8 and logged() == expected()
    run_train("--log=tensorboard")
    assert logged() == expected() and Path("out/run/previous-1/tensorboard").is_dir()


def test_a_logger_that_is_unknown_or_not_installed_is_named(tiny, fails, monkeypatch):
    line = fails(train.main, *TINY_RUN, "--log=tensorboard,mlflow")
    assert "log=tensorboard,mlflow: mlflow is not one of: tensorboard, wandb" in line
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    line = fails(train.main, *TINY_RUN, "--log=tensorboard")
    assert "log=tensorboard needs the package tensorboard: pip install tensorboard" in line
    assert not Path("out/run/metrics.jsonl").exists()
