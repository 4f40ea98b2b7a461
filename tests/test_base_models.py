"""Runs and texts that start from a model: one of our own runs, nanoGPT's ckpt.pt, Hugging Face's format."""

import json
import pickle
import re
import shlex
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import GPT2, TINY_RUN, assert_same_weights, make_text, read_rows

import prepare_data
import sample
import train
from humptygpt import checkpoint
from humptygpt import settings as train_config
from humptygpt.config import UserError
from humptygpt.loading import Loaded, load
from humptygpt.settings import read_settings
from humptygpt.tasks import build_on_meta
from model import ModelConfig

OTHER = make_text(4000, seed=1)  # other words of the same characters
FROM_RUN = [*TINY_RUN, "--dataset=other", "--out_dir=out/other", "--init_from=out/run"]


@pytest.fixture
def other(run_train, folder):
    """out/run, and data/other: another text in the tokens of its model."""
    run_train(
        *("--max_iters=60", "--eval_interval=30", "--log_interval=30"),
        *("--learning_rate=0.01", "--position=learned"),
    )
    (folder / "other.txt").write_text(OTHER)
    prepare_data.main(["--input=other.txt", "--name=other", "--tokenizer=out/run"])
    return folder


def val_losses(out_dir: str) -> list[float]:
    return [row["val_loss"] for row in read_rows(Path(out_dir)) if "val_loss" in row]


def test_a_run_starts_with_the_weights_of_another(other):
    for source in ("out/run", "out/run/best.pt"):
        run = train.setup(*read_settings([*FROM_RUN, f"--init_from={source}"]))
        assert_same_weights(
            dict(run.model.state_dict()), checkpoint.read(Path("out/run/best.pt"))["model"]
        )
        assert run.progress.iter == 0 and not run.optimizer.state
    assert load("out/run", "latest").path == Path("out/run/ckpt.pt")


def test_fine_tuning_is_below_training_from_scratch_at_equal_steps(other):
    assert train.main(FROM_RUN) == 0
    assert train.main([*FROM_RUN, "--init_from=scratch", "--out_dir=out/scratch"]) == 0
    _, *tuned = val_losses("out/other")
    assert all(a < b - 0.1 for a, b in zip(tuned, val_losses("out/scratch"), strict=True))


def test_a_run_that_started_from_a_model_resumes_without_it(other):
    assert train.main([*FROM_RUN, "--max_iters=3", "--lr_decay_iters=6"]) == 0
    shutil.rmtree("out/run")
    assert train.main(["--init_from=resume", "--out_dir=out/other", "--max_iters=6"]) == 0
    assert len(val_losses("out/other")) == 3


def test_fine_tuning_has_gentle_settings_unless_others_are_given(other):
    config = read_settings(FROM_RUN).config
    assert (config.optimizer, config.grad_clip) == ("adamw", 1.0)
    assert (config.learning_rate, config.muon_learning_rate) == (1e-4, 0.002)
    assert read_settings([*FROM_RUN, "--learning_rate=0.5"]).config.learning_rate == 0.5
    assert read_settings(TINY_RUN).config.learning_rate == 6e-3


def test_a_fine_tuning_is_resumed_when_torchrun_starts_it_again(other, monkeypatch, capsys):
    shutil.copytree("out/run", "out/twin")
    assert train.main(FROM_RUN) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for change, resumes in (
        ([], True),
        (["--n_layer=7"], True),  # without effect: the model has its own
        (["--max_iters=7"], False),
        (["--init_from=out/twin"], False),
        (["--init_from=scratch"], False),
    ):
        start = read_settings([*FROM_RUN, *change])
        assert (start.saved is not None) == resumes
        assert start.saved is None or start.base is None
    assert train.main(FROM_RUN) == 0
    assert "it resumes out/other/ckpt.pt" in capsys.readouterr().err
    assert not Path("out/other/.new").exists()


def test_many_epochs_of_fine_tuning_get_a_warning(other, capsys):
    note = "epochs: a model that is fine-tuned on so little text soon memorises it"
    for steps, start in ((270, "out/run"), (290, "out/run"), (290, "scratch")):
        argv = [*FROM_RUN, f"--init_from={start}", f"--max_iters={steps}"]
        assert train.main([*argv, "--eval_only=True"]) == 0
        expected = steps == 290 and start != "scratch"
        assert (note in capsys.readouterr().err) == expected


