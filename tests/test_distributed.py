"""Several processes train as one does."""

import datetime
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from conftest import PLAIN, TINY_RUN, assert_same_weights, read_rows
from torch.nn.parallel import DistributedDataParallel

import prepare_data
import train
from humptygpt import checkpoint, machine, optimizers, settings
from humptygpt.config import UserError
from humptygpt.data import TokenDataset
from humptygpt.parallel import processes as distributed
from humptygpt.parallel.processes import DataParallel, SharedDropout, check_divisible
from humptygpt.process import PARALLEL, Process, restarted
from humptygpt.settings import TrainConfig, read_settings
from model import Dropout

assert torch._dynamo  # which DDP loads: here, and not again in each process
CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
OUT = Path("out/run")
TIME = 600  # seconds until a test fails
STEPS = [
    *PLAIN,
    "--max_iters=50",
    "--eval_interval=25",
    "--eval_iters=3",
    "--learning_rate=3e-3",
    "--out_dir=out/run",
]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def one_of_several(rank: int, size: int, port: int, main, argv: list[str]) -> None:
    """What torchrun starts; its output goes to a file."""
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
    """Run a script in this many processes and return their exit codes; differ: {rank: its own arguments}."""
    context, port = multiprocessing.get_context("fork"), free_port()
    found = [
        context.Process(
            target=one_of_several,
            args=(rank, size, port, main, [*argv, *(differ or {}).get(rank, [])]),
        )
        for rank in range(size)
    ]
    for process in found:
        process.start()
    for process in found:
        process.join(seconds)
        for other in found if process.exitcode == 1 else [process]:
            other.kill()  # as torchrun does
        process.join()
    return [process.exitcode for process in found]


def losses(rows: list[dict]) -> list[float]:
    return [row.get("train_loss", row.get("val_loss")) for row in rows]


RUNS = {
    "micro-batches are divided": [
        "--gradient_accumulation_steps=4",
        "--dropout=0.2",
    ],
    "rows are divided": ["--dropout=0.2", "--grad_clip=0.5"],
    "both, 2 micro-batches": [
        "--gradient_accumulation_steps=2",
        "--dropout=0.2",
        "--bias=True",
        "--optimizer=normuon",
    ],
    "Muon": ["--optimizer=muon", "--n_layer=3"],
}
PAIRS = [
    "--dataset=pairs",
    "--model=transformer",
    "--block_size=64",
    "--batch_size=2",
    "--dropout=0.2",
]


USUAL = {
    "micro-batches are divided": 2,
    "rows are divided": 4,
    "both, 2 micro-batches": 4,
    "Muon": 2,
}


@pytest.mark.parametrize(
    "name, size",
    [
        pytest.param(name, size, marks=() if USUAL[name] == size else pytest.mark.long)
        for name in RUNS
        for size in (2, 4)
    ],
)
def test_several_processes_have_the_losses_of_one(run_train, monkeypatch, name, size):
    # Muon rounds to bfloat16 where it can, so that the smallest difference grows
    monkeypatch.setattr(optimizers, "multiplies_bfloat16", lambda device: False)
    argv = [*STEPS, *RUNS[name]]
    one = run_train(*argv)
    assert launch(size, *TINY_RUN, *argv) == [0] * size
    several = read_rows(Path("out/run"))
    assert [(row["iter"], row["tokens"]) for row in several] == [
        (row["iter"], row["tokens"]) for row in one
    ]
    tolerance = 1e-3 if "uon" in str(argv) else 1e-5
    assert losses(several) == pytest.approx(losses(one), rel=tolerance)


@pytest.mark.parametrize(
    "options",
    [
        [],
        pytest.param(["--gradient_accumulation_steps=2"], marks=pytest.mark.long),
        pytest.param(["--model=gpt", "--batch_size=4"], marks=pytest.mark.long),
    ],
)
def test_several_processes_have_the_losses_of_one_on_sentence_pairs(
    pairs, run_train, options
):
    argv = [*STEPS, *PAIRS, *options]
    one = run_train(*argv)
    assert launch(4, *TINY_RUN, *argv) == [0] * 4
    several = read_rows(Path("out/run"))
    assert [row["iter"] for row in several] == [row["iter"] for row in one]
    assert losses(several[:-1]) == pytest.approx(losses(one[:-1]), rel=1e-5)


