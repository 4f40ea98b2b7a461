"""Sharded, several processes train as one does; their checkpoints are whole, and any number of processes reads them."""

import errno
import hashlib
import importlib
import json
import os
import pickle
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PLAIN, TINY_RUN, assert_same_weights, read_rows
from test_distributed import (
    CPU,
    PAIRS,
    RUNS,
    complaints,
    count_matrices,
    dying,
    launch,
    losses,
    signal_at_4,
)
from test_model import every_variant
from test_model import tiny as tiny_model
from test_snapshots import kept

import export
import model as models
import prepare_data
import sample
import train
from humptygpt import checkpoint, machine, optimizers, tasks
from humptygpt.checkpoint import load_plain
from humptygpt.config import UserError
from humptygpt.parallel import fsdp as sharding
from humptygpt.parallel import sharded as sharded_checkpoint
from humptygpt.settings import TrainConfig
from humptygpt.tasks import Score, build, find_task

assert sharding  # loaded here, and not again in each process
OUT = Path("out/run")
# 34 rows, which 4 processes do not divide evenly
FSDP = [
    *TINY_RUN,
    *PLAIN,
    "--n_embd=34",
    "--parallel=fsdp",
]
SHARDED = dict(RUNS)
SHARDED["Muon"] = [
    *SHARDED["Muon"],
    "--dropout=0.2",
    "--gradient_accumulation_steps=4",
]
SHARDED["checkpointed activations"] = [
    *RUNS["micro-batches are divided"],
    "--checkpoint_activations=True",
]
SHARDED["clipped, untied, gated"] = [
    "--grad_clip=0.1",
    "--tie_weights=False",
    "--mlp=gated",
    "--position=rotary",
]
USUAL = {("micro-batches are divided", 2), ("both, 2 micro-batches", 4)}
CASES = [(name, size, 12) for name, size in USUAL] + [
    (name, size, 50) for name in SHARDED for size in (2, 4)
]
KEPT = [*PLAIN, "--learning_rate=3e-3", "--eval_iters=3"]


@pytest.mark.parametrize(
    "name, size, steps",
    [
        pytest.param(*case, marks=() if case[2] == 12 else pytest.mark.long)
        for case in sorted(CASES)
    ],
)
def test_sharded_processes_have_the_losses_of_one(
    run_train, monkeypatch, name, size, steps
):
    # Muon rounds to bfloat16 where it can, so that the smallest difference grows
    monkeypatch.setattr(optimizers, "multiplies_bfloat16", lambda device: False)
    argv = [
        *KEPT,
        *SHARDED[name],
        "--n_embd=34" if "rotary" not in str(SHARDED[name]) else "--n_embd=36",
    ]
    argv += [f"--max_iters={steps}", f"--eval_interval={steps // 2}"]
    one = run_train(*argv)
    assert launch(size, *TINY_RUN, *argv, "--parallel=fsdp") == [0] * size
    assert not kept()
    several = read_rows(OUT)
    assert [(row["iter"], row["tokens"]) for row in several] == [
        (row["iter"], row["tokens"]) for row in one
    ]
    tolerance = 1e-3 if "uon" in str(argv) else 1e-5
    assert losses(several) == pytest.approx(losses(one), rel=tolerance)


@pytest.mark.parametrize(
    "options",
    [
        ["--max_iters=6"],
        pytest.param(["--max_iters=50"], marks=pytest.mark.long),
        pytest.param(
            ["--model=gpt", "--batch_size=4", "--max_iters=50"], marks=pytest.mark.long
        ),
    ],
)
def test_sharded_processes_have_the_losses_of_one_on_sentence_pairs(
    pairs, run_train, options
):
    argv = [*PLAIN, *PAIRS, "--eval_interval=25", *options]
    one = run_train(*argv)
    size = 2 if "--max_iters=6" in options else 4
    assert launch(size, *TINY_RUN, *argv, "--parallel=fsdp") == [0] * size
    several = read_rows(OUT)
    assert [row["iter"] for row in several] == [row["iter"] for row in one]
    assert losses(several[:-1]) == pytest.approx(losses(one[:-1]), rel=1e-5)
    assert several[-1]["test_bleu"] == one[-1]["test_bleu"]


def test_a_sharded_run_starts_from_a_model_and_is_evaluated_as_one_of_one_process(
    run_train,
):
    run_train()
    argv = [
        "--init_from=out/run",
        "--out_dir=out/tuned",
        "--max_iters=3",
        "--freeze=wte",
    ]
    assert train.main([*TINY_RUN, *argv]) == 0
    one = read_rows(Path("out/tuned"))
    assert launch(2, *TINY_RUN, *argv, "--parallel=fsdp") == [0, 0]
    assert "parameters, 97." in Path("stdout0").read_text()  # are trained
    assert losses(read_rows(Path("out/tuned"))) == pytest.approx(losses(one), rel=1e-5)
    assert launch(2, "--init_from=resume", "--out_dir=out/tuned", "--eval_only=True") == [
        0,
        0,
    ]
    assert f"val loss {one[-1]['val_loss']:.4f}" in Path("stdout0").read_text()


