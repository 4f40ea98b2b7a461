"""A model and a prompt -> new tokens: logits -> probabilities -> token, again and again."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The probabilities (B, V) that the next token is sampled from; logits: (B, V).

    temperature: 0 is greedy. top_k: only the k most probable tokens. top_p: only the most probable ones that together
    have this probability (nucleus sampling). Source for top_p: Holtzman et al. 2019, arXiv:1904.09751.
    """
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # the shift changes nothing but cannot overflow
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = logits.softmax(dim=-1)
    if top_p is not None:
        ranked, order = probs.sort(dim=-1, descending=True)
        before = ranked.cumsum(dim=-1) - ranked  # of all more probable tokens; 0 for the first, which stays
        probs = torch.zeros_like(probs).scatter(-1, order, ranked.masked_fill(before >= top_p, 0.0))
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


@torch.inference_mode()
def generate(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    tokenizer_vocab_size: int | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    exact: bool = False,
    cached: bool = True,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue idx, (B, T) token ids with T >= 1, by max_new_tokens; yields each new token as (B,).

    tokenizer_vocab_size: ids from here on pad the model's vocabulary and are never sampled. exact: what happens when
    the context of block_size tokens is full: True recomputes the newest block_size tokens for every new one; False
    recomputes the newest half once and continues from there. cached=False computes the same without the decoder's
    state, as a model that has none always does.
    """
    if not model.has_state:
        cached, exact = False, True
    block_size = model.config.block_size
    state = model.make_state() if cached else None
    start = max(0, idx.shape[1] - block_size)  # the context is idx[:, start:]
    read = start  # tokens up to here are in the state
    for _ in range(max_new_tokens):
        if idx.shape[1] - start > block_size:
            start = read = idx.shape[1] - (block_size if exact else max(1, block_size // 2))
            if cached:
                state.clear()
        logits, _ = model(idx[:, read if cached else start :], state=state)
        read = idx.shape[1]
        probs = probabilities(logits[:, -1, :tokenizer_vocab_size].float(), temperature, top_k, top_p)
        token = torch.multinomial(probs, 1, generator=generator)
        idx = torch.cat([idx, token], dim=1)
        yield token[:, 0]
