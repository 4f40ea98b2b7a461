"""A model and sentences -> translations, greedily or by beam search, and how good they are by BLEU and chrF."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

NUM_BEAMS = 4  # unless told otherwise
SIDE_BY_SIDE = 64  # sentences that are translated at once


class Translation(NamedTuple):
    ids: list[int]  # without the token that ends it
    score: float  # log-probability / tokens^length_penalty
    ended: bool  # False: there was no room for more


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

    At each step the num_beams best beginnings of each sentence are gone on with; one that has ended stays as long as it
    is among them, and the best that ever ended is the result. Best is the highest sum of log-probabilities /
    tokens^length_penalty, so that long ones are not at a disadvantage: 0 compares sums, 1 means. One beam is greedy.
    A translation ends with eot, at max_new_tokens, or where block_size has no more room.
    Source: Sutskever et al. 2014, arXiv:1409.3215; a penalty for length: Wu et al. 2016, arXiv:1609.08144, section 7.
    """
    if model.has_encoder:
        caches, idx = model.make_caches(source), torch.full_like(source[:, :1], eot)
    else:  # the source is the beginning of the text that is gone on with
        caches, idx = model.make_caches(), source
    room = model.config.block_size + 1 - idx.shape[1]
    limit = min(room, max_new_tokens or room)

    n, k = len(source), 1  # sentences that are still open; beams of each, at first one, as all would begin alike
    numbers = torch.arange(n, device=source.device)  # of those sentences
    found: dict[int, Translation] = {}  # of each, the best so far that has ended
    written = source.new_empty(n, k, 0)
    ended = torch.zeros(n, k, dtype=torch.bool, device=source.device)
    tokens = torch.zeros(n, k, dtype=torch.int64, device=source.device)  # written, eot included
    sums = torch.zeros(n, k, device=source.device)  # of their log-probabilities
    for step in range(limit):
        # score all that each beam can go on with; what has ended goes on with eot alone, which changes nothing
        logits, _ = model(idx, caches=caches)
        logp = logits[:, -1, :known].float().log_softmax(dim=-1).view(n, k, -1)
        logp = logp.masked_fill(ended[..., None], -torch.inf)
        logp[..., eot].masked_fill_(ended, 0.0)
        tokens = tokens + ~ended
        sums = sums[..., None] + logp  # (n, k, V)
        ranks = (sums / tokens[..., None] ** length_penalty).flatten(1)

        # keep the best
        ranks, choice = ranks.topk(min(num_beams, ranks.shape[1]))  # (n, beams from now on), the best first
        beam, token = choice // logp.shape[-1], choice % logp.shape[-1]
        sums, tokens = sums.flatten(1).gather(1, choice), tokens.gather(1, beam)
        ended = ended.gather(1, beam) | (token == eot)
        written = torch.cat([written.gather(1, beam[..., None].expand(-1, -1, step)), token[..., None]], dim=2)

        # note what ended better than all before, or has no more room, and leave out the sentences that are done
        last = step == limit - 1
        score, place = ranks.masked_fill(~ended, -torch.inf).max(dim=1)
        for row, number in enumerate(numbers.tolist()):
            if float(score[row]) > (found[number].score if number in found else -torch.inf):
                ids = written[row, place[row]].tolist()
                found[number] = Translation(ids[: ids.index(eot)], float(score[row]), ended=True)
            elif last and number not in found:
                found[number] = Translation(written[row, 0].tolist(), float(ranks[row, 0]), ended=False)
        done = ended.all(dim=1)
        if last or done.all():
            break
        rows = k * torch.arange(n, device=source.device)[:, None] + beam  # of the caches
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
