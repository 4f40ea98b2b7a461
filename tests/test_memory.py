"""Memory: the lower bound, the refusal of runs that cannot fit, and scripts under a memory limit."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, WITHOUT_SAMPLE, exit_code, read_rows, started_processes
from humptygpt.model import ModelConfig

import prepare_data
import sample
import train
from humptygpt import cli, device, machine
from humptygpt import model as models
from humptygpt.cli import UserError
from humptygpt.device import DTYPES, autocast
from humptygpt.models import build as tasks
from humptygpt.models.build import MODELS, build, build_on_meta
from humptygpt.training import evaluation, memory
from humptygpt.training import run as runs
from humptygpt.training.memory import (
    ADVICE,
    Memory,
    check_training_fits,
    model_on_meta,
    training_memory,
)
from humptygpt.training.optimizers import OPTIMIZERS, freeze, make_optimizer
from humptygpt.training.settings import TrainConfig
from humptygpt.training.start import read_settings

ROOT = Path(__file__).parent.parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = {"n_layer": 3, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 50}
TINY = ModelConfig(**SIZES)


# --------------------------------------------------------------------------------------
# The lower bound


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_memory_of_weights_gradients_and_optimizer_is_what_a_step_holds(optimizer):
    config = TrainConfig(optimizer=optimizer, dtype="float32")
    model = build(TINY)
    trained = make_optimizer(config, model)
    idx = torch.zeros(2, 16, dtype=torch.int64)
    model(idx, idx)[1].backward()
    trained.step()
    needed = training_memory(config, build_on_meta(TINY))
    held = [tensor for state in trained.state.values() for tensor in state.values()]
    assert needed.optimizer == sum(tensor.nbytes for tensor in held)
    assert needed.weights == sum(p.nbytes for p in model.parameters())
    assert needed.gradients == sum(p.grad.nbytes for p in model.parameters())


VARIANTS = [
    *(("model", name) for name in MODELS if name != "number_mlp"),
    *(("mlp", "gated"), ("n_members", 2), ("vocab_size", 3000), ("dropout", 0.1)),
    *(("freeze", "mlp"), ("freeze", "wte,blocks.0,blocks.1"), ("lora_rank", 4)),
]


def kept_by_autograd(config: TrainConfig, model_config: ModelConfig, rows: int) -> int:
    """Bytes that a forward pass keeps for its backward pass, and those of the logits' gradient."""
    model = build(model_config, vars(config))
    freeze(model, config.freeze)
    idx = torch.zeros(rows, model_config.block_size, dtype=torch.int64)
    kept = []
    saved = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    )
    with saved, autocast(CPU, DTYPES[config.dtype]):
        model(idx, idx, **({"source": idx} if hasattr(model, "encode") else {}))
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    for p in model.parameters():
        storages.pop(p.data_ptr(), None)
    return sum(storages.values()) + 4 * idx.numel() * model_config.vocab_size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("key", "value"), VARIANTS)
def test_the_lower_bound_is_below_what_a_step_holds_and_counts_what_trains(key, value, dtype):
    sizes = {"vocab_size": 50, "block_size": 64, "window": 8, "batch_size": 6}
    settings = vars(TINY) | sizes | {"dtype": dtype, key: value}
    config = cli.make(TrainConfig, settings | {"init_from": "out/base"})
    model_config = tasks.make_model_config(settings)
    measured = kept_by_autograd(config, model_config, rows=6)
    on_meta = model_on_meta(config, model_config)
    needed = training_memory(config, on_meta)
    sizes = [p.nbytes for p in on_meta.parameters() if p.requires_grad]
    trained, steps = sum(sizes), 4 * len(sizes)  # AdamW counts the steps of each parameter
    assert (needed.gradients, needed.optimizer) == (trained, 2 * trained + steps)
    assert needed.logits <= measured


def test_with_checkpointed_activations_blocks_are_computed_again_with_the_same_losses(tiny, monkeypatch):
    calls, rows, counts = [], [], []
    forward = models.Block.forward
    monkeypatch.setattr(models.Block, "forward", lambda *args: calls.append(1) or forward(*args))
    for choice in ("False", "True"):
        argv = ["--dropout=0.2", "--dtype=bfloat16", f"--checkpoint_activations={choice}"]
        train.main([*TINY_RUN, *argv])
        rows.append(read_rows(Path("out/run")))
        counts.append(len(calls))
        calls.clear()
    assert rows[0] == rows[1]
    assert counts[1] == counts[0] + 6 * 2  # in 6 steps of 2 layers


