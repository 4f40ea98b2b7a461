"""What a run leaves beside its checkpoints, and what it does with an earlier run's files."""

import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, read_rows

import train
from humptygpt import checkpoint, evaluation
from humptygpt.config import UserError
from humptygpt.evaluation import Loss
from humptygpt.loggers import TensorBoard
from humptygpt.run_folder import draw_losses

OUT, ROOT = Path("out/run"), Path(__file__).parent.parent
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
        "out/run has a run already; continue it with --init_from=resume, or replace it with"
        " --overwrite=True\n"
    )
    assert fails(train.main, *NEW_RUN) == line
    for key in ("--eval_only=True", "--dry_run=True"):
        assert train.main([*NEW_RUN, key]) == 0
    (OUT / "ckpt.pt").unlink()
    assert fails(train.main, *NEW_RUN) == line
    assert files_of(OUT) == {k: v for k, v in before.items() if k != "ckpt.pt"}
    (
        OUT / "best.pt"
    ).unlink()  # now it is no run, but what an end before a checkpoint leaves
    assert train.main([*NEW_RUN, "--max_iters=3"]) == 0
    assert [row["iter"] for row in read_rows(OUT)] == [1, 2, 3, 3]


def test_with_overwrite_the_earlier_run_is_whole_until_the_new_one_has_a_checkpoint(
    run_train, monkeypatch, fails, capsys
):
    run_train("--seed=1", "--log=tensorboard")
    another = Path("out/run/best")
    another.mkdir()
    (another / "metrics.jsonl").write_text("of a run of its own")
    before = files_of(OUT)
    del before["best/metrics.jsonl"]

    def no_memory(run, it):
        raise UserError("no memory")

    for _ in range(2):  # the second time, the earlier run has been set aside already
        with monkeypatch.context() as patch:
            patch.setattr(train, "train_step", no_memory)
            fails_at_once = [*NEW_RUN, "--seed=2", "--overwrite=True"]
            with pytest.raises(UserError, match="no memory"):
                train.main(fails_at_once)
        assert files_of(OUT / "overwritten") == before
        assert "has a run already" in fails(train.main, *NEW_RUN)
    run_train("--seed=2")
    assert not (OUT / "overwritten").exists() and another.exists()
    assert {path.name for path in OUT.iterdir()} == {
        *("ckpt.pt", "best.pt", "best", "metrics.jsonl", "config.json", "snapshots"),
        "command.txt",
    }
    capsys.readouterr()
    assert train.main([*RESUME, "--overwrite=True"]) == 0
    assert "note: overwrite=True has no effect" in capsys.readouterr().err


def test_killed_while_it_sets_an_earlier_run_aside_nothing_of_it_is_lost(
    run_train, monkeypatch
):
    run_train("--seed=1")
    (OUT / "adapter").write_text("is moved first")
    before = files_of(OUT)
    commands = before.pop("command.txt")
    replace = Path.replace
    for last in ("metrics.jsonl", "ckpt.pt"):

        def killed(path, to, last=last):
            return replace(path, to) if path.name != last else 1 / 0

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed)
            with pytest.raises(ZeroDivisionError):
                run_train("--seed=2")
        assert (OUT / "overwritten" / "adapter").exists() and (OUT / "ckpt.pt").exists()
        assert train.main(RESUME) == 0
        after = files_of(OUT)
        assert after.pop("command.txt").startswith(commands)  # the resume is added
        assert after == before
    run_train("--seed=2")
    assert not (OUT / "overwritten").exists()


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


def test_the_loss_before_the_first_step_is_not_the_lowest(saved_figures):
    rows = [{"iter": 0, "val_loss": 1.0}, {"iter": 1, "train_loss": 3.0}]
    for more, lowest in ((rows, "1.000 at step 0"), (FALLING_ROWS, "4.000 at step 20")):
        draw_losses([*rows, *more], Path("loss.png"))
        (legend,) = saved_figures[-1].legends
        assert legend.get_texts()[1].get_text() == f"validation, lowest {lowest}"


FALLING_ROWS = [{"iter": 10, "val_loss": 5.0}, {"iter": 20, "val_loss": 4.0}]
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
        *lines, end = Path("out/run/metrics.jsonl").read_text().splitlines()
        assert json.loads(end)["end"] == "done"
        for row in map(json.loads, lines):
            for key in row.keys() - {"iter", "val_text"}:
                scalars.setdefault(key, []).append((row["iter"], pytest.approx(row[key])))
        return scalars

    run_train("--log=tensorboard")
    assert len(expected()["lr"]) == 6 and logged() == expected()
    # a process that was killed after its last checkpoint: what it logged since is logged again
    TensorBoard(Path("out/run"), {}, 6).log({"iter": 7, "train_loss": 99.0}, 7)
    assert train.main(["--init_from=resume", "--out_dir=out/run", "--max_iters=8"]) == 0
    assert len(expected()["lr"]) == 8 and logged() == expected()
    run_train("--log=tensorboard")
    assert logged() == expected()


def test_a_logger_that_is_unknown_or_not_installed_is_named(tiny, fails, monkeypatch):
    line = fails(train.main, *TINY_RUN, "--log=tensorboard,mlflow")
    assert "log=tensorboard,mlflow: mlflow is not one of: tensorboard, wandb" in line
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    line = fails(train.main, *TINY_RUN, "--log=tensorboard")
    assert "log=tensorboard needs the package tensorboard: pip install tensorboard" in line
    assert not Path("out/run/metrics.jsonl").exists()
