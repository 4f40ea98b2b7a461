"""LoRA and freezing: trained and frozen parameters."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN, assert_same_weights, prepare_tiny
from humptygpt.model import GPT, ModelConfig

import train
from humptygpt.formats import checkpoint
from humptygpt.formats.load import load
from humptygpt.models.build import build_on_meta, restore_model
from humptygpt.models.lora import LoRALinear
from humptygpt.page.snapshots import to_8_bits
from humptygpt.training.optimizers import trained_parameters
from humptygpt.training.start import read_settings

ALL = "q_proj,k_proj,v_proj,o_proj,up_proj,down_proj"
FROM_RUN = [*TINY_RUN, "--init_from=out/run", "--out_dir=out/lora", "--learning_rate=0.01"]
LORA = [*FROM_RUN, "--lora_rank=2", "--lora_alpha=8"]
OUT = Path("out/lora")
HALF = ["--max_iters=3", "--lr_decay_iters=6"]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def logits(model, idx: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(idx)[0]


def train_base() -> None:
    prepare_tiny()
    train.main([*TINY_RUN, "--bias=True", "--tie_weights=True"])


@pytest.fixture
def base(made_once):
    made_once(train_base)
    return load("out/run")


def test_a_run_with_lora_starts_as_the_model_that_it_starts_from(base):
    run = train.setup(read_settings([*LORA, f"--lora_targets={ALL}"]))
    idx = torch.arange(16)[None]
    assert torch.equal(logits(run.model, idx), logits(base.model, idx))
    kinds, matrices = zip(*(name.split(".")[-3:-1] for name in trained_parameters(run.model)), strict=True)
    assert set(kinds) == set(ALL.split(",")) and set(matrices) == {"lora_A", "lora_B"}


@pytest.mark.parametrize("optimizer", ["adamw", "normuon"])
def test_adamw_trains_the_matrices_of_lora_whatever_the_optimizer(base, optimizer):
    run = train.setup(read_settings([*LORA, f"--optimizer={optimizer}"]))
    groups = [group for group in run.optimizer.param_groups if group["params"]]
    assert groups and all("momentum" not in group for group in groups)


def test_lora_trains_its_own_parameters_only_and_its_best_is_merged(base):
    # with one evaluation, best.pt and ckpt.pt are from the same step
    assert train.main([*LORA, "--eval_interval=6"]) == 0
    saved, best = (checkpoint.read(OUT / name) for name in ("ckpt.pt", "best.pt"))
    before = base.model.state_dict()
    own = {name for name in saved["model"] if ".lora_" in name}
    assert saved["optimizer"].keys() == own
    assert all(saved["model"][name].any() for name in own)
    assert_same_weights({k: x for k, x in saved["model"].items() if k not in own}, before)
    changed = {k for k, x in best["model"].items() if not torch.equal(x, before[k])}
    assert changed == {name.replace(".lora_A", "") for name in own if ".lora_A" in name}
    assert best["model_config"] == saved["model_config"]
    assert best["train_config"] == saved["train_config"] | {"lora_rank": 0}
    rows = torch.load(OUT / "snapshots/0.pt")["rows"]
    assert len(to_8_bits(best["model"])) == len(rows)
    config = checkpoint.cli.make(ModelConfig, saved["model_config"])
    unmerged = build_on_meta(config, saved["train_config"])
    restore_model(unmerged, saved["model"])
    idx = torch.arange(16)[None]
    for path in (OUT / "ckpt.pt", OUT / "best.pt"):
        found = load(path).model
        assert not any(isinstance(part, LoRALinear) for part in found.modules())
        torch.testing.assert_close(logits(found, idx), logits(unmerged, idx), **CLOSE)


def test_a_resumed_run_with_lora_is_the_uninterrupted_one_and_names_its_base(base):
    assert train.main(LORA) == 0
    whole = checkpoint.read(OUT / "ckpt.pt")["model"]
    assert train.main([*LORA, *HALF]) == 0
    assert train.main(["--init_from=resume", f"--out_dir={OUT}", "--max_iters=6"]) == 0
    saved = checkpoint.read(OUT / "ckpt.pt")
    assert_same_weights(saved["model"], whole)
    assert saved["train_config"]["init_from"] == "out/run"


def test_frozen_parameters_stay_and_the_others_train(base):
    assert train.main([*FROM_RUN, "--freeze=wte,blocks.0,attn_norm", *HALF]) == 0
    assert train.main(["--init_from=resume", f"--out_dir={OUT}", "--max_iters=6"]) == 0
    saved = checkpoint.read(OUT / "ckpt.pt")
    before = base.model.state_dict()
    same = {name for name, x in saved["model"].items() if torch.equal(x, before[name])}
    # the head shares the weights of wte
    parts = r"(wte|lm_head)\.|\.blocks\.0\.|\.attn_norm\."
    assert same == {name for name in before if re.search(parts, name)}
    assert not saved["optimizer"].keys() & same


REFUSED = {
    "--lora_targets=q_proj,vproj": "lora_targets=q_proj,vproj: 'vproj' is not one of: down_proj, k_",
    "--init_from=scratch": "lora_rank=2 needs an existing model; name it with --init_from",
    "--lora_rank=-1": "lora_rank=-1 must be at least 0",
    "--freeze=wpee": "freeze=wpee: no parameter has 'wpee' in its name; see print(model)",
    "--freeze=stack,wte": "freeze=stack,wte leaves nothing to train; name fewer parameters",
}


@pytest.mark.parametrize("argument", REFUSED)
def test_what_cannot_train_is_refused_in_one_line(argument, base, fails):
    argv = FROM_RUN if "freeze" in argument else LORA
    assert REFUSED[argument] in fails(train.main, *argv, argument)


# --------------------------------------------------------------------------------------
# Memory

PEAK = """
import re, sys
from pathlib import Path
import torch, train
def peak():  # MB; the resource module would include the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
imported = peak()
run = train.setup(train.read_settings(sys.argv[1:]))
for _ in range(2):
    train.train_step(run)
    run.model.zero_grad()
print("peak", peak() - imported)
"""


@pytest.mark.long
def test_lora_needs_at_most_half_the_memory_of_full_fine_tuning_of_124_million_parameters(
    run_train,
):
    run_train()
    sizes = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}
    model = GPT(ModelConfig(**sizes, vocab_size=50257, bias=True))
    large = {"model_config": vars(model.config), "model": dict(model.state_dict())}
    checkpoint.save(Path("base.pt"), checkpoint.read(Path("out/run/best.pt")) | large)
    argv = ["--init_from=base.pt", "--dataset=tiny", "--batch_size=1", "--block_size=256"]
    argv += ["--max_iters=2", "--dtype=float32", "--device=cpu", "--warmup_iters=0"]
    peaks = {}
    for name, more in {"full": [], "lora": ["--lora_rank=8"]}.items():
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *argv, f"--out_dir=out/{name}", *more],
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[name] = int(done.stdout.rpartition("peak ")[2])
    assert peaks["lora"] <= peaks["full"] / 2, peaks
