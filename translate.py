"""A model and sentences -> translations, greedily or by beam search, and how good they are by BLEU and chrF."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

NUM_BEAMS = 4  # unless told otherwise
SIDE_BY_SIDE = 64  # sentences that are translated at once


class Translation(NamedTuple):
    ids: list[int]  # without the token that ends it
    score: float  # mean of its tokens' log-probabilities, as length_penalty takes the mean


def translate(
    model: nn.Module,
    sources: list[np.ndarray],
    eot: int,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    max_new_tokens: int | None = None,
    known: int | None = None,
) -> list[Translation]:
    """The translations of sources, token ids that end in eot, in their order.

    Sentences of equal lengths are translated side by side, so that none is padded. known: ids from here on, which pad
    the vocabulary, are never written. For the rest see beam_search.
    """
    device = next(model.parameters()).device
    done: dict[int, Translation] = {}
    order = sorted(range(len(sources)), key=lambda number: len(sources[number]))
    while order:
        length = len(sources[order[0]])
        together = [number for number in order[:SIDE_BY_SIDE] if len(sources[number]) == length]
        order = order[len(together) :]
        source = torch.from_numpy(np.stack([sources[number] for number in together])).to(device)
        found = beam_search(model, source, eot, num_beams, length_penalty, max_new_tokens, known)
        done.update(zip(together, found, strict=True))
    return [done[number] for number in range(len(sources))]


@torch.inference_mode()
def beam_search(
    model: nn.Module,
    source: Tensor,
    eot: int,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    max_new_tokens: int | None = None,
    known: int | None = None,
) -> list[Translation]:
    """The best translation found of each source, (B, S) token ids that end in eot.

    At each step the num_beams likeliest beginnings of each sentence are gone on with; one that has ended stays as long
    as it is among them. Likeliest is the highest sum of log-probabilities / tokens^length_penalty, so that longer ones
    are not at a disadvantage: 0 compares sums, 1 means. One beam is the greedy translation.
    A translation ends with eot, at max_new_tokens, or where block_size has no more room.
    Source: Wu et al. 2016, arXiv:1609.08144, section 7.
    """
    if model.has_encoder:
        caches, idx = model.make_caches(source), torch.full_like(source[:, :1], eot)
    else:  # the source is the beginning of the text that is gone on with
        caches, idx = model.make_caches(), source
    n, k = len(source), 1  # sentences that are not done; beams of each, as all begin alike
    room = model.config.block_size + 1 - idx.shape[1]
    found: dict[int, Translation] = {}
    numbers = torch.arange(n, device=source.device)  # of those sentences
    written = source.new_empty(n, k, 0)
    ended = torch.zeros(n, k, dtype=torch.bool, device=source.device)
    tokens = torch.zeros(n, k, dtype=torch.int64, device=source.device)  # written, eot included
    sums = torch.zeros(n, k, device=source.device)  # of their log-probabilities
    for step in range(limit := min(room, max_new_tokens or room)):
        logits, _ = model(idx, caches=caches)
        logp = logits[:, -1, :known].float().log_softmax(dim=-1).view(n, k, -1)
        # what has ended goes on with eot alone, which changes nothing
        logp = logp.masked_fill(ended[..., None], -torch.inf)
        logp[..., eot].masked_fill_(ended, 0.0)
        tokens = tokens + ~ended
        sums = sums[..., None] + logp  # (n, k, V)
        ranks = sums / tokens[..., None] ** length_penalty
        ranks = ranks.flatten(1)
        ranks, choice = ranks.topk(min(num_beams, ranks.shape[1]))  # (n, beams from now on), the best first
        beam, token = choice // logp.shape[-1], choice % logp.shape[-1]
        sums, tokens = sums.flatten(1).gather(1, choice), tokens.gather(1, beam)
        ended = ended.gather(1, beam) | (token == eot)
        written = torch.cat([written[torch.arange(n)[:, None], beam], token[..., None]], dim=2)
        done = ended.all(dim=1) | (step == limit - 1)
        for number, ids, score in zip(numbers[done].tolist(), written[done, 0].tolist(), ranks[done, 0], strict=True):
            found[number] = Translation(ids[: ids.index(eot)] if eot in ids else ids, float(score))
        if done.all():
            break
        rows = torch.arange(0, n * k, k, device=source.device)[:, None] + beam  # of the caches
        for cache in caches:
            cache.select(rows[~done].flatten())
        numbers, written, ended, tokens, sums = (x[~done] for x in (numbers, written, ended, tokens, sums))
        (n, k), idx = sums.shape, token[~done].view(-1, 1)
    return [found[number] for number in range(len(source))]


def score(translations: list[str], references: list[str]) -> dict[str, float | str]:
    """BLEU and chrF, both from 0 to 100, with sacrebleu's signatures: the words that say how they were computed.

    Source: Papineni et al. 2002, "BLEU: a method for automatic evaluation of machine translation"; Popovic 2015, "chrF:
    character n-gram F-score for automatic MT evaluation"; Post 2018, arXiv:1804.08771.
    """
    from sacrebleu.metrics import BLEU, CHRF

    found = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        found[name] = metric.corpus_score(translations, [references]).score
        found[f"{name}_signature"] = str(metric.get_signature())
    return found