def test_one_process_makes_no_process_group(run_train, monkeypatch):
    monkeypatch.setattr(dist, "init_process_group", None)
    run_train()
    assert not dist.is_initialized()


# --------------------------------------------------------------------------------------
# How a step is divided


class Numbered:
    """A data set whose batch number i has the rows (i, 0), (i, 1), ...; some have only some of them."""

    def __init__(self, rows: list[int]):
        self.rows = rows

    def batch(self, index: int, batch_size: int) -> dict[str, torch.Tensor]:
        targets = torch.tensor([[index, row] for row in range(self.rows[index])])
        return {"targets": targets}


@pytest.mark.parametrize("size, micro_batches", [(1, 3), (2, 4), (3, 3), (4, 2), (6, 1)])
@pytest.mark.parametrize("rows", [[6] * 12, [1, 2, 3, 4, 5, 6] * 2])
def test_each_row_of_a_step_counts_in_one_process_once(size, micro_batches, rows):
    config = TrainConfig(batch_size=6, gradient_accumulation_steps=micro_batches)
    task = SimpleNamespace(batches_vary=False)
    run = SimpleNamespace(config=config, batches=Numbered(rows), task=task)
    found = []
    for rank in range(size):
        process = Process(CPU) if size == 1 else DataParallel(rank, size, CPU)
        for share in process.shares(run, step=1)[0]:
            assert len(share.batch["targets"])  # also if nothing counts
            found += share.batch["targets"].tolist() if share.tokens else []
    step = range(micro_batches, 2 * micro_batches)
    assert sorted(found) == [[index, row] for index in step for row in range(rows[index])]


def test_a_process_draws_the_dropout_mask_of_its_rows():
    x = torch.ones(6, 5, 3)
    torch.manual_seed(0)
    whole = Dropout(0.4)(x)
    dropout = SharedDropout(0.4)
    for first, end in ((0, 2), (2, 3), (3, 6)):
        torch.manual_seed(0)
        dropout.rows = (first, 6)
        assert torch.equal(dropout(x[first:end]), whole[first:end])


def test_what_cannot_be_divided_is_refused_with_a_value_that_can():
    for works in ((1, 7, 5, False), (2, 4, 5, False), (4, 2, 6, False), (4, 1, 3, True)):
        check_divisible(*works)
    for micro_batches, batch_size, advice in ((6, 5, 8), (1, 6, 4)):
        with pytest.raises(UserError, match=f"take gradient_accumulation_steps={advice}$"):
            check_divisible(4, micro_batches, batch_size, False)


def test_each_process_orthogonalises_some_matrices_and_none_is_done_twice(tiny):
    assert launch(2, *TINY_RUN, "--optimizer=muon", "--n_layer=3", main=count_matrices) == [
        0,
        0,
    ]
    counts = [json.loads(Path(f"counts{rank}").read_text()) for rank in range(2)]
    # steps, layers, matrices of each
    assert sum(count["matrices"] for count in counts) == 6 * 3 * 6
    assert min(count["matrices"] for count in counts) >= 6 * 6


def count_matrices(argv: list[str]) -> int:
    """Train, counting the matrices that this process orthogonalises and its passes without sums of gradients."""
    counts = {"matrices": 0, "local": 0}
    orthogonalize = optimizers.orthogonalize
    no_sync = DistributedDataParallel.no_sync

    def counting(x):
        counts["matrices"] += len(x)
        return orthogonalize(x)

    def counting_passes(self):
        counts["local"] += 1
        return no_sync(self)

    optimizers.orthogonalize = counting
    DistributedDataParallel.no_sync = counting_passes
    code = train.main(argv)
    Path(f"counts{os.environ['RANK']}").write_text(json.dumps(counts))
    return code


def test_gradients_are_summed_once_in_a_step(tiny):
    assert launch(2, *TINY_RUN, "--gradient_accumulation_steps=4", main=count_matrices) == [
        0,
        0,
    ]
    assert json.loads(Path("counts1").read_text())["local"] == 6  # of 12 passes in 6 steps


