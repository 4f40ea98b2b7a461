"""Translate sentences with a model, by beam search or greedy search."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from humptygpt.cli import UserError, note
from humptygpt.model import Cache
from humptygpt.tokenizers.basic import Tokenizer

AT_ONCE = 500  # lines translated together; none is returned before all are done
BATCH = 64  # sentences translated at once


class Translation(NamedTuple):
    ids: list[int]  # without the end-of-text token
    score: float  # log-probability / length, see beam_search()
    ended: bool  # False: cut off at the length limit


def translate(
    model: nn.Module, tokenizer: Tokenizer, sources: list[np.ndarray], **settings: object
) -> list[Translation]:
    """Translate sentences. Those of a batch have the same length, so no padding is needed.

    sources: arrays of token ids, each ending in end-of-text. settings: passed to beam_search().
    """
    if not model.has_cache:
        raise UserError("model.py cannot translate: its logits with the cache differ from those without it")
    device = next(model.parameters()).device
    translations = {}
    for length in sorted(set(map(len, sources))):
        numbers = [number for number, ids in enumerate(sources) if len(ids) == length]
        for first in range(0, len(numbers), BATCH):
            batch = numbers[first : first + BATCH]
            source = torch.from_numpy(np.stack([sources[number] for number in batch]))
            found = beam_search(model, tokenizer, source.to(device), **settings)
            translations.update(zip(batch, found, strict=True))
    return [translations[number] for number in range(len(sources))]


@torch.inference_mode()
def beam_search(
    model: nn.Module,
    tokenizer: Tokenizer,
    source: Tensor,
    *,
    num_beams: int = 1,
    max_new_tokens: int | None = None,
) -> list[Translation]:
    """Find a translation of each source sentence.

    At each step the num_beams best hypotheses of each sentence are extended. A finished hypothesis is kept as long as
    it is among the best, and the result is the best hypothesis that ever finished. A hypothesis has as its score the
    mean of its tokens' log-probabilities, so that long translations are not at a disadvantage. With one beam the search
    is greedy.
    A translation ends with end-of-text, after max_new_tokens, or when block_size is reached.

    source: (B, S), token ids that end in end-of-text.
    Source: Sutskever et al. 2014, arXiv:1409.3215; dividing by the length: Wu et al. 2016, arXiv:1609.08144, section 7.
    """
    eot = tokenizer.eot
    if hasattr(model, "encode"):
        cache, idx = model.make_cache(source), source[:, -1:]  # its eot
    else:
        cache, idx = model.make_cache(), source
    room = model.config.block_size + 1 - idx.shape[1]
    best = [Translation([], 0.0, ended=False)] * len(source)
    open_sentences = list(range(len(source)))
    ids = source.new_empty(len(source), 1, 0)  # (n, k, T): k hypotheses per sentence
    log_prob = torch.zeros(ids.shape[:2], device=ids.device)
    for _ in range(min(room, max_new_tokens or room)):
        # the embedding may have more rows than there are tokens; these are never chosen
        logits = model.next_logits(idx, cache)[:, : tokenizer.vocab_size]
        logp = logits.float().log_softmax(dim=-1).view(*log_prob.shape, -1)
        ids, log_prob, scores, rows = extend(ids, log_prob, logp, eot, num_beams)
        going = []
        # tolist() makes the CPU wait for the GPU
        found = zip(open_sentences, ids.tolist(), scores.tolist(), strict=True)
        for row, (number, *extended) in enumerate(found):
            hypotheses = [
                Translation([i for i in tokens if i != eot], score, eot in tokens)
                for tokens, score in zip(*extended, strict=True)
            ]
            ended = [x for x in (best[number], *hypotheses) if x.ended]
            best[number] = max(ended, key=lambda x: x.score, default=hypotheses[0])
            if not all(x.ended for x in hypotheses):
                going.append(row)
        if not going:
            break
        open_sentences = [open_sentences[row] for row in going]
        ids, log_prob = ids[going], log_prob[going]
        select(cache, rows[going].flatten())
        idx = ids[..., -1].view(-1, 1)
    return best


def select(cache: Cache, rows: Tensor) -> None:
    """Select rows of the batch in every tensor of a cache. rows: int64 indices in the new order, which may repeat."""
    for layer in cache.layers:
        for tensors in (layer.buffers, layer.state):
            tensors.update({name: x[rows] for name, x in tensors.items()})


def extend(
    ids: Tensor,
    log_prob: Tensor,
    logp: Tensor,
    eot: int,
    num_beams: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Extend the hypotheses of each sentence by one token, and keep the num_beams best, best first.

    ids: (n, k, T), k hypotheses for each of n sentences. log_prob: (n, k), their log-probabilities.
    logp: (n, k, V), log-probabilities of the next token.
    Returns the new ids, (n, num_beams, T + 1), and three tensors of shape (n, num_beams): their log_prob, their scores,
    and the indices of the hypotheses that they extend, from 0 to nk - 1.
    """
    n, k, V = logp.shape
    # a finished hypothesis is extended only by eot, with log-probability 0
    ended = (ids == eot).any(dim=-1)
    logp = logp.masked_fill(ended[..., None], -torch.inf)
    logp[..., eot].masked_fill_(ended, 0.0)
    # + 1 for the new token or, in a finished hypothesis, for the eot that ends it
    length = (ids != eot).sum(dim=-1, keepdim=True) + 1
    sums = log_prob[..., None] + logp
    scores = (sums / length).flatten(1)
    scores, choice = scores.topk(min(num_beams, k * V))
    rows = k * torch.arange(n, device=ids.device)[:, None] + choice // V
    ids = torch.cat([ids.flatten(0, 1)[rows], (choice % V)[..., None]], dim=2)
    return ids, sums.flatten(1).gather(1, choice), scores, rows


def translate_lines(model: nn.Module, tokenizer: Tokenizer, lines: list[str], **search: object) -> Iterator[str]:
    """Translate each line; empty lines stay empty. search: keyword arguments for beam_search()."""
    block_size = model.config.block_size
    # without an encoder, source and translation share the context; the last token of a source is end-of-text
    room = (block_size if hasattr(model, "encode") else block_size // 2) - 1
    firsts = range(0, len(lines), AT_ONCE)
    for first in tqdm(firsts, unit=f"{AT_ONCE} lines", delay=2, disable=None):
        batch = lines[first : first + AT_ONCE]
        sources = [tokenizer.encode(" ".join(line.split())) for line in batch]
        for number, ids in enumerate(sources, start=first + 1):
            if len(ids) > room:
                note(f"line {number:,} has {len(ids):,} tokens; only the first {room:,} are read")
        cut = [np.append(ids[:room], tokenizer.eot) for ids in sources if len(ids)]
        translations = iter(translate(model, tokenizer, cut, **search))
        for number, ids in enumerate(sources, start=first + 1):
            if not len(ids):
                yield ""
                continue
            translation = next(translations)
            if not translation.ended:
                note(f"line {number:,}: the translation was cut off at the length limit")
            # a model may generate line breaks, but a translation must be one line
            yield " ".join(tokenizer.decode(translation.ids).split())
