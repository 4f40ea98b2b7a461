"""LoRA and freezing: what trains, what stays, and the adapter as PEFT opens it."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import GPT2, TINY_RUN, assert_same_weights, make_text
from safetensors.torch import load_file, save_file

import prepare_data
import sample
import train
from humptygpt import checkpoint
from humptygpt.finetune import lora
from humptygpt.finetune.lora import MARK
from humptygpt.loading import load
from humptygpt.optimizers import ADAMW, trained_parameters
from humptygpt.page import snapshots
from humptygpt.settings import read_settings
from model import GPT, ModelConfig

ALL = "q_proj,k_proj,v_proj,o_proj,up_proj,down_proj"
FROM_RUN = [*TINY_RUN, "--init_from=out/run", "--out_dir=out/lora", "--learning_rate=0.01"]
LORA = [*FROM_RUN, "--lora_rank=2", "--lora_alpha=8"]
OUT = Path("out/lora")


def logits(model, idx: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(idx)[0]


@pytest.fixture
def base(run_train):
    run_train("--bias=True", "--tie_weights=True")
    return load("out/run")


def test_a_run_with_lora_starts_as_the_model_that_it_starts_from(base):
    run = train.setup(*read_settings([*LORA, f"--lora_targets={ALL}"]))
    idx = torch.arange(16)[None]
    assert torch.equal(logits(run.model, idx), logits(base.model, idx))
    names = set(trained_parameters(run.model))
    kinds = ALL.split(",")
    assert {name.split(".")[-3] for name in names} == set(kinds) and len(
        names
    ) == 2 * 2 * len(kinds)
    assert all(".lora_A." in name or ".lora_B." in name for name in names)


@pytest.mark.parametrize("optimizer", ["adamw", "normuon"])
def test_adamw_trains_the_matrices_of_lora_whatever_the_optimizer(base, optimizer):
    run = train.setup(*read_settings([*LORA, f"--optimizer={optimizer}"]))
    groups = [group for group in run.optimizer.param_groups if group["params"]]
    assert groups and all(group["rule"] is ADAMW for group in groups)


def test_lora_trains_its_own_parameters_only_and_its_best_is_merged(base, capsys):
    assert train.main([*LORA, "--eval_interval=6"]) == 0  # so that the best is the last
    saved, best = (checkpoint.read(OUT / name) for name in ("ckpt.pt", "best.pt"))
    own = {name: x for name, x in saved["model"].items() if lora.MARK in name}
    assert_same_weights(
        {name: x for name, x in saved["model"].items() if name not in own},
        base.model.state_dict(),
    )
    assert saved["optimizer"]["state"].keys() == own.keys()
    assert all(x.any() for x in own.values())
    assert best["model_config"] == saved["model_config"]
    assert best["train_config"] == saved["train_config"] | {"lora_rank": 0}
    changed = {
        name
        for name, x in best["model"].items()
        if not torch.equal(x, base.model.state_dict()[name])
    }
    assert changed == {name.replace(".lora_A", "") for name in own if ".lora_A" in name}
    assert len(snapshots.to_8_bits(best["model"])) == len(
        torch.load(OUT / "snapshots/0.pt")["rows"]
    )
    config = checkpoint.configurator.make(ModelConfig, saved["model_config"])
    idx = torch.arange(16)[None]
    unmerged = logits(
        checkpoint.restore_model(saved["model"], config, saved["train_config"]), idx
    )
    for path in (OUT / "ckpt.pt", OUT / "best.pt"):
        torch.testing.assert_close(
            logits(load(path).model, idx), unmerged, atol=1e-5, rtol=1e-5
        )
    capsys.readouterr()
    texts = []
    for argv in (["--checkpoint=latest"], ["--checkpoint=best"]):
        sample.main([f"--out_dir={OUT}", "--temperature=0", "--max_new_tokens=20", *argv])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert not lora.adapted(load("out/lora", "latest").model)


def test_a_run_with_lora_of_an_earlier_version_is_sampled_and_resumed(base):
    """Whose keys were those of the model."""
    assert train.main(LORA) == 0
    saved = checkpoint.read(OUT / "ckpt.pt")
    expected = logits(load(OUT / "ckpt.pt").model, torch.arange(16)[None])
    for key in ("lora_rank", "lora_alpha", "lora_targets"):
        saved["model_config"][key] = saved["train_config"].pop(key)
    checkpoint.save(OUT / "ckpt.pt", saved)
    found = logits(load(OUT / "ckpt.pt").model, torch.arange(16)[None])
    assert torch.equal(found, expected)
    assert train.main(["--init_from=resume", f"--out_dir={OUT}", "--max_iters=9"]) == 0


def test_a_resumed_run_with_lora_is_the_uninterrupted_one(base):
    assert train.main(LORA) == 0
    whole = checkpoint.read(OUT / "ckpt.pt")
    assert (
        train.main([*LORA, "--max_iters=3", "--lr_decay_iters=6", "--out_dir=out/two"]) == 0
    )
    assert train.main(["--init_from=resume", "--out_dir=out/two", "--max_iters=6"]) == 0
    assert_same_weights(checkpoint.read(Path("out/two/ckpt.pt"))["model"], whole["model"])


def test_the_adapter_of_a_resumed_run_names_the_model_that_it_is_for(base):
    assert train.main([*LORA, "--max_iters=3", "--lr_decay_iters=6"]) == 0
    for steps in (6, 9):
        assert (
            train.main(["--init_from=resume", f"--out_dir={OUT}", f"--max_iters={steps}"])
            == 0
        )
    assert (
        json.loads((OUT / "adapter/adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        == "out/run"
    )
    assert checkpoint.read(OUT / "ckpt.pt")["train_config"]["init_from"] == "out/run"


def test_frozen_parameters_stay_and_the_others_train(base):
    assert (
        train.main(
            [
                *FROM_RUN,
                "--freeze=wte,blocks.0,attn_norm",
                "--max_iters=3",
                "--lr_decay_iters=6",
            ]
        )
        == 0
    )
    assert train.main(["--init_from=resume", f"--out_dir={OUT}", "--max_iters=6"]) == 0
    saved = checkpoint.read(OUT / "ckpt.pt")
    same = {
        name
        for name, x in saved["model"].items()
        if torch.equal(x, base.model.state_dict()[name])
    }
    frozen = {
        name
        for name in same
        if any(f".{part}." in f".{name}" for part in ("wte", "blocks.0", "attn_norm"))
    }
    assert same == frozen | {"lm_head.weight"} and "stack.blocks.1.attn_norm.weight" in same
    assert not saved["optimizer"]["state"].keys() & same


def test_how_much_of_the_model_trains_is_printed_before_the_run(base, capsys):
    assert train.main(LORA) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith(", from out/run")
    rows = 2 * 2 * 2 * (32 + 32)  # layers, projections, rank, inputs and outputs
    assert any(line.startswith(f"training: {rows} parameters, ") for line in lines)


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (
            ["--lora_targets=q_proj,vproj"],
            "lora_targets=q_proj,vproj: 'vproj' is not one of: down_proj, k_proj, o_pro",
        ),
        (
            ["--init_from=scratch"],
            "lora_rank=2 trains beside a model; name that with --init_from",
        ),
        (["--lora_rank=-1"], "lora_rank=-1 must be at least 0"),
        (
            ["--freeze=wpee"],
            "freeze=wpee: no parameter has 'wpee' in its name; see print(model)",
        ),
        (
            ["--freeze=stack,wte"],
            "freeze=stack,wte leaves nothing to train; name fewer parameters",
        ),
    ],
)
def test_what_cannot_train_is_refused_in_one_line(argv, complaint, base, fails):
    assert complaint in fails(
        train.main, *(FROM_RUN if "freeze" in complaint else LORA), *argv
    )


# --------------------------------------------------------------------------------------
# PEFT


def trained_adapter(kind: str, targets: str, folder: Path):
    """(our model with LoRA whose weights are random, transformers' base model with the adapter opened by PEFT)."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip(
        "peft", reason="needs peft: pip install -r requirements-dev.txt"
    )
    from test_pretrained import gpt2, llama

    from humptygpt.convert.adapters import write_adapter
    from humptygpt.convert.huggingface import read_pretrained

    (gpt2() if kind == "gpt2" else llama(num_key_value_heads=2)).save_pretrained("theirs")
    config, weights = read_pretrained(Path("theirs"))
    model = checkpoint.restore_model(weights, config)
    settings = {"lora_rank": 3, "lora_alpha": 5.0, "lora_targets": targets}
    lora.add(model, settings)
    torch.manual_seed(0)
    for p in trained_parameters(model).values():
        torch.nn.init.normal_(p, std=0.3)
    write_adapter(model, SimpleNamespace(init_from="theirs", **settings), folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        "theirs", dtype=torch.float32
    )
    return model, peft.PeftModel.from_pretrained(theirs, folder).eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("targets", ["q_proj,v_proj", "k_proj,o_proj,up_proj,down_proj"])
