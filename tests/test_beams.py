"""Searching for translations."""

import itertools

import numpy as np
import pytest
import torch
from test_transformer import EOT, shaken, tokens

import model as models
from humptygpt import beams as translation
from humptygpt.beams import Translation, beam_search, score, translate
from model import ModelConfig


def decoder_only(**keys) -> models.GPT:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 12, "vocab_size": 11}
    model = models.build(ModelConfig(**sizes | keys)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


both_ways = pytest.mark.parametrize("make", [shaken, decoder_only], ids=["encoder and decoder", "decoder only"])


def some_sources(*lengths: int) -> list[np.ndarray]:
    return [np.append(tokens(1, n - 1, seed=i)[0].numpy(), EOT) for i, n in enumerate(lengths)]


def log_probabilities(model, source: np.ndarray, ids: list[int]) -> list[float]:
    """Those of each token of a translation, read in one go without a cache."""
    source, ids = torch.from_numpy(source)[None], torch.tensor([ids])
    if model.has_encoder:
        logits, _ = model(torch.nn.functional.pad(ids, (1, 0), value=EOT)[:, :-1], source=source)
    else:
        logits, _ = model(torch.cat([source, ids[:, :-1]], dim=1))
    return logits.log_softmax(-1)[0, -ids.shape[1] :].gather(1, ids.T)[:, 0].tolist()


@both_ways
def test_one_beam_writes_the_likeliest_token_each_time(make):
    model = make()
    for source in some_sources(3, 5, 6, 6):
        ids = []
        (found,) = translate(model, [source], EOT, num_beams=1)
        for token in [*found.ids, EOT][: 13 - (1 if model.has_encoder else len(source))]:
            all_ids = [log_probabilities(model, source, [*ids, t])[-1] for t in range(11)]
            assert int(np.argmax(all_ids)) == token
            ids.append(token)


@both_ways
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0])
def test_enough_beams_find_the_best_translation_of_all(make, length_penalty):
    model = make(vocab_size=4)
    source = np.array([2, 1, EOT])
    candidates = [(*words, EOT) for n in range(3) for words in itertools.product(range(1, 4), repeat=n)]
    ranked = {ids: sum(log_probabilities(model, source, list(ids))) / len(ids) ** length_penalty for ids in candidates}
    best = max(ranked, key=ranked.get)
    (found,) = translate(model, [source], EOT, num_beams=40, length_penalty=length_penalty, max_new_tokens=3)
    assert found.ids == list(best[:-1]) and found.ended
    assert found.score == pytest.approx(ranked[best], abs=1e-5)


@both_ways
@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_score_is_that_of_reading_the_translation_without_a_cache(make, num_beams):
    model = make()
    sources = some_sources(4, 6, 4, 2, 6)
    for source, found in zip(sources, translate(model, sources, EOT, num_beams, max_new_tokens=5), strict=True):
        ids = found.ids if len(found.ids) == 5 else [*found.ids, EOT]
        assert found.score == pytest.approx(np.mean(log_probabilities(model, source, ids)), abs=1e-5)


@both_ways
@pytest.mark.parametrize("num_beams", [1, 4])
def test_sentences_translated_side_by_side_are_translated_as_each_alone(make, num_beams):
    model = make()
    sources = some_sources(4, 6, 4, 2, 6, 4, 4, 3)
    together = translate(model, sources, EOT, num_beams)
    for source, found in zip(sources, together, strict=True):
        (alone,) = translate(model, [source], EOT, num_beams)
        assert found.ids == alone.ids and found.score == pytest.approx(alone.score, abs=1e-5)
    assert len({len(found.ids) for found in together}) > 1  # some ended before others


@both_ways
def test_a_translation_ends_at_max_new_tokens_or_where_the_window_is_full(make):
    model = make()
    never = torch.zeros(11).index_fill_(0, torch.tensor([EOT]), 1e4)
    model.lm_head.register_forward_hook(lambda module, args, logits: logits - never)
    (source,) = some_sources(5)
    most = 12 if model.has_encoder else 12 + 1 - 5
    for num_beams in (1, 3):
        for limit, length in ((3, 3), (None, most)):
            (found,) = translate(model, [source], EOT, num_beams, max_new_tokens=limit)
            assert len(found.ids) == length and not found.ended


