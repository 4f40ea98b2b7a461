"""A model and sentences -> translations, by beam search or greedy search, and their BLEU and chrF scores."""

import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from humptygpt.config import UserError
from model import Cache

NUM_BEAMS = 4  # the default
BATCH = 64  # sentences translated at once


class Translation(NamedTuple):
    ids: list[int]  # without the end-of-text token
    score: float  # log-probability / tokens^length_penalty
    ended: bool  # False: cut off at the length limit


def translate(
    model: nn.Module,
    sources: list[np.ndarray],
    eot: int,
    tokenizer_vocab_size: int | None = None,
    **settings,
) -> list[Translation]:
    """Translate sources, each an array of token ids that ends in eot. settings: passed to beam_search().

    The sentences of a batch have the same length, so no padding is needed.
    """
    if not model.has_cache:
        raise UserError(
            "model.py cannot translate: its logits with the cache differ from those without it"
        )
    device = next(model.parameters()).device
    translations = {}
    by_length = defaultdict(list)
    for number, source in enumerate(sources):
        by_length[len(source)].append(number)
    for numbers in by_length.values():
        for first in range(0, len(numbers), BATCH):
            batch = numbers[first : first + BATCH]
            source = torch.from_numpy(np.stack([sources[number] for number in batch]))
            best = beam_search(
                model, source.to(device), eot, tokenizer_vocab_size, **settings
            )
            translations.update(zip(batch, best, strict=True))
    return [translations[number] for number in range(len(sources))]


@torch.inference_mode()
def beam_search(
    model: nn.Module,
    source: Tensor,
    eot: int,
    tokenizer_vocab_size: int | None = None,
    *,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    max_new_tokens: int | None = None,
) -> list[Translation]:
    """Find a translation of each source. source: (B, S), token ids that end in eot.

    At each step the num_beams best hypotheses of each sentence are extended. A finished hypothesis is kept as long as
    it is among the best, and the result is the best hypothesis that ever finished. The score is the sum of
    log-probabilities / tokens^length_penalty: a penalty of 0 gives the sum; 1 gives the mean, so that long translations
    are not at a disadvantage. With one beam the search is greedy. A translation ends with eot, at max_new_tokens, or
    when block_size is full. Ids from tokenizer_vocab_size on only pad the model's vocabulary and are never chosen.
    Source: Sutskever et al. 2014, arXiv:1409.3215; the length penalty: Wu et al. 2016, arXiv:1609.08144, section 7.
    """
    cache, idx = begin(model, source, eot)
    room = model.config.block_size + 1 - idx.shape[1]
    limit = min(room, max_new_tokens or room)

    best = [Translation([], -math.inf, ended=False)] * len(source)
    open_sentences = list(range(len(source)))
    ids = source.new_empty(len(source), 1, 0)  # (n, k, T): k hypotheses of n sentences
    log_prob = torch.zeros(ids.shape[:2], device=ids.device)
    for step in range(limit):
        n, k = log_prob.shape
        logits = model.next_logits(idx, cache)[:, :tokenizer_vocab_size]
        logp = logits.float().log_softmax(dim=-1).view(n, k, -1)
        ids, log_prob, scores, parents = extend(
            ids, log_prob, logp, eot, num_beams, length_penalty
        )
        ended = (ids == eot).any(dim=-1)
        highest, hypothesis = scores.masked_fill(~ended, -torch.inf).max(dim=1)
        # these copies make the CPU wait for the GPU: three times per step, plus once for each better translation
        hypotheses = zip(highest.tolist(), hypothesis.tolist(), strict=True)
        for row, (score, hypothesis) in enumerate(hypotheses):
            number = open_sentences[row]
            if score > best[number].score:
                found = ids[row, hypothesis].tolist()
                best[number] = Translation(found[: found.index(eot)], score, ended=True)
        going = [row for row, over in enumerate(ended.all(dim=1).tolist()) if not over]
        if step == limit - 1 or not going:
            break
        kept = torch.tensor(going, device=ids.device)
        rows = (
            k * torch.arange(n, device=ids.device)[:, None] + parents
        )  # rows of the cache
        cache.select(rows[kept].flatten())
        ids = ids[kept]
        log_prob = log_prob[kept]
        open_sentences = [open_sentences[row] for row in going]
        idx = ids[..., -1].view(-1, 1)
    for row, number in enumerate(open_sentences):
        if not best[number].ended:
            hypothesis = ids[row, 0].tolist()
            best[number] = Translation(hypothesis, float(scores[row, 0]), ended=False)
    return best


def begin(model: nn.Module, source: Tensor, eot: int) -> tuple[Cache, Tensor]:
    """Create a cache. Returns it and the tokens that the model is to continue, (B, T)."""
    if model.has_encoder:
        return model.make_cache(source), torch.full_like(source[:, :1], eot)
    return model.make_cache(), source


def extend(
    ids: Tensor,
    log_prob: Tensor,
    logp: Tensor,
    eot: int,
    num_beams: int,
    length_penalty: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Extend the hypotheses of each sentence by one token, and keep the num_beams best, best first.

    ids: (n, k, T), k hypotheses of n sentences. log_prob: (n, k). logp: (n, k, V), log-probabilities of the next token.
    Returns the new ids, (n, num_beams, T + 1), their log_prob and scores, and the indices of the hypotheses that they
    extend, each (n, num_beams).
    """
    # a finished hypothesis is extended only by eot, at no cost
    ended = (ids == eot).any(dim=-1)
    logp = logp.masked_fill(ended[..., None], -torch.inf)
    logp[..., eot].masked_fill_(ended, 0.0)
    # counts the new token, or the eot that ends the hypothesis
    length = (ids != eot).sum(dim=-1, keepdim=True) + 1
    sums = log_prob[..., None] + logp
    scores = (sums / length**length_penalty).flatten(1)
    scores, choice = scores.topk(min(num_beams, scores.shape[1]))
    log_prob = sums.flatten(1).gather(1, choice)
    parents = choice // logp.shape[-1]
    tokens = choice % logp.shape[-1]
    sentence = torch.arange(len(ids), device=ids.device)[:, None]
    ids = torch.cat([ids[sentence, parents], tokens[..., None]], dim=2)
    return ids, log_prob, scores, parents


def score(translations: list[str], references: list[str]) -> dict[str, float | str]:
    """Compute BLEU and chrF, both from 0 to 100, and sacrebleu's signatures, which record how they were computed.

    Source: Papineni et al. 2002, "BLEU: a method for automatic evaluation of machine translation"; Popovic 2015, "chrF:
    character n-gram F-score for automatic MT evaluation"; Post 2018, arXiv:1804.08771.
    """
    from sacrebleu.metrics import BLEU, CHRF

    scores = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        scores[name] = metric.corpus_score(translations, [references]).score
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores
