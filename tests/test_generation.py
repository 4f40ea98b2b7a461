"""Sampling: logits, probabilities, tokens."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_model import VARIANTS, random_model

import model as models
from humptygpt.core.errors import UserError
from humptygpt.generation import sampling as generation
from humptygpt.generation.decoder import prepare_for_generation
from humptygpt.generation.sampling import (
    Context,
    Sampler,
    continue_texts,
    draw,
    generate,
    probabilities,
    sample_tokens,
    uniform_numbers,
)
from model import POSITIONS, ModelConfig


def tiny_model(**keys) -> models.GPT:
    torch.manual_seed(0)
    config = ModelConfig(
        **{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 8, "vocab_size": 11}
        | keys
    )
    model = models.build(config).eval()
    for parameter in (
        model.parameters()
    ):  # far from initialization, where all tokens are about equally probable
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def continuation(model, idx, n: int, **options) -> list[list[int]]:
    return torch.stack(list(generate(model, idx, n, **options)), dim=1).tolist()


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("prompt", [1, 5, 8, 13], ids=lambda n: f"prompt{n}")
@pytest.mark.parametrize("block_size", [1, 2, 8])
def test_cached_equals_uncached_before_and_past_block_size(
    position, exact, prompt, block_size
):
    model = tiny_model(position=position, block_size=block_size)
    idx = torch.arange(2 * prompt).view(2, prompt) % 11
    cached, uncached = (
        continuation(model, idx, 30, exact=exact, cached=cached) for cached in (True, False)
    )
    assert cached == uncached


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


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_the_window_network_drops_its_oldest_token(exact):
    model = tiny_model(model="window_mlp", window=8)
    idx = torch.tensor([[1, 2, 3]])
    greedy = continuation(model, idx, 30, exact=exact, temperature=0)
    for _ in range(30):
        idx = torch.cat([idx, model(idx[:, -8:])[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    assert greedy == idx[:, 3:].tolist()


def test_temperature_0_is_greedy():
    model = tiny_model()
    idx = torch.tensor([[1, 2, 3]])
    greedy = continuation(model, idx, 5, temperature=0)
    for _ in range(5):
        idx = torch.cat([idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    assert greedy == idx[:, 3:].tolist()


def test_top_k_draws_from_the_k_most_probable_tokens():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    uniforms = [torch.tensor([[u]], dtype=torch.float64) for u in (0.0, 0.7, 0.75, 0.999)]
    assert [sample_tokens(logits, u, 2).item() for u in uniforms] == [
        1,
        1,
        2,
        2,
    ]  # 73 % and 27 %
    assert sample_tokens(logits, uniforms[0], 99).item() == 0


def test_top_p_keeps_the_fewest_tokens_that_together_reach_p():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    torch.testing.assert_close(
        probabilities(logits, top_p=0.6), torch.tensor([[0, 2 / 3, 0, 1 / 3]])
    )
    torch.testing.assert_close(
        probabilities(logits, top_p=1e-9), torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    )
    torch.testing.assert_close(probabilities(logits, top_p=1.0), logits.exp())


def test_the_smallest_temperature_is_greedy_and_does_not_overflow():
    assert probabilities(torch.tensor([[3.0, 5.0]]), temperature=1e-39).tolist() == [
        [0.0, 1.0]
    ]


def test_temperature_sharpens_and_flattens():
    logits = torch.tensor([[0.0, 1.0]])
    probs = [
        probabilities(logits, temperature=t)[0, 1].item() for t in (1e-9, 0.5, 1.0, 2.0)
    ]
    assert probs[0] == 1.0 and probs == sorted(probs, reverse=True)


def test_ids_that_only_pad_the_vocabulary_are_never_sampled():
    model = tiny_model(vocab_size=50)
    prompts = torch.zeros(20, 1, dtype=torch.long)

    def largest(size):
        return max(map(max, continuation(model, prompts, 30, tokenizer_vocab_size=size)))

    assert largest(None) >= 11 > largest(11)


def test_a_batch_of_texts_has_different_texts():
    first, second = continuation(tiny_model(), torch.ones(2, 3, dtype=torch.long), 20)
    assert first != second


# --------------------------------------------------------------------------------------
# What is kept of the probabilities, against slow and obvious references

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=200)


def reference(logits: list[float], top_p: float | None, min_p: float | None) -> np.ndarray:
    """One text, token by token, in float64."""
    weights = np.exp(np.array(logits) - max(logits))
    probs = dict(enumerate(weights / weights.sum()))
    if top_p is not None:
        total, nucleus = 0.0, []
        for p in sorted(probs.values(), reverse=True):
            if total >= top_p:
                break
            total += p
            nucleus.append(p)
        probs = {i: p for i, p in probs.items() if p >= nucleus[-1]}
    if min_p is not None:
        probs = {i: p for i, p in probs.items() if p >= min_p * max(probs.values())}
    return np.array([probs.get(i, 0.0) / sum(probs.values()) for i in range(len(logits))])


@given(LOGITS, st.none() | st.floats(0.01, 0.99), st.none() | st.floats(0, 1))
def test_filters_keep_what_a_slow_reference_keeps(logits, top_p, min_p):
    # ties, and no near ties that rounding could decide
    logits = [float(x) for x in np.round(logits, 1)]
    probs = (
        probabilities(torch.tensor([logits, logits[::-1]]), 1.0, top_p, min_p)
        .double()
        .numpy()
    )
    expected = reference(logits, top_p, min_p)
    if (
        top_p is not None
    ):  # where the sum is within rounding of p, one token more is right, too
        ranked = np.cumsum(sorted(reference(logits, None, None), reverse=True))
        if np.abs(ranked - top_p).min() < 1e-5:
            return
    if (
        min_p is not None
        and np.abs(expected[expected > 0].min() - min_p * expected.max()) < 1e-6
    ):
        return
    np.testing.assert_allclose(probs[0], expected, atol=1e-5)
    np.testing.assert_allclose(probs[1], expected[::-1], atol=1e-5)


@given(st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=1), st.floats(0.5, 3))
def test_the_repetition_penalty_makes_what_was_seen_less_probable(tokens, penalty):
    logits, seen = (torch.tensor([column]) for column in zip(*tokens, strict=True))
    found = generation.penalize_repetition(logits.double(), seen, penalty)
    expected = [
        (x / penalty if x > 0 else x * penalty) if once else x for x, once in tokens
    ]
    np.testing.assert_allclose(found[0], expected, rtol=1e-6, atol=1e-30)


def test_the_repetition_penalty_counts_the_prompt_and_the_tokens_drawn_but_no_padding():
    idx = torch.tensor([[-1, 2], [1, 1]])
    sampler = Sampler(idx, 4, [0, 1], 3, repetition_penalty=1e9, temperature=0)
    logits = torch.tensor([[1.0, 2.0, 3.0, 2.5]] * 2)
    tokens = [sampler.next_tokens(logits).flatten().tolist() for _ in range(3)]
    assert tokens == [[3, 2], [1, 3], [0, 0]]
    sampler.select([1])
    assert sampler.seen.tolist() == [[True, True, True, True]]


@pytest.mark.parametrize("cached", [True, False])
def test_padding_counts_as_no_token_that_was_seen(cached):
    prompts = torch.tensor([[-1, -1, 2], [1, 1, 1]])
    context = Context(tiny_model(), prompts, cached=cached)
    sampler = Sampler(context.tokens, 11, [0, 1], 3, repetition_penalty=2.0)
    assert sampler.seen.nonzero().tolist() == [[0, 2], [1, 1]]


def test_drawing_from_the_k_most_probable_alone_is_drawing_from_their_probabilities():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    uniform = uniform_numbers(5, list(range(50)), 1)[0]
    for k, keys in ((20, {}), (5, {"top_p": 0.8}), (300, {}), (40, {"min_p": 0.3})):
        least = logits.topk(k).values[:, -1:]
        expected = draw(
            probabilities(logits.masked_fill(logits < least, -torch.inf), 0.7, **keys),
            uniform,
        )
        assert torch.equal(
            sample_tokens(logits, uniform, k, temperature=0.7, **keys), expected
        )
        nan = torch.full_like(logits, torch.nan)
        assert sample_tokens(nan, uniform, k).flatten().tolist() == [300] * 50


def test_frequencies_of_100_000_draws_match_the_probabilities():
    probs = probabilities(
        torch.tensor([[0.0, 1.0, -3.0, 2.0, 0.5, -torch.inf]]), top_p=0.99
    )
    uniform = uniform_numbers(7, [0], 100_000)[:, 0]
    counts = torch.bincount(
        draw(probs.expand(100_000, -1), uniform).flatten(), minlength=6
    ).double()
    expected = probs[0].double() * 100_000
    assert counts[expected == 0].sum() == 0
    chi_square = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    assert (
        chi_square < 23.5
    )  # with 4 degrees of freedom or fewer, one in ten thousand is above


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64]
)  # Apple's GPUs have no float64
def test_the_largest_random_number_draws_a_token_that_has_a_probability(monkeypatch, dtype):
    numbers = type("Numbers", (), {"random": lambda self, n: np.full(n, 1 - 2.0**-53)})
    monkeypatch.setattr(np.random, "Generator", lambda bits: numbers())
    largest = uniform_numbers(0, [0], 1, dtype)[0]
    assert largest.dtype == dtype
    for probs in (
        [0.1, 0.9 - 1e-8, 0.0, 0.0],
        [0.5, 0.5, 0.0, 0.0],
        [0.3, 0.7000001, 0.0, 0.0],
    ):
        assert draw(torch.tensor([probs]), largest).tolist() == [[1]]
    assert draw(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 1, dtype=dtype)).tolist() == [
        [1]
    ]


def test_random_numbers_depend_on_seed_sample_and_position_alone():
    numbers = uniform_numbers(3, [5, 9, 5], 10)
    assert torch.equal(numbers[:, 0], numbers[:, 2]) and torch.equal(
        numbers[:4, 1], uniform_numbers(3, [9], 4)[:, 0]
    )
    assert (
        len(
            {
                *numbers[:, :2].flatten().tolist(),
                *uniform_numbers(4, [5], 10).flatten().tolist(),
            }
        )
        == 30
    )


# --------------------------------------------------------------------------------------
# Texts of different lengths, together and one by one


def alone(model, prompt: list[int], n: int, sample: int, **options) -> list[int]:
    """The continuation of one prompt without a cache and without company."""
    exact = options.pop("exact", False)
    context = Context(model, torch.tensor([prompt]), exact=exact, cached=False)
    return [step.ids[0] for step in continue_texts(context, n, samples=[sample], **options)]


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda v: "-".join(f"{k}-{x}" for k, x in v.items())
)
def test_each_text_of_a_padded_batch_is_what_it_is_alone_before_and_past_block_size(
    variant, exact
):
    model = random_model(
        **{"block_size": 8}
        | variant
        | ({"window": 8} if variant.get("window", 0) > 8 else {})
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prompts, n = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1, 2, 3, 4], [2, 2, 3, 4, 5, 6]], 20
    idx = torch.stack(
        [F.pad(torch.tensor(prompt), (10 - len(prompt), 0), value=-1) for prompt in prompts]
    )
    expected = [
        alone(model, prompt, n, i, temperature=0.9, exact=exact)
        for i, prompt in enumerate(prompts)
    ]
    for ready in (model, prepare_for_generation(copy.deepcopy(model))):
        together = torch.stack(
            list(generate(ready, idx, n, temperature=0.9, exact=exact)), dim=1
        )
        assert together.tolist() == expected
        pairs = torch.stack(
            list(generate(ready, idx[:2], n, temperature=0.9, exact=exact)), dim=1
        )
        assert pairs.tolist() == expected[:2]


def test_a_text_ends_after_eot_and_costs_nothing_more():
    model, rows = tiny_model(), []
    next_logits = model.next_logits
    model.next_logits = lambda idx, state=None: (
        rows.append(len(idx)) or next_logits(idx, state)
    )
    idx = torch.tensor([[1, 2], [3, 4], [5, 6]])
    free = torch.stack(list(generate(model, idx, 20)), dim=1).tolist()
    eot = free[1][4]
    rows.clear()
    ended = torch.stack(list(generate(model, idx, 20, eot=eot)), dim=1).tolist()
    for text, all_tokens in zip(ended, free, strict=True):
        length = all_tokens.index(eot) + 1 if eot in all_tokens else 20
        assert text[:length] == all_tokens[:length] and set(text[length:]) <= {-1}
    lengths = [text.index(eot) + 1 if eot in text else 20 for text in free]
    assert rows == [
        sum(length > step for length in lengths) for step in range(max(lengths))
    ]


def test_the_caller_can_stop_a_text_and_continue_the_others():
    model, stopped = tiny_model(block_size=32), set()
    idx = torch.tensor([[1, 2], [3, 4]])
    expected = torch.stack(list(generate(model, idx, 6)), dim=1).tolist()
    context = Context(model, idx)
    steps = []
    for step in continue_texts(context, 6, stopped=stopped):
        steps.append((step.rows, step.ids))
        if len(steps) == 2:
            stopped.add(0)
    assert steps == [
        ([0, 1], list(ids)) for ids in list(zip(*expected, strict=True))[:2]
    ] + [([1], [token]) for token in expected[1][2:]]
    context.append(torch.tensor([[7, 8]]))
    whole = torch.tensor([[3, 4, *expected[1], 7, 8]])
    with torch.inference_mode():
        torch.testing.assert_close(
            context.next_logits(), Context(model, whole, cached=False).next_logits()
        )


def test_a_short_text_goes_on_past_block_size_columns_when_the_longest_has_ended():
    model, stopped = tiny_model(), set()
    context = Context(
        model, torch.tensor([[1, 2, 3, 4, 5, 6, 7], [-1, -1, -1, -1, -1, -1, 2]])
    )
    ids = []
    for step in continue_texts(context, 12, stopped=stopped):
        stopped.add(0)
        ids.append(step.ids[-1])
    assert ids == alone(model, [2], 12, 1)


def test_logits_that_are_not_finite_are_an_error_in_one_line():
    for temperature in (0, 1):
        model = tiny_model()
        torch.nn.init.constant_(model.stack.norm.weight, torch.nan)
        with pytest.raises(UserError, match="logits are not finite"):
            list(generate(model, torch.tensor([[1]]), 3, temperature=temperature))


def test_a_state_is_no_larger_than_the_text_or_twice_the_window():
    model = tiny_model(block_size=64)
    context = Context(model, torch.ones(2, 3, dtype=torch.long), 10)
    list(continue_texts(context, 7))
    assert context.state.layers[0].k.shape == (2, 2, 10, 16)
    model = tiny_model(block_size=64, window=4, position="rotary")
    context = Context(model, torch.ones(1, 3, dtype=torch.long), 60)
    list(continue_texts(context, 57))
    assert context.state.layers[0].k.shape == (1, 2, 8, 16) and context.state.length == 59


@pytest.mark.parametrize(
    "keys", [{}, {"n_kv_head": 1}, {"head_size": 24}, {"window": 4, "position": "rotary"}]
)
def test_the_bytes_of_a_text_are_those_of_its_keys_values_logits_tokens_and_random_numbers(
    keys,
):
    model = tiny_model(block_size=64, **keys)
    context = Context(model, torch.ones(1, 3, dtype=torch.long), 60)
    list(continue_texts(context, 57))
    held = sum(layer.k.nbytes + layer.v.nbytes for layer in context.state.layers)
    assert (
        generation.bytes_per_text(model.config, 60)
        == held + 4 * 8 * model.config.vocab_size + 16 * 60
    )
