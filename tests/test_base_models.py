"""Training and sampling from an existing model: a run, or a folder in Hugging Face's format."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN, assert_same_weights, make_text, prepare_tiny, read_rows
from humptygpt.model import ModelConfig

import prepare_data
import sample
import score
import train
from humptygpt.formats import checkpoint
from humptygpt.formats.load import Loaded, load
from humptygpt.models.build import build_on_meta
from humptygpt.scoring import pairs
from humptygpt.training.finetune import FRACTION, LORA_FRACTION
from humptygpt.training.start import read_settings

OTHER = make_text(4000, seed=1)  # different words, the same characters
FROM_RUN = [*TINY_RUN, "--dataset=other", "--out_dir=out/other", "--init_from=out/run"]


def make_other() -> None:
    prepare_tiny()
    longer = ["--max_iters=60", "--eval_interval=30", "--log_interval=30"]
    rule = ["--optimizer=normuon", "--learning_rate=0.01", "--grad_clip=0", "--beta2=0.95"]
    train.main([*TINY_RUN, *longer, *rule])
    Path("other.txt").write_text(OTHER)
    prepare_data.main(["--input=other.txt", "--name=other", "--tokenizer=out/run"])


@pytest.fixture
def other(folder, made_once):
    """Train out/run, and prepare another text with its tokenizer as data/other."""
    made_once(make_other)
    return folder


def val_losses(out_dir: str) -> list[float]:
    return [row["val_loss"] for row in read_rows(Path(out_dir)) if "val_loss" in row]


def test_a_run_starts_with_the_weights_of_another(other):
    best = checkpoint.read(Path("out/run/best.pt"))["model"]
    for source in ("out/run", "out/run/best.pt"):
        run = train.setup(read_settings([*FROM_RUN, f"--init_from={source}"]))
        assert_same_weights(dict(run.model.state_dict()), best)
        assert run.progress.iter == 0 and not run.optimizer.state
    assert load("out/run", "latest").path == Path("out/run/ckpt.pt")


def test_a_run_that_started_from_a_model_resumes_without_it(other):
    assert train.main([*FROM_RUN, "--max_iters=3", "--lr_decay_iters=6"]) == 0
    shutil.rmtree("out/run")
    assert train.main(["--init_from=resume", "--out_dir=out/other", "--max_iters=6"]) == 0
    assert len(val_losses("out/other")) == 3


def rates(*argv: str) -> tuple[float, float]:
    config = read_settings([*FROM_RUN, *argv]).config
    return config.learning_rate, config.muon_learning_rate


def test_fine_tuning_has_the_optimizer_of_the_base_run_and_a_fraction_of_its_rates(other):
    config = read_settings(FROM_RUN).config
    assert (config.optimizer, config.grad_clip, config.beta2) == ("normuon", 0.0, 0.95)
    expected = pytest.approx((FRACTION * 0.01, FRACTION * 0.03))
    assert rates() == expected  # the base run had 0.01 and 0.03
    assert rates("--learning_rate=0.5") == (0.5, expected.expected[1])
    assert rates("--lora_rank=2")[0] == pytest.approx(LORA_FRACTION * 0.01)
    config = read_settings([*FROM_RUN, "--optimizer=muon", "--weight_decay=0.5"]).config
    assert (config.optimizer, config.weight_decay) == ("muon", 0.5)
    assert read_settings(TINY_RUN).config.learning_rate == 3e-3


def test_the_rates_do_not_shrink_from_one_fine_tuning_to_the_next(other):
    first = rates()
    assert train.main(FROM_RUN) == 0
    assert rates("--init_from=out/other", "--out_dir=out/third") == first


def test_a_base_run_of_an_earlier_version_or_with_an_optimizer_that_is_gone_is_a_start(other, fails):
    path = Path("out/run/best.pt")
    saved = checkpoint.read(path)
    del saved["train_config"]["muon_momentum"]
    saved["train_config"] |= {"optimizer": "own", "forgotten": 1}
    checkpoint.save(path, saved)
    assert "optimizer=own is not one of" in fails(train.main, *FROM_RUN)
    config = read_settings([*FROM_RUN, "--optimizer=adamw"]).config
    assert (config.optimizer, config.muon_momentum) == ("adamw", 0.85)


@pytest.mark.usefixtures("theirs")
def test_a_model_that_no_run_trained_gets_adamw_and_a_rate_for_its_width():
    argv = [*TINY_RUN, "--dataset=text", "--init_from=theirs"]
    config = read_settings(argv).config
    # the smallest GPT-2, with 768 features, gets a rate near 1e-4; this model has 16
    assert (config.optimizer, config.learning_rate) == ("adamw", 4e-3)
    assert read_settings([*argv, "--lora_rank=2"]).config.learning_rate == 1.6e-2


def test_the_first_row_of_fine_tuning_is_the_loss_before_its_first_step(other, capsys):
    assert train.main([*FROM_RUN, "--eval_only=True"]) == 0
    loss = re.search(r"val loss \S+", capsys.readouterr().out)[0]
    assert train.main(FROM_RUN) == 0
    first = read_rows(Path("out/other"))[0]
    assert first["iter"] == 0 and f"val loss {first['val_loss']:.4f}" == loss
    assert f"before the first step: {loss}" in capsys.readouterr().out


def test_other_tokens_are_refused_and_the_key_in_the_message_mends_it(run_train, fails, folder, capsys):
    run_train()
    (folder / "other.txt").write_text(OTHER)
    prepare_data.main(["--input=other.txt", "--name=other", "--tokenizer=byte"])
    line = fails(train.main, *FROM_RUN)
    assert line.startswith(
        "the tokens of data/other (byte) differ from those of the model out/run/best.pt (char); prep"
    )
    keys = shlex.split(line.partition("; prepare the data again with ")[2])
    prepare_data.main(["--input=other.txt", "--name=other", *keys])
    assert train.main(FROM_RUN) == 0
    assert "from out/run" in capsys.readouterr().out


def test_the_shape_of_the_model_stays_and_its_context_may_shrink(other, capsys, fails):
    assert train.main([*FROM_RUN, "--n_layer=7", "--block_size=8", "--dropout=0.1"]) == 0
    note = "note: n_layer=7 has no effect; the model out/run/best.pt has n_layer=2"
    assert note in capsys.readouterr().err
    config = checkpoint.read(Path("out/other/ckpt.pt"))["model_config"]
    assert (config["n_layer"], config["block_size"], config["dropout"]) == (2, 8, 0.1)
    line = fails(train.main, *FROM_RUN, "--block_size=17")
    assert "has learned 16 positions; use at most that many" in line


def test_a_models_tokenizer_separates_documents_where_it_can(run_train):
    Path("texts").mkdir()
    for i in range(6):
        Path("texts", f"{i}.txt").write_text(OTHER[: 100 + i])
    run_train()
    prepare_data.main(["--input=texts", "--name=characters", "--tokenizer=out/run"])
    Path("words.txt").write_text(make_text(20_000))
    argv = ["--input=words.txt", "--name=words", "--tokenizer=bpe", "--vocab_size=300"]
    prepare_data.main(argv)
    run_train("--dataset=words", "--out_dir=out/words", "--max_iters=1")
    prepare_data.main(["--input=texts", "--name=texts", "--tokenizer=out/words"])
    meta = json.loads(Path("data/texts/meta.json").read_text())
    assert meta["tokenizer"]["separated"]
    run_train("--dataset=texts", "--init_from=out/words")


# --------------------------------------------------------------------------------------
# nanoGPT


def test_a_checkpoint_and_data_of_nanogpt_are_refused_in_one_line(folder, fails):
    torch.save({"model_args": {}, "model": {}, "config": {}}, "ckpt.pt")
    line = fails(sample.main, "--init_from=ckpt.pt")
    assert line.startswith("cannot read ckpt.pt: its format is not 'gpt checkpoint")
    data = Path("data/theirs")
    data.mkdir(parents=True)
    for name in ("train.bin", "val.bin", "meta.pkl"):
        (data / name).write_bytes(b"ab" * 4000)
    line = fails(train.main, *TINY_RUN, "--dataset=theirs")
    assert line == (
        "data/theirs has no meta.json, so it was not prepared completely, or not here;"
        " prepare it: python prepare_data.py theirs --input=FILE_OR_FOLDER\n"
    )


def test_nanogpts_config_to_fine_tune_means_what_it_means_there(folder, monkeypatch, capsys):
    shape = {"n_layer": 48, "n_head": 25, "n_embd": 1600, "block_size": 1024}
    shape |= {"vocab_size": 50257, "bias": True}
    model = build_on_meta(ModelConfig(**shape))
    base = Loaded(model, None, Path("gpt2"), "")
    monkeypatch.setattr("humptygpt.training.start.load", lambda source: {"gpt2-xl": base}[source])
    keys = {"dataset": "shakespeare", "init_from": "gpt2-xl", "batch_size": 1}
    keys |= {"gradient_accumulation_steps": 32, "max_iters": 20, "learning_rate": 3e-5}
    keys |= {"decay_lr": False, "always_save_checkpoint": False}
    lines = [f"{key} = {value!r}\n" for key, value in keys.items()]
    Path("theirs.py").write_text("".join(lines))
    start = read_settings([str(ROOT / "config/nanogpt.py"), "theirs.py"])
    found = vars(start.config) | vars(start.model_config)
    assert found | keys | shape == found
    assert start.base is base
    assert "n_layer=12 has no effect" in capsys.readouterr().err


# --------------------------------------------------------------------------------------
# Hugging Face


@pytest.fixture
def theirs(folder):
    """Save a random GPT-2 with a tokenizer in theirs/, and prepare a text with that tokenizer."""
    transformers = pytest.importorskip("transformers")
    from test_pretrained import gpt2
    from test_tokenizer_files import gpt2_folder

    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2_folder(Path("theirs")))
    model = gpt2(vocab_size=400, eos_token_id=None, n_head=4)
    model.save_pretrained("theirs")
    Path("text.txt").write_text(make_text(6000))
    prepare_data.main(["--input=text.txt", "--name=text", "--tokenizer=theirs"])
    return model, tokenizer


def test_a_folder_of_hugging_face_writes_scores_and_trains(theirs, capsys):
    model, tokenizer = theirs
    capsys.readouterr()
    argv = ["--init_from=theirs", "--temperature=0", "--max_new_tokens=8"]
    sample.main([*argv, "--start=Hello the"])
    ids = tokenizer("Hello the", return_tensors="pt").input_ids
    found = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert capsys.readouterr().out == tokenizer.decode(found[0]) + "\n"

    Path("short.txt").write_text("Hello the dog")
    score.main(["--init_from=theirs", "--text=short.txt"])
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer("Hello the dog").input_ids]])
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    assert capsys.readouterr().out.startswith(f"{expected:.4f} ± ")

    run = [*TINY_RUN, "--dataset=text", "--init_from=theirs", "--learning_rate=0.01"]
    assert train.main(run) == 0
    losses = val_losses("out/run")
    assert losses[-1] < losses[0]


def test_pairs_are_scored_as_transformers_scores_them(theirs, monkeypatch):
    model, tokenizer = theirs
    choices = ["Hello the dog", "Hello the the dog the end", "dog"]
    expected = []
    for choice in choices:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(choice).input_ids]])
        with torch.no_grad():
            expected.append(-model(ids, labels=ids).loss.item() * (ids.shape[1] - 1))
    seen = []

    def watch(*arguments) -> list:
        rows = scores(*arguments)
        seen.extend(float(row.sum()) for row in rows)
        return rows

    scores = pairs.log_probabilities
    monkeypatch.setattr(pairs, "log_probabilities", watch)
    line = {"choices": choices, "answer": 0}
    Path("pairs.jsonl").write_text(json.dumps(line))
    score.main(["--init_from=theirs", "--pairs=pairs.jsonl"])
    assert seen == pytest.approx(expected, abs=1e-3)


def test_a_start_that_holds_no_model_is_refused(theirs, fails, folder):
    def refused(source: str, script=sample.main) -> str:
        return fails(script, f"--init_from={source}")

    assert refused("nothing") == "init_from=nothing: there is no such file or folder\n"
    assert "config.json: [Errno 2] No such file or directory" in refused("data", train.main)
    assert refused("theirs/model.safetensors") == (
        "init_from=theirs/model.safetensors is not a complete model; name the folder that contains it and config.json\n"
    )
    Path("out/stopped").mkdir(parents=True)
    Path("out/stopped/metrics.jsonl").write_text("{}")
    assert refused("out/stopped").startswith("no checkpoint out/stopped/best.pt; train first")
    vocab = Path("theirs/tokenizer.json")
    content = json.loads(vocab.read_text())
    content["model"]["vocab"] |= {"surplus": 400}
    vocab.write_text(json.dumps(content))
    assert "theirs has 401 tokens, but the model has only 400" in refused("theirs")
