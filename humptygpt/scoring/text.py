"""Log-probabilities of the tokens of a given text."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from humptygpt.config import UserError
from humptygpt.tokenizers import Tokenizer

LOGITS = 2**26  # compute at most this many logits at once: 256 MB
TOKENS = 2**13  # and at most this many tokens, since activations take memory as well


def tokens_at_once(model: nn.Module) -> int:
    return max(1, min(TOKENS, LOGITS // model.config.vocab_size))


def score_text(
    model: nn.Module, tokenizer: Tokenizer, text: str, stride: int | None
) -> dict[str, float]:
    """Score a text. Raises UserError if the text is too short or the stride too large.

    The first token is scored only if eot or bos can precede it. stride: see log_probabilities(); None: block_size / 2.
    """
    block_size = model.config.block_size
    ids = tokenizer.encode(text)
    if tokenizer.eot is not None or tokenizer.bos is not None:
        ids = np.concatenate([tokenizer.start(), ids])
    if len(ids) < 2:
        raise UserError("the text to score has no token to predict; give a longer text")
    stride = stride or max(1, block_size // 2)
    if stride > block_size:
        raise UserError(
            f"stride={stride} would skip tokens; it must be at most block_size={block_size}"
        )
    nats = -log_probabilities(model, ids, stride).astype(np.float64)
    # the tokens of a window depend on each other
    windows = np.array_split(nats, max(1, len(nats) // block_size))
    size = int(tokenizer.token_bytes()[ids[1:]].sum())
    return {
        "nats_per_token": nats.mean(),
        "standard_error": standard_error(np.array([window.mean() for window in windows])),
        "bits_per_byte": nats.sum() / np.log(2) / size,
        "perplexity": np.exp(nats.mean()),
        "nats": nats.sum(),
        "tokens": len(nats),
        "bytes": size,
        "window": block_size,
        "stride": stride,
    }


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of independent values; 0 for a single one."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


@torch.inference_mode()
def log_probabilities(model: nn.Module, ids: np.ndarray, stride: int) -> np.ndarray:
    """Compute the log-probability of every token after the first. Returns (T - 1,) float32.

    The model reads windows of block_size tokens. Each begins `stride` tokens after the previous one, and tokens already
    scored are only context. With stride = block_size, tokens are scored as in train.py's evaluation. With a smaller
    stride, each token has at least block_size - stride tokens of context, except at the beginning of the text.
    ids: (T,), with T at least 2.
    """
    block_size = model.config.block_size
    overlap = block_size - stride
    tokens = torch.from_numpy(ids.astype(np.int64)).to(next(model.parameters()).device)
    windows = tokens.new_empty(0, 0)
    if len(ids) > block_size:
        windows = tokens.unfold(0, block_size + 1, stride)  # (n, block_size + 1)
    last = tokens[None, len(windows) * stride :]  # shorter than a window
    at_once = tokens_at_once(model)
    scores = []
    for batch in (*windows.split(max(1, at_once // block_size)), last):
        if batch.shape[1] > 1:
            scores.append(score(model, batch, at_once))
    new = [batch_scores[:, overlap:].flatten() for batch_scores in scores]
    return torch.cat([scores[0][0, :overlap], *new]).cpu().numpy()


def score(model: nn.Module, batch: Tensor, at_once: int) -> Tensor:
    """Compute the log-probability of every token after the first in each window. Returns (B, T - 1).

    batch: windows, (B, T). A model with a cache reads at_once tokens of each window at a time.
    """
    T = batch.shape[1] - 1
    cache = {"cache": model.make_cache(T)} if model.has_cache and at_once < T else {}
    size = at_once if cache else T
    scores = []
    for idx, targets in zip(
        batch[:, :-1].split(size, 1), batch[:, 1:].split(size, 1), strict=True
    ):
        logits = model(idx, **cache)[0].flatten(0, 1).float()
        nats = F.cross_entropy(logits, targets.flatten(), reduction="none")
        scores.append(-nats.view(targets.shape))
    return torch.cat(scores, dim=1)
