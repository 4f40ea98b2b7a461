"""Several processes train as one does, with DDP and with FSDP; see test_sharding.py for the checkpoints of FSDP."""

import datetime
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo
from conftest import TINY_RUN, assert_same_weights, read_rows
from test_chat import prepare_chats

import train
from humptygpt import machine
from humptygpt.cli import UserError
from humptygpt.data import prepare as dataset
from humptygpt.data.dataset import TokenDataset
from humptygpt.formats import checkpoint
from humptygpt.training import fsdp, optimizers
from humptygpt.training import torchrun as distributed
from humptygpt.training.settings import TrainConfig
from humptygpt.training.start import read_settings

# loaded once here, and not in each process; DDP needs torch._dynamo
assert torch._dynamo and fsdp
CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
OUT = Path("out/run")
TIME = 600  # seconds until a test fails
RESUME = ["--init_from=resume", "--out_dir=out/run"]
# 4 processes do not divide 34 rows of a matrix evenly
UNEVEN = [*TINY_RUN, "--n_embd=34"]
every_parallel = pytest.mark.parametrize("parallel", TrainConfig.choices()["parallel"])


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def one_of_several(rank: int, size: int, port: int, main, argv: list[str]) -> None:
    """Run a script as torchrun does. Its output goes to a file."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["train.py", *argv]
    with (
        Path(f"stdout{rank}").open("w") as sys.stdout,
        Path(f"stderr{rank}").open("w") as sys.stderr,
    ):
        machine.run(main)


def launch(
    size: int,
    *argv: str,
    main=train.main,
    differ: dict[int, list[str]] | None = None,
    seconds: float = TIME,
) -> list[int]:
    """Run a script in this many processes and return their exit codes. differ: {rank: its own arguments}."""
    context, port = multiprocessing.get_context("fork"), free_port()
    found = []
    for rank in range(size):
        own = [*argv, *(differ or {}).get(rank, [])]
        args = (rank, size, port, main, own)
        found.append(context.Process(target=one_of_several, args=args))
        found[-1].start()
    for process in found:
        process.join(seconds)
        for other in found if process.exitcode == 1 else [process]:
            other.kill()  # torchrun does the same
        process.join(30)
    return [process.exitcode for process in found]


def losses(rows: list[dict]) -> list[float]:
    return [row.get("train_loss", row.get("val_loss")) for row in rows]


STEPS = ["--max_iters=6", "--eval_interval=3", "--eval_iters=3", "--learning_rate=3e-3"]
ACCUMULATE = "--gradient_accumulation_steps="
RUNS = {
    "micro-batches are divided, many are evaluated": (
        2,
        [f"{ACCUMULATE}4", "--block_size=4", "--batch_size=1", "--eval_iters=99"],
    ),
    "rows are divided, unevenly": (
        4,
        ["--dropout=0.2", "--grad_clip=0.1", "--tie_weights=False", "--batch_size=6"],
    ),
    "both are divided": (
        4,
        [f"{ACCUMULATE}2", "--dropout=0.2", "--bias=True", "--optimizer=normuon"],
    ),
    "Muon, activations again": (
        2,
        [f"{ACCUMULATE}4", "--optimizer=muon", "--checkpoint_activations=True"],
    ),
}


@every_parallel
@pytest.mark.parametrize("name", RUNS)
def test_several_processes_have_the_losses_of_one(run_train, name, parallel):
    size, options = RUNS[name]
    if parallel == "fsdp":  # which has only AdamW
        options = [key for key in options if not key.startswith("--optimizer")]
    argv = [*UNEVEN, *STEPS, *options]
    one = run_train(*argv)
    assert launch(size, *argv, f"--parallel={parallel}") == [0] * size
    several = read_rows(OUT)
    assert [row["tokens"] for row in several] == [row["tokens"] for row in one]
    tolerance = 1e-3 if "uon" in str(options) else 1e-5
    assert losses(several) == pytest.approx(losses(one), rel=tolerance)
    errors, expected = (
        [row["val_standard_error"] for row in rows if "val_standard_error" in row] for rows in (several, one)
    )
    assert errors == pytest.approx(expected, rel=tolerance)
    assert bool(errors) == ("many" in name)


@every_parallel
def test_several_processes_have_the_losses_of_one_on_sentence_pairs(pairs, run_train, parallel):
    argv = [*UNEVEN, *STEPS, "--dataset=pairs", "--model=transformer", "--dropout=0.2"]
    argv += ["--block_size=40", "--batch_size=2"]
    *one, end = run_train(*argv)
    assert launch(4, *argv, f"--parallel={parallel}") == [0] * 4
    *several, end_of_several = read_rows(OUT)
    assert losses(several) == pytest.approx(losses(one), rel=1e-5)
    assert end_of_several["test_bleu"] == end["test_bleu"]


@every_parallel
@pytest.mark.parametrize("count", [1, 2])
def test_several_processes_have_the_losses_of_one_on_conversations(made_once, parallel, count):
    """Rows have different numbers of targets. One micro-batch is divided by rows; of two, each rank has one."""
    made_once(prepare_chats)
    argv = [*UNEVEN, *STEPS, "--block_size=64", f"{ACCUMULATE}{count}"]
    assert train.main(argv) == 0
    one = read_rows(OUT)
    assert launch(2, *argv, f"--parallel={parallel}") == [0, 0]
    several = read_rows(OUT)
    assert [row["tokens"] for row in several] == [row["tokens"] for row in one]
    assert losses(several) == pytest.approx(losses(one), rel=1e-5)


# --------------------------------------------------------------------------------------
# How a step is divided


def count_work(argv: list[str]) -> int:
    """Train, and write how many matrices this process orthogonalizes and how many bytes of them it sends."""
    made, sent = [], []

    def counting_matrices(x, dtype, orthogonalize=optimizers.orthogonalize):
        made.append(len(x))
        return orthogonalize(x, dtype)

    def counting_bytes(collective):
        def call(*tensors, **keys):
            if tensors[-1].numel() > 1000:
                sent.append(tensors[-1].nbytes)
            return collective(*tensors, **keys)

        return call

    optimizers.orthogonalize = counting_matrices
    for name in ("all_reduce", "all_gather"):
        setattr(distributed.dist, name, counting_bytes(getattr(distributed.dist, name)))
    code = train.main(argv)
    Path(f"work{os.environ['RANK']}").write_text(f"{sum(made)} {sum(sent)}")
    return code


def test_each_process_orthogonalizes_half_and_sends_only_these_in_the_dtype_of_their_products(
    tiny,
):
    argv = [*UNEVEN, "--optimizer=muon", "--dtype=bfloat16"]
    assert launch(2, *argv, main=count_work) == [0, 0]
    elements = 4 * 34 * 34 + 2 * 34 * 136  # attention and feed-forward network of a layer
    # steps x layers x matrices in a layer, and x elements x bytes of each
    half = f"{6 * 2 * 6 // 2} {6 * 2 * elements * 2 // 2}"
    assert [Path(f"work{rank}").read_text() for rank in (0, 1)] == [half] * 2


# --------------------------------------------------------------------------------------
# One process reports; a signal ends all; mistakes are one line


def without_deprecated_argument(argv: list[str]) -> int:
    """Train, and fail at torch's warning, which each process would print."""
    warnings.filterwarnings("error", ".*broadcast_buffers")
    return train.main(argv)


