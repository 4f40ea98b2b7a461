"""Checkpoints: what is saved comes back, what is damaged or foreign is refused in one line, older formats are read."""

import operator
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import sample
import train
from humptygpt import model as models
from humptygpt.cli import UserError
from humptygpt.formats import checkpoint
from humptygpt.formats.huggingface import write_pretrained
from humptygpt.formats.load import load as load_source
from humptygpt.models.build import build, build_on_meta, restore_model
from humptygpt.tokenizers.basic import CharTokenizer
from humptygpt.training.optimizers import make_optimizer, named_state
from humptygpt.training.settings import TrainConfig

OUT = Path("out/run")


def make_entries() -> dict:
    """The entries of a small checkpoint, as saved."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 4, "vocab_size": 3}
    config = models.ModelConfig(**sizes, tie_weights=False)
    model = build(config)
    train_config = TrainConfig(dataset="tiny", out_dir="out")
    optimizer = make_optimizer(train_config, model)
    optimizer.make_state()
    return {
        "format": checkpoint.FORMAT,
        "train_config": asdict(train_config),
        "model_config": asdict(config),
        "tokenizer": CharTokenizer("ab\n").state(),
        "task": "language modelling",
        "data": {"source": "ü.txt", "identity": {"train_tokens": 9}},
        "progress": asdict(train.Progress(iter=3, tokens=12, losses=[1.5])),
        "model": dict(model.state_dict()),
        "optimizer": named_state(optimizer, model),
        "scaler": None,
    }


def flatten(entries: object, name: str = "") -> dict[str, object]:
    """Every value of nested dictionaries, by the path to it."""
    if not isinstance(entries, dict) or not entries:
        return {name: entries}
    return {path: leaf for key, value in entries.items() for path, leaf in flatten(value, f"{name}/{key}").items()}


def test_a_checkpoint_comes_back_as_it_was(folder):
    entries = make_entries()
    checkpoint.save(Path("a.pt"), entries)
    expected = flatten(entries)
    found = flatten(checkpoint.read(Path("a.pt")))
    assert expected.keys() == found.keys()
    for path, value in expected.items():
        same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
        assert same(found[path], value), path


# --------------------------------------------------------------------------------------
# Files that are not checkpoints


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def malicious(path: Path):
    torch.save({"format": checkpoint.FORMAT, "model": Evil()}, path)


NO_CHECKPOINT = "cannot read out/run/best.pt: it is truncated or damaged, or holds more than"
OTHER_VERSION = "cannot read out/run/best.pt: its format is not 'gpt checkpoint 3'"
BAD = [
    (NO_CHECKPOINT, malicious),
    (NO_CHECKPOINT, lambda path: path.write_bytes(b"no zip at all")),
    (OTHER_VERSION, lambda path: torch.save([1, 2], path)),
    (OTHER_VERSION, lambda path: torch.save({"format": "gpt checkpoint 2"}, path)),
    ("no checkpoint out/run/best.pt; train first", lambda path: None),
    ("cannot read the model in out/run/best.pt", Path.mkdir),
]


@pytest.mark.parametrize(("complaint", "make"), BAD)
def test_a_file_that_is_not_a_checkpoint_is_refused_and_runs_no_code(folder, fails, complaint, make):
    OUT.mkdir(parents=True)
    make(OUT / "best.pt")
    assert complaint in fails(sample.main, "--out_dir=out/run", "--device=cpu")
    assert not Path("ran").exists()


def test_a_record_marked_as_a_directory_is_noticed(folder):
    path = Path("a.pt")
    checkpoint.save(path, make_entries())
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        (name,) = (name for name in file.namelist() if name.endswith("/data/0"))
    # 38 bytes into the record's entry in the directory at the end of the file
    content[content.rindex(b"PK\1\2", 0, content.rindex(name.encode())) + 38] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(UserError, match="it is truncated or damaged"):
        checkpoint.read(path)


# --------------------------------------------------------------------------------------
# Content that nothing can use


HEAD = "the parameter lm_head.weight must be a dense, contiguous tensor of torch.float32 and shape"
READ = "cannot read out/run/ckpt.pt: "
# (complaint, path to an entry, its other value or None if it is missing)
EDITS = [
    (f"{READ}KeyError: 'train_config'", "train_config", None),
    (f"{READ}it has the key batch_sice, which", "train_config/batch_sice", 4),
    ("batch_size=0 must be at least 1", "train_config/batch_size", 0),
    ("device=.* must be printable text", "train_config/device", "c\npu"),
    ("lora_alpha='16' must be float", "train_config/lora_alpha", "16"),
    ("n_layer=4000 and n_embd=8 do not match", "model_config/n_layer", 4000),
    ("n_members=4000, n_layer=", "model_config/n_members", 4000),
    ("n_embd=1099511627776 must be from 1 to", "model_config/n_embd", 2**40),
    ("seconds=nan must be at least 0", "progress/seconds", float("nan")),
    ("the description of the tokenizer: TypeError", "tokenizer/alphabet", None),
    ("model=gpt does not support task=", "task", "painting"),
    ("iter=1000", "progress/iter", 10**400),
    (f"{READ}it has the key x, which this code", "progress/x", 3),
    (f"{READ}it lacks the parameter wte.weight", "model/wte.weight", None),
    (f"{READ}it has the parameter w, which", "model/w", torch.zeros(3)),
    (HEAD, "model/lm_head.weight", torch.zeros(8, 3)),
    (HEAD, "model/lm_head.weight", torch.zeros(8, 3).T),
    (HEAD, "model/lm_head.weight", torch.zeros(3, 8).double()),
    (HEAD, "model/lm_head.weight", torch.zeros(3, 8).to_sparse()),
]


@pytest.mark.parametrize(("complaint", "path", "value"), EDITS, ids=range(len(EDITS)))
def test_an_entry_that_is_missing_unknown_or_of_another_kind_is_named(folder, complaint, path, value):
    entries = make_entries()
    *outer, key = path.split("/")
    edited = entries
    for name in outer:
        edited = edited[name]
    edited[key] = value
    if value is None:
        del edited[key]
    OUT.mkdir(parents=True)
    torch.save(entries, OUT / "ckpt.pt")
    with pytest.raises(UserError, match=complaint) as refusal:
        train.main(["--init_from=resume", "--out_dir=out/run"])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("position", models.POSITIONS)
@pytest.mark.parametrize("keys", [{"tie_weights": False}, {"tie_weights": True}, {"model": "transformer"}])
def test_a_restored_model_is_whole_and_shares_the_tensors_of_the_file(position, keys):
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 8, "vocab_size": 11}
    model = build(models.ModelConfig(**sizes, position=position, **keys))
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    restored = restore_model(build_on_meta(model.config), saved)
    assert restored.wte.weight.data_ptr() == saved["wte.weight"].data_ptr()
    assert list(dict(restored.named_parameters())) == list(dict(model.named_parameters()))
    batch = {"idx": torch.ones(1, 8, dtype=torch.long)}
    if hasattr(model, "encode"):
        batch["source"] = torch.ones(1, 5, dtype=torch.long)
    assert torch.equal(restored(**batch)[0], model(**batch)[0])


# --------------------------------------------------------------------------------------
# Runs of a model.py that has changed since


USES = [
    lambda argv: sample.main(["--out_dir=out/run", "--device=cpu"]),
    lambda argv: train.main(["--init_from=resume", "--out_dir=out/run"]),
]


def test_a_checkpoint_of_other_code_is_whole_and_says_what_differs(run_train, monkeypatch, fails):
    def complaints() -> set[str]:
        """The messages of sampling and resuming, without the names of their files."""
        lines = map(fails, USES)
        return {line.partition(".pt: ")[2] for line in lines}

    kinds = ", ".join(models.NORMS)
    with monkeypatch.context() as patch:
        patch.setitem(models.NORMS, "mine", models.RMSNorm)
        run_train("--norm=mine")
    assert complaints() == {f"norm=mine is not one of: {kinds} (NORMS in model.py)\n"}

    monkeypatch.setitem(models.NORMS, "mine", models.NORMS["none"])
    name = "stack.blocks.0.attn_norm.weight"
    assert complaints() == {f"it has the parameter {name}, which this code does not know\n"}

    for path in (OUT / "best.pt", OUT / "ckpt.pt"):
        saved = torch.load(path)
        saved["model_config"]["swirl"] = 3
        torch.save(saved, path)
    assert complaints() == {"it has the key swirl, which this code does not know\n"}


def test_a_bug_in_a_model_is_not_taken_for_a_damaged_file(run_train, monkeypatch):
    run_train("--norm=layernorm", "--bias=True")
    write_pretrained(load_source(OUT).model, Path("theirs"))
    monkeypatch.setitem(models.NORMS, "layernorm", lambda config: int("a bug"))
    for use in (*USES, lambda argv: load_source("theirs")):
        with pytest.raises(ValueError, match=r"^invalid literal for int.*'a bug'") as error:
            use([])
        assert error.type is ValueError
