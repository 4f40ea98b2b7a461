"""FSDP: its checkpoints are whole, and any number of processes reads them. See also test_distributed.py."""

import errno
import os
import pickle
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PLAIN, TINY_RUN, assert_same_weights, read_rows
from test_distributed import (
    CPU,
    RESUME,
    UNEVEN,
    complaints,
    launch,
    losses,
    terminated,
)
from test_snapshots import kept
from torch.distributed.fsdp import FSDPModule

import export
import sample
import train
from humptygpt import checkpoint, evaluation, machine
from humptygpt.checkpoint import load_plain
from humptygpt.cli import UserError
from humptygpt.parallel import fsdp as sharding
from humptygpt.parallel import sharded as sharded_checkpoint
from humptygpt.settings import TrainConfig
from model import PreNormBlock

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
    precision, forward = sharding.precision, PreNormBlock.forward
    found = set()

    def watched(self, x, *inputs):
        if isinstance(self, FSDPModule):  # and no block that is only timed or tried
            found.update({str(self.attn.q_proj.weight.dtype), f"stream {x.dtype}"})
        return forward(self, x, *inputs)

    sharding.precision = lambda device, dtype: precision(torch.device("cuda"), dtype)
    PreNormBlock.forward = watched
    train.check_model = lambda model: None  # a small model is not sharded
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
    weights = checkpoint.read(OUT / "ckpt")["model"].values()
    assert {x.dtype for x in weights} == {torch.float32}


@pytest.mark.long
def test_compiled_sharded_processes_have_the_losses_of_one(run_train):
    argv = [*PLAIN, "--gradient_accumulation_steps=4"]
    one = losses(run_train(*argv))
    assert launch(2, *TINY_RUN, *argv, "--parallel=fsdp", "--compile=True") == [0, 0]
    assert "torch.compile failed" not in Path("stderr0").read_text()
    assert losses(read_rows(OUT)) == pytest.approx(one, rel=1e-5)


# --------------------------------------------------------------------------------------
# Checkpoints


def test_a_checkpoint_of_any_number_of_processes_is_resumed_by_any_other(run_train):
    def train_losses() -> list[float]:
        return [row["train_loss"] for row in read_rows(OUT) if "train_loss" in row]

    argv = [*UNEVEN, "--optimizer=normuon", "--gradient_accumulation_steps=4"]
    argv += ["--lr_decay_iters=6"]
    run_train(*argv)
    whole = train_losses()
    run_train(*argv, "--max_iters=2")
    sharded = [*RESUME, "--parallel=fsdp", "--max_iters=6"]
    assert launch(4, *sharded, main=terminated) == [128 + signal.SIGTERM] * 4
    assert "saved out/run/ckpt at iter 4" in Path("stderr0").read_text()
    assert [path.name for path in OUT.glob("ckpt*")] == ["ckpt"]
    assert launch(2, *RESUME, "--max_iters=5") == [0, 0]
    assert train.main([*RESUME, "--max_iters=6"]) == 0
    assert train_losses() == pytest.approx(whole, rel=1e-4)
    assert [path.name for path in OUT.glob("ckpt*")] == ["ckpt.pt"]


@pytest.fixture
def saved(tiny, tmp_path_factory):
    """A sharded checkpoint, made once."""
    kept = tmp_path_factory.getbasetemp() / "sharded"
    if not kept.exists():
        assert launch(2, *FSDP, "--max_iters=3") == [0, 0]
        OUT.rename(kept)
    shutil.copytree(kept, OUT)
    return OUT / "ckpt"


@pytest.mark.filterwarnings("error")
def test_sample_and_export_open_it_without_a_process_group(saved, capsys):
    assert not kept()
    latest, short = "--checkpoint=latest", ["--max_new_tokens=5", "--seed=1"]
    sample.main(["--out_dir=out/run", latest, *short])
    text, notes = capsys.readouterr()
    assert "Warning" not in notes
    export.main(["--out_dir=out/run", latest, "--to=one/ckpt.pt"])
    one, sharded = checkpoint.read(Path("one/ckpt.pt")), checkpoint.read(saved)
    assert_same_weights(one["model"], sharded["model"])
    assert one["progress"] == sharded["progress"] and one["optimizer"]["steps"] == 3
    capsys.readouterr()
    sample.main(["--out_dir=one", *short])
    assert capsys.readouterr().out == text
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (sample.main, ["--checkpoint=latest"]),
        (train.main, ["--init_from=resume", "--max_iters=9"]),
    ],
)
def test_a_missing_shard_is_one_line(saved, fails, main, argv):
    (saved / "__1_0.distcp").rename(saved / "elsewhere")
    complaint = fails(main, "--out_dir=out/run", *argv)
    problem = "No such file or directory: 'out/run/ckpt/__1_0.distcp'"
    assert complaint == f"out/run/ckpt is damaged: [Errno 2] {problem}\n"


