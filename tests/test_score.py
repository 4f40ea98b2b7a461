"""score.py: how well a model predicts a text, and which of two texts it finds likelier."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_export import CASES, make_run
from test_model import random_model
from texts import make_text

import export
import sample
import score
from humptygpt.cli import UserError
from humptygpt.scoring import pairs
from humptygpt.scoring import text as texts
from humptygpt.scoring.pairs import by_group, read_tests, run_tests
from humptygpt.tokenizers.basic import BytePairTokenizer, CharTokenizer


def scored(capsys, *argv: str) -> str:
    capsys.readouterr()
    score.main(list(argv) or ["--out_dir=out/run"])
    return capsys.readouterr().out


def write_lines(path: str, *rows: object) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_score_of_a_text_is_the_mean_over_windows_half_a_block_apart(run_dir, capsys):
    Path("val.txt").write_text("Ak k A Ak " * 20)
    argv = ["--out_dir=out/run", "--text=val.txt", "--json=True"]
    row = json.loads(scored(capsys, *argv))["out/run"]
    loaded = sample.load("out/run")
    ids = texts.encode(Path("val.txt").read_text(), loaded.tokenizer)
    expected = -texts.score_windows(loaded.model, ids, 8).mean()
    assert row["nats_per_token"] == pytest.approx(expected, abs=1e-4)
    assert row["stride"] == 8


@pytest.mark.parametrize("keys", [{}, {"position": "learned"}, {"model": "window_mlp", "window": 16}], ids=str)
def test_padded_batches_score_as_each_text_does_alone(keys, monkeypatch):
    model = random_model(**keys).eval()
    random = np.random.default_rng(0)
    sequences = [random.integers(0, 11, n) for n in (2, 16, 7, 17, 3, 12, 9)]
    expected = []
    for ids in sequences:
        ids = torch.from_numpy(ids)[None]
        with torch.no_grad():
            logprobs = model(ids[:, :-1])[0].log_softmax(-1)
        expected.append(logprobs.gather(-1, ids[:, 1:, None])[0, :, 0].numpy())
    for tokens in (1, 20, 1000):
        monkeypatch.setattr(texts, "TOKENS", tokens)
        found = texts.log_probabilities(model, sequences)
        for row, alone in zip(found, expected, strict=True):
            np.testing.assert_allclose(row, alone, atol=1e-5)


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


def test_the_likeliest_text_as_a_whole_passes_and_a_tie_counts_in_part():
    tokenizer = CharTokenizer("abc\n")
    model = Unigram({"a": 2.0, "b": 1.0, "c": 0.0, "\n": -9.0}, tokenizer)
    tests = [
        pairs.Test(["a", "b"], 0, "", "x"),
        pairs.Test(["b", "a"], 0, "c", "x"),
        pairs.Test(["aaaa", "b"], 1, "", "y"),  # fewer letters, each of them less likely
        pairs.Test(["ab", "ba"], 1, "", "y"),
        pairs.Test(["a", "é"], 0, "", "y"),  # é is not in the alphabet
    ]
    found = run_tests(model, tokenizer, tests)
    np.testing.assert_array_equal(found, [1, 0, 1, 0.5, math.nan])
    table = by_group(tests, found)
    assert table["x"] == (2, 0.5, 0.5)
    assert table["y"][:2] == (2, 0.75) and table["all"][:2] == (4, 0.625)


def test_a_space_that_ends_the_context_counts_as_the_beginning_of_each_choice():
    single = [bytes([byte]) for byte in range(256)]
    tokenizer = BytePairTokenizer([*single, b" y", b"es", b"no", b" no"])
    model = Unigram({" y": -3.0, "es": 3.0, " no": 2.0, "no": -3.0}, tokenizer)
    tests = [
        pairs.Test(["yes", "no"], 1, "A: "),
        pairs.Test([" yes", " no"], 1, "A:"),
        pairs.Test(["yes", "\ud83d"], 0),  # half a character, which no tokenizer has
    ]
    np.testing.assert_array_equal(run_tests(model, tokenizer, tests), [1, 1, math.nan])


def test_several_models_make_one_table_with_paired_differences(run_dir, capsys):
    write_lines("pairs.jsonl", *({"good": "A" * n, "bad": "A" * n + "k"} for n in (1, 2, 3)))
    argv = ["--init_from=out/run", "--init_from=out/run/ckpt.pt", "--pairs=pairs.jsonl"]
    rows = json.loads(scored(capsys, *argv, "--json=True"))
    assert [row["model"] for row in rows] == ["out/run", "out/run/ckpt.pt"]
    assert rows[0]["tests"] == 3 and "difference" not in rows[0]
    assert rows[1]["difference"] == rows[1]["sum"] - rows[0]["sum"]
    printed = scored(capsys, *argv)
    assert "out/run/ckpt.pt" in printed and " passed      difference\n" in printed


def test_a_line_separator_inside_a_text_does_not_end_its_line_and_one_test_makes_valid_json(run_dir, capsys):
    line = '{"good": "A\u2028", "bad": "k\u2028"}\n{"good": "A", "bad": "k"}\n'
    Path("pairs.jsonl").write_text(line, encoding="utf-8")
    out = scored(capsys, "--out_dir=out/run", "--pairs=pairs.jsonl", "--json=True")
    (row,) = json.loads(out, parse_constant=pytest.fail)
    assert row["tests"] == 1 and row["sum_error"] == 0


@pytest.mark.parametrize("suite", ["english", "python"])
def test_a_suite_has_two_hundred_tests_in_several_groups(suite):
    tests = read_tests(suite)
    assert len(tests) == len({tuple(test.choices) for test in tests}) == 200
    assert len({test.group for test in tests}) >= 8
    assert all(choice.encode() for test in tests for choice in test.choices)


BAD = [
    '{"good": ',
    "[" * 10**5,
    '{"text": "a"}',
    '{"good": "a", "bad": "a"}',
    '{"good": "a", "bad": ""}',
    '{"good": "a"}',
    '{"good": "a", "bad": "b", "context": 1}',
    '{"choices": ["a", "b"], "answer": -1}',
    '{"choices": ["a", ["b"]], "answer": 0}',
    '{"choices": ["a", "b"]}',
]


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_line_of_pairs_is_named_in_one_line(line, fails):
    Path("pairs.jsonl").write_text(f'{{"good": "a", "bad": "b"}}\n{line}\n')
    complaint = "pairs.jsonl, line 2: it must be an object with texts: good and bad, or "
    assert complaint in fails(score.main, "--pairs=pairs.jsonl")


def test_a_file_without_pairs_is_one_line(fails):
    Path("pairs.jsonl").write_text("\n")
    assert "pairs.jsonl is empty" in fails(score.main, "--pairs=pairs.jsonl")


def test_other_mistakes_are_explained(run_dir, fails):
    assert "one of --text, --pairs and --chats; 0 are given" in fails(score.main)
    complaint = "text_key=q,a has no effect with chats=None"
    assert complaint in fails(score.main, "--pairs=english", "--text_key=q,a")
    Path("short.txt").write_text("A")
    with pytest.raises(UserError, match="no token to predict"):
        score.main(["--out_dir=out/run", "--text=short.txt"])
    write_lines("pairs.jsonl", {"good": "é", "bad": "à"})
    with pytest.raises(UserError, match="lacks characters of every test"):
        score.main(["--out_dir=out/run", "--pairs=pairs.jsonl"])


def lm_eval_task(pairs_file: Path) -> dict:
    """Describe the tests of a file to lm-evaluation-harness."""
    return {
        "task": "pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(pairs_file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }


@pytest.mark.long
def test_lm_evaluation_harness_finds_the_same_for_an_exported_model(folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval: pip install lm_eval")
    make_run(*CASES["llama, documents of bpe"])
    export.main(["--out_dir=out/run", "--to=exported"])
    words = sorted(set(make_text(2000).split()))
    lines = [
        {
            "context": context,
            "choices": [f" {a}", f" {b} {a}", f" {a} {a}."],
            "answer": i % 3,
        }
        for i, (a, b) in enumerate(zip(words, words[::-1], strict=True))
        for context in ("", " ".join(words[i : i + 5]))
        if a != b
    ]
    write_lines("pairs.jsonl", *lines)
    capsys.readouterr()
    scores = []
    monkeypatch.setattr(
        pairs,
        "log_probabilities",
        lambda *given: scores.extend(texts.log_probabilities(*given)) or scores,
    )
    row = json.loads(scored(capsys, "--init_from=exported", "--pairs=pairs.jsonl", "--json=True"))[-1]
    task = lm_eval_task(folder / "pairs.jsonl")
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder / "exported"), "dtype": "float32"},
        tasks=[task],
        device="cpu",
        bootstrap_iters=0,
    )
    results = found["results"]["pairs"]
    assert row["tests"] == len(lines) > 20
    assert results["acc,none"] == pytest.approx(row["sum"])
    assert 0 < row["sum"] < 1
    samples = sorted(found["samples"]["pairs"], key=lambda sample: sample["doc_id"])
    theirs = [answer[0] for sample in samples for answer in sample["filtered_resps"]]
    for index, (each, likelihood) in enumerate(zip(scores, theirs, strict=True)):
        if not lines[index // 3]["context"]:
            assert each.sum() == pytest.approx(likelihood, abs=1e-4)
