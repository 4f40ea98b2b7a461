"""Sampling: logits, probabilities, tokens."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_model import every_variant, tiny
from uncached import generate, uncached

from humptygpt import model as models
from humptygpt.cli import UserError
from humptygpt.generation.generator import make_generator
from humptygpt.generation.sampling import (
    Context,
    draw,
    next_tokens,
    probabilities,
    stream_texts,
    uniform_numbers,
)


def tiny_model(**keys) -> models.GPT:
    model = tiny(**{"block_size": 8} | keys).eval()
    # far from initialization, where all tokens are about equally probable
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_the_newest_half_is_recomputed_when_the_context_is_full():
    model = tiny_model()
    read = []
    next_logits = model.next_logits
    model.next_logits = lambda idx, cache: read.append(idx.shape[1]) or next_logits(idx, cache)
    generate(model, [[1, 2]], 16)
    assert read == [2, 1, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4, 1, 1, 1]


def test_temperature_0_is_greedy():
    model, idx = tiny_model(block_size=40), torch.tensor([[1, 2, 3]])
    greedy = generate(model, idx.tolist(), 30, temperature=0)
    for _ in range(30):
        idx = torch.cat([idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    assert greedy == idx[:, 3:].tolist()


def test_the_smallest_temperature_is_greedy_and_does_not_overflow():
    probs = probabilities(torch.tensor([[3.0, 5.0]]), temperature=1e-39)
    assert probs.tolist() == [[0.0, 1.0]]


def test_ids_that_only_pad_the_vocabulary_are_never_sampled():
    model = tiny_model(vocab_size=50)

    def largest(vocab_size):
        return max(map(max, generate(model, [[0]] * 20, 30, vocab_size)))

    assert largest(50) >= 11 > largest(11)


# --------------------------------------------------------------------------------------
# Filters and draws


@pytest.mark.parametrize(
    ("top_p", "min_p", "kept"),
    [
        (0.35, None, [1]),
        (0.5, None, [1, 3]),
        (0.75, None, [0, 1, 2, 3]),  # as probable as the last one kept
        (1.0, None, [0, 1, 2, 3]),
        (None, 0.3, [0, 1, 2, 3]),
        (None, 0.5, [1, 3]),
        (None, 1.0, [1]),
        (0.5, 0.8, [1]),
    ],
)
def test_filters_keep_the_most_probable_tokens_and_rescale_them(top_p, min_p, kept):
    probs = torch.tensor([[0.15, 0.4, 0.15, 0.3]])
    expected = torch.zeros(1, 4)
    expected[:, kept] = probs[:, kept] / probs[:, kept].sum()
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        found = probabilities(probs[:, order].log(), 1.0, top_p, min_p)
        torch.testing.assert_close(found, expected[:, order])


def test_the_repetition_penalty_makes_the_tokens_of_each_text_less_probable():
    logits = torch.tensor([[-3.0, 3.0, -4.0, 2.0]] * 2 + [[-1.0, -1.5, -9.0, -9.0]])
    penalty = {"repetition_penalty": 2.0, "temperature": 0}
    found = next_tokens(logits, torch.zeros(3, 1), [[1], [3, 1, 1], [0]], **penalty)
    assert found.tolist() == [[3], [1], [1]]
    model, penalty = tiny_model(), {"repetition_penalty": 1.5, "temperature": 0}
    texts = [[1, 2, 3], [4]]
    expected = [uncached(model, text, 30, **penalty) for text in texts]
    assert generate(model, texts, 30, **penalty) == expected


def test_drawing_from_the_k_most_probable_is_drawing_from_their_probabilities():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    uniform = uniform_numbers(5, list(range(50)), 1)[0]
    for k, keys in ((20, {}), (5, {"top_p": 0.8}), (300, {}), (40, {"min_p": 0.3})):
        least = logits.topk(k).values[:, -1:]
        kept = logits.masked_fill(logits < least, -torch.inf)
        expected = draw(probabilities(kept, 0.7, **keys), uniform)
        found = next_tokens(logits, uniform, [], top_k=k, temperature=0.7, **keys)
        assert torch.equal(found, expected)


# Apple's GPUs have no float64
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_random_number_draws_a_token_that_has_a_probability(monkeypatch, dtype):
    numbers = type("Numbers", (), {"random": lambda self, n: np.full(n, 1 - 2.0**-53)})
    monkeypatch.setattr(np.random, "Generator", lambda bits: numbers())
    largest = uniform_numbers(0, [0], 1, dtype)[0]
    assert largest.dtype == dtype
    for probs in ([0.1, 0.9 - 1e-8, 0.0], [0.5, 0.5, 0.0], [0.3, 0.7000001, 0.0]):
        assert draw(torch.tensor([probs]), largest).tolist() == [[1]]
    least = torch.zeros_like(largest)
    assert draw(torch.tensor([[0.0, 1.0]]), least).tolist() == [[1]]


def test_random_numbers_depend_on_seed_sample_and_position_alone():
    numbers = uniform_numbers(3, [5, 9, 5], 10)
    assert torch.equal(numbers[:, 0], numbers[:, 2])
    assert torch.equal(numbers[:4, 1:2], uniform_numbers(3, [9], 4))
    different = torch.cat([numbers[:, :2], uniform_numbers(4, [5], 10)], dim=1)
    assert len(different.unique()) == 30


# --------------------------------------------------------------------------------------
# Texts of different lengths, together and one by one


@every_variant
def test_each_text_of_a_padded_batch_is_what_it_is_alone_before_and_past_block_size(
    variant,
):
    narrow = {"window": 8} if variant.get("window", 0) > 8 else {}
    model = tiny_model(**variant | narrow)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1, 2, 3, 4], [2, 2, 3, 4, 5, 6, 7, 8]]
    expected = [uncached(model, prompt, 20, sample=i, temperature=0.9) for i, prompt in enumerate(prompts)]
    for ready in (model, make_generator(copy.deepcopy(model))):
        for texts in (4, 2):
            found = generate(ready, prompts[:texts], 20, temperature=0.9)
            assert found == expected[:texts]


def test_each_text_ends_with_its_end_of_text_and_generation_with_the_last_one():
    model, read = tiny_model(), []
    next_logits = model.next_logits
    model.next_logits = lambda *inputs: read.append(inputs) or next_logits(*inputs)
    prompts = [[1, 2], [3, 4], [5, 6]]
    free = generate(model, prompts, 40)
    eot = free[1][4]
    lengths = [text.index(eot) for text in free]
    assert len(set(lengths)) > 1
    read.clear()
    tokenizer = SimpleNamespace(vocab_size=11, pieces=[b"%x" % i for i in range(11)])
    tokenizer.eot = eot
    texts = [""] * 3
    context = Context(model, prompts)
    for piece in stream_texts(context, tokenizer, range(3), max_new_tokens=40):
        texts[piece.row] += piece.text
    for text, tokens, length in zip(texts, free, lengths, strict=True):
        assert text == "".join(f"{token:x}" for token in tokens[:length])
    assert len(read) == max(lengths) + 1


@pytest.mark.parametrize("keys", [{"temperature": 0}, {}, {"top_k": 5}], ids=str)
def test_logits_that_are_not_finite_are_an_error_in_one_line(keys):
    model = tiny_model()
    torch.nn.init.constant_(model.stack.norm.weight, torch.nan)
    with pytest.raises(UserError, match="logits are not finite"):
        generate(model, [[1]], 3, **keys)
