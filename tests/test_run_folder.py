"""What a run leaves beside its checkpoints, and what it does with an earlier run's files."""

import sys
import types
from pathlib import Path

import pytest
from conftest import TINY_RUN, assert_same_weights, read_rows

import train
from humptygpt import checkpoint

OUT = Path("out/run")


def test_a_new_run_keeps_every_earlier_one(run_train, capsys):
    run_train("--seed=1")
    first = checkpoint.load(OUT / "ckpt.pt")["model"]
    run_train("--seed=2")
    assert "is now in out/run/previous-1" in capsys.readouterr().err
    run_train("--seed=3")
    assert_same_weights(checkpoint.load(OUT / "previous-1" / "ckpt.pt")["model"], first)
    assert (OUT / "previous-2" / "best.pt").exists()


def test_killed_while_it_moves_an_earlier_run_aside_nothing_of_it_is_lost(run_train, monkeypatch):
    run_train("--seed=1")
    first = checkpoint.load(OUT / "ckpt.pt")["model"]
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: replace(path, to) if path.name == "ckpt.pt" else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_train("--seed=2")
    monkeypatch.setattr(Path, "replace", replace)
    run_train("--seed=2")
    assert_same_weights(checkpoint.load(OUT / "previous-1" / "ckpt.pt")["model"], first)
    assert (OUT / "previous-1" / "metrics.jsonl").exists() and not (OUT / "previous.new").exists()


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
    assert "cannot write out/run/metrics.jsonl: No space left on device" in fails(train.main, *TINY_RUN)


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
    train.main(["--init_from=resume", "--out_dir=out/run", "--max_iters=8"])
    first, second = fake.started
    assert first["id"] == second["id"] and first["project"] == "p" and first["name"] == "run"
    assert first["mode"] == (None if online else "offline")
    assert ("logging offline" in capsys.readouterr().err) == (not online)
    assert [step for step, _ in fake.logged][: len(rows)] == [row["iter"] for row in rows]
    assert fake.finished == 2
    run_train("--wandb_log=True")
    assert fake.started[-1]["id"] != first["id"]


def test_wandb_that_is_not_installed_is_named(tiny, fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # as a folder of that name is imported
    line = fails(train.main, *TINY_RUN, "--wandb_log=True")
    assert "wandb_log=True needs the package wandb: pip install wandb" in line