def test_the_first_row_of_fine_tuning_is_the_loss_before_its_first_step(other, capsys):
    assert train.main([*FROM_RUN, "--eval_only=True"]) == 0
    loss = re.search(r"val loss \S+", capsys.readouterr().out)[0]
    assert train.main(FROM_RUN) == 0
    first = read_rows(Path("out/other"))[0]
    assert first["iter"] == 0 and f"val loss {first['val_loss']:.4f}" == loss
    assert f"before the first step: {loss}" in capsys.readouterr().out


def test_other_tokens_are_refused_and_the_key_in_the_message_mends_it(
    run_train, fails, folder, capsys
):
    run_train()
    (folder / "other.txt").write_text(OTHER)
    prepare_data.main(["--input=other.txt", "--name=other", "--tokenizer=byte"])
    line = fails(train.main, *FROM_RUN)
    assert line.startswith(
        "data/other has tokens (byte) that are not those of the model out/run/best.pt (char); prep"
    )
    keys = shlex.split(line.partition("; prepare it again with ")[2])
    prepare_data.main(["--input=other.txt", "--name=other", *keys])
    assert train.main(FROM_RUN) == 0
    assert "from out/run" in capsys.readouterr().out


def test_the_shape_of_the_model_stays_and_its_context_may_shrink(other, capsys, fails):
    assert train.main([*FROM_RUN, "--n_layer=7", "--block_size=8", "--dropout=0.1"]) == 0
    assert (
        "note: n_layer=7: without effect; the model out/run/best.pt has n_layer=2"
        in capsys.readouterr().err
    )
    config = checkpoint.read(Path("out/other/ckpt.pt"))["model_config"]
    assert (config["n_layer"], config["block_size"], config["dropout"]) == (2, 8, 0.1)
    assert "has learned 16 positions; take at most as many" in fails(
        train.main, *FROM_RUN, "--block_size=17"
    )


def test_a_models_tokenizer_separates_documents_where_it_can(run_train, folder, capsys):
    run_train()
    Path("texts").mkdir()
    for i in range(6):
        Path("texts", f"{i}.txt").write_text(OTHER[: 100 + i])
    prepare_data.main(["--input=texts", "--name=characters", "--tokenizer=out/run"])
    (folder / "words.txt").write_text(make_text(20_000))
    prepare_data.main(
        ["--input=words.txt", "--name=words", "--tokenizer=bpe", "--vocab_size=300"]
    )
    assert (
        train.main([*TINY_RUN, "--dataset=words", "--out_dir=out/words", "--max_iters=1"])
        == 0
    )
    prepare_data.main(["--input=texts", "--name=texts", "--tokenizer=out/words"])
    ids = json.loads(Path("data/texts/meta.json").read_text())
    assert ids["tokenizer"]["separated"] and ids["commonest"]
    assert (
        train.main(
            [*TINY_RUN, "--dataset=texts", "--out_dir=out/texts", "--init_from=out/words"]
        )
        == 0
    )


# --------------------------------------------------------------------------------------
# nanoGPT

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 24, "vocab_size": 11}
CHARACTERS = "\nabcdefgh"  # 9 of the 11 rows; the others are padding


def nanogpt_checkpoint(bias: bool = True, prefix: str = "_orig_mod.", **changes) -> dict:
    """What nanoGPT's train.py saves, with random weights."""
    torch.manual_seed(0)
    C = SIZES["n_embd"]
    shapes = {
        "wte.weight": (11, C),
        "wpe.weight": (24, C),
        "ln_f.weight": (C,),
        "ln_f.bias": (C,),
    }
    linear = {
        "attn.c_attn": (3, 1),
        "attn.c_proj": (1, 1),
        "mlp.c_fc": (4, 1),
        "mlp.c_proj": (1, 4),
    }
    for i in range(SIZES["n_layer"]):
        for name, (outputs, inputs) in linear.items():
            shapes[f"h.{i}.{name}.weight"] = (outputs * C, inputs * C)
            shapes[f"h.{i}.{name}.bias"] = (outputs * C,)
        shapes |= {
            f"h.{i}.ln_{n}.{kind}": (C,) for n in (1, 2) for kind in ("weight", "bias")
        }
    weights = {
        f"{prefix}transformer.{name}": torch.randn(shape) * 0.3
        + ("ln" in name and "weight" in name)
        for name, shape in shapes.items()
        if bias or not name.endswith("bias")
    }
    weights[f"{prefix}lm_head.weight"] = weights[f"{prefix}transformer.wte.weight"]
    args = SIZES | {"bias": bias, "dropout": 0.0}
    config = {"dataset": "letters", "learning_rate": 1e-3}
    saved = {
        "model": OrderedDict(weights),
        "optimizer": {"state": {}},
        "model_args": args,
        "iter_num": 5,
        "config": config,
    }
    return saved | {"best_val_loss": torch.tensor(1.5)} | changes


