"""FSDP: its checkpoints are whole, and any number of processes reads them. See also test_distributed.py."""

import errno
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_RUN, assert_same_weights, read_rows, train_losses
from humptygpt.model import Block
from test_distributed import (
    CPU,
    RESUME,
    UNEVEN,
    complaints,
    every_parallel,
    launch,
    losses,
    terminated,
)
from test_snapshots import kept
from torch.distributed.fsdp import FSDPModule

import sample
import train
from humptygpt import machine
from humptygpt import model as models
from humptygpt.cli import UserError
from humptygpt.formats import checkpoint
from humptygpt.training import evaluation
from humptygpt.training import fsdp as sharding
from humptygpt.training.settings import TrainConfig

OUT = Path("out/run")
FSDP = [*UNEVEN, "--parallel=fsdp"]


def test_a_sharded_run_starts_from_a_model_and_is_evaluated_as_one_of_one_process(
    run_train,
):
    run_train()
    argv = [*TINY_RUN, "--init_from=out/run", "--out_dir=out/tuned", "--freeze=wte"]
    assert train.main(argv) == 0
    one = read_rows(Path("out/tuned"))
    assert launch(2, *argv, "--parallel=fsdp") == [0, 0]
    assert "parameters, 97." in Path("stdout0").read_text()  # are trained
    assert losses(read_rows(Path("out/tuned"))) == pytest.approx(losses(one), rel=1e-5)
    resumed = ["--init_from=resume", "--out_dir=out/tuned", "--eval_only=True"]
    assert launch(2, *resumed) == [0, 0]
    assert f"val loss {one[-1]['val_loss']:.4f}" in Path("stdout0").read_text()


def gathering_as_on_cuda(argv: list[str]) -> int:
    """Train as on a GPU, and write the dtypes of the weights that products read, and of the residual stream."""
    precision, forward = sharding.precision, Block.forward
    found = set()

    def watched(self, x, *inputs):
        if isinstance(self, FSDPModule):  # and no block that is only timed or tried
            found.update({str(self.attn.q_proj.weight.dtype), f"stream {x.dtype}"})
        return forward(self, x, *inputs)

    sharding.precision = lambda device, dtype: precision(torch.device("cuda"), dtype)
    Block.forward = watched
    code = train.main(argv)
    Path(f"dtypes{os.environ['RANK']}").write_text(str(sorted(found)))
    return code


def test_on_a_gpu_blocks_are_gathered_in_bfloat16_and_masters_and_stream_stay_float32(tiny):
    """A CPU's layer norm refuses bfloat16 weights for a float32 input; its RMS norm does not."""
    argv = [*FSDP, "--dtype=bfloat16", "--norm=rmsnorm", "--mlp_conv=3", "--dropout=0.2"]
    argv += ["--gradient_accumulation_steps=4"]
    assert launch(2, *argv, "--parallel=ddp") == [0, 0]
    replicated = losses(read_rows(OUT))
    assert launch(2, *argv, main=gathering_as_on_cuda) == [0, 0]
    found = "['stream torch.float32', 'torch.bfloat16']"
    assert [Path(f"dtypes{rank}").read_text() for rank in (0, 1)] == [found] * 2
    assert losses(read_rows(OUT)) == pytest.approx(replicated, rel=2e-3)
    weights = checkpoint.read(OUT / "ckpt.pt")["model"].values()
    assert {x.dtype for x in weights} == {torch.float32}


@pytest.mark.long
def test_compiled_sharded_processes_have_the_losses_of_one(run_train):
    argv = ["--gradient_accumulation_steps=4"]
    one = losses(run_train(*argv))
    assert launch(2, *TINY_RUN, *argv, "--parallel=fsdp", "--compile=True") == [0, 0]
    assert "torch.compile failed" not in Path("stderr0").read_text()
    assert losses(read_rows(OUT)) == pytest.approx(one, rel=1e-5)


# --------------------------------------------------------------------------------------
# Checkpoints


def test_a_checkpoint_of_any_number_of_processes_is_resumed_by_any_other(run_train):
    argv = [*UNEVEN, "--gradient_accumulation_steps=4", "--lr_decay_iters=6"]
    run_train(*argv)
    whole = train_losses(read_rows(OUT))
    run_train(*argv, "--max_iters=2")
    sharded = [*RESUME, "--parallel=fsdp", "--max_iters=6"]
    assert launch(4, *sharded, main=terminated) == [128 + signal.SIGTERM] * 4
    assert "saved out/run/ckpt.pt at iter 4" in Path("stderr0").read_text()
    assert launch(2, *RESUME, "--max_iters=5") == [0, 0]
    assert train.main([*RESUME, "--max_iters=6"]) == 0
    assert train_losses(read_rows(OUT)) == pytest.approx(whole, rel=3e-7)


