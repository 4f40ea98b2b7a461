"""What will not fit into memory is refused before it is tried; under any limit, a script ends well or in one line."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, started_processes

import prepare_data
import sample
import train
from humptygpt.core import device, limits
from humptygpt.core import settings as configurator
from humptygpt.core.device import DTYPES
from humptygpt.core.errors import UserError
from humptygpt.training import evaluation, memory, run_folder, sizes
from humptygpt.training.settings import TrainConfig, read_settings
from model import ACTIVATIONS, BLOCKS, MLPS, MODELS, POSITIONS

ROOT = Path(__file__).parent.parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gigabyte(monkeypatch):
    """A machine, and a GPU, with 1 GB of free memory."""
    monkeypatch.setattr(limits, "available_memory", lambda: 10**9)
    monkeypatch.setattr(device, "available_memory", lambda: 10**9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 4 * 10**9))


TOO_LARGE = [
    "--n_embd=1000000",
    "--n_layer=1000000",
    "--batch_size=10000000",
    "--n_hidden=100000000",
]
TOO_LARGE += ["--n_embd=4000000000", "--vocab_size=1000000000 --n_embd=4096"]


@pytest.mark.parametrize("settings", TOO_LARGE)
def test_a_training_that_will_not_fit_is_refused_with_its_size_and_the_setting_that_fits(
    tiny, gigabyte, fails, settings
):
    line = fails(train.main, *TINY_RUN, *settings.split())
    assert re.search(r" takes (inf|[\d,.]+) GB of memory or more, and 1\.00 GB are free; ", line), (
        line
    )
    assert not Path("out/run/config.json").exists()
    if fits := re.search(r"(--\w+=\d+) would fit$", line):
        config, model_config, *_ = read_settings(
            [*TINY_RUN, *settings.split(), fits[1], "--vocab_size=21"]
        )
        memory.check_training_fits(config, model_config, config.batch_size, CPU, torch.float32)
    else:
        assert (
            line.endswith("make the model smaller, and the batches\n") and "vocab_size" in settings
        )


def test_on_a_gpu_its_own_memory_counts(tiny, gigabyte, monkeypatch):
    config, model_config, *_ = read_settings([*TINY_RUN, "--n_embd=4096", "--vocab_size=50"])
    with pytest.raises(
        UserError, match=r"GB of memory or more, and 1\.00 GB are free on cuda; --n_"
    ):
        memory.check_training_fits(config, model_config, 4, CUDA, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**11, 10**11))
    memory.check_training_fits(config, model_config, 4, CUDA, torch.bfloat16)


def test_several_processes_share_the_memory_of_a_machine(tiny, gigabyte, monkeypatch):
    config, model_config, *_ = read_settings(
        [*TINY_RUN, "--n_embd=1024", "--vocab_size=50", "--n_layer=4"]
    )
    memory.check_training_fits(config, model_config, 4, CPU, torch.float32)  # 0.8 GB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"in each process, and 250\.0 MB are free"):
        memory.check_training_fits(config, model_config, 1, CPU, torch.float32, processes=4)
    memory.check_training_fits(
        replace(config, parallel="fsdp"), model_config, 1, CPU, torch.float32, processes=4
    )


VARIANTS = [("position", name) for name in POSITIONS] + [("block", name) for name in BLOCKS]
VARIANTS += [("mlp", name) for name in MLPS] + [("activation", name) for name in ACTIVATIONS]
VARIANTS += [("model", name) for name in MODELS] + [
    ("dropout", 0.1),
    ("n_kv_head", 1),
    ("norm", "none"),
]
VARIANTS += [("block_size", 256), ("vocab_size", 3000), ("n_hidden", 2048)]
DTYPE_NAMES = ("float32", "bfloat16")


@pytest.mark.parametrize(("key", "value"), VARIANTS)
def test_the_size_is_linear_in_the_layers_and_less_than_a_training_takes_but_not_a_sixth_of_it(
    key, value
):
    settings = {
        "vocab_size": 50,
        "n_embd": 32,
        "n_head": 2,
        "block_size": 64,
        "n_layer": 5,
        "window": 8,
        key: value,
    }
    if value == "parallel" or value == "plain":
        settings["init"] = "gpt2"
    config = configurator.make(TrainConfig, settings)
    model_config = configurator.make(train.ModelConfig, settings)
    parameters = sum(p.numel() for p in train.models.build(model_config).parameters())
    for dtype in (DTYPES[name] for name in DTYPE_NAMES):
        size = memory.training_size(config, model_config, config.batch_size, CPU, dtype)
        assert size.parameters == parameters
        assert size.bytes == pytest.approx(
            memory.size_of_layers(config, model_config, config.batch_size, CPU, dtype).bytes,
            rel=1e-9,
        )
        exact = sizes.memory(model_config, config.optimizer, config.batch_size, dtype)
        assert exact.total / 6 < size.bytes < exact.total - min(exact.gradients, exact.activations)
        assert size.bytes > 16 * parameters  # AdamW: the weights, their gradients and two averages


@pytest.mark.parametrize("position", memory.TABLES)
def test_counting_makes_no_table_of_positions_which_may_be_large_too(monkeypatch, position):
    monkeypatch.setitem(POSITIONS, position, lambda *args: 1 / 0)
    model_config = train.ModelConfig(vocab_size=9, position=position)
    assert (
        memory.training_size(train.TrainConfig(), model_config, 4, CPU, torch.float32).bytes > 10**6
    )


def test_counting_loads_no_compiler(tiny):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch, train; from humptygpt.training import memory\n"
    code += "for position in train.models.POSITIONS:\n"
    code += "    model_config = train.ModelConfig(vocab_size=9, position=position)\n"
    code += "    memory.training_size(train.TrainConfig(), model_config, 4, torch.device('cpu'), torch.float32)\n"
    code += "print('torch._dynamo' in sys.modules, 'sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr


@pytest.fixture
def run_dir(run_train):
    run_train()
    return Path("out/run")


@pytest.mark.parametrize(
    ("argv", "way_out"),
    [
        (["--num_samples=100000000"], r"--num_samples=\d+ would fit"),
        (["--max_new_tokens=1000000000"], r"--num_samples=1 --max_new_tokens=\d+ would fit"),
        (
            ["--max_new_tokens=1000000000000000000"],
            r"--num_samples=1 --max_new_tokens=\d+ would fit",
        ),
    ],
)
def test_texts_that_will_not_fit_are_refused_with_their_size_and_how_many_would(
    run_dir, gigabyte, fails, argv, way_out, capsys
):
    with pytest.raises(UserError) as error:
        sample.main(["--out_dir=out/run", "--device=cpu", *argv])
    assert re.search(
        rf" tokens take [\d,.]+ GB of memory, and 1\.00 GB are free; {way_out}$", str(error.value)
    )


def test_weights_that_will_not_fit_are_refused_with_their_size(run_dir, monkeypatch):
    monkeypatch.setattr(device, "available_memory", lambda: 100)
    with pytest.raises(
        UserError, match=r"out/run takes .* MB .* free; --quantize=int8 takes a quarter"
    ):
        sample.load("out/run", device="cpu")


def test_a_step_for_which_memory_does_not_suffice_all_the_same_is_one_line_with_the_way_out(
    tiny, fails, monkeypatch
):
    monkeypatch.setattr(train, "train_step", lambda run, it: torch.empty(2**50))
    line = fails(train.main, *TINY_RUN)
    assert line.startswith("out of memory, ")
    assert line.endswith("; try a smaller --batch_size, --block_size or model\n")


def test_a_tokenizer_whose_training_will_not_fit_is_refused_with_the_one_that_fits(
    tiny, fails, monkeypatch
):
    monkeypatch.setattr(limits, "available_memory", lambda: 50_000)
    line = fails(prepare_data.main, "--input=tiny.txt", "--name=mine", "--tokenizer=sentencepiece")
    assert line == (
        "training tokenizer=sentencepiece on this text takes 50.1 MB of memory, and 0.1 MB are free;"
        " --tokenizer=byte takes none\n"
    )
    assert not Path("data/mine").exists()


def test_as_many_workers_encode_as_memory_allows(folder, monkeypatch):
    Path("large.txt").write_text("Ak el. " * 1_200_000)
    monkeypatch.setattr(limits, "available_memory", lambda: 250_000_000)
    monkeypatch.setattr(limits, "usable_cores", lambda: 8)
    started, in_order = [], prepare_data.in_order
    watched = lambda *args: started.append(args[3]) or in_order(*args[:3], 1)  # noqa: E731
    monkeypatch.setattr(prepare_data, "in_order", watched)
    prepare_data.main(["--input=large.txt", "--name=mine"])
    assert started == [2]


# --------------------------------------------------------------------------------------
# ulimit -v


def run_limited(main, argv: list[str], room: int) -> None:
    """Run a script's main in a process that may allocate this many bytes more than it has."""
    import resource

    import psutil

    torch.set_num_threads(1)
    run_folder.draw_losses, evaluation.sample_text = lambda *args: None, lambda *args: ""
    for name in ("stdout", "stderr"):
        os.dup2(
            os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY),
            getattr(sys, f"__{name}__").fileno(),
        )
    sys.argv = ["script.py", *argv]
    sys.excepthook = limits.report_failed_import
    limit = psutil.Process().memory_info().vms + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    configurator.run(main)