def write_nanogpt(**changes) -> Path:
    """A checkout of nanoGPT: its run, and the characters of its data set."""
    path, data = Path("nano/out/ckpt.pt"), Path("nano/data/letters")
    for folder in (path.parent, data):
        folder.mkdir(parents=True, exist_ok=True)
    torch.save(nanogpt_checkpoint(**changes), path)
    itos = dict(enumerate(CHARACTERS))
    meta = {
        "vocab_size": len(itos),
        "itos": itos,
        "stoi": {char: i for i, char in itos.items()},
    }
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    return path


def nanogpt_logits(saved: dict, idx: torch.Tensor) -> torch.Tensor:
    """By transformers, whose GPT-2 has its matrices the other way round."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "n_positions": 24,
        **{key: SIZES[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")},
    }
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(activation_function="gelu", **sizes)
    ).eval()
    weights = {name.removeprefix("_orig_mod."): x for name, x in saved["model"].items()}
    theirs = {
        name: x.T if x.dim() == 2 and ".h." in name else x for name, x in weights.items()
    }
    zeros = {
        name: torch.zeros_like(x)
        for name, x in model.state_dict().items()
        if name.endswith("bias")
    }
    model.load_state_dict(zeros | theirs)
    with torch.no_grad():
        return model(idx).logits


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["_orig_mod.", ""])
def test_a_nanogpt_checkpoint_has_its_logits(bias, prefix, folder):
    path = write_nanogpt(bias=bias, prefix=prefix)
    base = load(str(path.parent))
    idx = torch.randint(9, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = base.model(idx)[0]
    torch.testing.assert_close(
        ours, nanogpt_logits(nanogpt_checkpoint(bias, prefix), idx), atol=1e-4, rtol=1e-4
    )
    assert base.tokenizer.decode(range(9)) == CHARACTERS


def test_a_nanogpt_checkpoint_writes_and_its_training_proceeds(folder, capsys):
    write_nanogpt()
    sample.main(
        [
            "--init_from=nano/out",
            "--temperature=0",
            "--start=abc",
            "--max_new_tokens=6",
            "--num_samples=1",
        ]
    )
    text = capsys.readouterr().out
    saved, ids = nanogpt_checkpoint(), [CHARACTERS.index(char) for char in "abc"]
    for _ in range(6):
        ids.append(int(nanogpt_logits(saved, torch.tensor([ids]))[0, -1, :9].argmax()))
    assert text == "".join(CHARACTERS[i] for i in ids) + "\n"

    Path("letters.txt").write_text("abc\nfed\nhag\n" * 60)
    prepare_data.main(
        ["--input=letters.txt", "--name=mine", "--tokenizer=nano/out/ckpt.pt"]
    )
    run = [
        *TINY_RUN,
        "--dataset=mine",
        "--init_from=nano/out",
        "--learning_rate=0.003",
        "--max_iters=12",
    ]
    assert train.main(run) == 0
    losses = val_losses("out/run")
    assert (
        losses[-1] < losses[0]
        and checkpoint.read(Path("out/run/best.pt"))["model_config"]["vocab_size"] == 11
    )


def test_without_its_meta_pkl_a_large_vocabulary_is_gpt2s(folder, monkeypatch):
    from humptygpt.convert import sources as base_models

    path = write_nanogpt()
    Path("nano/data/letters/meta.pkl").unlink()
    with pytest.raises(
        UserError,
        match=r"needs the characters of its data set: there is no data/letters/meta.pkl",
    ):
        load(str(path))
    made = object()
    monkeypatch.setattr(
        base_models.tokenizers.GPT2Tokenizer, "train", lambda separated: made
    )
    assert (
        base_models.nanogpt_tokenizer(path, {"model_args": {"vocab_size": 50304}}) is made
    )


def test_a_padded_vocabulary_of_nanogpt_is_kept_and_its_padding_never_drawn(folder, capsys):
    """nanoGPT's 50,304 rows, in small: 11 for 9 tokens, those of the padding the likeliest by far."""
    saved = nanogpt_checkpoint()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        saved["model"][f"_orig_mod.{name}"][9:] *= 10
    path = write_nanogpt()
    torch.save(saved, path)
    logits = nanogpt_logits(saved, torch.tensor([[1, 2, 3]]))[0, -1]
    assert logits.argmax() >= 9 or (-logits).argmax() >= 9
    sample.main(
        [
            "--init_from=nano/out",
            "--start=abc",
            "--max_new_tokens=21",
            "--num_samples=4",
            "--temperature=3",
        ]
    )
    assert set(capsys.readouterr().out) <= set(CHARACTERS)
    Path("letters.txt").write_text("abc\nfed\nhag\n" * 60)
    prepare_data.main(
        ["--input=letters.txt", "--name=mine", "--tokenizer=nano/out/ckpt.pt"]
    )
    assert train.main([*TINY_RUN, "--dataset=mine", "--init_from=nano/out"]) == 0
    assert load("out/run").model.state_dict()["wte.weight"].shape[0] == 11