def test_peft_opens_the_adapter_with_equal_logits(kind, targets, folder):
    ours, theirs = trained_adapter(kind, targets, Path("adapter"))
    idx = torch.randint(11, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(idx).logits
        plain = theirs.get_base_model()
    found = logits(ours, idx)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(lora.merge(ours), idx), found, atol=1e-5, rtol=1e-5)
    assert (
        plain is not None
        and json.loads(Path("adapter/adapter_config.json").read_text())["r"] == 3
    )


def test_the_adapter_is_small_and_has_our_names_where_there_are_no_others(run_train):
    run_train("--qk_norm=True")
    assert train.main(LORA) == 0
    weights = load_file(OUT / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.stack.blocks.0.attn.q_proj.lora_A.weight"
    assert weights[name].shape == (2, 32) and len(weights) == 8
    size = sum(path.stat().st_size for path in (OUT / "adapter").iterdir())
    assert size < (OUT / "best.pt").stat().st_size / 10


@pytest.mark.parametrize(
    "shape", [[], ["--qk_norm=True"]], ids=["names of transformers", "our names"]
)
def test_a_model_is_read_back_from_its_adapter(shape, run_train, capsys):
    run_train("--bias=True", *shape)
    targets = "--lora_targets=k_proj,v_proj,o_proj,up_proj"
    assert train.main([*LORA, targets, "--eval_interval=6"]) == 0
    merged, found = load("out/lora"), load("out/lora/adapter")
    assert found.model.config == merged.model.config
    torch.testing.assert_close(
        dict(found.model.state_dict()),
        dict(merged.model.state_dict()),
        atol=1e-6,
        rtol=1e-6,
    )
    assert found.description == "out/lora/adapter: an adapter of out/run/best.pt"
    capsys.readouterr()
    texts = []
    for source in ("out/lora", "out/lora/adapter"):
        sample.main([f"--init_from={source}", "--temperature=0", "--max_new_tokens=20"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    prepare_data.main(["--input=tiny.txt", "--name=tiny2", "--tokenizer=out/lora/adapter"])
    assert (
        train.main(
            [
                *TINY_RUN,
                "--init_from=out/lora/adapter",
                "--dataset=tiny2",
                "--out_dir=out/more",
            ]
        )
        == 0
    )


PEFT_CONFIGS = {
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2, rank-stabilised": (
        "gpt2",
        {"target_modules": ["c_fc"], "use_rslora": True, "fan_in_fan_out": True},
    ),
    "llama, several ranks": (
        "llama",
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 5}}
        | {"alpha_pattern": {"down_proj": 11, "layers.1.self_attn.q_proj": 7}},
    ),
    "llama, MLP": ("llama", {"target_modules": ["gate_proj", "up_proj"]}),
}