def test_ranks_wait_for_each_other_once_in_a_step_of_text(run_train, monkeypatch):
    calls = []

    def count(self, x):
        calls.append(x.dtype)
        return x

    monkeypatch.setattr(Process, "sum", count)
    run_train("--eval_interval=99", "--gradient_accumulation_steps=2")
    assert calls.count(torch.int64) == calls.count(torch.float32) == 6


# --------------------------------------------------------------------------------------
# One process writes; a signal ends all; mistakes are one line


def test_one_process_writes_and_reports(tiny):
    assert launch(2, *TINY_RUN) == [0, 0]
    assert (
        "best val loss" in Path("stdout0").read_text() and Path("stdout1").read_text() == ""
    )
    assert Path("stderr1").read_text() == ""
    assert sorted(path.name for path in OUT.iterdir()) == [
        "best.pt",
        "ckpt.pt",
        "command.txt",
        "config.json",
        "metrics.jsonl",
        "snapshots",
    ]


def signal_at_4(argv: list[str]) -> int:
    """Train, and send SIGTERM to process 1 in its fourth step."""
    step = train.train_step

    def step_and_signal(run, it):
        if it == 3 and run.process.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, it)

    train.train_step = step_and_signal
    return train.main(argv)


def test_a_signal_to_one_process_ends_all_with_one_checkpoint_that_any_number_resumes(
    tiny, run_train
):
    argv = [*TINY_RUN, "--optimizer=muon"]
    assert launch(2, *argv) == [0, 0]
    rows, whole = read_rows(OUT), checkpoint.read(OUT / "ckpt.pt")
    assert launch(2, *argv, main=signal_at_4) == [128 + signal.SIGTERM] * 2
    assert (
        "SIGTERM: saved out/run/ckpt.pt at iter 4; resume:" in Path("stderr0").read_text()
    )
    assert checkpoint.read(OUT / "ckpt.pt")["progress"]["iter"] == 4
    assert launch(2, "--init_from=resume", "--out_dir=out/run") == [0, 0]
    assert read_rows(OUT) == rows
    assert_same_weights(checkpoint.read(OUT / "ckpt.pt")["model"], whole["model"])
    launch(2, *argv, main=signal_at_4)
    assert train.main(["--init_from=resume", "--out_dir=out/run"]) == 0
    assert losses(read_rows(OUT)) == pytest.approx(losses(rows), rel=1e-3)


def complaints(*argv: str, **settings) -> list[str]:
    """The exit code of two processes is 2; what each reports."""
    assert launch(2, *TINY_RUN, *argv, **settings) == [2, 2]
    return [Path(f"stderr{rank}").read_text() for rank in range(2)]


def test_with_nccl_the_watchdog_ends_a_process_whose_collective_fails_or_waits_too_long(
    monkeypatch,
):
    groups = []
    monkeypatch.setattr(os, "environ", {"RANK": "1", "WORLD_SIZE": "2"})
    monkeypatch.setattr(distributed, "pick_gpu", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(
        dist, "rendezvous", lambda *args, **keys: iter([[dist.HashStore()]])
    )
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **keys: groups.append((backend, keys))
    )
    monkeypatch.setattr(dist, "new_group", lambda **keys: groups.append((None, keys)))
    monkeypatch.setattr(DataParallel, "prepare_in_turn", lambda self, prepare: None)
    process = DataParallel.start(TrainConfig(), torch.device("cuda"), None, None)
    (backend, training), (_, patient) = groups
    assert process.device == torch.device("cuda", 1)
    assert backend == "cpu:gloo,cuda:nccl"
    assert training["timeout"] == distributed.TIMEOUT == datetime.timedelta(minutes=10)
    assert patient == {"backend": "gloo", "timeout": distributed.LONG}
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"  # it ends the process
    assert os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "600"


def counting_graphs(argv: list[str]) -> int:
    """Train, writing what was compiled before the first step and in all, and whether any size was left open."""
    graphs = []

    def count(graph, inputs):
        graphs.append(any(isinstance(x, torch.SymInt) for x in inputs))
        return graph.forward

    setup = train.setup

    def setup_and_count(*args):
        run = setup(*args)
        graphs.append("trains")
        return run

    torch.compile = partial(torch.compile, backend=count)
    train.setup = setup_and_count
    code = train.main(argv)
    Path(f"graphs{os.environ['RANK']}").write_text(json.dumps(graphs))
    return code


