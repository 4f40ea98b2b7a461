"""Checkpoints: what is saved comes back, what is damaged or foreign is refused in one line, older formats are read."""

import errno
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ADAMW, GPT2, PLAIN, TINY_RUN
from torch import nn

import model as models
import sample
import train
from humptygpt import checkpoint
from humptygpt.config import UserError
from humptygpt.convert.huggingface import write_pretrained
from humptygpt.loading import load as load_source
from humptygpt.settings import TrainConfig
from humptygpt.tasks import build
from humptygpt.tokenizers import CharTokenizer

OUT = Path("out/run")


def make_entries(**changes) -> dict:
    """The entries of a small checkpoint."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 4, "vocab_size": 3}
    config = models.ModelConfig(**GPT2 | sizes | {"tie_weights": False})
    model = build(config)
    parameters = dict(model.named_parameters())
    state = {
        name: {key: torch.rand_like(p) for key in ("exp_avg", "exp_avg_sq")}
        for name, p in parameters.items()
    }
    return {
        "train_config": asdict(TrainConfig(**ADAMW, dataset="tiny", out_dir="out")),
        "model_config": asdict(config),
        "tokenizer": CharTokenizer("ab\n").state(),
        "task": "language modelling",
        "data": {"source": "ü.txt", "identity": {"train_tokens": 9}},
        "progress": asdict(train.Progress(iter=3, tokens=12, losses=[1.5])),
        "model": dict(model.state_dict()),
        "optimizer": {"steps": 3, "state": state},
        "scaler": None,
    } | changes


def flatten(entries: object, name: str = "") -> dict[str, object]:
    """{path: value}"""
    if not isinstance(entries, dict) or not entries:
        return {name: entries}
    return {
        path: leaf
        for key, value in entries.items()
        for path, leaf in flatten(value, f"{name}/{key}").items()
    }


def test_a_checkpoint_comes_back_as_it_was(folder):
    entries = make_entries()
    checkpoint.save(Path("a.pt"), entries)
    expected, found = (
        flatten(entries | {"format": checkpoint.FORMAT}),
        flatten(checkpoint.read(Path("a.pt"))),
    )
    assert expected.keys() == found.keys()
    for path, value in expected.items():
        same = (
            torch.equal(found[path], value)
            if isinstance(value, torch.Tensor)
            else found[path] == value
        )
        assert same, path


def test_a_full_disk_in_training_is_one_line(tiny, fails, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    assert "cannot write out/run/best.pt: No space left on device" in fails(
        train.main, *TINY_RUN, "--snapshots=False"
    )


# --------------------------------------------------------------------------------------
# Files that are not checkpoints


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def malicious(path: Path):
    torch.save({"format": checkpoint.FORMAT, "model": Evil()}, path)


def malicious_without_zip(path: Path):
    path.write_bytes(pickle.dumps({"format": checkpoint.FORMAT, "model": Evil()}))


def truncated(path: Path):
    checkpoint.save(path, make_entries())
    path.write_bytes(path.read_bytes()[:-500])


BAD = {
    "out/run/best.pt is not a checkpoint: it is truncated, damaged or holds": [
        malicious,
        malicious_without_zip,
        truncated,
        lambda path: path.write_bytes(b"no zip at all"),
        lambda path: path.write_bytes(b""),
    ],
    "out/run/best.pt is not a checkpoint of this version": [
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({"format": ["gpt checkpoint 3"]}, path),
        lambda path: torch.save({"format": "gpt checkpoint 2"}, path),
    ],
    "cannot read out/run/best.pt: model_args.n_layer is missing": [
        lambda path: torch.save({"model": {}, "model_args": {}}, path),
    ],
    "no checkpoint out/run/best.pt; train first": [lambda path: None],
    "cannot read the model in out/run/best.pt": [lambda path: path.mkdir()],
}


@pytest.mark.parametrize(
    ("complaint", "make"), [(line, make) for line, makes in BAD.items() for make in makes]
)
def test_a_file_that_is_not_a_checkpoint_is_refused_and_runs_no_code(
    folder, fails, complaint, make
):
    OUT.mkdir(parents=True)
    make(OUT / "best.pt")
    assert complaint in fails(sample.main, "--out_dir=out/run", "--device=cpu")
    assert not Path("ran").exists()


def test_resuming_without_a_checkpoint_is_refused(tiny, fails):
    assert "no checkpoint out/run/ckpt.pt" in fails(
        train.main, *TINY_RUN, "--init_from=resume"
    )
    assert not Path("out").exists()


def test_a_record_marked_as_a_directory_is_found(folder):
    path = Path("a.pt")
    checkpoint.save(path, make_entries())
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        records = file.infolist()
    for info in records:
        in_directory = whole.rindex(b"PK\1\2", 0, whole.rindex(info.filename.encode()))
        attributes = in_directory + 38
        damaged = bytearray(whole)
        damaged[attributes] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="it is truncated, damaged"):
            checkpoint.read(path)


# --------------------------------------------------------------------------------------
# The schema


def change(
    *keys: str, value: object = None, rename: str | None = None
) -> Callable[[dict], None]:
    """An edit of an entry: another value, another name, or none (neither is given)."""

    def edit(entries: dict) -> None:
        for key in keys[:-1]:
            entries = entries[key]
        old = entries.pop(keys[-1], None)
        if rename or value is not None:
            entries[rename or keys[-1]] = old if rename else value

    return edit


WTE = torch.zeros(3, 8)
EDITS = [
    ("train_config is missing", change("train_config")),
    ("train_config must be dict", change("train_config", value=[])),
    (
        "ckpt.pt was written by other code: it has the key batch_sice, which this code lacks",
        change("train_config", "batch_size", rename="batch_sice"),
    ),
    ("batch_size=0 must be at least 1", change("train_config", "batch_size", value=0)),
    (
        "learning_rate=nan must be above 0",
        change("train_config", "learning_rate", value=float("nan")),
    ),
    (
        "n_layer=1000000 and n_embd=8 do not describe its weights",
        change("model_config", "n_layer", value=10**6),
    ),
    (
        "n_embd=1099511627776 must be at least 1 and at most 1048576",
        change("model_config", "n_embd", value=2**40),
    ),
    ("n_head=3", change("model_config", "n_head", value=3)),
    (
        "block_size=2147483648 must be at least 1 and at most",
        change("model_config", "block_size", value=2**31),
    ),
    (
        "lm_head.weight must equal wte.weight",
        change("model_config", "tie_weights", value=True),
    ),
    (
        "ckpt.pt: the description of the tokenizer char is damaged",
        change("tokenizer", "alphabet"),
    ),
    (
        "the tokenizer has 4 tokens, but the model 3",
        change("tokenizer", "alphabet", value="abcd"),
    ),
    ("model=gpt is not for task=", change("task", value="painting")),
    ("progress.iter is missing", change("progress", "iter", rename="steps")),
    ("progress.iter must", change("progress", "iter", value=10**400)),
    ("progress has seconds=nan", change("progress", "seconds", value=float("nan"))),
    ("model.wte.weight must be Tensor", change("model", "wte.weight", value=[0.0])),
    (
        "it lacks the parameter wte.weight, which this code has",
        change("model", "wte.weight"),
    ),
    (
        "it has the parameter lm_head.w, which this code lacks",
        change("model", "lm_head.weight", rename="lm_head.w"),
    ),
    (
        "the parameter lm_head.weight must be a dense tensor of torch.float32 and shape",
        change("model", "lm_head.weight", value=WTE.T),
    ),
    (
        "the parameter lm_head.weight must be",
        change("model", "lm_head.weight", value=WTE.double()),
    ),
    (
        "the parameter lm_head.weight must be",
        change("model", "lm_head.weight", value=WTE.to_sparse()),
    ),
    (
        "the parameter lm_head.weight must be",
        change("model", "lm_head.weight", value=torch.zeros(()).expand(3, 8)),
    ),
    ("progress.seconds must be float", change("progress", "seconds", value=10**400)),
    ("it has progress.x, which this code lacks", change("progress", "x", value=3)),
    (
        "device must have no control characters",
        change("train_config", "device", value="c\npu"),
    ),
    ("optimizer.steps is missing", change("optimizer", "steps")),
    (
        "batch_size must be a number of at most 64 bits",
        change("train_config", "batch_size", value=10**400),
    ),
    ("scaler", change("scaler", value={"scale": 1.0})),
]


@pytest.mark.parametrize(("complaint", "edit"), EDITS, ids=range(len(EDITS)))
def test_an_entry_that_is_missing_renamed_or_of_another_kind_is_named(
    tiny, complaint, edit
):
    entries = make_entries(format=checkpoint.FORMAT)
    edit(entries)
    OUT.mkdir(parents=True)
    torch.save(entries, OUT / "ckpt.pt")
    with pytest.raises(UserError, match=complaint) as refusal:
        train.main(["--init_from=resume", "--out_dir=out/run"])
    assert "\n" not in str(refusal.value)


def test_what_does_not_fit_the_schema_is_never_saved(folder):
    with pytest.raises(ValueError, match="model is missing"):
        checkpoint.save(
            Path("a.pt"),
            {key: value for key, value in make_entries().items() if key != "model"},
        )
    assert not Path("a.pt").exists()


# --------------------------------------------------------------------------------------
# Checkpoints of earlier versions


def test_a_checkpoint_that_is_older_than_mlp_conv_has_none(run_train):
    run_train("--lr_decay_iters=8", "--mlp_conv=0")
    saved = torch.load(OUT / "ckpt.pt")
    del saved["model_config"]["mlp_conv"]
    torch.save(saved, OUT / "ckpt.pt")
    assert load_source(OUT / "ckpt.pt").model.config.mlp_conv == 0
    assert train.main(["--init_from=resume", "--out_dir=out/run", "--max_iters=8"]) == 0


@pytest.mark.parametrize("position", models.POSITIONS)
def test_a_restored_model_shares_the_tensors_of_the_file_and_is_whole(position):
    for keys in ({}, {"tie_weights": True}, {"model": "transformer"}):
        config = models.ModelConfig(
            n_layer=1,
            n_head=2,
            n_embd=32,
            block_size=8,
            vocab_size=11,
            position=position,
            **keys,
        )
        model = build(config)
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if config.tie_weights:
            saved["lm_head.weight"] = saved["wte.weight"]
        restored = checkpoint.restore_model(saved, config)
        assert restored.wte.weight.data_ptr() == saved["wte.weight"].data_ptr()
        assert [name for name, _ in restored.named_parameters()] == [
            name for name, _ in model.named_parameters()
        ]
        assert all(p.requires_grad for p in restored.parameters())
        batch = {"idx": torch.ones(1, 8, dtype=torch.long)}
        batch |= {"source": torch.ones(1, 5, dtype=torch.long)} if model.has_encoder else {}
        assert torch.equal(restored(**batch)[0], model(**batch)[0])


# --------------------------------------------------------------------------------------
# Runs of a model.py that has changed since


class ScaleOnly(nn.Module):
    """The README's example of a new norm."""

    def __init__(self, config: models.ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Renamed(models.LayerNorm):
    """A layer norm whose parameter has another name."""

    def __init__(self, config: models.ModelConfig):
        super().__init__(config)
        self.gain = nn.Parameter(self.weight.detach())
        del self.weight


class Buggy(models.LayerNorm):
    def __init__(self, config: models.ModelConfig):
        super().__init__(config)
        int("a bug")


DOORS = {
    "sampled": lambda argv: sample.main(["--out_dir=out/run", "--device=cpu"]),
    "resumed": lambda argv: train.main(["--init_from=resume", "--out_dir=out/run"]),
    "exported": lambda argv: load_source("theirs"),
}


def test_a_checkpoint_of_other_code_is_whole_and_says_what_differs(
    run_train, monkeypatch, fails
):
    def complaints() -> set[str]:
        """Of sampling and resuming, without the files, both of which are called whole."""
        lines = [fails(DOORS[door]) for door in ("sampled", "resumed")]
        return {line.partition(".pt was written by other code: ")[2] for line in lines}

    with monkeypatch.context() as patch:
        patch.setitem(models.NORMS, "scale", ScaleOnly)
        run_train("--norm=scale")
    kinds = ", ".join(models.NORMS)
    assert complaints() == {f"norm=scale is not one of: {kinds}\n"}

    monkeypatch.setitem(models.NORMS, "scale", Renamed)
    name = "stack.blocks.0.attn_norm.weight"
    assert complaints() == {f"it has the parameter {name}, which this code lacks\n"}

    for path in (OUT / "best.pt", OUT / "ckpt.pt"):
        saved = torch.load(path)
        saved["model_config"]["swirl"] = 3
        torch.save(saved, path)
    assert complaints() == {"it has the key swirl, which this code lacks\n"}


def test_a_bug_in_a_model_is_not_taken_for_a_damaged_file(run_train, monkeypatch):
    run_train(*PLAIN, "--norm=layernorm", "--bias=True")
    write_pretrained(load_source(OUT).model, Path("theirs"))
    monkeypatch.setitem(models.NORMS, "layernorm", Buggy)
    for enter in DOORS.values():
        with pytest.raises(ValueError, match=r"^invalid literal for int.*'a bug'") as error:
            enter([])
        assert error.type is ValueError
