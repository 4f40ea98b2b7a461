"""Beam search, its score and the metrics of translations."""

import itertools

import numpy as np
import pytest
import test_model
import torch
from test_transformer import EOT, random_model, tokens

import model as models
from humptygpt.translation import beams
from humptygpt.translation.beams import Translation, score, translate


def decoder_only(**keys) -> models.GPT:
    return test_model.random_model(block_size=12, **keys).eval()


both_ways = pytest.mark.parametrize(
    "make", [random_model, decoder_only], ids=["encoder and decoder", "decoder only"]
)


def some_sources(*lengths: int) -> list[np.ndarray]:
    return [
        np.append(tokens(1, n - 1, seed=i)[0].numpy(), EOT) for i, n in enumerate(lengths)
    ]


def log_probabilities(model, source: np.ndarray, ids: list[int]) -> list[float]:
    """Log-probability of each token of a translation, by one forward pass without a cache."""
    source, ids = torch.from_numpy(source)[None], torch.tensor([ids])
    if model.has_encoder:
        logits, _ = model(
            torch.nn.functional.pad(ids, (1, 0), value=EOT)[:, :-1], source=source
        )
    else:
        logits, _ = model(torch.cat([source, ids[:, :-1]], dim=1))
    return logits.log_softmax(-1)[0, -ids.shape[1] :].gather(1, ids.T)[:, 0].tolist()


@both_ways
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0])
def test_enough_beams_find_the_best_translation_of_all(make, length_penalty):
    model = make(vocab_size=4)
    source = np.array([2, 1, EOT])
    candidates = [
        (*words, EOT)
        for n in range(3)
        for words in itertools.product(range(1, 4), repeat=n)
    ]
    ranked = {
        ids: sum(log_probabilities(model, source, list(ids))) / len(ids) ** length_penalty
        for ids in candidates
    }
    best = max(ranked, key=ranked.get)
    (found,) = translate(
        model, [source], EOT, num_beams=40, length_penalty=length_penalty, max_new_tokens=3
    )
    assert found.ids == list(best[:-1]) and found.ended
    assert found.score == pytest.approx(ranked[best], abs=1e-5)


@both_ways
@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_batch_of_sentences_is_translated_as_each_alone(make, num_beams):
    model = make()
    sources = some_sources(4, 6, 4, 2, 6, 4, 4, 3)
    together = translate(model, sources, EOT, num_beams=num_beams)
    for source, found in zip(sources, together, strict=True):
        (alone,) = translate(model, [source], EOT, num_beams=num_beams)
        assert found.ids == alone.ids
        assert found.score == pytest.approx(alone.score, abs=1e-5)
    assert len({len(found.ids) for found in together}) > 1  # some ended before others


@both_ways
def test_a_translation_ends_at_max_new_tokens_or_where_the_context_is_full(make):
    model = make()
    never = torch.zeros(11).index_fill_(0, torch.tensor([EOT]), 1e4)
    model.lm_head.register_forward_hook(lambda module, args, logits: logits - never)
    (source,) = some_sources(5)
    most = 12 if model.has_encoder else 12 + 1 - 5
    for num_beams in (1, 3):
        for limit, length in ((3, 3), (None, most)):
            (found,) = translate(
                model, [source], EOT, num_beams=num_beams, max_new_tokens=limit
            )
            assert len(found.ids) == length and not found.ended


def test_ids_that_only_pad_the_vocabulary_are_never_chosen():
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight[9:] = 100 * model.lm_head.weight[9:]

    def chosen(tokenizer_vocab_size: int | None) -> set[int]:
        found = translate(
            model, some_sources(5, 5, 5, 7), EOT, tokenizer_vocab_size, num_beams=2
        )
        return {token for translation in found for token in translation.ids}

    assert max(chosen(None)) >= 9 > max(chosen(9))


def plain_search(model, source: np.ndarray, num_beams: int, limit: int) -> Translation:
    """A beam search without a cache, one hypothesis at a time, over four tokens."""
    kept, best = [([], 0.0)], None
    mean = lambda hypothesis: hypothesis[1] / len(hypothesis[0])  # noqa: E731
    for _ in range(limit):
        longer = [hypothesis for hypothesis in kept if hypothesis[0][-1:] == [EOT]]
        for ids, total in kept:
            if ids[-1:] != [EOT]:
                longer += [
                    ([*ids, t], total + log_probabilities(model, source, [*ids, t])[-1])
                    for t in range(4)
                ]
        kept = sorted(longer, key=mean, reverse=True)[:num_beams]
        ended = [hypothesis for hypothesis in kept if hypothesis[0][-1] == EOT]
        best = max([*filter(None, [best]), *ended], key=mean, default=None)
        if len(ended) == len(kept):
            break
    ids, _ = found = best or kept[0]
    return Translation(ids[:-1] if best else ids, mean(found), ended=bool(best))


@both_ways
@pytest.mark.parametrize("num_beams", [1, 2])
def test_the_search_finds_what_a_plain_one_without_a_cache_finds(make, num_beams):
    model = make(vocab_size=4)
    sources = [source % 4 for source in some_sources(*[2 + i % 4 for i in range(16)])]
    found = translate(model, sources, EOT, num_beams=num_beams, max_new_tokens=7)
    for source, translation in zip(sources, found, strict=True):
        expected = plain_search(model, source, num_beams, 7)
        assert translation[:1] + translation[2:] == expected[:1] + expected[2:]
        assert translation.score == pytest.approx(expected.score, abs=1e-5)


def test_a_batch_has_sentences_of_one_length_and_a_limit_and_is_encoded_once(monkeypatch):
    model, read = random_model(), []
    model.encoder.register_forward_hook(lambda module, args, x: read.append(x.shape[:2]))
    monkeypatch.setattr(beams, "BATCH", 2)
    translate(model, some_sources(4, 6, 4, 4, 6, 4, 4), EOT)
    assert read == [(2, 4), (2, 4), (1, 4), (2, 6)]


def test_a_perfect_translation_scores_100_and_the_signature_names_the_settings():
    lines = ["A man sleeps on a bench.", "Two children play ball in the park."]
    scores = score(lines, lines)
    assert scores["bleu"] == pytest.approx(100) and scores["chrf"] == pytest.approx(100)
    assert {"tok:13a", "case:mixed"} < set(scores["bleu_signature"].split("|"))
    assert score(["A dog runs."], lines[:1])["bleu"] < 10


def test_a_translation_that_leaves_words_out_gets_the_brevity_penalty():
    whole = "A man in a blue shirt sleeps on a bench"
    assert score([whole], [f"{whole} near the lake"])["bleu"] == pytest.approx(
        100 * np.exp(1 - 13 / 10)
    )
