import dataclasses
from pathlib import Path

import pytest
from conftest import TINY_RUN

import sample
import train
from humptygpt import checkpoint
from humptygpt.tokenizer import ByteTokenizer
from model import ModelConfig


@pytest.fixture
def run_dir(tiny):
    """A trained run's folder."""
    train.main(TINY_RUN)
    return Path("out/run")


def text_of(capsys, *argv: str) -> str:
    capsys.readouterr()
    sample.main(["--out_dir=out/run", "--device=cpu", "--max_new_tokens=40", *argv])
    return capsys.readouterr().out


def test_only_text_goes_to_stdout(run_dir, capsys):
    sample.main(["--out_dir=out/run", "--device=cpu", "--num_samples=2", "--max_new_tokens=20", "--start=A"])
    out, err = capsys.readouterr()
    assert out.count("A") >= 2 and len(out) == 2 * (1 + 20 + 1)  # prompt, tokens, line end
    assert "---------------" in err and "best val loss" in err


def test_the_same_seed_gives_the_same_text(run_dir, capsys):
    first = text_of(capsys, "--seed=1")
    assert first == text_of(capsys, "--seed=1") != text_of(capsys, "--seed=2")


def test_the_prompt_may_come_from_a_file(run_dir, capsys):
    Path("prompt.txt").write_text("Ak ")
    assert text_of(capsys, "--start=FILE:prompt.txt") == text_of(capsys, "--start=Ak ")


def zero_embeddings(path: Path) -> None:
    """All tokens become equally probable."""
    saved = checkpoint.load(path)
    saved["model"]["wte.weight"].zero_()
    saved["model"]["lm_head.weight"].zero_()
    checkpoint.save(path, saved)


def test_the_best_checkpoint_is_sampled_unless_the_latest_is_asked_for(run_dir, capsys):
    zero_embeddings(run_dir / "best.pt")
    assert text_of(capsys) != text_of(capsys, "--checkpoint=latest")
    (run_dir / "best.pt").unlink()
    assert text_of(capsys) == text_of(capsys, "--checkpoint=latest")
    sample.main(["--out_dir=out/run", "--device=cpu", "--max_new_tokens=1"])
    note, loaded, *_ = capsys.readouterr().err.splitlines()
    assert note == "note: no evaluation has found a best model yet; taking out/run/ckpt.pt"
    assert loaded.startswith("out/run/ckpt.pt: iter 6, best val loss ")


def test_the_model_that_is_sampled_is_the_one_that_load_model_gives(tiny, capsys, monkeypatch):
    train.main([*TINY_RUN, "--ema_decay=0.5"])
    text = text_of(capsys, "--checkpoint=latest")
    zero_embeddings(Path("out/run/ckpt.pt"))  # its ema entry stays
    assert text_of(capsys, "--checkpoint=latest") == text
    loaded, sampled, load_model = [], [], checkpoint.load_model
    monkeypatch.setattr(checkpoint, "load_model", lambda path: loaded.append(load_model(path)) or loaded[-1])
    monkeypatch.setattr(sample, "generate", lambda model, *args, **settings: sampled.append(model) or iter(()))
    text_of(capsys, "--checkpoint=latest", "--num_samples=1")
    assert len(sampled) == 1 and sampled[0] is loaded[0].model


def test_sampling_needs_no_data_folder(run_dir, capsys):
    Path("data").rename("gone")
    assert text_of(capsys)


def test_a_character_appears_when_its_last_byte_is_there():
    read = []
    pieces = ByteTokenizer().decode_stream(read.append(byte) or byte for byte in "ü🙂a".encode() + b"\xc3")
    assert [(piece, len(read)) for piece in pieces] == [("ü", 2), ("🙂", 6), ("a", 7), ("\N{REPLACEMENT CHARACTER}", 8)]


BAD = {
    "character 'é' (U+00E9) is not among the": ["--start=é"],
    "an empty prompt; give at least one character": ["--start="],
    "cannot read the prompt latin1.txt: it is not UTF-8": ["--start=FILE:latin1.txt"],
    "cannot read the prompt nothing.txt: No such file or directory": ["--start=FILE:nothing.txt"],
    "temperature=-1.0 must be at least 0": ["--temperature=-1"],
    "temperature=nan must be at least 0": ["--temperature=nan"],
    "top_p=0.0 must be above 0": ["--top_p=0"],
    "top_k=0 must be at least 1": ["--top_k=0"],
    "num_samples=0 must be at least 1": ["--num_samples=0"],
    "context=all is not one of: fast, exact": ["--context=all"],
    "init_from=gpt2-xl: GPT-2's weights cannot be read yet": ["--init_from=gpt2-xl"],
    "device=cuda:99 is not available": ["--device=cuda:99"],
}


@pytest.mark.parametrize("complaint", BAD)
def test_bad_input_is_one_line(run_dir, fails, monkeypatch, complaint):
    loaded = checkpoint.load_model(run_dir / "best.pt")
    monkeypatch.setattr(sample, "load", lambda config: loaded)  # it prints nothing
    Path("latin1.txt").write_bytes(b"caf\xe9")
    assert complaint in fails(sample.main, "--out_dir=out/run", *BAD[complaint])


def test_keys_that_have_no_effect_are_reported(run_dir, capsys):
    sample.main(["--out_dir=out/run", "--device=cpu", "--compile=True", "--max_new_tokens=1"])
    assert "compile=True has no effect" in capsys.readouterr().err
    sample.main(["--out_dir=out/run", "--device=cpu", "--temperature=0", "--top_p=0.5", "--max_new_tokens=1"])
    assert "note: top_p=0.5 has no effect with temperature=0.0" in capsys.readouterr().err


def test_every_model_key_is_in_the_checkpoint(run_dir):
    saved = checkpoint.load(run_dir / "best.pt")["model_config"]
    assert set(saved) == {field.name for field in dataclasses.fields(ModelConfig)}


def test_greedy_texts_are_all_the_same_so_one_is_printed(run_dir, capsys):
    sample.main(["--out_dir=out/run", "--device=cpu", "--max_new_tokens=5", "--temperature=0"])
    captured = capsys.readouterr()
    assert "at temperature=0 all texts are the same" in captured.err and "-----" not in captured.err