def test_one_process_reports(tiny):
    assert launch(2, *TINY_RUN, main=without_deprecated_argument) == [0, 0]
    assert "best val loss" in Path("stdout0").read_text()
    assert Path("stdout1").read_text() == Path("stderr1").read_text() == ""


def signalled(argv: list[str], number: int, victim: int = 1) -> int:
    """Train, and send this signal to one process in its fourth step."""
    step = train.train_step

    def step_and_signal(run):
        if run.progress.iter == 3 and run.ranks.rank == victim:
            os.kill(os.getpid(), number)
        return step(run)

    train.train_step = step_and_signal
    return train.main(argv)


terminated = partial(signalled, number=signal.SIGTERM)


def test_a_signal_to_one_process_ends_all_with_one_checkpoint_that_any_number_resumes(tiny):
    argv = [*TINY_RUN, "--optimizer=muon"]
    assert launch(2, *argv) == [0, 0]
    rows, whole = read_rows(OUT), checkpoint.read(OUT / "ckpt.pt")["model"]
    shutil.rmtree(OUT)
    assert launch(2, *argv, main=terminated) == [128 + signal.SIGTERM] * 2
    line = "SIGTERM: saved out/run/ckpt.pt at iter 4; resume:"
    assert line in Path("stderr0").read_text()
    shutil.copytree(OUT, "out/copy")
    assert launch(2, *RESUME) == [0, 0]
    assert read_rows(OUT) == rows
    assert_same_weights(checkpoint.read(OUT / "ckpt.pt")["model"], whole)
    assert train.main(["--init_from=resume", "--out_dir=out/copy"]) == 0
    assert losses(read_rows(Path("out/copy"))) == pytest.approx(losses(rows), rel=1e-3)


