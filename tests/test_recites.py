"""How much of what a model writes stands word for word in its training text."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, prepare_tiny
from test_chat import chat, write_chats
from torch.utils._pytree import tree_leaves

import prepare_data
import sample
import score
import train
from humptygpt.cli import UserError
from humptygpt.scoring.recites import PIECE, recited

DRAW = random.Random(0)
TRAINING = "".join(DRAW.choices("abcdé ", k=5000))


def written(*lengths: int) -> list[str]:
    """Texts that alternate between passages of the training text, of these lengths, and other characters."""
    return [
        "xyz".join(TRAINING[100 * n :][: n + length] for n in range(3))
        for length in lengths
    ]


@pytest.mark.parametrize("parts", [[5000], [1, 2000, 30, 2969], [60] * 83 + [20]])
def test_pieces_are_those_that_a_search_word_for_word_finds(parts):
    texts = [*written(20, 48, 70, 200), "too short", ""]
    pieces = [text[i : i + PIECE] for text in texts for i in range(len(text) - PIECE + 1)]
    cuts = [sum(parts[:n]) for n in range(len(parts) + 1)]
    training = [TRAINING[a:b] for a, b in pairwise(cuts)]
    assert recited(texts, training) == pytest.approx(
        sum(piece in TRAINING for piece in pieces) / len(pieces)
    )


def test_nothing_is_found_in_another_text_and_nothing_in_texts_that_are_too_short():
    for texts in (["x" * 200], ["", "abc"], [TRAINING[: PIECE - 1]]):
        assert recited(texts, [TRAINING]) == 0


def test_score_py_says_how_much_is_recited(folder, capsys):
    prepare_tiny()
    train.main([*TINY_RUN, "--max_iters=60", "--learning_rate=1e-2"])
    capsys.readouterr()
    score.main(["--out_dir=out/run", "--recites=True", "--device=cpu"])
    line = capsys.readouterr().out
    assert line.startswith("out/run: of its texts, ") and "in the training text" in line
    entries = tree_leaves(sample.load("out/run", device="cpu").run)
    assert not any(
        isinstance(x, torch.Tensor) for x in entries
    )  # they would stay in memory
    Path("data/tiny").rename("data/other")
    with pytest.raises(UserError, match="data/tiny"):
        score.main(["--out_dir=out/run", "--recites=True", "--device=cpu"])


def test_the_replies_of_a_model_that_learned_them_by_heart_are_recited(folder, capsys):
    write_chats(*(chat(f"say {i % 3}", "one two three four five " * 5) for i in range(80)))
    prepare_data.main(["--input=chats.jsonl", "--name=chats", "--tokenizer=byte"])
    keys = ["--dataset=chats", "--block_size=256", "--max_iters=120", "--eval_interval=120"]
    train.main([*TINY_RUN, *keys, "--learning_rate=1e-2", "--n_embd=32"])
    score.main(["--out_dir=out/run", "--recites=True", "--device=cpu"])
    out = capsys.readouterr().out
    assert "held-out questions answered word for word: " in out
    assert "of its replies, 100.0% of all pieces of 50 characters stand" in out
