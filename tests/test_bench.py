import json
from pathlib import Path

import pytest
from conftest import make_text

import bench
import prepare_data
from tokenizer import BytePairTokenizer

NANOGPT = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int = 8
    vocab_size: int = 8
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 8
    dropout: float = 0.0
    bias: bool = True

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets):
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.SGD(self.parameters(), lr=learning_rate)
"""


@pytest.fixture
def text(folder):
    Path("text.txt").write_text(make_text())
    prepare_data.main(["--input=text.txt", "--name=shakespeare_char"])


def test_the_last_line_is_json_with_the_ratio_of_the_medians(text, capsys):
    Path("other").mkdir()
    Path("other/model.py").write_text(NANOGPT)
    bench.main(["--nanogpt=other", "--steps=2"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == {"ours_ms", "nanogpt_ms", "speedup"}
    assert result["speedup"] == pytest.approx(result["nanogpt_ms"] / result["ours_ms"], rel=0.05, abs=0.01)


def test_alone_it_times_this_program(text, capsys):
    bench.main(["--steps=1"])
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])) == {"ours_ms"}


def test_our_step_learns(text):
    step = bench.our_step(Path("data/shakespeare_char"))
    losses = [step(it) for it in range(30)]
    assert losses[-1] < losses[0] - 0.5


def test_preparing_is_timed_beside_tiktoken_alone(folder, monkeypatch, capsys):
    tok = BytePairTokenizer("gpt2", [bytes([i]) for i in range(256)])
    monkeypatch.setattr(BytePairTokenizer, "gpt2", lambda: tok)
    Path("text.txt").write_text(make_text(100_000))
    script = Path("fake.py")  # stands for prepare_data.py, which would fetch GPT-2's vocabulary
    script.write_text(
        "held = b'x' * 80_000_000\nimport time\nlast = time.time() + 0.5\nwhile time.time() < last: pass\n"
    )
    monkeypatch.setattr(bench, "PREPARE", script)
    bench.main(["--what=prepare", "--input=text.txt"])
    result = json.loads(capsys.readouterr().out)
    assert result["most_memory_mb"] > 80
    alone = result["tiktoken_alone_mb_per_second"] * result["cores"]
    assert result["share"] == pytest.approx(result["mb_per_second"] / alone, rel=0.05, abs=0.01)


def test_reading_is_timed(text, capsys):
    bench.main(["--what=read", "--block_size=16", "--batches=50"])
    result = json.loads(capsys.readouterr().out)
    assert result["tokens_per_second"] > 1000 and result["growth_mb"] < 50


def test_bad_input_is_one_line(folder, fails):
    assert "what=memory is not one of: train, prepare, read" in fails(bench.main, "--what=memory")
    assert "what=prepare needs --input" in fails(bench.main, "--what=prepare")
    assert "batches=5 goes with --what=read only" in fails(bench.main, "--batches=5")
    assert "nanogpt=nothing has no model.py" in fails(bench.main, "--nanogpt=nothing")
    assert "steps=0 must be at least 1" in fails(bench.main, "--steps=0")
    assert "no data/shakespeare_char; run: python prepare_data.py shakespeare_char" in fails(bench.main)