def complaints(*argv: str, **settings) -> list[str]:
    """Launch two processes, which both have to end with exit code 2, and return their messages."""
    assert launch(2, *TINY_RUN, *argv, **settings) == [2, 2]
    return [Path(f"stderr{rank}").read_text() for rank in range(2)]


def scaled_with_one_overflow(argv: list[str]) -> int:
    """Train with float16's scaler. Only process 1 has gradients that are not finite, in its third step."""
    runs = []
    setup = train.setup

    class Scaler(torch.amp.GradScaler):
        def scale(self, loss):
            if runs[0].ranks.rank == 1 and runs[0].progress.iter == 2:
                loss.register_hook(lambda gradient: gradient * math.inf)
            return super().scale(loss)

    def setup_with_scaler(*args):
        runs.append(setup(*args))
        runs[0].scaler = Scaler("cpu", init_scale=8.0)
        return runs[0]

    train.setup = setup_with_scaler
    code = train.main(argv)
    steps = next(iter(runs[0].optimizer.state.values()))["step"]
    found = f"{runs[0].scaler.get_scale()} {steps:.0f}"
    Path(f"scale{os.environ['RANK']}").write_text(found)
    return code


def test_if_one_rank_overflows_all_skip_the_step_and_halve_the_scale(tiny):
    assert launch(2, *TINY_RUN, main=scaled_with_one_overflow) == [0, 0]
    assert [Path(f"scale{rank}").read_text() for rank in range(2)] == ["4.0 5"] * 2


def with_other_data(argv: list[str]) -> int:
    """Train, with a changed text in process 1."""
    if os.environ["RANK"] == "1":
        identity = TokenDataset.identity
        other = {"files_sha256": "other"}
        TokenDataset.identity = property(lambda self: identity.func(self) | other)
    return train.main(argv)


def with_other(argv: list[str], what: object, name: str, value: object) -> int:
    """Train, with another value of a module's attribute in process 1."""
    if os.environ["RANK"] == "1":
        setattr(what, name, value)
    return train.main(argv)


other_code = partial(with_other, what=distributed, name="code_checksum", value=lambda: "other")
other_torch = partial(with_other, what=torch, name="__version__", value="2.99.0")


