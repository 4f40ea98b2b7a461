"""How well a model predicts a given text: the log-probability of each token after those before it."""

from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

BATCH = 16  # windows that are read at once


class Window(NamedTuple):
    """A piece of the text that the model reads at once."""

    first: int  # where it begins
    end: int  # its last token is predicted, but not read
    scored: int  # tokens from here on are scored; those before them are context


def windows(length: int, block_size: int, stride: int) -> Iterator[Window]:
    """Windows of block_size tokens, each `stride` further; together they score each token but the first once.

    With stride = block_size each token counts as the trainer's evaluation counts it. With a smaller one each, but for
    those at the beginning, has at least block_size - stride tokens of context.
    """
    scored = 1
    while scored < length:
        end = min(scored + (stride if scored > 1 else block_size), length)
        yield Window(max(0, scored - 1 - (block_size - stride)), end, scored)
        scored = end


@torch.inference_mode()
def log_probabilities(
    model: nn.Module, ids: np.ndarray, stride: int | None = None, device: torch.device | None = None
) -> np.ndarray:
    """Of each token of a text but the first; ids: (T,). Returns (T - 1,) float32, in nats. stride: of windows()."""
    block_size = model.config.block_size
    tokens = torch.from_numpy(ids.astype(np.int64)).to(device)
    found = []
    every = windows(len(ids), block_size, stride or block_size)
    for _, alike in groupby(
        every, key=lambda window: (window.end - window.first, window.end - window.scored)
    ):
        for batch in batched(alike, BATCH):
            texts = torch.stack([tokens[window.first : window.end] for window in batch])
            logits, _ = model(texts[:, :-1])
            n = batch[0].end - batch[0].scored
            loss = F.cross_entropy(
                logits[:, -n:].flatten(0, 1).float(), texts[:, -n:].flatten(), reduction="none"
            )
            found.append(-loss.cpu().numpy())
    return np.concatenate(found)


def batched(items: Iterable, n: int) -> Iterator[list]:
    """Lists of n of them, the last one shorter. itertools has it from Python 3.12 on."""
    items = iter(items)
    while batch := list(islice(items, n)):
        yield batch