DAMAGES = {
    "a weight is missing": (
        lambda saved: saved["model"].pop("transformer.ln_f.bias"),
        r"the weight transformer.ln_f.bias is missing",
    ),
    "a weight is surplus": (
        lambda saved: saved["model"].update(more=torch.ones(1)),
        "transformer.more is unknown",
    ),
    "a wrong shape": (
        lambda saved: saved["model_args"].update(vocab_size=12),
        "must have shape",
    ),
    "no number": (
        lambda saved: saved["model_args"].update(n_layer="2"),
        "model_args.n_layer must be int",
    ),
    "huge": (
        lambda saved: saved["model_args"].update(n_layer=2**20),
        "n_layer=1048576 and n_embd=.* do not describe its weights",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_nanogpt_checkpoint_is_refused_in_one_line(name, folder):
    saved = nanogpt_checkpoint(prefix="")
    damage, complaint = DAMAGES[name]
    damage(saved)
    torch.save(saved, "ckpt.pt")
    with pytest.raises(UserError, match=complaint) as error:
        load("ckpt.pt")
    assert "\n" not in str(error.value)


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_a_checkpoint_that_would_run_code_is_refused(folder):
    torch.save(nanogpt_checkpoint(model=Hostile()), "ckpt.pt")
    with pytest.raises(UserError, match="holds more than tensors and plain data"):
        load("ckpt.pt")
    assert not Path("executed").exists()


def test_out_dir_may_be_nanogpts_but_its_training_is_not_resumed(folder, fails, capsys):
    write_nanogpt()
    texts = []
    for argv in (
        ["--out_dir=nano/out"],
        ["--init_from=nano/out/ckpt.pt"],
        ["--init_from=nano/out"],
    ):
        sample.main(
            [*argv, "--seed=3", "--start=abc", "--max_new_tokens=9", "--num_samples=1"]
        )
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1 and len(texts[0]) == 13
    line = fails(train.main, "--init_from=resume", "--out_dir=nano/out")
    assert line.endswith(
        "is a checkpoint of nanoGPT; start from it by --init_from=nano/out/ckpt.pt\n"
    )


# what nanoGPT's config files set, but for out_dir, wandb and intervals
NANOGPT_CONFIGS = {
    "train_gpt2": {"batch_size": 12, "max_iters": 600000, "weight_decay": 1e-1},
    "eval_gpt2_xl": {
        "batch_size": 8,
        "eval_iters": 500,
        "eval_only": True,
        "init_from": "gpt2-xl",
    },
    "finetune_shakespeare": {
        "dataset": "shakespeare",
        "init_from": "gpt2-xl",
        "batch_size": 1,
        "max_iters": 20,
    }
    | {
        "gradient_accumulation_steps": 32,
        "learning_rate": 3e-5,
        "decay_lr": False,
        "always_save_checkpoint": False,
    },
    "train_shakespeare_char": {
        "dataset": "shakespeare_char",
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
    }
    | {
        "block_size": 256,
        "dropout": 0.2,
        "learning_rate": 1e-3,
        "max_iters": 5000,
        "lr_decay_iters": 5000,
    }
    | {
        "min_lr": 1e-4,
        "beta2": 0.99,
        "warmup_iters": 100,
        "batch_size": 64,
        "gradient_accumulation_steps": 1,
    },
}
DEFAULTS = Path(train.__file__).parent / "config" / "nanogpt.py"


@pytest.mark.parametrize("name", NANOGPT_CONFIGS)
def test_after_nanogpts_defaults_its_config_files_mean_what_they_mean_there(
    name, folder, monkeypatch, capsys
):
    asked, keys = [], NANOGPT_CONFIGS[name]
    shape = {
        "n_layer": 48,
        "n_head": 25,
        "n_embd": 1600,
        "block_size": 1024,
        "vocab_size": 50257,
        "bias": True,
    }
    model = build_on_meta(ModelConfig(**GPT2 | shape))
    base = Loaded(model, None, Path("gpt2"), "")
    monkeypatch.setattr(train_config, "load", lambda source: asked.append(source) or base)
    Path("theirs.py").write_text(
        "".join(f"{key} = {value!r}\n" for key, value in keys.items())
    )
    start = read_settings([str(DEFAULTS), "theirs.py"])
    settings = vars(start.config) | vars(start.model_config)
    defaults = {
        "dataset": "openwebtext",
        "learning_rate": 6e-4,
        "beta2": 0.95,
        "gradient_accumulation_steps": 40,
    }
    defaults |= {
        "vocab_size": 50304,
        "n_layer": 12,
        "n_embd": 768,
        "block_size": 1024,
        "warmup_iters": 2000,
        "min_lr": 6e-5,
        "bias": False,
    }
    started = "init_from" in keys
    expected = defaults | keys | (shape if started else {})
    assert {key: settings[key] for key in expected} == expected
    assert asked == ([keys["init_from"]] if started else [])
    assert (start.base is base) == started
    assert ("n_layer=12: without effect" in capsys.readouterr().err) == started


# --------------------------------------------------------------------------------------
# Hugging Face


@pytest.fixture
def theirs(folder):
    """A random GPT-2 with a trained tokenizer, as transformers writes them, and the data in its tokens."""
    transformers = pytest.importorskip("transformers")
    from test_tokenizer_files import merges_folder

    tokenizer = transformers.AutoTokenizer.from_pretrained(merges_folder(Path("theirs")))
    torch.manual_seed(0)
    sizes = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "n_positions": 24,
        "vocab_size": 400,
        "eos_token_id": None,
    }
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(initializer_range=0.3, **sizes)
    ).eval()
    model.save_pretrained("theirs")
    Path("text.txt").write_text(make_text(6000))
    prepare_data.main(["--input=text.txt", "--name=text", "--tokenizer=theirs"])
    return model, tokenizer


