"""The files that a run writes beside its checkpoints, and the fate of an earlier run's files."""

import itertools
import json
import math
import shutil
import sys
import types
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import TINY_RUN, read_rows

import train
from humptygpt import checkpoint, evaluation
from humptygpt.evaluation import Loss
from humptygpt.loggers import TensorBoard
from humptygpt.metrics import draw_losses
from humptygpt.run_folder import put_in_place
from humptygpt.settings import read_settings

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
    instead = "start from its best model with --init_from=out/run and another --out_dir"
    assert fails(train.main, *RESUME) == f"no checkpoint out/run/ckpt.pt; {instead}\n"
    assert train.main([*NEW_RUN, "--init_from=out/run", "--out_dir=out/b"]) == 0
    # the rest is no run: it may be left of one without a checkpoint
    (OUT / "best.pt").unlink()
    assert train.main([*NEW_RUN, "--max_iters=3"]) == 0
    assert [row["iter"] for row in read_rows(OUT)] == [1, 2, 3, 3]


class Killed(Exception):
    pass


@pytest.fixture
def killed(monkeypatch):
    """Overwrite a run, and be killed just before or after the first checkpoint is saved."""

    def run(when: str) -> None:
        def save(path: Path, entries: dict, save=checkpoint.save) -> None:
            if path.name != "ckpt.pt" or when == "after":
                save(path, entries)
            if path.name == "ckpt.pt":
                raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(checkpoint, "save", save)
            train.main([*TINY_RUN, "--seed=2"])

    return run


def die_at(moment: int, patch: pytest.MonkeyPatch) -> None:
    """Be killed before a file is removed or moved for the moment-th time."""
    calls = itertools.count()

    def dying(act):
        def inner(*args, **keys):
            if next(calls) == moment:
                raise Killed
            return act(*args, **keys)

        return inner

    for name in ("unlink", "rename", "replace", "rmdir"):
        patch.setattr(Path, name, dying(getattr(Path, name)))


def test_a_run_that_overwrites_another_changes_nothing_of_it_before_its_first_checkpoint(
    run_train, killed, monkeypatch, capsys, fails
):
    run_train("--seed=1")
    before = files_of(OUT)
    for _ in range(2):  # the second time, the files of the first attempt are there
        killed("before")
        now = files_of(OUT)
        assert {name: now[name] for name in now if not name.startswith(".new/")} == before
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", lambda *args: Loss(math.nan, 0.1))
        assert train.main([*TINY_RUN, "--seed=2"]) == 1
    assert "nothing has been saved yet" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # torchrun starts the new run again
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert read_settings([*TINY_RUN, "--seed=1"]).saved is None
    assert "already holds a run" in fails(train.main, *NEW_RUN)
    assert train.main([*RESUME, "--overwrite=True"]) == 0
    assert "note: overwrite=True has no effect" in capsys.readouterr().err
    changed = {name: (OUT / name).read_bytes() for name in ("command.txt", "result.json")}
    assert files_of(OUT) == before | changed


def test_a_run_takes_the_place_of_another_whenever_it_is_killed_after_its_first_checkpoint(
    run_train, killed, monkeypatch
):
    rows = run_train("--seed=2")
    whole = files_of(OUT)
    run_train("--seed=1")
    foreign = {"plan.py", "notes.txt", "best/metrics.jsonl", "best/mine.txt"}
    for name in {"adapter/of the old run", "tensorboard/of the old run", *foreign}:
        (OUT / name).parent.mkdir(exist_ok=True)
        (OUT / name).touch()
    killed("after")
    shutil.copytree(OUT, "killed")
    put_in_place(OUT)
    expected = files_of(OUT)
    assert expected.keys() == whole.keys() - {"result.json"} | foreign

    for moment in itertools.count():
        shutil.rmtree(OUT)
        shutil.copytree("killed", OUT)
        with monkeypatch.context() as patch, suppress(Killed):
            die_at(moment, patch)
            put_in_place(OUT)
            break
        assert [*OUT.rglob("ckpt.pt")]
        put_in_place(OUT)
        assert files_of(OUT) == expected
    assert moment > 10
    shutil.rmtree(OUT)
    shutil.copytree("killed", OUT)
    assert train.main(RESUME) == 0
    assert read_rows(OUT) == rows


def test_a_metrics_line_that_a_kill_cut_short_is_dropped(run_train):
    rows = run_train()
    with (OUT / "metrics.jsonl").open("a") as file:
        file.write('{"iter": 7, "tok')
    assert train.main(RESUME) == 0
    assert read_rows(OUT) == rows


# --------------------------------------------------------------------------------------
# The plot


def test_the_plot_shows_every_loss_and_names_the_lowest_but_the_one_before_the_first_step(
    saved_figures,
):
    for losses, lowest in (
        ([1.0, 5.0, 4.0], "4.000 at step 20"),
        ([1.0], "1.000 at step 0"),
    ):
        rows = [
            {"iter": 10 * it, "train_loss": loss, "val_loss": loss}
            for it, loss in enumerate(losses)
        ]
        draw_losses(rows, Path("loss.png"))
        figure = saved_figures[-1]
        label = figure.legends[0].get_texts()[1].get_text()
        assert label == f"validation, lowest {lowest}"
        for line in figure.axes[0].lines:
            assert list(line.get_ydata()) == losses
            assert line.get_marker() != "None"  # a single point would be invisible


# --------------------------------------------------------------------------------------
# Loggers: Weights & Biases, as far as it can be tested without the package, and TensorBoard


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
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: Loss(math.nan, 0.1))
    assert train.main([*TINY_RUN, "--log=wandb"]) == 1
    assert fake.finished == 1


def test_tensorboard_has_the_numbers_of_the_metrics_and_a_resumed_run_continues_in_it(
    run_train,
):
    pytest.importorskip(
        "tensorboard", reason="needs tensorboard: pip install -r requirements-dev.txt"
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def logs_its_metrics(steps: int) -> bool:
        events = EventAccumulator("out/run/tensorboard").Reload()
        logged = {
            (key, event.step): event.value
            for key in events.Tags()["scalars"]
            for event in events.Scalars(key)
        }
        *rows, _ = map(json.loads, (OUT / "metrics.jsonl").read_text().splitlines())
        assert [row["iter"] for row in rows if "lr" in row] == [*range(1, steps + 1)]
        return logged == {
            (key, row["iter"]): pytest.approx(row[key])
            for row in rows
            for key in row.keys() - {"iter", "val_text", "dtype"}
        }

    run_train("--log=tensorboard")
    assert logs_its_metrics(steps=6)
    # a process that was killed after its last checkpoint: its points are replaced
    TensorBoard(OUT, {}, 6).log({"iter": 7, "train_loss": 99.0}, 7)
    assert train.main([*RESUME, "--max_iters=8"]) == 0
    assert logs_its_metrics(steps=8)
    run_train("--log=tensorboard")
    assert logs_its_metrics(steps=6)


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        (
            "--log=wandb,mlflow",
            "log=wandb,mlflow: mlflow is not one of: tensorboard, wandb",
        ),
        ("--wandb_log=True", "this needs the package wandb: pip install wandb"),
        (
            "--log=tensorboard",
            "this needs the package tensorboard: pip install tensorboard",
        ),
    ],
)
def test_a_logger_that_is_unknown_or_not_installed_is_named(
    tiny, fails, monkeypatch, option, complaint
):
    for module in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    assert fails(train.main, *TINY_RUN, option) == f"{complaint}\n"
    assert not OUT.exists()