def peft_adapter(kind: str, **settings):
    """transformers' model with a random adapter of PEFT, which is saved in adapter/, the model in theirs/."""
    peft = pytest.importorskip(
        "peft", reason="needs peft: pip install -r requirements-dev.txt"
    )
    from test_pretrained import gpt2, llama
    from test_tokenizer_files import merges_folder

    base = (gpt2 if kind == "gpt2" else llama)(vocab_size=400)
    merges_folder(Path("theirs"))
    base.save_pretrained("theirs")
    base.name_or_path = base.config._name_or_path = "theirs"
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    ).eval()
    for name, p in model.named_parameters():
        if MARK in name:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained("adapter")
    return model


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_an_adapter_of_peft_is_read_with_its_logits(name, folder):
    kind, settings = PEFT_CONFIGS[name]
    theirs = peft_adapter(kind, **settings)
    base = load("adapter")
    idx = torch.randint(400, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(idx).logits
    torch.testing.assert_close(
        logits(base.model, idx),
        expected,
        atol=1e-4,
        rtol=1e-4,
    )
    assert not torch.equal(expected, logits(load("theirs").model, idx))


def change_config(**changes):
    path = Path("adapter/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(change):
    weights = load_file("adapter/adapter_model.safetensors")
    change(weights)
    save_file(weights, "adapter/adapter_model.safetensors")


B = "base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"
BAD = [
    (lambda: change_config(peft_type="LOHA"), "peft_type must be LORA"),
    (lambda: change_config(use_dora=True), "use_dora=True is not supported; plain LoRA is"),
    (
        lambda: change_config(init_lora_weights="pissa"),
        "init_lora_weights=pissa changes the base model",
    ),
    (
        lambda: change_config(alpha_pattern={"c_(a|b)": 3}),
        "the regular expression 'c_(a|b)'; names of layers are",
    ),
    (
        lambda: change_config(base_model_name_or_path=None),
        "base_model_name_or_path must be str",
    ),
    (
        lambda: change_config(base_model_name_or_path="thei"),
        "thei: there is no such file or folder; did you mean theirs?",
    ),
    (
        lambda: change_config(base_model_name_or_path="adapter"),
        "the base model of the adapter adapter is an adapter, too",
    ),
    (
        lambda: change_weights(lambda weights: weights.pop(B)),
        "lora_A.weight is unknown, or the other of its pair is missing",
    ),
    (
        lambda: change_weights(lambda weights: weights.update(more=torch.ones(1))),
        "the weight more is unknown",
    ),
    (
        lambda: change_weights(lambda weights: weights.update({B: torch.ones(48, 4)})),
        "c_attn.lora_B.weight must have shape (48, 3) and",
    ),
    (
        lambda: change_weights(
            lambda weights: weights.update({B: torch.ones(48, 3).int()})
        ),
        "and is in torch.int32",
    ),
    (lambda: change_weights(dict.clear), "it has no weights"),
    (
        lambda: Path("adapter/adapter_model.safetensors").unlink(),
        "neither adapter_model.safetensors nor adapter_model.bin",
    ),
    (
        lambda: Path("adapter/adapter_model.safetensors").write_bytes(b"abc"),
        "is truncated, damaged or holds more",
    ),
]


@pytest.mark.parametrize(("damage", "complaint"), BAD, ids=range(len(BAD)))
def test_an_adapter_that_is_damaged_or_more_than_lora_is_refused_in_one_line(
    damage, complaint, folder, fails
):
    peft_adapter("gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    damage()
    assert complaint in fails(sample.main, "--init_from=adapter")
    if "adapter, too" in complaint:
        Path("text.txt").write_text(make_text(3000))
        argv = ["--input=text.txt", "--name=x", "--tokenizer=adapter"]
        assert complaint in fails(prepare_data.main, *argv)


# --------------------------------------------------------------------------------------
# Memory

PEAK = """
import re, sys
from pathlib import Path
import torch, train
def peak():  # MB; of this program, where the resource module counts the one that started it, too
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
imported = peak()
run = train.setup(*train.read_settings(sys.argv[1:]))
for it in range(2):
    train.train_step(run, it)
print("peak", peak() - imported)
"""


@pytest.mark.long
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from /proc"
)
def test_lora_needs_at_most_half_the_memory_of_full_fine_tuning_of_124_million_parameters(
    folder,
):
    from humptygpt.tokenizers import BytePairTokenizer

    Path("text.txt").write_text(make_text(20_000))
    prepare_data.main(
        ["--input=text.txt", "--name=text", "--tokenizer=bpe", "--vocab_size=300"]
    )
    shape = {
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "block_size": 1024,
        "vocab_size": 50257,
        "bias": True,
    }
    state = json.loads(Path("data/text/meta.json").read_text())["tokenizer"]
    assert state["tokenizer"] == BytePairTokenizer.name
    progress = {
        "iter": 1,
        "tokens": 1,
        "seconds": 1.0,
        "best_val_loss": 1.0,
        "best_iter": 1,
        "evals_since_best": 0,
    }
    model = GPT(ModelConfig(**GPT2 | shape))
    entries = {
        "train_config": {},
        "model_config": vars(model.config),
        "tokenizer": state,
        "task": "language modelling",
    }
    entries |= {
        "data": {"source": "", "identity": {}},
        "progress": progress | {"losses": []},
    }
    checkpoint.save(Path("base.pt"), entries | {"model": dict(model.state_dict())})
    argv = [
        "--init_from=base.pt",
        "--dataset=text",
        "--batch_size=1",
        "--block_size=256",
        "--max_iters=2",
    ]
    argv += ["--dtype=float32", "--device=cpu", "--warmup_iters=0"]
    peaks = {}
    for name, more in {"full": [], "lora": ["--lora_rank=8"]}.items():
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *argv, f"--out_dir=out/{name}", *more],
            env={
                "PYTHONPATH": str(Path(train.__file__).parent),
                "OMP_NUM_THREADS": "1",
                "PATH": "/usr/bin",
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        print(name, done.stdout)
        peaks[name] = int(done.stdout.rpartition("peak ")[2])
    assert peaks["lora"] <= peaks["full"] / 2, peaks