def test_padding_of_the_vocabulary_is_never_written():
    model = shaken()
    with torch.no_grad():
        model.lm_head.weight[9:] = 100 * model.lm_head.weight[9:]
    written = lambda known: {  # noqa: E731
        token for found in translate(model, some_sources(5, 5, 5, 7), EOT, 2, known=known) for token in found.ids
    }
    assert max(written(None)) >= 9 > max(written(9))


@both_ways
def test_what_has_ended_well_is_not_lost_to_beginnings_that_end_worse(make):
    model = make(vocab_size=4)
    wanting = 0
    for source in some_sources(*[2 + i % 4 for i in range(30)]):
        source = source % 4
        ended = []
        for ids in itertools.chain.from_iterable(itertools.product(range(1, 4), repeat=n) for n in range(3)):
            ended.append(np.mean(log_probabilities(model, source, [*ids, EOT])))
        (found,) = translate(model, [source], EOT, num_beams=40, max_new_tokens=6)
        assert found.ended
        wanting += found.score < max(ended) - 1e-5
    assert wanting == 0


def test_the_source_is_encoded_once_however_long_the_translation():
    model = shaken()
    encoded = []
    model.encoder.register_forward_hook(lambda *args: encoded.append(1))
    beam_search(model, tokens(3, 5), EOT, num_beams=2)
    assert len(encoded) == 1


def plain_search(model, source: np.ndarray, num_beams: int, limit: int) -> Translation:
    """A beam search without caches, one beam after the other, over four tokens."""
    beams, best = [([], 0.0)], None
    mean = lambda beam: beam[1] / len(beam[0])  # noqa: E731
    for _ in range(limit):
        longer = [beam for beam in beams if beam[0][-1:] == [EOT]]
        for ids, total in beams:
            if ids[-1:] != [EOT]:
                longer += [([*ids, t], total + log_probabilities(model, source, [*ids, t])[-1]) for t in range(4)]
        beams = sorted(longer, key=mean, reverse=True)[:num_beams]
        ended = [beam for beam in beams if beam[0][-1] == EOT]
        best = max([*filter(None, [best]), *ended], key=mean, default=None)
        if len(ended) == len(beams):
            break
    ids, _ = found = best or beams[0]
    return Translation(ids[:-1] if best else ids, mean(found), ended=bool(best))


@both_ways
def test_two_beams_find_what_a_plain_search_without_caches_finds(make):
    model = make(vocab_size=4)
    sources = [source % 4 for source in some_sources(*[2 + i % 4 for i in range(16)])]
    for source, found in zip(sources, translate(model, sources, EOT, 2, max_new_tokens=7), strict=True):
        expected = plain_search(model, source, 2, 7)
        assert (found.ids, found.ended) == (expected.ids, expected.ended)
        assert found.score == pytest.approx(expected.score, abs=1e-5)


def test_no_more_than_so_many_sentences_are_translated_side_by_side(monkeypatch):
    model, read = shaken(), []
    model.encoder.register_forward_hook(lambda module, args, x: read.append(x.shape[:2]))
    monkeypatch.setattr(translation, "SIDE_BY_SIDE", 2)
    translate(model, some_sources(4, 6, 4, 4, 6, 4, 4), EOT)
    assert read == [(2, 4), (2, 4), (1, 4), (2, 6)]


def test_a_perfect_translation_scores_100_and_the_signature_tells_how():
    lines = ["A man sleeps on a bench.", "Two children play ball in the park."]
    scores = score(lines, lines)
    assert scores["bleu"] == pytest.approx(100) and scores["chrf"] == pytest.approx(100)
    assert "tok:13a" in scores["bleu_signature"] and "case:mixed" in scores["bleu_signature"]
    assert score(["A dog runs."], lines[:1])["bleu"] < 10


def test_a_translation_that_leaves_words_out_is_punished_for_its_length():
    whole = "A man in a blue shirt sleeps on a bench"
    assert score([whole], [f"{whole} near the lake"])["bleu"] == pytest.approx(100 * np.exp(1 - 13 / 10))
