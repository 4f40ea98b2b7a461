"""Log-probabilities of the tokens that a model samples, and of the tokens of a given text."""

import json
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from humptygpt.config import UserError
from humptygpt.sampling import Piece, Prompt
from humptygpt.tokenizers import Tokenizer

# --------------------------------------------------------------------------------------
# Sampled tokens


def print_json_lines(
    pieces: Iterable[Piece], texts: list[tuple[Prompt, int]], k: int, tokenizer: Tokenizer
) -> None:
    """Print each token and the k likeliest tokens at its position. texts: (prompt, sample number)."""
    for row, _, token, logits in pieces:
        if token is None:
            continue
        prompt, sample = texts[row]
        logprobs = logits.log_softmax(dim=-1)
        likeliest = logprobs.topk(min(k, len(logprobs))).indices.tolist()
        chosen, *top = [
            {
                "token": i,
                "text": tokenizer.pieces[i].decode("utf-8", "replace"),
                "logprob": round(float(logprobs[i]), 6),
            }
            for i in (token, *likeliest)
        ]
        line = {"prompt": prompt.number, "sample": sample} | chosen | {"top": top}
        print(json.dumps(line, ensure_ascii=False), flush=True)


# --------------------------------------------------------------------------------------
# A given text

LOGITS = 2**26  # compute at most this many logits at once: 256 MB


def describe_score(
    model: nn.Module, tokenizer: Tokenizer, text: str, stride: int | None
) -> str:
    """Score a text and describe the result. Raises UserError if the text is too short or the stride too large.

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
    size = int(tokenizer.token_bytes()[ids[1:]].sum())
    return (
        f"{nats.mean():.4f} nats per token, {nats.sum() / np.log(2) / size:.4f} bits per byte,"
        f" perplexity {np.exp(nats.mean()):.2f}, {nats.sum():.2f} nats in all;"
        f" {len(nats):,} tokens, {size:,} bytes, windows of {block_size:,} tokens, stride {stride:,}"
    )


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
    at_once = max(1, LOGITS // model.config.vocab_size)  # tokens
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
    cache = {"cache": model.make_cache()} if model.has_cache else {}
    size = at_once if cache else batch.shape[1]
    pieces = zip(batch[:, :-1].split(size, 1), batch[:, 1:].split(size, 1), strict=True)
    nats = [
        F.cross_entropy(model(idx, **cache)[0].float().mT, targets, reduction="none")
        for idx, targets in pieces
    ]
    return -torch.cat(nats, dim=1)
