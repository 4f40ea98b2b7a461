"""A model and sentences -> translations, greedily or by beam search, and how good they are by BLEU and chrF."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

NUM_BEAMS = 4  # by default
BATCH = 64  # sentences that are translated at once


class Translation(NamedTuple):
    ids: list[int]  # without the end-of-text token
    score: float  # log-probability / tokens^length_penalty
    ended: bool  # False: there was no room for more


def translate(
    model: nn.Module,
    sources: list[np.ndarray],
    eot: int,
    tokenizer_vocab_size: int | None = None,
    **settings,
) -> list[Translation]:
    """The translations of sources, token ids that end in eot, in their order; settings: of beam_search.

    Sentences of equal lengths are translated in one batch, so that none is padded.
    """
    device = next(model.parameters()).device
    done: dict[int, Translation] = {}
    order = sorted(range(len(sources)), key=lambda number: len(sources[number]))
    while order:
        length = len(sources[order[0]])
        batch = [number for number in order[:BATCH] if len(sources[number]) == length]
        order = order[len(batch) :]
        source = torch.from_numpy(np.stack([sources[number] for number in batch])).to(device)
        done.update(
            zip(
                batch,
                beam_search(model, source, eot, tokenizer_vocab_size, **settings),
                strict=True,
            )
        )
    return [done[number] for number in range(len(sources))]


class Hypotheses(NamedTuple):
    """Of n sentences that are still open: k hypotheses each, the best first."""

    ids: Tensor  # (n, k, tokens so far)
    ended: Tensor  # (n, k) bool: the last id is eot
    tokens: Tensor  # (n, k) int64, up to the first eot
    log_prob: Tensor  # (n, k)
    score: Tensor  # (n, k)


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
    """The best translation found of each source, (B, S) token ids that end in eot.

    At each step the num_beams best hypotheses of each sentence are extended; one that has ended stays as long as it is
    among them, and the best that ever ended is the result. Best is the highest sum of log-probabilities /
    tokens^length_penalty, so that long ones are not at a disadvantage: 0 compares sums, 1 means. One beam is greedy.
    A translation ends with eot, at max_new_tokens, or where block_size has no more room. Ids from tokenizer_vocab_size
    on pad the model's vocabulary and are never chosen.
    Source: Sutskever et al. 2014, arXiv:1409.3215; the length penalty: Wu et al. 2016, arXiv:1609.08144, section 7.
    """
    if model.has_encoder:
        state, idx = model.make_state(source), torch.full_like(source[:, :1], eot)
    else:  # the source is the beginning of the text that the model continues
        state, idx = model.make_state(), source
    room = model.config.block_size + 1 - idx.shape[1]
    limit = min(room, max_new_tokens or room)

    sentences = torch.arange(len(source), device=source.device)  # numbers of the open ones
    zeros = torch.zeros(
        len(source), 1, device=source.device
    )  # one hypothesis each, since all would begin alike
    hypotheses = Hypotheses(
        source.new_empty(len(source), 1, 0), zeros.bool(), zeros.long(), zeros, zeros
    )
    found: dict[int, Translation] = {}  # of each sentence, the best so far that has ended
    for step in range(limit):
        logits = model.next_logits(idx, state)
        n, k = hypotheses.score.shape
        logp = logits[:, :tokenizer_vocab_size].float().log_softmax(dim=-1).view(n, k, -1)
        hypotheses, extends = extend(hypotheses, logp, eot, num_beams, length_penalty)
        last = step == limit - 1
        collect(found, sentences.tolist(), hypotheses, eot, last)
        open_ = ~hypotheses.ended.all(dim=1)
        if last or not open_.any():
            break
        rows = k * torch.arange(n, device=source.device)[:, None] + extends  # of the state
        state.select(rows[open_].flatten())
        sentences, hypotheses = sentences[open_], Hypotheses(*(x[open_] for x in hypotheses))
        idx = hypotheses.ids[..., -1].view(-1, 1)
    return [found[number] for number in range(len(source))]


def extend(
    hypotheses: Hypotheses, logp: Tensor, eot: int, num_beams: int, length_penalty: float
) -> tuple[Hypotheses, Tensor]:
    """The best hypotheses one token longer, and which of the given ones each extends, (n, k).

    logp: (n, k, V), log-probabilities of the next token. What has ended is extended by eot alone, at no cost.
    """
    ids, ended, tokens, log_prob, _ = hypotheses
    logp = logp.masked_fill(ended[..., None], -torch.inf)
    logp[..., eot].masked_fill_(ended, 0.0)
    tokens = tokens + ~ended
    log_prob = log_prob[..., None] + logp  # (n, k, V)
    scores = (log_prob / tokens[..., None] ** length_penalty).flatten(1)

    score, choice = scores.topk(
        min(num_beams, scores.shape[1])
    )  # (n, hypotheses from now on), the best first
    extends, token = choice // logp.shape[-1], choice % logp.shape[-1]
    ids = torch.cat(
        [ids.gather(1, extends[..., None].expand(-1, -1, ids.shape[2])), token[..., None]], dim=2
    )
    ended = ended.gather(1, extends) | (token == eot)
    return Hypotheses(
        ids, ended, tokens.gather(1, extends), log_prob.flatten(1).gather(1, choice), score
    ), extends


def collect(
    found: dict[int, Translation],
    sentences: list[int],
    hypotheses: Hypotheses,
    eot: int,
    last: bool,
) -> None:
    """Keep in found what ended with a better score than all before; last: or has no room for more."""
    score, best = hypotheses.score.masked_fill(~hypotheses.ended, -torch.inf).max(dim=1)
    for row, number in enumerate(sentences):
        if float(score[row]) > (found[number].score if number in found else -torch.inf):
            ids = hypotheses.ids[row, best[row]].tolist()
            found[number] = Translation(ids[: ids.index(eot)], float(score[row]), ended=True)
        elif last and number not in found:
            found[number] = Translation(
                hypotheses.ids[row, 0].tolist(), float(hypotheses.score[row, 0]), ended=False
            )


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