@every_variant
def test_of_a_new_model_each_rank_draws_its_rows_of_the_weights_of_one_process_and_keeps_no_more(
    variant,
):
    one = tiny_model(**variant)
    for rank in range(3):
        processes = sharding.FullySharded(rank, 3, CPU)
        torch.manual_seed(0)
        with sharding.DrawnRows(processes) as drawn:
            model = build(one.config)
        for p, expected in zip(model.parameters(), one.parameters(), strict=True):
            rows = drawn.take(p)
            assert torch.equal(rows, processes.rows_of(expected))
            assert not p.is_meta or rows.untyped_storage().nbytes() == rows.nbytes


@pytest.mark.parametrize(
    "init", [torch.nn.init.trunc_normal_, lambda x: x.normal_().mul_(2)]
)
def test_a_weight_that_cannot_be_drawn_by_rows_is_refused(init):
    refused = pytest.raises(UserError, match="normal_, uniform_ and fill_ alone; take")
    with refused, sharding.DrawnRows(sharding.FullySharded(0, 2, CPU)) as drawn:
        drawn.take(init(torch.empty(4, 4)))


def status(key: str) -> int:
    """Of this process, in bytes: VmRSS, VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def peak_of_setup(argv: list[str]) -> int:
    """Put a run together, and write what the process took beside what it took with torch imported."""
    before = status("VmRSS")

    def fit(run):
        taken = status("VmHWM") - before
        print(f"{models.count_parameters(run.model):,} parameters, {taken / 1e6:.0f} MB")
        Path(f"taken{run.process.rank}").write_text(str(taken))
        return 0

    train.fit = fit
    return train.main(argv)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_new_model_of_half_a_billion_parameters_takes_a_shard_and_its_largest_matrix(
    tiny,
):
    shape = ["--n_layer=16", "--n_head=12", "--n_embd=1536", "--vocab_size=50304"]
    argv = [*TINY_RUN, *shape, "--parallel=fsdp"]
    assert launch(4, *argv, main=peak_of_setup) == [0] * 4
    parameters = 16 * 12 * 1536**2 + 50304 * 1536
    for rank in range(4):
        taken = int(Path(f"taken{rank}").read_text())
        print(f"{taken / 1e6:,.0f} MB of {4 * parameters / 1e6:,.0f}")
        assert taken < 4 * (parameters / 4 + 50304 * 1536) + 300e6


@pytest.mark.long
def test_compiled_sharded_processes_have_the_losses_of_one(run_train):
    argv = [*PLAIN, "--gradient_accumulation_steps=4"]
    one = run_train(*argv)
    assert launch(2, *TINY_RUN, *argv, "--parallel=fsdp", "--compile=True") == [0, 0]
    assert "torch.compile fails" not in Path("stderr0").read_text()
    assert losses(read_rows(OUT)) == pytest.approx(losses(one), rel=1e-5)


def test_sharded_each_matrix_is_orthogonalised_whole_by_one_process(tiny):
    assert launch(2, *FSDP, "--optimizer=normuon", "--n_layer=3", main=count_matrices) == [
        0,
        0,
    ]
    counts = [
        json.loads(Path(f"counts{rank}").read_text())["matrices"] for rank in range(2)
    ]
    # steps, layers, matrices of each
    assert sum(counts) == 6 * 3 * 6 and min(counts) >= 6 * 8


# --------------------------------------------------------------------------------------
# Checkpoints


def test_saved_by_4_processes_it_is_resumed_by_2_and_by_1(run_train, monkeypatch):
    monkeypatch.setattr(optimizers, "multiplies_bfloat16", lambda device: False)
    argv = [
        *PLAIN,
        "--n_embd=34",
        "--optimizer=normuon",
        "--gradient_accumulation_steps=4",
    ]
    resume = ["--init_from=resume", "--out_dir=out/run"]
    rows = run_train(*argv)
    assert (
        launch(4, *TINY_RUN, *argv, "--parallel=fsdp", main=signal_at_4)
        == [128 + signal.SIGTERM] * 4
    )
    assert "saved out/run/ckpt at iter 4" in Path("stderr0").read_text()
    assert [path.name for path in OUT.glob("ckpt*")] == ["ckpt"]
    shutil.copytree(OUT, "out/four")
    assert launch(2, *resume) == [0, 0]
    assert losses(read_rows(OUT)) == pytest.approx(losses(rows), rel=1e-4)
    shutil.rmtree(OUT)
    shutil.copytree("out/four", OUT)
    assert train.main(resume) == 0
    assert losses(read_rows(OUT)) == pytest.approx(losses(rows), rel=1e-4)
    assert (OUT / "ckpt.pt").exists() and not (OUT / "ckpt").exists()  # of one process


def test_a_checkpoint_of_one_process_is_resumed_sharded(run_train, monkeypatch):
    monkeypatch.setattr(optimizers, "multiplies_bfloat16", lambda device: False)
    argv = [*PLAIN, "--optimizer=normuon"]
    rows = run_train(*argv)
    run_train(*argv, "--max_iters=3")
    resume = ["--init_from=resume", "--out_dir=out/run", "--parallel=fsdp", "--max_iters=6"]
    assert launch(2, *resume) == [0, 0]
    assert losses(read_rows(OUT))[-3:] == pytest.approx(losses(rows)[-3:], rel=1e-4)
    assert (OUT / "ckpt").is_dir() and not (OUT / "ckpt.pt").exists()


@pytest.fixture
def saved(tiny, tmp_path_factory):
    """A sharded checkpoint, made once."""
    kept = tmp_path_factory.getbasetemp() / "sharded"
    if kept.exists():
        shutil.copytree(kept, OUT)
    else:
        assert launch(2, *FSDP, "--max_iters=3") == [0, 0]
        shutil.copytree(OUT, kept)
    return OUT / "ckpt"


@pytest.mark.filterwarnings("error")
def test_sample_and_export_open_it_without_a_process_group(saved, capsys):
    sample.main(
        ["--out_dir=out/run", "--max_new_tokens=5", "--seed=1", "--checkpoint=latest"]
    )
    text, notes = capsys.readouterr()
    assert "Warning" not in notes
    export.main(
        ["--out_dir=out/run", "--format=ckpt", "--checkpoint=latest", "--to=one/ckpt.pt"]
    )
    one, sharded = checkpoint.read(Path("one/ckpt.pt")), checkpoint.read(saved)
    assert_same_weights(one["model"], sharded["model"])
    assert one["progress"] == sharded["progress"] and one["optimizer"]["steps"] == 3
    capsys.readouterr()
    sample.main(["--out_dir=one", "--max_new_tokens=5", "--seed=1"])
    assert capsys.readouterr().out == text
    assert not torch.distributed.is_initialized()


def test_data_is_prepared_with_the_tokenizer_of_a_sharded_run(saved):
    prepare_data.main(["--input=tiny.txt", "--name=again", "--tokenizer=out/run"])
    again, first = (
        json.loads(Path(f"data/{name}/meta.json").read_text())["tokenizer"]
        for name in ("again", "tiny")
    )
    assert again == first


def test_a_missing_shard_is_one_line(saved, fails, monkeypatch):
    monkeypatch.setattr(machine, "PATIENCE", 0)
    (saved / "__1_0.distcp").rename(saved / "elsewhere")
    for main, argv in (
        (sample.main, ["--checkpoint=latest"]),
        (train.main, ["--init_from=resume", "--max_iters=9"]),
    ):
        complaint = fails(main, "--out_dir=out/run", *argv)
        assert complaint.startswith(
            "out/run/ckpt is not whole: its file __1_0.distcp is missing; copy all files"
        )
    found = complaints("--n_embd=34", "--init_from=resume", "--max_iters=9")
    errors = [line for line in found[0].splitlines() if not line.startswith("note: ")]
    assert "__1_0.distcp is missing" in found[0] + found[1] and len(errors) == 1


def rewrite_metadata(folder: Path, content: bytes) -> None:
    """Also its checksum, as whoever wants to do harm would."""
    (folder / ".metadata").write_bytes(content)
    entries = load_plain(folder / "entries.pt")
    entries["metadata"] = hashlib.sha256(content).hexdigest()
    torch.save(entries, folder / "entries.pt")


@pytest.mark.parametrize("name", sorted(sharded_checkpoint.CLASSES))
def test_the_classes_of_torch_that_metadata_is_made_of_are_still_there(name):
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute), (
        f"torch has no {name} any more"
    )


class Harm:
    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


def test_metadata_that_would_run_code_is_refused(saved, fails):
    rewrite_metadata(saved, pickle.dumps(Harm()))
    complaint = fails(sample.main, "--out_dir=out/run", "--checkpoint=latest")
    assert (
        complaint.startswith("out/run/ckpt is damaged: it holds")
        and not Path("harmed").exists()
    )


def test_every_damaged_byte_is_noticed_or_does_not_matter(saved):
    whole, draw = checkpoint.read(saved), torch.Generator().manual_seed(0)
    for path in [path for path in saved.iterdir() for _ in range(4)]:
        content = path.read_bytes()
        at = int(torch.randint(len(content), (), generator=draw))
        path.write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
        try:
            found = checkpoint.read(saved)
        except UserError as error:
            assert str(saved) in str(error) and "\n" not in str(error)
        else:  # the date of a record in a zip file, say
            assert_same_weights(found["model"], whole["model"])
            assert found["progress"] == whole["progress"]
        path.write_bytes(content)
    checkpoint.read(saved)


def outside(metadata):
    for info in metadata.storage_data.values():
        info.relative_path = "../../secret.distcp"


def without_files(metadata):
    metadata.storage_data.clear()


@pytest.mark.parametrize("harm", [outside, without_files])
def test_metadata_that_names_other_files_or_none_is_refused(saved, harm):
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    harm(metadata)
    rewrite_metadata(saved, pickle.dumps(metadata))
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.read(saved)


def test_rows_that_no_file_has_are_zeros(saved):
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    del metadata.state_dict_metadata["model/wte.weight"].chunks[-1]
    rewrite_metadata(saved, pickle.dumps(metadata))
    assert not checkpoint.read(saved)["model"]["wte.weight"][-1].any()


def test_at_any_moment_of_a_replacement_a_whole_checkpoint_is_found(saved, monkeypatch):
    """Killed between any two of its steps."""
    new, steps = saved.with_name("ckpt.tmp"), []
    shutil.copytree(saved, new)
    for name in ("rename",):
        monkeypatch.setattr(Path, name, stopping(getattr(Path, name), steps))
    monkeypatch.setattr(
        sharded_checkpoint, "remove", stopping(sharded_checkpoint.remove, steps)
    )
    for stop in range(1, 4):
        steps[:] = [stop]
        with pytest.raises(KeyboardInterrupt):
            sharded_checkpoint.put_in_place(new, saved)
        assert checkpoint.read(OUT / "ckpt.pt")["progress"]["iter"] == 3
        if not new.exists():
            shutil.copytree(saved, new)
    steps[:] = [99]
    sharded_checkpoint.put_in_place(new, saved)
    assert [path.name for path in OUT.glob("ckpt*")] == ["ckpt"]


def stopping(function, steps: list[int]):
    def run(*args):
        steps[0] -= 1
        if not steps[0]:
            raise KeyboardInterrupt
        return function(*args)

    return run


# --------------------------------------------------------------------------------------
# Mistakes and faults


def on_a_full_disk(argv: list[str]) -> int:
    """Train, in process 1 without room for a checkpoint."""
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


@pytest.mark.parametrize(("rank", "dtype"), [(4, torch.float32), (0, torch.float16)])
def test_what_cannot_be_sharded_is_refused(rank, dtype):
    with pytest.raises(UserError, match="trains neither LoRA nor in float16; take"):
        sharding.FullySharded.check_config(TrainConfig(lora_rank=rank), dtype)


def test_a_sharded_process_that_dies_ends_the_others_and_the_run_resumes_exactly(
    tiny, monkeypatch
):
    assert launch(2, *FSDP) == [0, 0]
    rows, whole = read_rows(OUT), checkpoint.read(OUT / "ckpt.pt")["model"]
    assert launch(2, *FSDP, main=partial(dying, number=signal.SIGKILL)) == [
        2,
        -signal.SIGKILL,
    ]
    assert (
        Path("stderr0")
        .read_text()
        .splitlines()[-1]
        .startswith("train.py: another process has ended")
    )
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert launch(2, *FSDP) == [0, 0]
    assert "it resumes out/run/ckpt" in Path("stderr0").read_text()
    assert read_rows(OUT) == rows
    assert_same_weights(checkpoint.read(OUT / "ckpt.pt")["model"], whole)


def test_no_process_has_a_sharded_model_whole_on_its_card(tiny, monkeypatch):
    model = tiny_model()
    card = torch.device("meta")  # what is moved there is lost
    run = train.setup(*train.read_settings(TINY_RUN))
    run.process, run.device = sharding.FullySharded(0, 1, card), card
    assert not run.task.evaluation_examples and not run.task.final_examples
    scored = []
    task = replace(
        find_task("translation"),
        score=lambda model, _: scored.append(model) or Score("", {}),
    )
    monkeypatch.setattr(tasks, "TEXT", task)
    monkeypatch.setattr(train, "load", lambda path: SimpleNamespace(model=model))
    train.show_best(run, SimpleNamespace(path=OUT, record=lambda row: None))
    assert {p.device.type for p in scored[0].parameters()} == {"cpu"}