@pytest.fixture(scope="module")
def processes():
    """They have torch loaded already."""
    return started_processes("test_memory")


COMMANDS = {
    "train": (
        train.main,
        [*TINY_RUN, "--n_embd=256", "--block_size=64", "--batch_size=64", "--max_iters=2"],
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


def under_limits(processes, name: str, count: int) -> None:
    main, argv = COMMANDS[name]
    codes = []
    for number in range(count):
        room = 400_000_000 * number // (count - 1)
        process = processes.Process(target=run_limited, args=(main, argv, room))
        process.start()
        process.join()
        codes.append(process.exitcode)
        lines = [
            line
            for line in Path("stderr").read_text().splitlines()
            if not line.startswith(("note: ", "out/run", "---"))
        ]
        assert (process.exitcode, len(lines)) in ((0, 0), (2, 1)), (room, process.exitcode, lines)
        assert not lines or "memory" in lines[0], lines
    assert codes[-1] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs ulimit -v")
@pytest.mark.parametrize("name", COMMANDS)
def test_under_a_limit_of_memory_a_script_ends_well_or_in_one_line(run_train, processes, name):
    run_train()
    under_limits(processes, name, 4)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="needs ulimit -v")
@pytest.mark.parametrize("name", COMMANDS)
def test_under_thirty_limits_of_memory_a_script_ends_well_or_in_one_line(
    run_train, processes, name
):
    run_train()
    under_limits(processes, name, 30)


# --------------------------------------------------------------------------------------
# Whole scripts, from the loading of Python on

# (script, its arguments, bytes of virtual memory with which it certainly succeeds)
SCRIPTS = {
    "train": ("train.py", COMMANDS["train"][1], 1_500_000_000),
    "sample": ("sample.py", COMMANDS["sample"][1], 1_500_000_000),
    "prepare": ("prepare_data.py", COMMANDS["prepare"][1], 400_000_000),
}
LEAST = 60_000_000  # with which Python itself starts


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="needs ulimit -v")
@pytest.mark.parametrize("name", SCRIPTS)
def test_under_thirty_limits_a_whole_script_ends_well_or_in_one_line(run_train, name):
    run_train()
    script, argv, enough = SCRIPTS[name]
    command = shlex.join([sys.executable, str(ROOT / script), *argv])
    known = ("note: ", "out/run", "---")
    codes = []
    for number in range(30):
        size = LEAST + (enough - LEAST) * number // 29
        limited = f"ulimit -v {size // 1024}; exec {command}"
        done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
        lines = [
            line
            for line in done.stderr.splitlines()
            if line and not line.startswith(known) and "step/s" not in line
        ]
        codes.append(done.returncode)
        assert (done.returncode, len(lines)) in ((0, 0), (2, 1)), (size, done)
        assert not lines or "memory" in lines[0], lines
    assert codes[0] == 2 and codes[-1] == 0
