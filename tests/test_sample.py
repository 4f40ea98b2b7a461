import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN

import model as models
import sample
import train
from humptygpt.tokenizer import ByteTokenizer
from model import POSITIONS, ModelConfig
from sample import generate, probabilities


@pytest.fixture
def run_dir(tiny):
    """A trained run's folder."""
    train.main(TINY_RUN)
    return Path("out/run")


def text_of(capsys, *argv: str) -> str:
    capsys.readouterr()
    sample.main(["--out_dir=out/run", "--device=cpu", "--max_new_tokens=40", *argv])
    return capsys.readouterr().out


def tiny_model(**keys) -> models.GPT:
    torch.manual_seed(0)
    config = ModelConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 8, "vocab_size": 11} | keys)
    model = models.build(config).eval()
    for parameter in model.parameters():  # far from the start, where every token has about the same chance
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def continuation(model, idx, n: int, **options) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return torch.stack(list(generate(model, idx, n, generator=generator, **options)), dim=1).tolist()


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("prompt", [1, 5, 8, 13], ids=lambda n: f"prompt{n}")
@pytest.mark.parametrize("block_size", [1, 2, 8])
def test_cached_equals_uncached_before_and_past_block_size(position, exact, prompt, block_size):
    model = tiny_model(position=position, block_size=block_size)
    idx = torch.arange(2 * prompt).view(2, prompt) % 11
    cached, uncached = (continuation(model, idx, 30, exact=exact, cached=cached) for cached in (True, False))
    assert cached == uncached


def test_the_exact_way_is_nanogpts():
    model = tiny_model()
    idx = torch.tensor([[1, 2, 3]])
    generator = torch.Generator().manual_seed(3)
    for _ in range(30):
        logits, _ = model(idx[:, -8:])
        token = torch.multinomial((logits[:, -1] / 0.7).softmax(-1), 1, generator=generator)
        idx = torch.cat([idx, token], dim=1)
    assert continuation(model, torch.tensor([[1, 2, 3]]), 30, exact=True, temperature=0.7) == idx[:, 3:].tolist()


