"""An ensemble: several GPTs in one model, which predicts what they predict on average."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from humptygpt.model import GPT, Cache, ModelConfig


class Ensemble(nn.Module):
    """GPTs that read the same text, but start with different random weights and have different dropout masks.

    Each learns by itself, except that grad_clip limits the gradients of all together. What one has learned by heart,
    another has not, so the mean of their probabilities predicts new text better than any member does.
    Source: Lakshminarayanan et al. 2016, arXiv:1612.01474.
    """

    has_cache = True

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.members = nn.ModuleList(GPT(config) for _ in range(config.n_members))

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        **more: Tensor,
    ) -> tuple:
        """Same as GPT.forward, but in training, with targets, it returns no logits.

        There the loss and its terms are the means of the members', so each learns by itself.
        """
        if self.training and targets is not None:
            outputs = [member(idx, targets, **more) for member in self.members]
            losses = [{"train_loss": x[1]} | dict(*x[2:]) for x in outputs]
            terms = {key: torch.stack([x[key] for x in losses]).mean() for key in losses[0]}
            return None, terms.pop("train_loss"), terms
        logits = self.average(lambda member, part: member(idx, None, part)[0], cache)
        return logits, None if targets is None else self.loss(logits, targets)

    loss = GPT.loss
    generate = GPT.generate

    def next_logits(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        """Compute the logits (B, V) of the token that follows idx."""
        return self.average(lambda member, part: member.next_logits(idx, part), cache)

    def make_cache(self, size: int | None = None) -> Cache:
        """Make an empty cache for up to `size` tokens, by default block_size."""
        n_layer, block_size = self.config.n_layer, self.config.block_size
        return Cache(len(self.members) * n_layer, min(size or block_size, block_size))

    def average(self, call: Callable[..., Tensor], cache: Cache | None) -> Tensor:
        """Average the probabilities whose logits are call(member, its part of the cache). Returns logits.

        They are as large as the members' logits, because a penalty for repetition depends on their size.
        """
        logits = []
        for i, member in enumerate(self.members):
            part = copy.copy(cache)
            if cache:
                part.layers = cache.layers[i :: len(self.members)]
            logits.append(call(member, part))
        if cache:
            cache.length = part.length
        each = torch.stack(logits).float()
        sums = each.logsumexp(dim=-1, keepdim=True)
        return (each - sums).logsumexp(dim=0) - math.log(len(logits)) + sums.mean(dim=0)
