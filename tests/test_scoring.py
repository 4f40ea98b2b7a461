"""How well a model predicts a text."""

import numpy as np
import pytest
import torch
from test_model import random_model, tokens

from humptygpt.scoring import log_probabilities


@torch.no_grad()
@pytest.mark.parametrize("length", [2, 16, 17, 33, 60])
@pytest.mark.parametrize(
    "keys", [{}, {"model": "window_mlp", "window": 16}, {"position": "alibi"}], ids=str
)
def test_a_text_is_scored_as_token_by_token_with_as_much_context_as_promised(keys, length):
    model, ids = random_model(**keys).eval(), tokens(1, length)[0].numpy()
    for stride in (1, 5, 16):
        expected = []
        for t in range(1, length):
            # of the first window that has token t
            first = max(0, -(-(t - 16) // stride)) * stride
            context = torch.from_numpy(ids[first:t])[None]
            expected.append(float(model(context)[0][0, -1].log_softmax(-1)[ids[t]]))
        np.testing.assert_allclose(
            log_probabilities(model, ids, stride), expected, atol=1e-5
        )
