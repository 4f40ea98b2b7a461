"""Log-probabilities of the tokens of given texts."""

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from humptygpt.cli import UserError
from humptygpt.data.dataset import BLOCKS
from humptygpt.tokenizers.basic import Tokenizer

LOGITS = 2**26  # compute at most this many logits at once: 256 MB
TOKENS = 2**13  # and at most this many tokens, since activations take memory as well


def score_text(model: nn.Module, tokenizer: Tokenizer, text: str) -> dict[str, float]:
    """Score a text, in windows that begin half a block after each other. Returns the figures that score.py prints.

    The first token is scored only if eot or bos can precede it. Raises UserError if the text is too short.
    """
    block_size = model.config.block_size
    ids = encode(text, tokenizer)
    stride = max(1, block_size // 2)
    nats = -score_windows(model, ids, stride).astype(np.float64)
    # neighbouring tokens depend on each other, but long parts of a text hardly do
    parts = np.array_split(nats, min(BLOCKS, len(nats)))
    size = int(tokenizer.token_bytes()[ids[1:]].sum())
    return {
        "nats_per_token": nats.mean(),
        "standard_error": standard_error(np.array([part.mean() for part in parts])),
        "bits_per_byte": nats.sum() / np.log(2) / size,
        "perplexity": np.exp(nats.mean()),
        "nats": nats.sum(),
        "tokens": len(nats),
        "bytes": size,
        "window": block_size,
        "stride": stride,
    }


def encode(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Encode a text, after what can precede it: eot or bos. Raises UserError if there is no token to predict."""
    ids = tokenizer.encode(text)
    if tokenizer.eot is not None or tokenizer.bos is not None:
        ids = np.concatenate([tokenizer.start(), ids])
    if len(ids) < 2:
        raise UserError("the text to score has no token to predict; give a longer text")
    return ids


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of independent values; 0 for a single one."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def score_windows(model: nn.Module, ids: np.ndarray, stride: int) -> np.ndarray:
    """Compute the log-probability of every token after the first. Returns (T - 1,) float32.

    The model reads windows of block_size tokens. Each begins `stride` tokens after the previous one, and tokens already
    scored are only context. With stride = block_size, tokens are scored as in train.py's evaluation. With a smaller
    stride, each token has at least block_size - stride tokens of context, except at the beginning of the text.
    ids: (T,), with T at least 2.
    """
    block_size = model.config.block_size
    overlap = block_size - stride
    starts = range(0, max(1, len(ids) - 1 - overlap), stride)
    windows = [ids[start : start + block_size + 1] for start in starts]
    first, *rest = log_probabilities(model, windows)
    return np.concatenate([first, *(scores[overlap:] for scores in rest)])


@torch.inference_mode()
def log_probabilities(model: nn.Module, sequences: list[np.ndarray]) -> list[np.ndarray]:
    """Compute the log-probability of every token after the first in each sequence. Returns (T - 1,) float32 for each.

    Sequences of similar length share a padded batch: later tokens do not affect earlier ones, so each is scored as if
    it were alone. sequences: ids, (T,), with T at most block_size + 1.
    """
    # int8 weights are not parameters, and they are always on a CPU
    device = next((p.device for p in model.parameters()), "cpu")
    shape = model.config
    at_once = max(1, min(TOKENS, LOGITS // (shape.vocab_size * shape.n_members)))
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = [np.empty(0)] * len(sequences)
    with tqdm(total=len(sequences), unit="text", delay=5, disable=None) as bar:
        while order:
            count = max(1, at_once // len(sequences[order[-1]]))
            order, rows = order[:-count], order[-count:]
            texts = [torch.from_numpy(sequences[i]) for i in rows]
            batch = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device)
            for i, row in zip(rows, score(model, batch, at_once), strict=True):
                scores[i] = row[: len(sequences[i]) - 1].cpu().numpy()
            bar.update(len(rows))
    return scores


def score(model: nn.Module, batch: Tensor, at_once: int) -> Tensor:
    """Compute the log-probability of every token after the first in each row. Returns (B, T - 1).

    batch: (B, T). A model with a cache reads at_once tokens of each row at a time.
    """
    T = batch.shape[1] - 1
    cache = {"cache": model.make_cache(T)} if model.has_cache and at_once < T else {}
    size = at_once if cache else T
    scores = []
    for idx, targets in zip(batch[:, :-1].split(size, 1), batch[:, 1:].split(size, 1), strict=True):
        logp = model(idx, **cache)[0].float().log_softmax(dim=-1)
        scores.append(logp.gather(2, targets[..., None]).squeeze(2))
    return torch.cat(scores, dim=1)