def test_with_fsdp_each_process_has_a_part_of_all_and_without_it_all():
    model = build_on_meta(TINY)

    def needed(processes: int = 8, **settings) -> Memory:
        config = TrainConfig(batch_size=2, dtype="float32", **settings)
        return training_memory(config, model, processes)

    alone = needed(1, parallel="fsdp")
    assert alone == needed(1) == needed(gradient_accumulation_steps=8)  # DDP
    sharded = needed(parallel="fsdp", gradient_accumulation_steps=8)
    assert sharded == Memory(*(x / 8 for x in alone[:3]), alone.logits)


def test_a_dry_run_reports_memory_and_touches_nothing(capsys, monkeypatch):
    argv = ["--n_layer=2", "--vocab_size=100", "--device=cpu", "--dataset=missing"]
    argv += ["--gradient_accumulation_steps=4", "--dry_run=True"]
    weights = {}
    for parallel in ("", "ddp", "fsdp"):
        if parallel:
            for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
                monkeypatch.setenv(name, "0")
            monkeypatch.setenv("MASTER_ADDR", "localhost")
            monkeypatch.setenv("WORLD_SIZE", "4")
            argv.append(f"--parallel={parallel}")
        assert train.main(argv) == 0
        out = capsys.readouterr().out
        assert " parameters, " in out and ": activations come on top\n" in out
        each, size = re.search(r"memory(.*), in GB: weights ([0-9.e-]+)", out).groups()
        assert each == (f" per process (4 processes, {parallel.upper()})" if parallel else "")
        weights[parallel] = float(size)
    assert weights["ddp"] == weights[""]
    assert weights["fsdp"] == pytest.approx(weights[""] / 4, rel=0.01)
    assert not list(Path().iterdir())


def test_a_dry_run_without_data_or_vocabulary_is_one_line(fails):
    assert "meta.json" in fails(train.main, "--dataset=missing", "--dry_run=True")


# --------------------------------------------------------------------------------------
# The refusal of runs that cannot fit


@pytest.fixture
def gigabyte(monkeypatch):
    """A machine with 1 GB of free memory."""
    monkeypatch.setattr(machine, "available_memory", lambda: 10**9)
    monkeypatch.setattr(device, "available_memory", lambda: 10**9)


TOO_LARGE = (
    "--n_embd=1000000",
    "--batch_size=10000000",
    "--batch_size=10000000 --checkpoint_activations=True",
    "--n_hidden=1000000 --n_embd=4096 --freeze=mlp",
)


@pytest.mark.parametrize("settings", TOO_LARGE)
def test_a_training_that_will_not_fit_is_refused_with_its_size_and_what_takes_less(tiny, gigabyte, fails, settings):
    line = fails(train.main, *TINY_RUN, *settings.split())
    end = f"of memory, but only 1.00 GB is free; {ADVICE}\n"
    assert re.search(r" takes at least [\d,.]+ GB ", line) and line.endswith(end)
    assert not Path("out/run/config.json").exists()


def test_a_model_of_very_many_layers_is_refused_before_it_is_built(tiny, monkeypatch, fails):
    monkeypatch.setattr("humptygpt.training.memory.build_on_meta", None)
    line = "n_layer=100000 must be from 1 to 4096\n"
    assert fails(train.main, *TINY_RUN, "--n_layer=100000") == line


def test_the_memory_of_a_gpu_counts_or_that_of_a_machine_which_processes_share(tiny, gigabyte, monkeypatch):
    argv = [*TINY_RUN, "--n_embd=1024", "--vocab_size=50", "--n_layer=4"]
    config, model_config, *_ = read_settings([*argv, "--dtype=float32"])
    check = partial(check_training_fits, config, model_config)
    check(CPU)  # 0.8 GB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**8, 10**11))
    with pytest.raises(UserError, match=r" but only 100\.0 MB is free"):
        check(CUDA)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r" but only 250\.0 MB is free"):
        check(CPU, processes=4)
    sharded = replace(config, parallel="fsdp")
    check_training_fits(sharded, model_config, CPU, processes=4)


