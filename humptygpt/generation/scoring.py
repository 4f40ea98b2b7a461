"""How well a model predicts a given text: the log-probability of each token after those before it."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

BATCH = 16  # windows that are read at once


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
    scores = []
    for batch in (*windows.split(BATCH), last):
        if batch.shape[1] > 1:
            logits, _ = model(batch[:, :-1])
            nats = F.cross_entropy(logits.float().mT, batch[:, 1:], reduction="none")
            scores.append(-nats)
    new = [batch_scores[:, overlap:].flatten() for batch_scores in scores]
    return torch.cat([scores[0][0, :overlap], *new]).cpu().numpy()
