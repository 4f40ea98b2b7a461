"""Tests for a CUDA card: pytest -m cuda. The same claims hold on a CPU: TEST_DEVICE=cpu pytest -m cuda.

Tolerances: in float32, 1e-4 of a loss and 1e-3 of gradients; in 16 bits, 2 % and 10 %.
"""

import copy
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN, read_rows
from humptygpt.model import POSITIONS
from test_bench import NANOGPT
from test_distributed import losses
from test_inference import logits_in_pieces
from test_model import VARIANTS, random_model, tokens
from uncached import generate

import prepare_data
import train
from benchmarks import __main__ as bench
from humptygpt.device import autocast, pick_dtype
from humptygpt.generation.generator import make_generator
from humptygpt.training.memory import ADVICE

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
CARDS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(ON_GPU and not CARDS, reason="no CUDA card; TEST_DEVICE=cpu"),
]
OUT = Path("out/run")
RUN = [*TINY_RUN, f"--device={DEVICE}"]
LOW = pick_dtype("auto", DEVICE) if CARDS or not ON_GPU else torch.bfloat16
LOW = torch.bfloat16 if torch.float32 == LOW else LOW
MODELS = [
    *VARIANTS,
    {"model": "transformer"},
    {"model": "transformer", "position": "rotary", "norm": "rmsnorm", "n_kv_head": 1},
]


def trained(*argv: str) -> list[float]:
    assert train.main([*RUN, *argv]) == 0
    return losses(read_rows(OUT))


@pytest.mark.parametrize("variant", MODELS, ids=str)
def test_losses_and_gradients_are_those_of_a_cpu(variant):
    model = random_model(**variant)
    T = min(model.config.block_size, 12)
    batch = {"idx": tokens(3, T), "targets": tokens(3, T, seed=1)}
    if hasattr(model, "encode"):
        batch["source"] = tokens(3, 7, seed=2)
        batch["source"][0, 4:] = -1
    _, expected = model(**batch)
    expected.backward()
    on_device = copy.deepcopy(model).to(DEVICE)
    batch = {name: x.to(DEVICE) for name, x in batch.items()}
    for dtype, loss_error, gradient_error in (
        (torch.float32, 1e-4, 1e-3),
        (LOW, 0.02, 0.1),
    ):
        on_device.zero_grad()
        with autocast(DEVICE, dtype):
            _, loss = on_device(**batch)
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=loss_error)
        for p, q in zip(model.parameters(), on_device.parameters(), strict=True):
            error = (q.grad.cpu() - p.grad).norm()
            assert error <= gradient_error * p.grad.norm() + 1e-3 * gradient_error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", [[], ["--optimizer=normuon", "--dropout=0.1"]])
def test_training_goes_as_on_a_cpu(tiny, dtype, options):
    if dtype == "float16" and not ON_GPU:
        pytest.skip("float16 trains on CUDA alone")
    cpu = trained("--device=cpu", *options)
    found = trained(f"--dtype={dtype}", "--compile=False", *options)
    assert found == pytest.approx(cpu, rel=0.05)


def test_a_resumed_run_has_the_losses_of_one_that_was_not_interrupted(tiny):
    argv = ["--compile=False", "--dropout=0.1", "--optimizer=normuon"]
    whole = trained(*argv)
    trained(*argv, "--max_iters=3", "--lr_decay_iters=6")
    resume = ["--init_from=resume", "--out_dir=out/run", "--max_iters=6"]
    assert train.main(resume) == 0
    assert losses(read_rows(OUT))[-3:] == pytest.approx(whole[-3:], rel=1e-4)


def test_a_compiled_run_has_the_losses_of_an_eager_one(tiny, capsys):
    eager = trained("--compile=False")
    capsys.readouterr()
    assert trained("--compile=True") == pytest.approx(eager, rel=1e-3)
    assert "compile failed" not in capsys.readouterr().err


@contextmanager
def waits_are_errors():
    """Turn on CUDA's own check; a CPU has none."""
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
    yield
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_does_not_wait_for_the_card(tiny, monkeypatch):
    step = train.train_step

    def checked(run):
        with waits_are_errors():
            return step(run)

    argv = ["--compile=False", "--grad_clip=1.0", "--dropout=0.1"]
    if ON_GPU and torch.float16 == LOW:
        argv.append("--dtype=float32")  # a scaler waits
    expected = trained(*argv)
    monkeypatch.setattr(train, "train_step", checked)
    assert trained(*argv) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("window", [0, 5])
