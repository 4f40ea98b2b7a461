"""Generation without a cache, one text at a time: what humptygpt.sampling is compared with."""

import torch
from torch import nn

from humptygpt.sampling import Sampler


@torch.inference_mode()
def uncached(
    model: nn.Module,
    text: list[int],
    n: int,
    *,
    sample: int = 0,
    exact: bool = False,
    **how,
) -> list[int]:
    """The n tokens that follow a text, each computed anew from the tokens that the model may see. how: as Sampler."""
    block_size, tokens = model.config.block_size, list(text)
    first = max(0, len(tokens) - block_size)
    kept = block_size if exact or not model.has_cache else max(1, block_size // 2)
    seen = torch.tensor([tokens[first:]])
    sampler = Sampler(seen, model.config.vocab_size, [sample], n, **how)
    for _ in range(n):
        if len(tokens) - first > block_size:
            first = len(tokens) - kept
        logits = model(torch.tensor([tokens[first:]]))[0][:, -1]
        tokens.append(int(sampler.next_tokens(logits)))
    return tokens[len(text) :]
