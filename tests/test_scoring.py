"""How well a model predicts a text."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_model import random_model, tokens

from humptygpt.generation.scoring import log_probabilities, windows


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 20))
def test_windows_score_each_token_but_the_first_once_with_as_much_context_as_promised(
    length, block_size, stride
):
    stride, scored = min(stride, block_size), []
    for window in windows(length, block_size, stride):
        assert 0 <= window.first < window.scored < window.end <= length
        assert window.end - 1 - window.first <= block_size  # tokens read
        assert window.first == 0 or window.scored - window.first > block_size - stride
        scored += range(window.scored, window.end)
    assert scored == list(range(1, length))


@torch.no_grad()
@pytest.mark.parametrize(
    "keys", [{}, {"model": "window_mlp", "window": 16}, {"position": "alibi"}], ids=str
)
def test_a_text_is_scored_as_token_by_token(keys):
    model, ids = random_model(**keys).eval(), tokens(1, 60)[0].numpy()
    for stride in (1, 5, 16):
        expected = []
        for window in windows(60, 16, stride):
            for t in range(window.scored, window.end):
                context = torch.from_numpy(ids[window.first : t])[None]
                expected.append(float(model(context)[0][0, -1].log_softmax(-1)[ids[t]]))
        np.testing.assert_allclose(log_probabilities(model, ids, stride), expected, atol=1e-5)