def test_in_16_bits_cached_is_uncached_also_padded(position, window):
    model = random_model(n_embd=64, position=position, window=window, qk_norm=True, mlp_conv=2).eval()
    idx = tokens(3, 12)
    expected = model(idx)[0][:, 2:].detach()
    ready = make_generator(copy.deepcopy(model), LOW, DEVICE)
    idx = idx.to(DEVICE)
    with torch.inference_mode():
        cached = logits_in_pieces(ready, idx).cpu()
        whole = ready(idx)[0][:, 2:].cpu()
        padding = torch.full((3,), 2, device=DEVICE)
        padded = torch.nn.functional.pad(idx, (2, 0))
        shifted = logits_in_pieces(ready, padded, padding=padding)[:, 2:].cpu()
    for found in (cached, whole, shifted):
        error = (found - expected).square().mean() / expected.var()
        assert error < 0.03**2
    torch.testing.assert_close(cached, whole, atol=0.1, rtol=0.0)


def test_a_text_is_the_same_in_a_batch_and_alone():
    model = make_generator(random_model(position="rotary"), torch.float32, DEVICE)
    texts = tokens(4, 5).tolist()
    together = generate(model, texts, 20, device=DEVICE, seed=3)
    for i, text in enumerate(texts):
        alone = generate(model, [text], 20, device=DEVICE, seed=3, samples=[i])
        assert alone == together[i : i + 1]


# --------------------------------------------------------------------------------------
# Several cards, and too little memory: in processes of their own


def run_script(*argv: str, before: str = "", processes: int = 1):
    """Run train.py as a user does. before: code that runs first."""
    Path("start.py").write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
        "import train\nfrom humptygpt import machine\n"
        f"{before}\nmachine.run(train.main)\n"
    )
    command = [sys.executable]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        command += [*launcher, f"--nproc_per_node={processes}"]
    command += ["start.py", *argv]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(ON_GPU and CARDS < 2, reason="needs two cards")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_have_the_losses_of_one(tiny, parallel):
    argv = ["--optimizer=adamw", "--compile=False", "--gradient_accumulation_steps=2"]
    one = trained(*argv)
    done = run_script(*RUN, *argv, f"--parallel={parallel}", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(read_rows(OUT)) == pytest.approx(one, rel=1e-4)


def test_out_of_memory_is_one_line_with_what_takes_less(tiny):
    argv = [*RUN, "--compile=False", "--n_embd=512", "--n_layer=8", "--batch_size=65536"]
    before = "train.check_training_fits = lambda *args: None\n"
    if not ON_GPU:
        before += "def full(*args): raise train.torch.OutOfMemoryError('CUDA out of memory')\n"
        before += "train.train_step = full\n"
    done = run_script(*argv, before=before)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert line == f"start.py: out of memory on the GPU; {ADVICE}"


# --------------------------------------------------------------------------------------
# The bench


def test_the_bench_of_a_card_prints_its_table(tiny, capsys):
    Path("tiny.txt").rename("text.txt")
    prepare_data.main(["--input=text.txt", "--name=shakespeare_char"])
    Path("other").mkdir()
    Path("other/model.py").write_text(NANOGPT)
    argv = ["--what=gpu", f"--device={DEVICE}", "--short=True", "--nanogpt=other"]
    bench.main(argv)
    *table, figures = capsys.readouterr().out.splitlines()
    decoded = 4 if ON_GPU else 2
    assert sum(line.startswith("| gpt2_") for line in table) == 6 + decoded
    assert all(line.count("|") == 4 for line in table if line.startswith("|"))
    figures = json.loads(figures)
    assert figures["gpt2_350m"]["nanogpt_tokens_per_second"] > 0
    assert figures["fineweb_normuon"]["ms_per_step"] > 0
    assert figures["the demo, uncompiled"]["ms_per_step"] > 0
    assert figures["decode_16"]["tokens_per_second"] > 0
