"""Generation in two ways: by generation/sampling.py, and without a cache, one text at a time, to compare it with."""

import torch
from torch import nn

from humptygpt.generation.sampling import (
    Context,
    continue_texts,
    next_tokens,
    uniform_numbers,
)


def generate(
    model: nn.Module,
    texts: list[list[int]],
    n: int,
    vocab_size: int | None = None,
    *,
    device: str = "cpu",
    samples: list[int] | None = None,
    **sampling,
) -> list[list[int]]:
    """The n new tokens of each text. sampling: keyword arguments of continue_texts()."""
    size = max(map(len, texts)) + n
    context = Context(model, texts, size, device=torch.device(device))
    samples = samples or range(len(texts))
    vocab_size = vocab_size or model.config.vocab_size
    steps = continue_texts(context, samples, vocab_size, max_new_tokens=n, **sampling)
    return [list(new) for new in zip(*(ids for ids, _ in steps), strict=True)]


@torch.inference_mode()
def uncached(model: nn.Module, text: list[int], n: int, *, sample: int = 0, **sampling) -> list[int]:
    """The n tokens that follow a text, each computed anew from the tokens that the model may see."""
    block_size, tokens = model.config.block_size, list(text)
    first = max(0, len(tokens) - block_size)
    kept = max(1, block_size // 2) if model.has_cache else block_size
    uniforms = uniform_numbers(1337, [sample], n)
    for uniform in uniforms:
        if len(tokens) - first > block_size:
            first = len(tokens) - kept
        logits = model(torch.tensor([tokens[first:]]))[0][:, -1]
        tokens.append(int(next_tokens(logits, uniform, [tokens], **sampling)))
    return tokens[len(text) :]
