import json
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_text

import bench
import prepare_data
from benchmarks import rivals
from humptygpt.tokenizer.tokenizers import GPT2Tokenizer
from model import ModelConfig, flops_per_token

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
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def generate(self, idx, max_new_tokens):
        for _ in range(max_new_tokens):
            idx = torch.cat([idx, self.table(idx[:, -1:]).argmax(dim=-1)], dim=1)
        return idx

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.SGD(self.parameters(), lr=learning_rate)
"""


@pytest.fixture
def text(folder):
    """data/shakespeare_char, and folders of a nanoGPT and of a config."""
    Path("text.txt").write_text(make_text())
    prepare_data.main(["--input=text.txt", "--name=shakespeare_char"])
    Path("other").mkdir()
    Path("other/model.py").write_text(NANOGPT)
    Path("plain.py").write_text("n_layer = 1\nn_head = 2\nn_embd = 32\nblock_size = 16\n")
    Path("tiny.py").write_text(
        "n_layer = 1\nn_head = 2\nn_embd = 32\nblock_size = 16\nlearning_rate = 1e-2\nwarmup_iters = 2\n"
        "ngrams = 3\noptimizer = 'muon'\n"
    )


class Here:
    """A contender in this process: others take seconds to start."""

    def __init__(self, cls, *arguments):
        self.contender = cls(*arguments)

    def ask(self, method, *arguments):
        return getattr(self.contender, method)(*arguments)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(bench, "Apart", Here)
    monkeypatch.setattr(bench, "WARMUP", 2)


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_steps_of_both_are_timed_in_processes_of_their_own_and_the_ratio_is_of_the_medians(
    text, capsys
):
    bench.main(["--nanogpt=other", "--steps=2", "--config=plain.py"])
    result = last_line(capsys)
    assert result["speedup"] == pytest.approx(
        result["nanogpt_ms"] / result["ours_ms"], rel=0.05, abs=0.01
    )
    assert result["ours_tokens_per_second"] == pytest.approx(
        12 * 16 / result["ours_ms"] * 1000, rel=0.05
    )


def test_alone_it_times_this_program(text, here, capsys):
    bench.main(["--steps=1", "--config=plain.py", "--dtype=bfloat16"])
    assert last_line(capsys).keys() == {"ours_ms", "ours_tokens_per_second"}


def test_where_the_peak_of_the_card_is_listed_mfu_is_reported(text, here, monkeypatch, capsys):
    monkeypatch.setattr(bench, "peak_flops", lambda device: 1e12)
    bench.main(["--steps=1", "--config=tiny.py"])
    result = last_line(capsys)
    model = bench.Ours(*bench.read_config(bench.BenchConfig(config="tiny.py", device="cpu"))).model
    speed = result["ours_tokens_per_second"]
    assert result["ours_mfu"] == pytest.approx(
        speed * flops_per_token(model) / 1e12, rel=0.01, abs=1e-4
    )


def test_both_train_to_the_target_and_ours_for_as_long_as_nanogpt(text, here, monkeypatch, capsys):
    monkeypatch.setattr(bench, "PRESET", replace(bench.PRESET, max_iters=300))
    monkeypatch.setattr(bench, "timed", lambda step: step() or 0.002)
    bench.main(
        [
            "--what=loss",
            "--nanogpt=other",
            "--config=tiny.py",
            "--target=2.6",
            "--seeds=1",
            "--device=cpu",
        ]
    )
    out = capsys.readouterr().out
    assert out.startswith("seed 1: {")
    result = json.loads(out.splitlines()[-1])
    assert 0 < result["ours_seconds_to_target"] <= result["ours_seconds"]
    assert result["ours_steps"] == 240  # 0.8 of the other's time
    assert (
        result["ours_val_loss"] < 2.6 and result["nanogpt_val_loss"] > 2.6
    )  # a table of pairs cannot learn as much
    assert result["speedup"] == pytest.approx(
        result["nanogpt_seconds"] / result["ours_seconds_to_target"], rel=0.01
    )


def test_both_are_scored_by_one_function_on_the_whole_split_and_on_random_crops(text):
    def nats(model, ids) -> float:  # ids: (B, T + 1)
        with torch.no_grad():
            logits = model(ids[:, :-1], ids[:, 1:])[0]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()

    preset = replace(
        bench.PRESET, batch_size=2, device="cpu", dtype="float32"
    )  # several batches in the split
    for run in (bench.Ours(preset, bench.SHAPE), theirs(preset)):
        torch.nn.init.normal_(next(run.model.parameters()))  # so that no two texts cost the same
        val, T = (
            torch.from_numpy(run.dataset.val.read(np.array([0]), len(run.dataset.val))[0]),
            run.dataset.block_size,
        )
        whole = sum(
            nats(run.model, val[None, first : first + T + 1]) for first in range(0, len(val) - 1, T)
        )
        assert run.val_loss() == pytest.approx(whole / (len(val) - 1), rel=1e-4)
        draw = np.random.default_rng(1337)
        crops = [
            val[i : i + T + 1] for _ in range(200) for i in draw.integers(len(val) - T, size=2)
        ]
        assert run.crops_loss() == pytest.approx(
            nats(run.model, torch.stack(crops)) / 400 / T, rel=1e-4
        )


def theirs(config) -> bench.NanoGPT:
    return bench.NanoGPT(config, bench.SHAPE, Path("other"))


def test_our_steps_and_theirs_learn(text):
    preset = replace(bench.PRESET, device="cpu", dtype="float32")
    for run in (
        bench.Ours(preset, bench.SHAPE),
        theirs(replace(preset, learning_rate=1)),
    ):
        before = run.val_loss()
        assert len(run.take_steps(0, 30)) == 30
        assert run.val_loss() < before - 0.05


def test_the_profile_reports_the_parts_of_a_step_and_its_operators(text, capsys):
    bench.main(["--what=profile", "--config=tiny.py", "--steps=2", "--device=cpu"])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    parts = [
        result[f"{part}_ms"]
        for part in ("read_a_batch", "forward", "backward", "clip", "optimizer")
    ]
    assert min(parts) > 0 and result["whole_step_ms"] > 0
    assert "aten::mm" in out


def test_preparing_is_timed_beside_tiktoken_alone(folder, monkeypatch, capsys):
    tok = GPT2Tokenizer([bytes([i]) for i in range(256)])
    monkeypatch.setattr(GPT2Tokenizer, "train", lambda: tok)
    Path("text.txt").write_text(make_text(100_000))
    script = Path("fake.py")  # stands for prepare_data.py, which would fetch GPT-2's vocabulary
    script.write_text(
        "held = b'x' * 80_000_000\nimport time\nlast = time.time() + 0.5\nwhile time.time() < last: pass\n"
    )
    monkeypatch.setattr(bench, "PREPARE", script)
    bench.main(["--what=prepare", "--input=text.txt"])
    result = json.loads(capsys.readouterr().out)
    assert result["peak_memory_mb"] > 80
    alone = result["tiktoken_alone_mb_per_second"] * result["cores"]
    assert result["efficiency"] == pytest.approx(
        result["mb_per_second"] / alone, rel=0.05, abs=0.01
    )


def test_reading_is_timed(text, capsys):
    bench.main(["--what=read", "--block_size=16", "--batches=50"])
    result = json.loads(capsys.readouterr().out)
    assert result["tokens_per_second"] > 1000 and result["growth_mb"] < 50


def test_bad_input_is_one_line(folder, fails):
    assert "what=memory is not one of: train, loss, profile, prepare, read" in fails(
        bench.main, "--what=memory"
    )
    assert "what=prepare needs --input" in fails(bench.main, "--what=prepare")
    assert "batches=5 has no effect without what=read" in fails(bench.main, "--batches=5")
    assert "nanogpt=nothing has no model.py" in fails(bench.main, "--nanogpt=nothing")
    assert "what=loss needs --nanogpt" in fails(bench.main, "--what=loss")
    assert "target=0.0 must be above 0" in fails(bench.main, "--what=loss", "--target=0")
    assert "dtype=int8 is not one of: auto, float32" in fails(bench.main, "--dtype=int8")
    assert "steps=5 has no effect without what=train or profile" in fails(
        bench.main, "--what=read", "--steps=5"
    )
    assert "steps=0 must be at least 1" in fails(bench.main, "--steps=0")
    assert "no data/shakespeare_char; run: python prepare_data.py shakespeare_char" in fails(
        bench.main
    )


def test_seconds_to_the_target_are_read_off_between_two_evaluations():
    losses = iter([4.0, 3.0, 2.0, 2.0])
    answers = {"take_steps": lambda first, count: [1.0] * count, "val_loss": lambda: next(losses)}
    answers["crops_loss"] = lambda: 2.5
    found = bench.train_to(
        lambda method, *given: answers[method](*given), steps=30, interval=10, target=2.75
    )
    assert found == {"seconds": 30.0, "seconds_to_target": 22.5, "val_loss": 2.0, "crops_loss": 2.5}


def test_a_run_that_cannot_start_is_one_line(text, fails):
    Path("other/model.py").write_text("raise ImportError('no such thing')")
    assert "failed in a process of its own: no such thing" in fails(
        bench.main, "--nanogpt=other", "--config=plain.py", "--steps=1"
    )
    assert "device=cuda:77 is not available" in fails(bench.main, "--device=cuda:77")
    assert "dtype=float16 needs a CUDA device" in fails(
        bench.main, "--dtype=float16", "--device=cpu"
    )


def test_settings_that_do_not_count_here_are_refused(text, fails):
    Path("mean.py").write_text("ema_decay = 0.9\n")
    assert "ema_decay=0.9 is not timed here" in fails(bench.main, "--config=mean.py")


def test_what_nanogpt_cannot_be_is_not_timed_beside_it(text, fails):
    assert "tiny.py is no GPT-2 trained by AdamW" in fails(
        bench.main, "--nanogpt=other", "--config=tiny.py"
    )


# --------------------------------------------------------------------------------------
# Generation


SMALL = ModelConfig(
    n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=40, bias=True, activation="gelu_tanh"
)


@pytest.fixture
def small(here, monkeypatch):
    """--sizes=small is SMALL; no package but torch is there, and a small tensor is read."""
    monkeypatch.setitem(bench.GPT2, "small", SMALL)
    monkeypatch.setattr(bench, "READ_BYTES", 4_000_000)
    monkeypatch.setattr(
        rivals.importlib.util, "find_spec", lambda package: package if package == "torch" else None
    )


def run_sample(capsys, *argv: str) -> tuple[dict, str]:
    """(the JSON object, what is on stderr)."""
    bench.main(["--what=sample", "--sizes=small", "--new_tokens=4", "--rounds=2", *argv])
    captured = capsys.readouterr()
    return json.loads(captured.out.splitlines()[-1]), captured.err


def test_generation_is_timed_in_each_dtype_and_case_and_missing_programs_are_named(small, capsys):
    result, errors = run_sample(capsys, "--cases=1x8", "--cases=3x2", "--cases=1x17")
    shapes = [(case["dtype"], case["batch"], case["prompt"]) for case in result["cases"]]
    assert shapes == [
        (dtype, *case) for dtype in ("float32", "bfloat16", "int8") for case in ((1, 8), (3, 2))
    ]
    machine = result["machine"]
    assert machine.keys() == {"processor", "cores", "threads", "bytes_read", "bytes_per_second"}
    assert machine["bytes_read"] == 4_000_000
    weights = 2 * 12 * 32**2 + 40 * 32  # of two blocks of width 32, and of the head
    for case, size in zip(result["cases"], (4, 4, 2, 2, 1, 1), strict=True):
        limit = case["batch"] * machine["bytes_per_second"] / (weights * size)
        assert case["limit_tokens_per_second"] == pytest.approx(limit, rel=1e-3)
        assert case["ours"]["of_limit"] == pytest.approx(
            case["ours"]["tokens_per_second"] / limit, abs=1e-3
        )
        assert case["ours"]["first_token_ms"] > 0 and case["ours"]["version"].startswith("torch ")
    assert "cases=1x17: the prompt is longer than the 16 tokens of small" in errors
    missing = next(line for line in errors.splitlines() if line.startswith("not timed: "))
    assert missing == (
        "not timed: nanogpt (--nanogpt=FOLDER), transformers (pip install transformers),"
        " ctranslate2 (pip install ctranslate2 transformers), llama_cpp (pip install xllamacpp gguf transformers)"
    )


def test_each_other_program_has_the_ratios_of_ours_to_it(text, small, monkeypatch, capsys):
    peaks = count(1_000_000, 500_000)  # of no model, of ours and of theirs
    monkeypatch.setattr(rivals.Process, "peak_memory", lambda self: next(peaks))
    result, errors = run_sample(capsys, "--nanogpt=other", "--dtypes=float32", "--cases=2x3")
    ours, theirs = result["cases"][0]["ours"], result["cases"][0]["nanogpt"]
    assert (ours["memory_mb"], theirs["memory_mb"], theirs["ratio"]["memory_mb"]) == (0.5, 1.0, 0.5)
    for key in ("first_token_ms", "tokens_per_second"):
        assert theirs["ratio"][key] == pytest.approx(ours[key] / theirs[key], rel=0.01, abs=1e-3)
    assert "nanogpt" not in errors


def test_figures_are_medians_over_rounds_and_steps_and_the_contenders_take_turns(here):
    answers = [[5.0, 0.1, 0.2], [9.0, 0.4, 0.2], [7.0, 0.2, 0.9]]
    asked = []

    def make(name: str) -> type:
        def measure(self, n: int) -> list[float]:
            asked.append(name)
            return answers[asked.count(name) - 1]

        methods = {
            "load": lambda self, case: None,
            "__init__": lambda self, case: None,
            "measure": measure,
        }
        return type(name, (rivals.Contender,), methods)

    case = rivals.Case(bench.SHAPE, bench.SHAPE, "float32", 4, 8, 3, None, Path())
    found = bench.time_case(case, {"ours": make("ours"), "other": make("other")}, rounds=3)
    assert asked == ["ours", "other"] * 3
    assert (found["other"]["first_token_ms"], found["other"]["tokens_per_second"]) == (
        7000,
        20,
    )  # 4 texts in 0.2 s


def test_a_step_ends_when_its_token_is_there_and_patience_ends_a_measurement(monkeypatch):
    now = 0.0

    class Slow(rivals.Contender):
        def load(self, case):
            self.seconds = [3.0, 1.0, 25.0, 1.0]

        def steps(self, n):
            nonlocal now
            for seconds in self.seconds[:n]:
                now += seconds
                yield

    monkeypatch.setattr(rivals.time, "perf_counter", lambda: now)
    slow = Slow(
        rivals.Case(
            bench.SHAPE, replace(bench.SHAPE, vocab_size=5), "float32", 2, 8, 3, None, Path()
        )
    )
    assert slow.idx.shape == (2, 8) and slow.idx.max() < 5
    assert slow.measure(2) == [3.0, 1.0]
    assert slow.measure(4) == [3.0, 1.0, 25.0]


def test_what_cannot_be_generated_is_one_line(small, fails):
    sample = partial(fails, bench.main, "--what=sample")
    assert "sizes=gpt9 is not one of: 0.8M, gpt2, gpt2-medium" in sample("--sizes=gpt9")
    assert "dtypes=float16 is not one of: float32, bfloat16, int8" in sample("--dtypes=float16")
    for case in ("8", "0x8", "1x8x1", "1x-8"):
        assert f"cases={case} must be texts x tokens of the prompt" in sample(f"--cases={case}")
    assert "new_tokens=1 must be at least 2" in sample("--new_tokens=1")
    assert "cases=1x65: the prompt is longer than the 64 tokens of 0.8M" in sample(
        "--sizes=0.8M", "--cases=1x65"
    )
    assert "dtype=float32 has no effect without what=train" in sample("--dtype=float32")
    assert "rounds=3 has no effect without what=sample" in fails(bench.main, "--rounds=3")
    assert "sizes=('gpt2',) has no effect without what=sample" in fails(bench.main, "--sizes=gpt2")


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
def test_a_gguf_file_has_the_tensors_of_a_gpt2_under_their_names(kind):
    gguf, transformers = pytest.importorskip("gguf"), pytest.importorskip("transformers")
    assert transformers
    model = rivals.random_gpt2(SMALL)
    rivals.write_random_gguf(Path("model.gguf"), SMALL, kind)
    reader = gguf.GGUFReader("model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    inner = {"attn_norm": [32], "attn_qkv": [32, 96], "attn_output": [32, 32]}  # (inputs, outputs)
    inner |= {"ffn_norm": [32], "ffn_up": [32, 128], "ffn_down": [128, 32]}
    layers = {"output_norm": [32]} | {
        f"blk.{i}.{name}": inner[name] for i in range(2) for name in inner
    }
    shapes = {"token_embd.weight": [32, 40], "position_embd.weight": [32, 16]}
    shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[-1:] for name, shape in layers.items()}
    assert {name: tensor.shape.tolist() for name, tensor in tensors.items()} == shapes
    matrices = {
        name for name, shape in shapes.items() if len(shape) == 2 and name != "position_embd.weight"
    }
    kinds = {name: kind if name in matrices else "F32" for name in shapes}
    assert {name: tensor.tensor_type.name for name, tensor in tensors.items()} == kinds
    up = tensors["blk.1.ffn_up.weight"]
    written = torch.tensor(gguf.quants.dequantize(up.data, up.tensor_type))
    torch.testing.assert_close(
        written, model.transformer.h[1].mlp.c_fc.weight.T, atol=1e-3, rtol=1e-2
    )
    assert reader.fields["tokenizer.ggml.tokens"].contents()[39] == "t39"
    assert reader.fields["gpt2.block_count"].contents() == 2


def test_the_loop_around_hugging_faces_model_is_greedy_and_keeps_what_it_has_read():
    pytest.importorskip("transformers")
    case = rivals.Case(SMALL, SMALL, "float32", 3, 5, 4, None, Path())
    run = rivals.Transformers(case)
    expected = run.idx
    for tokens in run.steps(6):
        with torch.no_grad():
            expected = torch.cat(
                [expected, run.model(expected).logits[:, -1:].argmax(dim=-1)], dim=1
            )
        assert torch.equal(tokens, expected[:, -1:])
    assert expected.shape == (3, 11)