def test_a_sharded_run_saves_the_file_of_one_process_and_it_is_sampled(run_train, capsys):
    argv = [*FSDP, "--max_iters=3", "--dropout=0.2"]
    rows = run_train(*UNEVEN, "--max_iters=3", "--dropout=0.2")
    one = {name: checkpoint.read(OUT / name) for name in ("ckpt.pt", "best.pt")}
    size = (OUT / "best.pt").stat().st_size
    assert launch(2, *argv) == [0, 0]
    assert losses(read_rows(OUT)) == pytest.approx(losses(rows), rel=3e-7)
    assert not kept()
    # tied weights are stored once
    assert (OUT / "best.pt").stat().st_size == pytest.approx(size, rel=0.02)
    for name, expected in one.items():
        saved = checkpoint.read(OUT / name)
        assert saved.keys() == expected.keys()
        for key, x in expected["model"].items():
            torch.testing.assert_close(saved["model"][key], x, rtol=0, atol=1e-5)
    sample.main(["--out_dir=out/run", "--max_new_tokens=5", "--seed=1"])
    assert capsys.readouterr().out


def on_a_disk_of_its_own(argv: list[str]) -> int:
    """Train. Other processes than the first have the data, and no checkpoint."""
    rank = os.environ["RANK"]
    if rank != "0":
        shutil.copytree("data", f"disk{rank}/data", dirs_exist_ok=True)
        os.chdir(f"disk{rank}")
    return train.main(argv)


@every_parallel
def test_processes_on_machines_without_a_shared_disk_resume(tiny, parallel):
    argv = [*UNEVEN, f"--parallel={parallel}", "--lr_decay_iters=6", "--dropout=0.2"]
    assert launch(2, *argv) == [0, 0]
    rows, whole = read_rows(OUT), checkpoint.read(OUT / "ckpt.pt")
    assert launch(2, *argv, "--max_iters=3", main=on_a_disk_of_its_own) == [0, 0]
    auto = [*argv, "--init_from=auto"]  # the first process decides
    assert launch(2, *auto, main=on_a_disk_of_its_own) == [0, 0]
    assert not Path("disk1/out").exists()
    assert read_rows(OUT) == rows
    saved = checkpoint.read(OUT / "ckpt.pt")
    assert_same_weights(saved["model"], whole["model"])
    evaluate = [*RESUME, "--eval_only=True", "--eval_iters=2"]
    assert launch(2, *evaluate, main=on_a_disk_of_its_own) == [0, 0]
    assert f"val loss {rows[-1]['val_loss']:.4f}" in Path("stdout0").read_text()


def with_a_buffer(argv: list[str]) -> int:
    """Train a model that counts its steps, in a buffer that is saved with the weights."""

    class Counting(models.MLP):
        def __init__(self, config, layer):
            super().__init__(config)
            self.register_buffer("steps", torch.zeros(3))

        def forward(self, x, shared):
            if self.training:
                self.steps += 1
                Path("steps").write_text(str(self.steps.tolist()))
            return super().forward(x)

    models.MLPS["counting"] = Counting
    return on_a_disk_of_its_own([*argv, "--mlp=counting"])


@every_parallel
def test_a_buffer_of_the_users_own_reaches_all_processes(tiny, parallel):
    argv = [*UNEVEN, f"--parallel={parallel}", "--init_from=auto", "--lr_decay_iters=6"]
    for steps in (3, 6):
        assert launch(2, *argv, f"--max_iters={steps}", main=with_a_buffer) == [0, 0]
        for path in (Path("steps"), Path("disk1/steps")):
            assert path.read_text() == str([float(steps)] * 3)


# --------------------------------------------------------------------------------------
# Mistakes and faults


def on_a_full_disk(argv: list[str]) -> int:
    """Train. Process 0 cannot write a checkpoint."""

    def save(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    torch.save = save
    return train.main(argv)


def test_a_full_disk_is_one_line(tiny, monkeypatch):
    monkeypatch.setattr(machine, "PATIENCE", 0)
    found = complaints("--parallel=fsdp", main=on_a_full_disk)
    line = found[0].splitlines()[-1]
    assert "cannot write out/run/best.pt: No space left on device" in line
    assert not (OUT / "best.pt").exists()


METRIC = {"one": lambda run, before: 1.0}


@pytest.mark.parametrize(
    "settings, dtype, metrics, name",
    [
        ({"lora_rank": 4}, "float32", {}, "LoRA"),
        ({"optimizer": "muon"}, "float32", {}, "optimizer=muon"),
        ({"snapshots": True}, "float32", {}, "snapshots"),
        ({}, "float16", {}, "float16"),
        ({}, "float32", METRIC, "METRICS"),
    ],
)
def test_what_cannot_be_sharded_is_refused(settings, dtype, metrics, name):
    config = TrainConfig(**{"optimizer": "adamw"} | settings)
    run = SimpleNamespace(config=config, dtype=getattr(torch, dtype), metrics=metrics)
    complaint = f"parallel=fsdp does not support {name}; leave it out, or use --parallel"
    with pytest.raises(UserError, match=complaint):
        sharding.FullySharded(0, 2, CPU).place(None, run)


def test_a_sharded_run_shows_no_examples_because_no_process_has_the_whole_model(tiny, monkeypatch):
    monkeypatch.setattr(evaluation, "TEXT", replace(evaluation.TEXT, final_examples=str))
    run = train.setup(train.read_settings(TINY_RUN))
    assert run.task.final_examples
    run.ranks = sharding.FullySharded(0, 1, CPU)
    assert not run.task.evaluation_examples and not run.task.final_examples
