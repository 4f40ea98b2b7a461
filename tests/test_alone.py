"""model.py by itself, as somebody copies it into an empty folder; scripts without the optional packages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from texts import make_text

from humptygpt import machine

ROOT = Path(__file__).parent.parent
ALONE = """
import sys
import torch
from model import GPT, ModelConfig

torch.manual_seed(0)
# rotary positions, because the text outgrows the context, in which learned positions would then be shifted
sizes = {"vocab_size": 65, "n_layer": 2, "n_embd": 32, "block_size": 16}
model = GPT(ModelConfig(**sizes, position="rotary"))
idx = torch.arange(17)[None] % 5
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(60):
    _, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < 0.1 < losses[0], losses
text = model.eval().generate(idx[:, :3], 30, top_k=1)[0].tolist()
assert text == [i % 5 for i in range(33)], text
try:
    GPT(ModelConfig(vocab_size=65, n_embd=33))
except ValueError as error:
    assert "n_embd=33 must be a multiple of n_head=2" in str(error)
ours = [name for name in sys.modules if name.startswith("humptygpt")]
print(ours)
"""


def test_copied_into_an_empty_folder_model_py_trains_and_generates(folder):
    shutil.copy(ROOT / "model.py", folder)
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


BLOCKED = f"""
import runpy
import sys

sys.path.insert(0, {str(ROOT)!r})
missing, *commands = sys.argv[1:]
for name in missing.split(","):
    sys.modules[name] = None  # as if it were not installed
for command in commands:
    script, *sys.argv[1:] = command.split()
    sys.argv[0] = {str(ROOT)!r} + "/" + script
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


def run_without(packages, *commands: str):
    """Run scripts in one process as if these packages were not installed."""
    command = [sys.executable, "-c", BLOCKED, ",".join(packages), *commands]
    return subprocess.run(command, capture_output=True, text=True)


def test_training_by_the_clock_too_sampling_and_the_page_need_no_optional_package(folder):
    Path("own.txt").write_text(make_text())
    shape = "--n_layer=1 --n_embd=32 --block_size=16 --max_iters=2"
    commands = [
        f"train.py --input=own.txt {shape}",
        "sample.py --out_dir=out/own --num_samples=1 --max_new_tokens=5",
        "explain.py --out_dir=out/own",
        "humptygpt/training/minutes.py",
    ]
    done = run_without(machine.OPTIONAL, *commands)
    assert done.returncode == 0, done.stderr
    assert "no loss.png, because matplotlib is not installed" in done.stderr
    assert not Path("out/own/loss.png").exists() and Path("out/own/explain.html").exists()


@pytest.mark.parametrize(
    ("package", "argv"),
    [
        ("tiktoken,tiktoken_ext", "prepare_data.py a --input=own.txt --tokenizer=gpt2"),
        ("pyarrow", "prepare_data.py a --input=own.parquet"),
        ("uvicorn", "serve.py --out_dir=out/run"),
    ],
)
def test_a_missing_package_is_named_in_one_line(folder, package, argv):
    Path("own.txt").write_text(make_text())
    Path("own.parquet").write_bytes(b"PAR1")
    done = run_without([package], argv)
    package = package.split(",")[0]
    line = f"{argv.split()[0]}: this needs the package {package}: pip install {package}\n"
    assert (done.returncode, done.stderr.endswith(line)) == (2, True), done.stderr


ELSEWHERE = """
import humptygpt
import model
loaded = humptygpt.load("out/run")
print(model.GPT, loaded.complete("Ak", max_new_tokens=5))
"""


def test_a_program_with_a_model_py_of_its_own_loads_a_run_in_a_line(run_train, folder):
    run_train()
    Path("model.py").write_text("GPT = 'mine'\n")
    command = [sys.executable, "-c", ELSEWHERE]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("mine Ak"), done.stderr