def test_what_a_rank_computes_is_compiled_before_the_first_step_also_where_it_has_a_part_of_a_batch(
    tiny,
):
    argv = ["--compile=True", "--dropout=0.1", "--batch_size=4"]
    assert launch(2, *TINY_RUN, *argv, main=counting_graphs) == [0, 0]
    for rank in range(2):
        graphs = json.loads(Path(f"graphs{rank}").read_text())
        assert graphs[-1] == "trains" and not any(graphs[:-1])
        assert "compile fails" not in Path(f"stderr{rank}").read_text()


def scaled_with_one_overflow(argv: list[str]) -> int:
    """Train with float16's scaler; process 1 alone has gradients that are not finite in its third step."""
    steps = []
    setup = train.setup

    def setup_with_scaler(*args):
        run = setup(*args)
        run.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        steps.append(run)
        return run

    share_of_loss = train.share_of_loss

    def overflow(run, share, tokens):
        steps.append(0)
        loss = share_of_loss(run, share, tokens)
        if run.process.rank and len(steps) == 4:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    train.setup = setup_with_scaler
    train.share_of_loss = overflow
    code = train.main(argv)
    scale = steps[0].scaler.get_scale()
    Path(f"scale{os.environ['RANK']}").write_text(f"{scale} {steps[0].optimizer.steps}")
    return code


def test_where_one_rank_overflows_all_skip_the_step_and_halve_the_scale(tiny):
    assert launch(2, *TINY_RUN, main=scaled_with_one_overflow) == [0, 0]
    assert [Path(f"scale{rank}").read_text() for rank in range(2)] == ["4.0 5"] * 2


def with_other_data(argv: list[str]) -> int:
    """Train, in process 1 on a text that has been changed."""
    if os.environ["RANK"] == "1":
        identity = TokenDataset.identity
        TokenDataset.identity = lambda self: identity(self) | {"files_sha256": "other"}
    return train.main(argv)


@pytest.mark.parametrize(
    "argv, settings, complaint",
    [
        (
            ["--batch_size=3"],
            {},
            "batch_size=3 cannot be divided evenly over 2 processes; take gradient_accumulation_steps=2",
        ),
        (["--backend=nccl"], {}, "do not train on cpu; take --device=cpu --backend=gloo"),
        (
            [],
            {"differ": {1: ["--learning_rate=0.5"]}},
            "has learning_rate=0.5, but process 0",
        ),
        ([], {"main": with_other_data}, "has files_sha256=other, but process 0 on"),
    ],
)
def test_a_mistake_is_one_line(tiny, monkeypatch, argv, settings, complaint):
    monkeypatch.setattr(machine, "PATIENCE", 0)
    line = complaints(*argv, **settings)[0]
    assert complaint in line and line.count("\n") == 1
    assert not Path("out").exists()


def on_two_machines(argv: list[str], disks: int) -> int:
    """Train on two machines of two processes, with a disk each or one together, where the data has to be prepared."""
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = str(rank % 2)
    elsewhere = Path("tiny").absolute()
    if rank >= 2 and disks == 2:
        os.chdir("second")

    def prepare(config: object) -> None:
        Path("preparing").mkdir()  # fails where another process does the same
        time.sleep(0.2)
        shutil.copytree(elsewhere, "data/tiny")

    prepare_data.prepare = prepare
    return train.main(argv)


@pytest.mark.parametrize("disks", [1, 2])
def test_one_process_prepares_missing_data_on_each_disk(tiny, disks):
    shutil.move(tiny, "tiny")
    Path("second").mkdir()
    assert launch(4, *TINY_RUN, main=partial(on_two_machines, disks=disks)) == [0] * 4


def test_a_port_in_use_is_one_line(tiny, fails, monkeypatch):
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2}
        launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in launched.items():
            monkeypatch.setenv(name, str(value))
        complaint = fails(train.main, *TINY_RUN)
    assert complaint.startswith("the processes cannot meet (") and "in use" in complaint
    assert complaint.endswith("; start them with torchrun, or take another --master_port\n")