def rewrite_metadata(folder: Path, metadata: object) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


class Harm:
    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


def test_metadata_that_would_run_code_is_refused(saved, fails):
    rewrite_metadata(saved, Harm())
    complaint = fails(sample.main, "--out_dir=out/run", "--checkpoint=latest")
    assert complaint.startswith("out/run/ckpt is damaged: it contains")
    assert not Path("harmed").exists()


def test_a_checkpoint_that_has_a_checksum_is_read_as_before(saved):
    """Earlier versions wrote it."""
    whole, entries = checkpoint.read(saved), load_plain(saved / "entries.pt")
    torch.save(entries | {"metadata": 64 * "0"}, saved / "entries.pt")
    assert_same_weights(checkpoint.read(saved)["model"], whole["model"])
    assert train.main([*RESUME, "--max_iters=4"]) == 0


def test_a_damaged_byte_that_torch_notices_is_one_line(saved):
    draw, complaints = random.Random(0), []
    for path in [path for path in saved.iterdir() for _ in range(4)]:
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 64
        path.write_bytes(damaged)
        try:
            checkpoint.read(saved)
        except UserError as error:
            complaints.append(str(error))
        path.write_bytes(content)
    assert complaints and all(
        str(saved) in line and "\n" not in line for line in complaints
    )


def test_metadata_that_names_a_file_elsewhere_is_refused(saved):
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../../secret.distcp"
    rewrite_metadata(saved, metadata)
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.read(saved)


@pytest.mark.parametrize("stop", range(4))
def test_at_any_moment_of_a_replacement_a_whole_checkpoint_is_found(
    saved, monkeypatch, stop
):
    steps = iter(range(4))

    def stopping(function):
        def run(*args):
            if next(steps) == stop:
                raise KeyboardInterrupt
            return function(*args)

        return run

    new = saved.with_name("ckpt.tmp")
    shutil.copytree(saved, new)
    monkeypatch.setattr(Path, "rename", stopping(Path.rename))
    monkeypatch.setattr(sharded_checkpoint, "remove", stopping(sharded_checkpoint.remove))
    with pytest.raises(KeyboardInterrupt):
        sharded_checkpoint.put_in_place(new, saved)
    assert checkpoint.read(OUT / "ckpt.pt")["progress"]["iter"] == 3


# --------------------------------------------------------------------------------------
# Mistakes and faults


def on_a_full_disk(argv: list[str]) -> int:
    """Train. Process 1 cannot write its part of a checkpoint."""
    if os.environ["RANK"] == "1":

        def write_data(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        sharded_checkpoint.dcp.FileSystemWriter.write_data = write_data
    return train.main(argv)


def test_a_disk_that_is_full_for_one_process_is_one_line(tiny, monkeypatch):
    monkeypatch.setattr(machine, "PATIENCE", 0)
    found = complaints("--parallel=fsdp", main=on_a_full_disk)
    assert "cannot write out/run/best: No space left on device" in found[0].splitlines()[-1]
    assert not (OUT / "best").exists()


@pytest.mark.parametrize(
    "settings, dtype",
    [({"lora_rank": 4}, "float32"), ({"snapshots": True}, "float32"), ({}, "float16")],
)
def test_what_cannot_be_sharded_is_refused(settings, dtype):
    config = TrainConfig(init_from="out/other", **settings)
    dtype = getattr(torch, dtype)
    with pytest.raises(UserError, match="LoRA, snapshots or float16; use --parallel=ddp"):
        run = SimpleNamespace(config=config, dtype=dtype)
        sharding.FullySharded(0, 2, CPU).place(None, run)


def test_a_sharded_run_shows_no_examples_because_no_process_has_the_whole_model(
    tiny, monkeypatch
):
    monkeypatch.setattr(evaluation, "TEXT", replace(evaluation.TEXT, final_examples=str))
    run = train.setup(train.read_settings(TINY_RUN))
    assert run.task.final_examples
    run.process = sharding.FullySharded(0, 1, CPU)
    assert not run.task.evaluation_examples and not run.task.final_examples