@pytest.mark.parametrize(
    "argv, settings, complaint",
    [
        ([f"{ACCUMULATE}3"], {}, f"over 2 processes; use {ACCUMULATE[2:]}4"),
        (["--backend=nccl"], {}, "the processes cannot connect ("),
        (
            [],
            {"differ": {1: ["--seed=5"]}},
            "process 1 differs from process 0 in {'seed': 5}",
        ),
        ([], {"main": with_other_data}, "in {'files_sha256': 'other'}; start all with the"),
        ([], {"main": other_code}, "in {'model.py': 'other'}; start all with the same"),
        ([], {"main": other_torch}, "in {'torch': '2.99.0'}; start all with the same"),
    ],
)
def test_a_mistake_is_one_line(tiny, monkeypatch, argv, settings, complaint):
    monkeypatch.setattr(machine, "PATIENCE", 0)
    for line in complaints(*argv, **settings):
        assert complaint in line and line.count("\n") == 1
    assert not Path("out").exists()


def with_own_disk(argv: list[str]) -> int:
    """Train, with nothing on the disk of process 1."""
    if os.environ["RANK"] == "1":
        Path("second").mkdir()
        os.chdir("second")
    return train.main(argv)


@pytest.mark.parametrize(
    "source, complaint",
    [
        ("resume", "train.py: no checkpoint out/next/ckpt.pt; train first"),
        ("out/run", f"train.py: process 1 on {socket.gethostname()}: init_from=out/run: "),
        ("scratch", f"train.py: process 1 on {socket.gethostname()}: no data set tiny: "),
    ],
)
def test_what_one_process_cannot_read_ends_all_with_the_same_line(tiny, monkeypatch, source, complaint):
    monkeypatch.setattr(machine, "PATIENCE", 0)
    assert train.main(TINY_RUN) == 0
    argv = [f"--init_from={source}", "--out_dir=out/next"]
    lines = complaints(*argv, main=with_own_disk, seconds=60)
    assert lines[0].startswith(complaint) and lines[0].count("\n") == 1
    assert lines[0] == lines[1] and not Path("out/next").exists()


def test_only_the_first_process_minds_an_earlier_run_in_out_dir(tiny, monkeypatch):
    """Only its machine's disk gets the new run."""
    assert train.main(TINY_RUN) == 0
    argv = [*TINY_RUN, "--overwrite=False"]
    with pytest.raises(UserError, match="already holds a run"):
        read_settings(argv)
    monkeypatch.setenv("RANK", "1")
    read_settings(argv)


def on_two_machines(argv: list[str], disks: int) -> int:
    """Prepare missing data and train, on two machines of two processes that have a disk each or share one."""
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = str(rank % 2)
    elsewhere = Path("tiny").absolute()
    if rank >= 2 and disks == 2:
        os.chdir("second")

    def prepare(*config: object) -> None:
        Path("preparing").mkdir()  # fails if another process does the same
        time.sleep(0.2)
        shutil.copytree(elsewhere, "data/tiny")

    dataset.prepare = prepare
    return train.main(argv)


@pytest.mark.parametrize("disks", [1, 2])
def test_one_process_prepares_missing_data_on_each_disk(tiny, disks):
    shutil.move(tiny, "tiny")
    Path("second").mkdir()
    assert launch(4, *TINY_RUN, main=partial(on_two_machines, disks=disks)) == [0] * 4


def until_said(who: str) -> None:
    """Wait until process 0 has said for whom it waits."""
    while f"note: waiting for {who}\n" not in Path("stderr0").read_text():
        time.sleep(0.01)


def waited_for(argv: list[str]) -> int:
    """Train. Process 1 does not go on before process 0 has said that it waits."""
    if os.environ["RANK"] == "1":
        until_said("the other processes to connect")
        train.prepare_missing = lambda *config: until_said("process 1, which prepares the data")
    return train.main(argv)


def test_a_process_that_waits_says_for_whom(tiny, monkeypatch):
    monkeypatch.setattr(distributed, "QUIET", 0)
    Path("stderr0").touch()  # process 1 may look into it before process 0 has opened it
    assert launch(2, *TINY_RUN, main=waited_for) == [0, 0]


