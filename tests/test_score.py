"""score.py: how well a model predicts a text, and which of two texts it finds likelier."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, read_rows
from test_model import random_model

import sample
import score
import train
from humptygpt.config import UserError
from humptygpt.data import TokenDataset
from humptygpt.scoring import pairs
from humptygpt.scoring import text as texts
from humptygpt.scoring.pairs import by_group, read_tests, run_tests
from humptygpt.tokenizers import ByteTokenizer, CharTokenizer


def scored(capsys, *argv: str) -> str:
    capsys.readouterr()
    score.main(list(argv) or ["--out_dir=out/run"])
    return capsys.readouterr().out


def write_lines(path: str, *rows: object) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_score_of_the_validation_text_is_the_trainers_evaluation(tiny, capsys):
    train.main([*TINY_RUN, "--eval_iters=None"])
    dataset = TokenDataset(Path("data/tiny"), block_size=16, seed=0)
    ids = dataset.splits["val"].read(np.array([0]), len(dataset.splits["val"]))[0]
    Path("val.txt").write_text(dataset.tokenizer.decode(ids.tolist()))
    argv = ["--out_dir=out/run", "--text=val.txt", "--json=True"]
    rows = json.loads(scored(capsys, *argv, "--stride=16"))["out/run"]
    best = min(read_rows(Path("out/run")), key=lambda row: row.get("val_loss", 99))
    assert rows["nats_per_token"] == pytest.approx(best["val_loss"], abs=1e-4)
    assert rows["bits_per_byte"] == pytest.approx(best["val_bits_per_byte"], abs=1e-2)
    more_context = json.loads(scored(capsys, *argv))["out/run"]
    assert more_context["nats_per_token"] != rows["nats_per_token"]
    with pytest.raises(UserError, match="stride=17 would skip tokens; it must be at most"):
        scored(capsys, *argv, "--stride=17")


@pytest.mark.parametrize(
    "keys", [{}, {"position": "learned"}, {"model": "window_mlp", "window": 16}], ids=str
)
def test_padded_batches_score_as_each_text_does_alone(keys, monkeypatch):
    model = random_model(**keys).eval()
    random = np.random.default_rng(0)
    sequences = [random.integers(0, 11, n) for n in (2, 30, 7, 17, 3, 12, 9)]
    lengths = [1, 20, 6, 16, 1, 5, 8]
    expected = []
    for ids, length in zip(sequences, lengths, strict=True):
        ids = torch.from_numpy(ids[-17:])[None]
        with torch.no_grad():
            logprobs = model(ids[:, :-1])[0].log_softmax(-1)
        each = logprobs.gather(-1, ids[:, 1:, None])[0, :, 0]
        expected.append(float(each[-length:].sum()))
    for tokens in (1, 20, 1000):
        monkeypatch.setattr(texts, "TOKENS", tokens)
        found = pairs.sum_log_probabilities(model, sequences, lengths)
        np.testing.assert_allclose(found, expected, atol=1e-5)


class Unigram(torch.nn.Module):
    """A model for which a token's log-probability depends on nothing but the token."""

    has_cache = False

    def __init__(self, logits: dict[str, float], tokenizer):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(tokenizer.vocab_size))
        for char, value in logits.items():
            self.logits.data[tokenizer.encode(char)[0]] = value
        self.config = random_model(vocab_size=tokenizer.vocab_size, block_size=16).config

    def forward(self, idx):
        return self.logits.expand(*idx.shape, -1), None


def test_sums_favour_short_choices_and_bytes_do_not_and_a_tie_counts_in_part():
    tokenizer = CharTokenizer("abc\n")
    model = Unigram({"a": 2.0, "b": 1.0, "c": 0.0, "\n": -9.0}, tokenizer)
    tests = [
        pairs.Test("", ["a", "b"], 0, "x"),
        pairs.Test("c", ["b", "a"], 0, "x"),
        pairs.Test("", ["aaaa", "b"], 0, "y"),  # more letters, each of them likelier
        pairs.Test("", ["ab", "ba"], 1, "y"),
        pairs.Test("", ["a", "é"], 0, "y"),  # é is not in the alphabet
    ]
    found = run_tests(model, tokenizer, tests)
    expected = [[1, 1], [0, 0], [0, 1], [0.5, 0.5], [math.nan] * 2]
    np.testing.assert_array_equal(found, expected)
    table = by_group(tests, found[:, 1])
    assert table["x"] == (2, 0.5, 0.5)
    assert table["y"][:2] == (2, 0.75) and table["all"][:2] == (4, 0.625)


