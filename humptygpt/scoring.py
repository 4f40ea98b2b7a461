"""Log-probabilities of the tokens that a model samples, and of the tokens of a given text."""

import json
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from humptygpt.config import UserError
from humptygpt.sampling import Piece, Prompt
from humptygpt.tokenizers import Tokenizer

# --------------------------------------------------------------------------------------
# Sampled tokens


def print_json_lines(
    pieces: Iterable[Piece], texts: list[tuple[Prompt, int]], k: int, tokenizer: Tokenizer
) -> None:
    """Print each token and the k likeliest tokens in its place. texts: (prompt, number of the sample)."""
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


def describe_score(
    model: nn.Module, tokenizer: Tokenizer, text: str, stride: int | None
) -> str:
    """Score a text from its first token if eot or bos can precede it, else from its second. Raises UserError.

    stride: as for log_probabilities(); None: half of block_size.
    """
    block_size = model.config.block_size
    ids = tokenizer.encode(text)
    if tokenizer.eot is not None or tokenizer.bos is not None:
        ids = np.concatenate([tokenizer.start(), ids])
    if len(ids) < 2:
        raise UserError("the text to score has no token to predict; give a longer one")
    stride = min(stride or max(1, block_size // 2), block_size)  # skip no token
    nats = -log_probabilities(model, ids, stride).astype(np.float64)
    size = int(tokenizer.token_bytes()[ids[1:]].sum())
    return (
        f"{nats.mean():.4f} nats per token, {nats.sum() / np.log(2) / size:.4f} bits per byte,"
        f" perplexity {np.exp(nats.mean()):.2f}, {nats.sum():.2f} nats in all;"
        f" {len(nats):,} tokens, {size:,} bytes, windows of {block_size:,} tokens, stride {stride:,}"
    )


@torch.inference_mode()
def log_probabilities(model: nn.Module, ids: np.ndarray, stride: int) -> np.ndarray:
    """Compute the log-probability of every token after the first, (T - 1,) float32; ids: (T,), at least two.

    The model reads windows of block_size tokens. Each begins `stride` tokens after the previous one, and tokens already
    scored are only context. With stride = block_size, tokens are scored as in train.py's evaluation. With a smaller
    stride, each has at least block_size - stride tokens of context, except at the beginning of the text.
    """
    block_size = model.config.block_size
    tokens = torch.from_numpy(ids.astype(np.int64)).to(next(model.parameters()).device)
    scores, end = [], 1  # the first token that is not scored yet
    for first in range(0, max(1, len(ids) - 1 - block_size + stride), stride):
        window = tokens[first : first + block_size + 1]
        logits, _ = model(window[None, :-1])
        nats = F.cross_entropy(logits[0].float(), window[1:], reduction="none")
        scores.append(-nats[end - first - 1 :])
        end = first + len(window)
    return torch.cat(scores).cpu().numpy()
