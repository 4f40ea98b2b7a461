"""Sampling: logits, probabilities, tokens."""

import copy

import numpy as np
import pytest
import torch
from test_model import every_variant, tiny
from uncached import uncached

import model as models
from humptygpt import sampling
from humptygpt.config import UserError
from humptygpt.decoding import make_generator
from humptygpt.sampling import (
    Context,
    Sampler,
    continue_texts,
    draw,
    generate,
    probabilities,
    sample_tokens,
    uniform_numbers,
)
from model import POSITIONS


def tiny_model(**keys) -> models.GPT:
    model = tiny(**{"block_size": 8} | keys).eval()
    # far from initialization, where all tokens are about equally probable
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def continuation(model, idx, n: int, **options) -> list[list[int]]:
    """The new tokens of each text."""
    return torch.stack(list(generate(model, idx, n, **options)), dim=1).tolist()


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("prompt", [1, 5, 8, 13], ids=lambda n: f"prompt{n}")
@pytest.mark.parametrize("block_size", [1, 2, 8])
def test_cached_equals_uncached_before_and_past_block_size(
    position, exact, prompt, block_size
):
    model = tiny_model(position=position, block_size=block_size)
    text = [token % 11 for token in range(prompt)]
    found = continuation(model, torch.tensor([text]), 30, exact=exact)
    assert found == [uncached(model, text, 30, exact=exact)]


def test_exact_generation_is_nanogpts():
    model = tiny_model()
    idx, uniform = torch.tensor([[1, 2, 3]]), uniform_numbers(1337, [0], 30)
    for i in range(30):
        logits, _ = model(idx[:, -8:])
        cumulative = (logits[0, -1] / 0.7).softmax(-1).double().cumsum(-1)
        token = int((cumulative <= uniform[i, 0] * cumulative[-1]).sum())
        idx = torch.cat([idx, torch.tensor([[token]])], dim=1)
    assert (
        continuation(model, torch.tensor([[1, 2, 3]]), 30, exact=True, temperature=0.7)
        == idx[:, 3:].tolist()
    )


def test_fast_generation_recomputes_the_newest_half_when_the_context_is_full():
    model = tiny_model()
    read = []
    next_logits = model.next_logits
    model.next_logits = lambda idx, state=None: (
        read.append(idx.shape[1]) or next_logits(idx, state)
    )
    continuation(model, torch.tensor([[1, 2]]), 16)
    assert read == [2, 1, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4, 1, 1, 1]