def test_torchrun_must_not_restart_a_run_on_several_machines(tiny, fails, monkeypatch):
    for name in ("WORLD_SIZE", "GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.setenv(name, "2")
    assert "--max_restarts works on one machine only" in fails(train.main, *TINY_RUN)


def test_without_torchrun_several_processes_are_refused(tiny, fails, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    complaint = fails(train.main, *TINY_RUN)
    assert "RANK expected, but not set" in complaint and "with torchrun" in complaint


# --------------------------------------------------------------------------------------
# A process dies or hangs


@pytest.mark.parametrize(("parallel", "victim"), [("ddp", 1), ("fsdp", 0)])
def test_a_process_that_dies_ends_the_others_and_the_run_resumes_exactly(tiny, monkeypatch, parallel, victim):
    argv = [*UNEVEN, "--dropout=0.2", f"{ACCUMULATE}2", f"--parallel={parallel}"]
    argv += ["--init_from=auto"]
    assert launch(2, *argv) == [0, 0]
    rows, whole = read_rows(OUT), checkpoint.read(OUT / "ckpt.pt")["model"]
    shutil.rmtree(OUT)
    killed = partial(signalled, number=signal.SIGKILL, victim=victim)
    assert sorted(launch(2, *argv, main=killed)) == [-signal.SIGKILL, 2]
    complaint = Path(f"stderr{1 - victim}").read_text().splitlines()[-1]
    assert complaint.startswith("train.py: another process has ended or does not respond")
    # as torchrun --max_restarts does
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert launch(2, *argv) == [0, 0]
    assert "; 3 are done" in Path("stdout0").read_text()
    assert read_rows(OUT) == rows
    assert_same_weights(checkpoint.read(OUT / "ckpt.pt")["model"], whole)


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGSTOP")
def test_a_process_that_hangs_ends_the_run(tiny, monkeypatch):
    monkeypatch.setattr(distributed, "TIMEOUT", datetime.timedelta(seconds=4))
    hanging = partial(signalled, number=signal.SIGSTOP)
    assert launch(2, *TINY_RUN, main=hanging, seconds=10) == [2, -signal.SIGKILL]
    assert "another process has ended or does not respond" in Path("stderr0").read_text()


DYING = """
import os, random, signal, sys, threading, time
sys.path[:0] = [{root!r}]
import train
from humptygpt import machine
start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
draw = random.Random(f"{seed} {{start}}")
victim, moment = draw.randrange(2), draw.uniform(0, {seconds})
def die():
    time.sleep(moment)
    with open("kills", "a") as file:
        print(f"seed {seed}, start {{start}}, {{moment:.2f}} s", file=file, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if int(os.environ["RANK"]) == victim and start < 3:
    threading.Thread(target=die, daemon=True).start()
machine.run(train.main)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@every_parallel
def test_killed_at_twenty_random_moments_runs_end_by_themselves_with_the_weights_of_the_uninterrupted_one(
    tiny, parallel
):
    """Each run loses a process up to three times: at the start, in steps and while it saves."""
    command = ["torchrun", "--standalone", "--nproc_per_node=2", "--max_restarts=3"]
    command += [
        "dying.py",
        *TINY_RUN,
        "--dropout=0.2",
        f"{ACCUMULATE}2",
        "--max_iters=60",
    ]
    command += ["--eval_interval=2", f"--parallel={parallel}", "--init_from=auto"]

    def run(seed: int, seconds: float) -> float:
        """Train, and return how long it took."""
        text = DYING.format(root=str(ROOT), seed=seed, seconds=seconds)
        Path("dying.py").write_text(text)
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return time.monotonic() - started

    seconds = run(0, 1e6)
    rows, whole = read_rows(OUT), checkpoint.read(OUT / "ckpt.pt")["model"]
    seed, kills = 0, []
    while len(kills) < 20:
        seed += 1
        shutil.rmtree(OUT)
        seconds = min(seconds, run(seed, seconds))  # the machine may be less busy now
        kills = Path("kills").read_text().splitlines() if Path("kills").exists() else []
        assert read_rows(OUT) == rows
        assert_same_weights(checkpoint.read(OUT / "ckpt.pt")["model"], whole)
    print(*kills, sep="\n")