def test_several_models_make_one_table_with_paired_differences(run_dir, capsys):
    write_lines(
        "pairs.jsonl", *({"good": "A" * n, "bad": "A" * n + "k"} for n in (1, 2, 3))
    )
    argv = ["--init_from=out/run", "--init_from=out/run/ckpt.pt", "--pairs=pairs.jsonl"]
    rows = json.loads(scored(capsys, *argv, "--json=True"))
    assert [row["model"] for row in rows] == ["out/run", "out/run/ckpt.pt"]
    assert rows[0]["tests"] == 3 and "difference" not in rows[0]
    assert rows[1]["difference"] == rows[1]["sum"] - rows[0]["sum"]
    printed = scored(capsys, *argv)
    assert "out/run/ckpt.pt" in printed and "difference by sum" in printed


def test_a_line_separator_inside_a_text_does_not_end_its_line_and_one_test_makes_valid_json(
    run_dir, capsys
):
    line = '{"good": "A\u2028", "bad": "k\u2028"}\n{"good": "A", "bad": "k"}\n'
    Path("pairs.jsonl").write_text(line, encoding="utf-8")
    out = scored(capsys, "--out_dir=out/run", "--pairs=pairs.jsonl", "--json=True")
    (row,) = json.loads(out, parse_constant=pytest.fail)
    assert row["tests"] == 1 and row["sum_error"] == 0


@pytest.mark.parametrize("suite", ["english", "python"])
def test_a_suite_has_two_hundred_tests_in_several_groups(suite):
    tests = read_tests(str(pairs.SUITES / f"{suite}.jsonl"))
    assert len(tests) == len({tuple(test.choices) for test in tests}) == 200
    assert len({test.group for test in tests}) >= 8
    ByteTokenizer().encode_batch([choice for test in tests for choice in test.choices])


BAD = {
    "pairs.jsonl, line 2: Expecting": '{"good": "a", "bad": "b"}\n{"good": \n',
    "line 1: it is not a JSON object": "[1]\n",
    "line 1: it has neither good and bad nor choices": '{"text": "a"}\n',
    "line 1: its choices do not differ": '{"good": "a", "bad": "a"}\n',
    "line 1: good, bad, choices and group must be texts": '{"good": "a"}\n',
    "line 1: answer=2 is not an index of its 2 choices": '{"choices": ["a", "b"], "answer": 2}',
    "line 1: answer=None is not an index": '{"choices": ["a", "b"]}',
    "pairs.jsonl is empty": "\n",
}


@pytest.mark.parametrize("message, content", BAD.items())
def test_a_bad_file_of_pairs_is_one_line(message, content, fails):
    Path("pairs.jsonl").write_text(content)
    assert message in fails(score.main, "--pairs=pairs.jsonl")


def test_other_mistakes_are_explained(run_dir, fails):
    assert "one of --text, --pairs and --suite; 0 are given" in fails(score.main)
    assert "stride=4 has no effect" in fails(score.main, "--suite=english", "--stride=4")
    assert "python score.py --text=FILE" in fails(sample.main, "--score=short.txt")
    Path("short.txt").write_text("A")
    with pytest.raises(UserError, match="no token to predict"):
        score.main(["--out_dir=out/run", "--text=short.txt"])
    write_lines("pairs.jsonl", {"good": "é", "bad": "à"})
    with pytest.raises(UserError, match="lacks characters of every test"):
        score.main(["--out_dir=out/run", "--pairs=pairs.jsonl"])