def test_the_lower_bound_loads_no_compiler():
    code = """if True:
        import sys, train
        from humptygpt import model
        for position in model.POSITIONS:
            train.main(["--vocab_size=9", f"--position={position}", "--dry_run=True"])
        print("torch._dynamo" in sys.modules, "sympy" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("\nFalse False\n"), done.stderr


def test_a_text_that_will_not_fit_is_refused_with_its_size(run_train, gigabyte):
    run_train()
    match = r" tokens takes [\d,.]+ GB of memory, but only 900\.0 MB is free; try a smaller --max_new_tokens"
    with pytest.raises(UserError, match=match):
        sample.main(["--out_dir=out/run", "--device=cpu", f"--max_new_tokens={10**18}"])


def test_weights_that_will_not_fit_are_refused_with_their_size(run_train, monkeypatch):
    run_train()
    monkeypatch.setattr(device, "available_memory", lambda: 100)
    with pytest.raises(UserError, match=r"the weights take .* MB .* free; .*--quantize=int8"):
        sample.load("out/run", device="cpu")


def test_a_step_for_which_memory_does_not_suffice_all_the_same_is_one_line_with_the_way_out(tiny, fails, monkeypatch):
    monkeypatch.setattr(train, "train_step", lambda run: torch.empty(2**50))
    assert fails(train.main, *TINY_RUN) == f"out of memory; {ADVICE}\n"


# --------------------------------------------------------------------------------------
# Allocations that fail


def run_limited(main, argv: list[str], room: int) -> None:
    """Run a script's main in a process that may allocate this many bytes more than it has."""
    import resource

    import psutil

    torch.set_num_threads(1)
    runs.draw_losses = lambda *args: None
    evaluation.TEXT = WITHOUT_SAMPLE
    os.dup2(os.open("stderr", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
    sys.argv = ["script.py", *argv]
    limit = psutil.Process().memory_info().vms + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    machine.run(main)


def run_with_little_memory(argv: list[str], free: int) -> None:
    """Train in a process that believes that so many bytes are free."""
    torch.set_num_threads(1)
    os.dup2(os.open("stderr", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
    memory.available_memory = lambda: free
    sys.argv = ["train.py", *argv]
    machine.run(train.main)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of memory")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_that_needs_more_than_is_free_is_one_line_and_the_checkpoint_stays(run_train, processes, threads):
    run_train("--n_embd=256", "--batch_size=64", "--vocab_size=2000", "--max_iters=1")
    saved = Path("out/run/ckpt.pt").read_bytes()
    argv = ["--init_from=resume", "--out_dir=out/run", f"--threads={threads}"]
    argv += ["--device=cpu", "--max_iters=3"]
    process = processes.Process(target=run_with_little_memory, args=(argv, 10_000_000))
    process.start()
    assert exit_code(process) == 2
    line = f"train.py: out of memory; {ADVICE}"
    assert Path("stderr").read_text().splitlines()[-1:] == [line]
    assert Path("out/run/ckpt.pt").read_bytes() == saved


@pytest.fixture(scope="module")
def processes():
    """A way to start processes that have already loaded torch."""
    return started_processes("test_memory")


COMMANDS = {
    "train": (
        train.main,
        [
            *TINY_RUN,
            *("--n_embd=256", "--block_size=64", "--batch_size=64", "--max_iters=2"),
        ],
    ),
    "sample": (
        sample.main,
        ["--out_dir=out/run", "--num_samples=500", "--max_new_tokens=20", "--device=cpu"],
    ),
    "prepare": (
        prepare_data.main,
        ["--input=tiny.txt", "--name=mine", "--tokenizer=bpe", "--vocab_size=300"],
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of memory")
@pytest.mark.parametrize("name", COMMANDS)
def test_under_a_limit_of_memory_a_script_ends_well_or_in_one_line(run_train, processes, name):
    run_train()
    for room in (0, 130_000_000, 260_000_000, 400_000_000):
        process = processes.Process(target=run_limited, args=(*COMMANDS[name], room))
        process.start()
        exit_code(process)
        known = "note: |out/run|---|.*step/s|$"
        stderr = Path("stderr").read_text()
        lines = [line for line in stderr.splitlines() if not re.match(known, line)]
        assert (process.exitcode, len(lines)) in ((0, 0), (2, 1)), (room, stderr)
        assert not lines or "memory" in lines[0]
    assert process.exitcode == 0
