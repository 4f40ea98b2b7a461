"""Beam search, its score and the metrics of translations."""

from types import SimpleNamespace

import numpy as np
import pytest
import test_model
import torch
from test_transformer import EOT, random_model, tokens

from humptygpt import model as models
from humptygpt.generation import translation as beams
from humptygpt.generation.translation import Translation
from humptygpt.training.translation import score


def decoder_only(**keys) -> models.GPT:
    return test_model.random_model(block_size=12, **keys).eval()


both_ways = pytest.mark.parametrize("make", [random_model, decoder_only], ids=["encoder and decoder", "decoder only"])


def some_sources(*lengths: int) -> list[np.ndarray]:
    return [np.append(tokens(1, n - 1, seed=i)[0].numpy(), EOT) for i, n in enumerate(lengths)]


def translated(model, sources: list[np.ndarray], vocab_size: int | None = None, **settings) -> list[Translation]:
    tokenizer = SimpleNamespace(eot=EOT, vocab_size=vocab_size)
    return beams.translate(model, tokenizer, sources, **settings)


def log_probabilities(model, source: np.ndarray, ids: list[int]) -> list[float]:
    """Log-probability of each token of a translation, by one forward pass without a cache."""
    source, ids = torch.from_numpy(source)[None], torch.tensor([ids])
    if hasattr(model, "encode"):
        logits, _ = model(torch.nn.functional.pad(ids, (1, 0), value=EOT)[:, :-1], source=source)
    else:
        logits, _ = model(torch.cat([source, ids[:, :-1]], dim=1))
    return logits.log_softmax(-1)[0, -ids.shape[1] :].gather(1, ids.T)[:, 0].tolist()


@both_ways
def test_a_translation_ends_at_max_new_tokens_or_where_the_context_is_full(make):
    model = make()
    never = torch.zeros(11).index_fill_(0, torch.tensor([EOT]), 1e4)
    model.lm_head.register_forward_hook(lambda module, args, logits: logits - never)
    (source,) = some_sources(5)
    most = 12 if hasattr(model, "encode") else 12 + 1 - 5
    for num_beams in (1, 3):
        for limit, length in ((3, 3), (None, most)):
            (found,) = translated(model, [source], num_beams=num_beams, max_new_tokens=limit)
            assert len(found.ids) == length and not found.ended


def test_ids_that_only_pad_the_vocabulary_are_never_chosen():
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight[9:] = 100 * model.lm_head.weight[9:]

    def chosen(vocab_size: int | None) -> set[int]:
        found = translated(model, some_sources(5, 5, 5, 7), vocab_size, num_beams=2)
        return {token for translation in found for token in translation.ids}

    assert max(chosen(None)) >= 9 > max(chosen(9))


def plain_search(model, source: np.ndarray, num_beams: int, limit: int) -> Translation:
    """A beam search without a cache, one hypothesis at a time, over four tokens."""
    kept, best = [([], 0.0)], None

    def score(hypothesis: tuple[list[int], float]) -> float:
        ids, total = hypothesis
        return total / len(ids)

    for _ in range(limit):
        longer = [hypothesis for hypothesis in kept if hypothesis[0][-1:] == [EOT]]
        for ids, total in kept:
            if ids[-1:] != [EOT]:
                longer += [([*ids, t], total + log_probabilities(model, source, [*ids, t])[-1]) for t in range(4)]
        kept = sorted(longer, key=score, reverse=True)[:num_beams]
        ended = [hypothesis for hypothesis in kept if hypothesis[0][-1] == EOT]
        best = max([*filter(None, [best]), *ended], key=score, default=None)
        if len(ended) == len(kept):
            break
    ids, _ = found = best or kept[0]
    return Translation(ids[:-1] if best else ids, score(found), ended=bool(best))


@both_ways
@pytest.mark.parametrize("num_beams", [1, 2, 5, pytest.param(9, marks=pytest.mark.long)])
def test_the_search_finds_what_a_plain_one_without_a_cache_finds(make, num_beams):
    model = make(vocab_size=4)
    sources = [source % 4 for source in some_sources(2, 3, 5, 2, 3)]
    found = translated(model, sources, num_beams=num_beams, max_new_tokens=5)
    for source, translation in zip(sources, found, strict=True):
        expected = plain_search(model, source, num_beams, limit=5)
        assert translation[::2] == expected[::2]
        assert translation.score == pytest.approx(expected.score, abs=1e-5)


def test_a_batch_has_sentences_of_one_length_and_a_limit_and_is_encoded_once(monkeypatch):
    model, read = random_model(), []
    model.encoder.register_forward_hook(lambda module, args, x: read.append(x[0].shape[:2]))
    monkeypatch.setattr(beams, "BATCH", 2)
    translated(model, some_sources(4, 6, 4, 4, 6, 4, 4))
    assert read == [(2, 4), (2, 4), (1, 4), (2, 6)]


def test_a_perfect_translation_scores_100_and_the_signature_names_the_settings():
    lines = ["A man sleeps on a bench.", "Two children play ball in the park."]
    text, metrics = score(lines, lines)
    assert metrics == pytest.approx({"test_bleu": 100, "test_chrf": 100})
    assert "BLEU 100.00   nrefs:1|case:mixed|eff:no|tok:13a|" in text
    assert score(["A dog runs."], lines[:1])[1]["test_bleu"] < 10