def test_temperature_0_is_greedy():
    model, idx = tiny_model(), torch.tensor([[1, 2, 3]])
    greedy = continuation(model, idx, 30, exact=True, temperature=0)
    for _ in range(30):
        idx = torch.cat([idx, model(idx[:, -8:])[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    assert greedy == idx[:, 3:].tolist()


def test_the_smallest_temperature_is_greedy_and_does_not_overflow():
    probs = probabilities(torch.tensor([[3.0, 5.0]]), temperature=1e-39)
    assert probs.tolist() == [[0.0, 1.0]]


def test_ids_that_only_pad_the_vocabulary_are_never_sampled():
    model = tiny_model(vocab_size=50)
    prompts = torch.zeros(20, 1, dtype=torch.long)

    def largest(size):
        return max(map(max, continuation(model, prompts, 30, tokenizer_vocab_size=size)))

    assert largest(None) >= 11 > largest(11)


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


def test_the_repetition_penalty_makes_what_was_seen_less_probable():
    logits = torch.tensor([[3.0, -3.0, 3.0, -3.0]])
    seen = torch.tensor([[True, True, False, False]])
    found = sampling.penalize_repetition(logits, seen, 2.0)
    assert found.tolist() == [[1.5, -6.0, 3.0, -3.0]]


def test_the_repetition_penalty_counts_the_prompt_and_the_tokens_drawn_but_no_padding():
    idx = torch.tensor([[-1, 2], [1, 1]])
    sampler = Sampler(idx, 4, [0, 1], 3, repetition_penalty=1e9, temperature=0)
    logits = torch.tensor([[1.0, 2.0, 3.0, 2.5]] * 2)
    tokens = [sampler.next_tokens(logits).flatten().tolist() for _ in range(3)]
    assert tokens == [[3, 2], [1, 3], [0, 0]]
    sampler.select(torch.tensor([1]))
    assert sampler.seen[:, :-1].tolist() == [[True, True, True, True]]


def test_drawing_from_the_k_most_probable_alone_is_drawing_from_their_probabilities():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    uniform = uniform_numbers(5, list(range(50)), 1)[0]
    for k, keys in ((20, {}), (5, {"top_p": 0.8}), (300, {}), (40, {"min_p": 0.3})):
        least = logits.topk(k).values[:, -1:]
        kept = logits.masked_fill(logits < least, -torch.inf)
        expected = draw(probabilities(kept, 0.7, **keys), uniform)
        found = sample_tokens(logits, uniform, k, temperature=0.7, **keys)
        assert torch.equal(found, expected)
        nan = torch.full_like(logits, torch.nan)
        assert sample_tokens(nan, uniform, k).flatten().tolist() == [300] * 50


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


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@every_variant
def test_each_text_of_a_padded_batch_is_what_it_is_alone_before_and_past_block_size(
    variant, exact
):
    narrow = {"window": 8} if variant.get("window", 0) > 8 else {}
    model = tiny_model(**variant | narrow)
    prompts, n = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1, 2, 3, 4], [2, 2, 3, 4, 5, 6]], 20
    idx = torch.tensor([[-1] * (10 - len(prompt)) + prompt for prompt in prompts])
    expected = [
        uncached(model, prompt, n, sample=i, temperature=0.9, exact=exact)
        for i, prompt in enumerate(prompts)
    ]
    for ready in (model, make_generator(copy.deepcopy(model))):
        for texts in (4, 2):
            found = continuation(ready, idx[:texts], n, temperature=0.9, exact=exact)
            assert found == expected[:texts]


def test_a_text_ends_after_eot_and_costs_nothing_more():
    model, rows = tiny_model(), []
    next_logits = model.next_logits
    model.next_logits = lambda idx, state=None: (
        rows.append(len(idx)) or next_logits(idx, state)
    )
    idx = torch.tensor([[1, 2], [3, 4], [5, 6]])
    free = continuation(model, idx, 20)
    eot = free[1][4]
    rows.clear()
    ended = continuation(model, idx, 20, eot=eot)
    lengths = [text.index(eot) + 1 if eot in text else 20 for text in free]
    for text, whole, length in zip(ended, free, lengths, strict=True):
        assert text == whole[:length] + [-1] * (max(lengths) - length)
    steps = range(max(lengths))
    assert rows == [sum(length > step for length in lengths) for step in steps]


def test_the_caller_can_stop_a_text_and_continue_the_others():
    model, stopped = tiny_model(block_size=32), set()
    context = Context(model, torch.tensor([[1, 2], [3, 4]]))
    steps = []
    for step in continue_texts(context, 6, stopped=stopped, temperature=0):
        steps.append(step)
        if len(steps) == 2:
            stopped.add(0)
    assert [step.rows for step in steps] == [[0, 1]] * 2 + [[1]] * 4
    expected = uncached(model, [3, 4], 6, temperature=0)
    assert [step.ids[-1] for step in steps] == expected
    context.append(torch.tensor([[7, 8]]))
    (step,) = continue_texts(context, 1, temperature=0)
    assert step.ids == uncached(model, [3, 4, *expected, 7, 8], 1, temperature=0)


def test_a_short_text_goes_on_past_block_size_columns_when_the_longest_has_ended():
    model, stopped = tiny_model(), set()
    context = Context(model, torch.tensor([[1, 2, 3, 4, 5, 6, 7], [-1] * 6 + [2]]))
    ids = []
    for step in continue_texts(context, 12, stopped=stopped):
        stopped.add(0)
        ids.append(step.ids[-1])
    assert ids == uncached(model, [2], 12, sample=1)


def test_logits_that_are_not_finite_are_an_error_in_one_line():
    for temperature in (0, 1):
        model = tiny_model()
        torch.nn.init.constant_(model.stack.norm.weight, torch.nan)
        with pytest.raises(UserError, match="logits are not finite"):
            list(generate(model, torch.tensor([[1]]), 3, temperature=temperature))


@pytest.mark.parametrize(
    "keys", [{}, {"n_kv_head": 1}, {"head_size": 24}, {"window": 4, "position": "rotary"}]
)
def test_the_bytes_of_a_text_are_those_of_its_keys_values_logits_tokens_and_random_numbers(
    keys,
):
    model = tiny_model(block_size=64, **keys)
    context = Context(model, torch.ones(1, 3, dtype=torch.long), 60)
    list(continue_texts(context, 57))
    held = sum(layer.k.nbytes + layer.v.nbytes for layer in context.cache.layers)
    logits = 4 * 8 * model.config.vocab_size
    assert sampling.bytes_per_text(model, 60) == held + logits + 16 * 60
