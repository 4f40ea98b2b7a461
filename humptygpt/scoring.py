"""How well a model predicts a given text: the log-probability of each token after those before it."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGITS = 2**26  # the most logits computed at once: 256 MB


@torch.inference_mode()
def log_probabilities(model: nn.Module, ids: np.ndarray, stride: int) -> np.ndarray:
    """Return those of each token of a text but the first, (T - 1,) float32, in nats; ids: (T,), at least two.

    The model reads windows of block_size tokens, each `stride` further, and what the window before has scored is
    context. With stride = block_size each token counts as the trainer's evaluation counts it; with a smaller one each,
    but for those at the beginning, has at least block_size - stride tokens of context.
    """
    block_size = model.config.block_size
    overlap = block_size - stride
    tokens = torch.from_numpy(ids.astype(np.int64)).to(next(model.parameters()).device)
    windows = tokens.new_empty(0, 0)
    if len(ids) > block_size:
        windows = tokens.unfold(0, block_size + 1, stride)  # (n, block_size + 1)
    last = tokens[None, len(windows) * stride :]  # a shorter one
    at_once = max(1, LOGITS // model.config.vocab_size)  # tokens
    scores = []
    for batch in (*windows.split(max(1, at_once // block_size)), last):
        if batch.shape[1] > 1:
            scores.append(score(model, batch, at_once))
    new = [batch_scores[:, overlap:].flatten() for batch_scores in scores]
    return torch.cat([scores[0][0, :overlap], *new]).cpu().numpy()


def score(model: nn.Module, batch: Tensor, at_once: int) -> Tensor:
    """Log-probabilities, (B, T - 1), of windows, (B, T). A model with a cache reads at_once tokens at a time."""
    cache = {"cache": model.make_cache()} if model.has_cache else {}
    size = at_once if cache else batch.shape[1]
    pieces = zip(batch[:, :-1].split(size, 1), batch[:, 1:].split(size, 1), strict=True)
    nats = [
        F.cross_entropy(model(idx, **cache)[0].float().mT, targets, reduction="none")
        for idx, targets in pieces
    ]
    return -torch.cat(nats, dim=1)
