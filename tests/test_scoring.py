"""How well a model predicts a text."""

import numpy as np
import pytest
import torch
from test_model import random_model, tokens

from humptygpt.generation.generator import make_generator
from humptygpt.scoring import text as scoring
from humptygpt.scoring.text import score_windows


@torch.no_grad()
@pytest.mark.parametrize("length", [2, 16, 17, 33, 60])
@pytest.mark.parametrize("keys", [{}, {"model": "window_mlp", "window": 16}, {"position": "alibi"}], ids=str)
def test_a_text_is_scored_as_token_by_token_with_as_much_context_as_promised(keys, length):
    model, ids = random_model(**keys).eval(), tokens(1, length)[0].numpy()
    for stride in (1, 5, 16):
        expected = []
        for t in range(1, length):
            # of the first window that has token t
            first = max(0, -(-(t - 16) // stride)) * stride
            context = torch.from_numpy(ids[first:t])[None]
            expected.append(float(model(context)[0][0, -1].log_softmax(-1)[ids[t]]))
        np.testing.assert_allclose(score_windows(model, ids, stride), expected, atol=1e-5)


def test_a_network_whose_weights_are_all_in_8_bits_is_scored():
    model = random_model(model="number_mlp", n_embd=1, window=4).eval()
    ids = tokens(1, 20)[0].numpy()
    expected = score_windows(model, ids, 8)
    found = score_windows(make_generator(model, torch.int8), ids, 8)
    np.testing.assert_allclose(found, expected, atol=0.1)


@pytest.mark.parametrize(
    "keys",
    [{}, {"window": 3, "mlp_conv": 2}, {"position": "alibi"}, {"n_members": 2}],
    ids=str,
)
def test_no_more_logits_are_computed_at_once_than_memory_is_meant_for(keys, monkeypatch):
    model, ids = random_model(**keys).eval(), tokens(1, 60)[0].numpy()
    at_once = []
    members = model.config.n_members
    head = model.members[0].lm_head if members > 1 else model.lm_head
    head.register_forward_hook(lambda *call: at_once.append(members * call[-1].numel()))
    whole = {stride: score_windows(model, ids, stride) for stride in (5, 16)}
    for n_tokens in (1, 6, 40):
        at_once.clear()
        monkeypatch.setattr(scoring, "LOGITS", members * 11 * n_tokens + 1, raising=False)
        for stride, expected in whole.items():
            found = score_windows(model, ids, stride)
            np.testing.assert_allclose(found, expected, atol=1e-5)
        assert max(at_once) <= members * 11 * n_tokens