def test_a_folder_of_hugging_face_writes_scores_and_trains(theirs, capsys):
    model, tokenizer = theirs
    capsys.readouterr()
    argv = [
        "--init_from=theirs",
        "--temperature=0",
        "--start=Hello the",
        "--max_new_tokens=8",
    ]
    sample.main(argv)
    ids = tokenizer("Hello the", return_tensors="pt").input_ids
    found = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert capsys.readouterr().out == tokenizer.decode(found[0]) + "\n"

    Path("short.txt").write_text("Hello the dog")
    sample.main(["--init_from=theirs", "--score=short.txt"])
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer("Hello the dog").input_ids]])
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    assert capsys.readouterr().out.startswith(f"{expected:.4f} nats per token")

    run = [*TINY_RUN, "--dataset=text", "--init_from=theirs", "--learning_rate=0.01"]
    assert train.main(run) == 0
    losses = val_losses("out/run")
    assert losses[-1] < losses[0]
    assert train.main([*run, "--eval_only=True"]) == 0


def test_a_start_that_holds_no_model_is_refused(theirs, fails, folder):
    def refused(source: str, script=sample.main) -> str:
        return fails(script, f"--init_from={source}")

    assert refused("nothing") == "init_from=nothing: there is no such file or folder\n"
    assert refused("their").endswith("; did you mean theirs?\n")
    assert (
        "cannot read the model in data: config.json: No such file or directory"
        in refused("data", train.main)
    )
    assert "is not a checkpoint: it is truncated" in refused("text.txt")
    assert refused("theirs/model.safetensors") == (
        "init_from=theirs/model.safetensors is no model by itself; name its folder, which also has config.json\n"
    )
    Path("out/stopped").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        Path("out/stopped", name).write_text("{}")
    assert refused("out/stopped").startswith(
        "no checkpoint out/stopped/best.pt; train first: python train.py --out_d"
    )
    assert refused("out/gone").startswith(
        "init_from=out/gone: there is no such file or folder"
    )
    assert refused("stopped").endswith("; did you mean out/stopped?\n")
    line = fails(sample.main, "--out_dir=out/stopped/best.pt")
    assert line.endswith("; train first: python train.py --out_dir=out/stopped\n")
    vocab = json.loads(Path("theirs/vocab.json").read_text())
    config = json.loads(Path("theirs/config.json").read_text())
    Path("theirs/vocab.json").write_text(json.dumps(vocab | {"surplus": 400}))
    assert "the tokenizer in theirs has 401 tokens, but the model only 400" in refused(
        "theirs"
    )
    Path("theirs/vocab.json").unlink()
    assert "there is neither tokenizer.json nor tokenizer.model nor vocab.json" in refused(
        "theirs"
    )
    Path("theirs/config.json").unlink()
    assert (
        "cannot read the model in theirs: config.json: No such file or directory"
        in refused("theirs", train.main)
    )
    Path("theirs/config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    assert "model_type=bert is not supported" in refused("theirs", train.main)
