"""Sampling: logits, probabilities, tokens."""

import pytest
import torch

import model as models
from humptygpt.generation import generate, probabilities, uniform_numbers
from model import POSITIONS, ModelConfig


def tiny_model(**keys) -> models.GPT:
    torch.manual_seed(0)
    config = ModelConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 8, "vocab_size": 11} | keys)
    model = models.build(config).eval()
    for parameter in model.parameters():  # far from initialization, where all tokens are about equally probable
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def continuation(model, idx, n: int, **options) -> list[list[int]]:
    return torch.stack(list(generate(model, idx, n, **options)), dim=1).tolist()


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("prompt", [1, 5, 8, 13], ids=lambda n: f"prompt{n}")
@pytest.mark.parametrize("block_size", [1, 2, 8])
def test_cached_equals_uncached_before_and_past_block_size(position, exact, prompt, block_size):
    model = tiny_model(position=position, block_size=block_size)
    idx = torch.arange(2 * prompt).view(2, prompt) % 11
    cached, uncached = (continuation(model, idx, 30, exact=exact, cached=cached) for cached in (True, False))
    assert cached == uncached


def test_exact_generation_is_nanogpts():
    model = tiny_model()
    idx, uniform = torch.tensor([[1, 2, 3]]), uniform_numbers(1337, [0], 30)
    for i in range(30):
        logits, _ = model(idx[:, -8:])
        cumulative = (logits[0, -1] / 0.7).softmax(-1).double().cumsum(-1)
        token = int((cumulative <= uniform[i, 0] * cumulative[-1]).sum())
        idx = torch.cat([idx, torch.tensor([[token]])], dim=1)
    assert continuation(model, torch.tensor([[1, 2, 3]]), 30, exact=True, temperature=0.7) == idx[:, 3:].tolist()


def test_fast_generation_recomputes_the_newest_half_when_the_context_is_full():
    model = tiny_model()
    read = []
    next_logits = model.next_logits
    model.next_logits = lambda idx, state=None: read.append(idx.shape[1]) or next_logits(idx, state)
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


def test_top_k_keeps_the_k_most_probable_tokens():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    probs = probabilities(logits, top_k=2)
    torch.testing.assert_close(
        probs, torch.tensor([[0.0, 3.0, 2.0, 0.0]]).masked_fill(logits < 2, -torch.inf).softmax(-1)
    )
    torch.testing.assert_close(probabilities(logits, top_k=99), logits.softmax(-1))


def test_top_p_keeps_the_fewest_tokens_that_together_reach_p():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    torch.testing.assert_close(probabilities(logits, top_p=0.6), torch.tensor([[0, 2 / 3, 0, 1 / 3]]))
    torch.testing.assert_close(probabilities(logits, top_p=1e-9), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    torch.testing.assert_close(probabilities(logits, top_p=1.0), logits.exp())


def test_the_smallest_temperature_is_greedy_and_does_not_overflow():
    assert probabilities(torch.tensor([[3.0, 5.0]]), temperature=1e-39).tolist() == [[0.0, 1.0]]


def test_temperature_sharpens_and_flattens():
    logits = torch.tensor([[0.0, 1.0]])
    probs = [probabilities(logits, temperature=t)[0, 1].item() for t in (0, 0.5, 1.0, 2.0)]
    assert probs[0] == 1.0 and probs == sorted(probs, reverse=True)


def test_ids_that_only_pad_the_vocabulary_are_never_sampled():
    model = tiny_model(vocab_size=50)
    prompts = torch.zeros(20, 1, dtype=torch.long)
    largest = lambda size: max(map(max, continuation(model, prompts, 30, tokenizer_vocab_size=size)))  # noqa: E731
    assert largest(None) >= 11 > largest(11)


def test_a_batch_of_texts_has_different_texts():
    first, second = continuation(tiny_model(), torch.ones(2, 3, dtype=torch.long), 20)
    assert first != second