def test_without_torchrun_several_processes_are_refused(tiny, fails, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    complaint = fails(train.main, *TINY_RUN)
    assert "RANK expected, but not set" in complaint and "with torchrun" in complaint


# --------------------------------------------------------------------------------------
# A process dies or hangs


def dying(argv: list[str], number: int) -> int:
    """Train, and let process 1 get this signal before its fifth step."""
    step = train.train_step

    def step_or_die(run, it):
        if it == 4 and run.process.rank == 1 and not restarted():
            os.kill(os.getpid(), number)
        return step(run, it)

    train.train_step = step_or_die
    return train.main(argv)


def test_a_process_that_dies_ends_the_others_and_the_run_resumes_exactly(tiny, monkeypatch):
    argv = [*TINY_RUN, "--dropout=0.2", "--gradient_accumulation_steps=2"]
    assert launch(2, *argv) == [0, 0]
    rows, whole = read_rows(OUT), checkpoint.read(OUT / "ckpt.pt")["model"]
    assert launch(2, *argv, main=partial(dying, number=signal.SIGKILL)) == [
        2,
        -signal.SIGKILL,
    ]
    complaint = Path("stderr0").read_text().splitlines()[-1]
    assert complaint.startswith("train.py: another process has ended or does not answer")
    assert checkpoint.read(OUT / "ckpt.pt")["progress"]["iter"] == 3
    # as torchrun --max_restarts starts them again
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert launch(2, *argv) == [0, 0]
    assert (
        "note: torchrun has started this run again; it resumes out/run/ckpt.pt"
        in Path("stderr0").read_text()
    )
    assert read_rows(OUT) == rows
    assert_same_weights(checkpoint.read(OUT / "ckpt.pt")["model"], whole)


def test_only_the_same_run_is_resumed_when_torchrun_starts_again(run_train, monkeypatch):
    run_train()
    monkeypatch.setattr(settings, "restarted", lambda: True)
    for change, resumes in (
        ([], True),
        (["--n_layer=3"], False),
        (["--max_iters=7"], False),
    ):
        assert (read_settings([*TINY_RUN, *change])[2] is not None) == resumes


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGSTOP")
def test_a_process_that_hangs_ends_the_run(tiny, monkeypatch):
    monkeypatch.setattr(distributed, "TIMEOUT", datetime.timedelta(seconds=4))
    hanging = partial(dying, number=signal.SIGSTOP)
    assert launch(2, *TINY_RUN, main=hanging, seconds=10) == [2, -signal.SIGKILL]
    assert "another process has ended or does not answer" in Path("stderr0").read_text()


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
    saving = any(name.endswith(".tmp") for name in (os.listdir("out/run") if os.path.isdir("out/run") else ()))
    with open("kills", "a") as file:
        print(f"seed {seed}, start {{start}}, {{moment:.2f}} s", "saving" if saving else "", file=file, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if int(os.environ["RANK"]) == victim and start < 3:
    threading.Thread(target=die, daemon=True).start()
machine.run(train.main)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("parallel", PARALLEL)
def test_killed_at_twenty_random_moments_runs_end_by_themselves_with_the_weights_of_the_uninterrupted_one(
    tiny, parallel
):
    """Each run loses a process up to three times, in the start, in steps and in saving."""
    argv = [
        *TINY_RUN,
        "--dropout=0.2",
        "--gradient_accumulation_steps=2",
        "--max_iters=60",
        "--eval_interval=2",
    ]
    command = [
        "torchrun",
        "--standalone",
        "--nproc_per_node=2",
        "--max_restarts=3",
        "dying.py",
        *argv,
    ]
    command.append(f"--parallel={parallel}")

    def run(seed: int, seconds: float) -> float:
        """Returns how long it took."""
        Path("dying.py").write_text(
            DYING.format(root=str(ROOT), seed=seed, seconds=seconds)
        )
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return time.monotonic() - started

    seconds = run(0, 1e6)
    rows, whole, seed, kills = (
        read_rows(OUT),
        checkpoint.read(OUT / "ckpt.pt")["model"],
        0,
        [],
    )
    while len(kills) < 20:
        seed += 1
        shutil.rmtree(OUT)
        seconds = min(seconds, run(seed, seconds))  # the machine may be less busy now
        kills = Path("kills").read_text().splitlines() if Path("kills").exists() else []
        print(kills[-3:], f"{seconds:.1f} s")
        assert read_rows(OUT) == rows
        assert_same_weights(checkpoint.read(OUT / "ckpt.pt")["model"], whole)