def test_the_fast_way_reads_the_newest_half_again_when_the_window_is_full():
    model = tiny_model()
    read = []
    forward = model.forward
    model.forward = lambda idx, caches=None: read.append(idx.shape[1]) or forward(idx, caches=caches)
    continuation(model, torch.tensor([[1, 2]]), 16)
    assert read == [2, 1, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4, 1, 1, 1]


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_the_window_network_drops_its_oldest_token(exact):
    model = tiny_model(model="window_mlp", window=8)
    idx = torch.tensor([[1, 2, 3]])
    written = continuation(model, idx, 30, exact=exact, temperature=0)
    for _ in range(30):
        idx = torch.cat([idx, model(idx[:, -8:])[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    assert written == idx[:, 3:].tolist()


def test_temperature_0_is_greedy():
    model = tiny_model()
    idx = torch.tensor([[1, 2, 3]])
    greedy = continuation(model, idx, 5, temperature=0)
    for _ in range(5):
        idx = torch.cat([idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    assert greedy == idx[:, 3:].tolist()


def test_top_k_keeps_the_k_likeliest():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    probs = probabilities(logits, top_k=2)
    torch.testing.assert_close(
        probs, torch.tensor([[0.0, 3.0, 2.0, 0.0]]).masked_fill(logits < 2, -torch.inf).softmax(-1)
    )
    torch.testing.assert_close(probabilities(logits, top_k=99), logits.softmax(-1))


def test_top_p_keeps_the_fewest_that_together_reach_p():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    torch.testing.assert_close(probabilities(logits, top_p=0.6), torch.tensor([[0, 2 / 3, 0, 1 / 3]]))
    torch.testing.assert_close(probabilities(logits, top_p=1e-9), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    torch.testing.assert_close(probabilities(logits, top_p=1.0), logits.exp())


def test_the_smallest_temperature_is_greedy_and_no_overflow():
    assert probabilities(torch.tensor([[3.0, 5.0]]), temperature=1e-39).tolist() == [[0.0, 1.0]]


def test_temperature_sharpens_and_flattens():
    logits = torch.tensor([[0.0, 1.0]])
    chances = [probabilities(logits, temperature=t)[0, 1].item() for t in (0, 0.5, 1.0, 2.0)]
    assert chances[0] == 1.0 and chances == sorted(chances, reverse=True)


def test_ids_that_only_pad_the_vocabulary_are_never_drawn():
    model = tiny_model(vocab_size=50)
    drawn = continuation(model, torch.zeros(20, 1, dtype=torch.long), 30, known=11)
    assert max(map(max, drawn)) < 11


def test_a_batch_of_texts_has_different_texts():
    first, second = continuation(tiny_model(), torch.ones(2, 3, dtype=torch.long), 20)
    assert first != second


def test_only_text_goes_to_stdout(run_dir, capsys):
    sample.main(["--out_dir=out/run", "--device=cpu", "--num_samples=2", "--max_new_tokens=20", "--start=A"])
    out, err = capsys.readouterr()
    assert out.count("A") >= 2 and len(out) == 2 * (1 + 20 + 1)  # prompt, tokens, line end
    assert "---------------" in err and "best val loss" in err


def test_the_same_seed_writes_the_same_text(run_dir, capsys):
    first = text_of(capsys, "--seed=1")
    assert first == text_of(capsys, "--seed=1") != text_of(capsys, "--seed=2")


def test_the_prompt_may_come_from_a_file(run_dir, capsys):
    Path("prompt.txt").write_text("Ak ")
    assert text_of(capsys, "--start=FILE:prompt.txt") == text_of(capsys, "--start=Ak ")


def test_the_best_checkpoint_writes_unless_the_latest_is_asked_for(run_dir, capsys):
    best, latest = (train.checkpoint.load(run_dir / name) for name in ("best.pt", "ckpt.pt"))
    best["model"]["wte.weight"].zero_()
    train.checkpoint.save(run_dir / "best.pt", best)
    assert text_of(capsys) != text_of(capsys, "--checkpoint=latest")
    (run_dir / "best.pt").unlink()
    from_latest = text_of(capsys)
    assert latest["iter"] == 6 and from_latest == text_of(capsys, "--checkpoint=latest")


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
    "device=cuda:99 is not there": ["--device=cuda:99"],
}


@pytest.mark.parametrize("complaint", BAD)
def test_bad_input_is_one_line(run_dir, fails, monkeypatch, complaint):
    monkeypatch.setattr(sample, "load", lambda config, load=sample.checkpoint.load: load(run_dir / "best.pt"))  # silent
    Path("latin1.txt").write_bytes(b"caf\xe9")
    assert complaint in fails(sample.main, "--out_dir=out/run", *BAD[complaint])


def test_keys_that_have_no_effect_say_so(run_dir, capsys):
    sample.main(["--out_dir=out/run", "--device=cpu", "--compile=True", "--max_new_tokens=1"])
    assert "compile=True has no effect" in capsys.readouterr().err
    sample.main(["--out_dir=out/run", "--device=cpu", "--temperature=0", "--top_p=0.5", "--max_new_tokens=1"])
    assert "note: top_p=0.5 has no effect with temperature=0.0" in capsys.readouterr().err


def test_models_of_every_config_key_survive_the_checkpoint(run_dir):
    saved = train.checkpoint.load(run_dir / "best.pt")["model_config"]
    assert set(saved) == {field.name for field in dataclasses.fields(ModelConfig)}


def test_greedy_texts_are_all_the_same_so_one_is_written(run_dir, capsys):
    sample.main(["--out_dir=out/run", "--device=cpu", "--max_new_tokens=5", "--temperature=0"])
    captured = capsys.readouterr()
    assert "at temperature=0 all texts are the same" in captured.err and "-----" not in captured.err
