"""Targets from n-grams: predictions against counts by hand, and runs that learn from them."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, read_rows

import train
from humptygpt.data import TokenDataset
from humptygpt.minutes.ngrams import LONGEST, NGrams, SoftTargets

V = 5


def count(ids: list[int], length: int, left_out: int | None = None) -> Counter:
    """Count (context, token) as Kneser and Ney do, without one position."""

    def context(position: int, length: int) -> tuple:
        return tuple((["start", *ids])[max(0, position + 1 - length) : position + 1])

    seen = [
        (context(i, length + 1) if length < LONGEST else i, context(i, length), token)
        for i, token in enumerate(ids)
        if i != left_out
    ]
    return Counter((context, token) for _, context, token in set(seen))


def predict_by_hand(ids: list[int], position: int) -> np.ndarray:
    predicted = np.full(V, 1 / V)
    for length in range(LONGEST + 1):
        every = Counter(count(ids, length).values())
        ratio = every[1] / max(1, every[1] + 2 * every[2])
        discounts = [0.0]
        for c in (1, 2, 3):
            discount = c - (c + 1) * ratio * every[c + 1] / max(1, every[c])
            discounts.append(min(max(discount, 0), c))
        counts = count(ids, length, left_out=position if length else None)
        context = tuple((["start", *ids])[max(0, position + 1 - length) : position + 1])
        here = np.array([counts[context, token] for token in range(V)])
        if here.any():
            kept = [c - discounts[min(c, 3)] for c in here] / here.sum()
            predicted = kept + (1 - kept.sum()) * predicted
    return predicted


def test_predictions_are_those_of_counts_by_hand_without_the_predicted_position():
    ids = np.random.default_rng(1).choice(V - 1, 60, p=[0.5, 0.25, 0.15, 0.1])
    found = NGrams(ids, V).predict(np.arange(60))
    expected = [predict_by_hand(ids.tolist(), position) for position in range(60)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_target_is_partly_the_token_that_follows_and_partly_the_prediction(tiny):
    dataset = TokenDataset(tiny, block_size=8, seed=1)
    vocab_size = dataset.tokenizer.vocab_size
    ids = dataset.read("train", np.array([0]), len(dataset.train))[0]
    predicted = NGrams(ids, vocab_size + 3).predict(np.arange(len(ids)))
    batch, hard = SoftTargets(dataset, 0.3, vocab_size + 3).batch(5, 4), dataset.batch(5, 4)
    assert torch.equal(batch["idx"], hard["idx"])
    places = dataset.train_starts(5, 4)[:, None] + np.arange(1, 9)
    assert (hard["targets"].numpy() == ids[places]).all()
    expected = 0.3 * predicted[places] + 0.7 * np.eye(vocab_size + 3)[ids[places]]
    np.testing.assert_allclose(batch["targets"], expected, atol=1e-6)


def test_a_run_learns_from_ngrams_and_after_a_stop_it_ends_with_the_same_weights(tiny):
    argv = [*TINY_RUN, "--ngram_targets=0.5"]
    assert train.main([*argv, "--out_dir=out/whole"]) == 0
    assert train.main([*argv, "--max_iters=3", "--lr_decay_iters=6"]) == 0
    assert train.main(["--init_from=resume", "--out_dir=out/run", "--max_iters=6"]) == 0
    saved = [
        torch.load(f"out/{name}/ckpt.pt", weights_only=True) for name in ("whole", "run")
    ]
    for name, weight in saved[0]["model"].items():
        assert torch.equal(weight, saved[1]["model"][name])
    assert train.main([*TINY_RUN, "--out_dir=out/plain"]) == 0
    plain, soft = (
        [row["val_loss"] for row in read_rows(Path("out", name)) if "val_loss" in row]
        for name in ("plain", "whole")
    )
    assert plain[-1] != soft[-1]


@pytest.mark.parametrize("value", ["-0.1", "1"])
def test_a_share_outside_of_0_to_1_is_one_line(tiny, fails, value):
    assert "ngram_targets" in fails(train.main, *TINY_RUN, f"--ngram_targets={value}")


def test_ngrams_are_for_text_only(pairs, fails):
    assert "ngram_targets" in fails(
        train.main, *TINY_RUN, "--dataset=pairs", "--block_size=64", "--ngram_targets=0.5"
    )
