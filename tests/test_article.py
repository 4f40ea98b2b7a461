"""The numbers and claims of 'Understanding LLMs from Scratch Using Middle School Math', computed by our own blocks."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import overfit
from humptygpt.model import (
    ACTIVATIONS,
    BLOCKS,
    POSITIONS,
    LayerNorm,
    ModelConfig,
    Position,
    SelfAttention,
    Shared,
    attend,
    attention_mask,
)
from uncached import generate

from humptygpt import model as models
from humptygpt.models.build import build
from humptygpt.models.window_mlp import NumberEmbedding
from humptygpt.tokenizers.basic import CharTokenizer

LETTERS = CharTokenizer("abcdefghijklmnopqrstuvwxyz ")
LEAF = torch.tensor([32.0, 107.0, 56.0, 11.2])  # red, green, blue, volume in ml
# the weights from these to the first hidden neuron
TO_BLUE_CIRCLE = torch.tensor([[0.10, -0.29, -0.07, 0.46]])
# the weights from red and green to all three hidden neurons
TO_MIDDLE = torch.tensor([[0.10, -0.29], [0.12, -0.05], [-0.36, -0.21]])
# the weights from these three to the first neuron of the output
TO_GREEN_CIRCLE = torch.tensor([[-0.17, 0.39, 0.10]])


def config(**keys) -> ModelConfig:
    """A ModelConfig with small sizes, unless the keys say otherwise."""
    small = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 27}
    return ModelConfig(**small | keys)


def inputs(T: int, position: Position | None = None) -> Shared:
    """The inputs that a stack computes for its blocks, for a text of T tokens."""
    position = position or Position(config())
    distance = torch.arange(T)[:, None] - torch.arange(T)
    bias = position.score_bias(distance) if position.score_bias else None
    mask = attention_mask(distance, bias=bias)
    at = slice(0, T)
    idx = torch.zeros(1, T, dtype=torch.int64)
    rotation = position.rotation(at) if position.rotation else None
    return Shared(idx, at, T, rotation, {0: mask}, None, {}, {})


# --------------------------------------------------------------------------------------
# A simple neural network, and how it is trained


def test_the_blue_circle_is_minus_26_6_and_its_bias_is_added():
    network = models.MLP(config(n_embd=4, n_hidden=1, bias=True))
    network.up_proj.weight.data = TO_BLUE_CIRCLE
    network.up_proj.bias.data = torch.tensor([0.0])
    assert round(network.up_proj(LEAF).item(), 1) == -26.6
    network.up_proj.bias.data = torch.tensor([0.25])
    # the article has dropped the sign here
    assert round(network.up_proj(LEAF).item(), 2) == -26.35


@pytest.mark.parametrize("activation", ["identity", *ACTIVATIONS])
def test_only_without_an_activation_do_two_layers_collapse_into_one(monkeypatch, activation):
    monkeypatch.setitem(ACTIVATIONS, "identity", lambda x: x)
    network = models.MLP(config(n_embd=2, n_hidden=3, activation=activation, n_head=1))
    network.up_proj.weight.data, network.down_proj.weight.data = TO_MIDDLE, TO_GREEN_CIRCLE
    red = 0.10 * -0.17 + 0.12 * 0.39 - 0.36 * 0.1
    green = -0.29 * -0.17 - 0.05 * 0.39 - 0.21 * 0.1
    assert torch.allclose(network(LEAF[:2]), red * LEAF[0] + green * LEAF[1]) == (activation == "identity")


def test_gradient_descent_learns_to_classify_leaf_and_flower():
    torch.manual_seed(0)
    spread = torch.tensor([15.0, 15.0, 15.0, 3.0])
    leaves = LEAF + torch.randn(50, 4) * spread
    flowers = torch.tensor([241.0, 200.0, 4.0, 59.5]) + torch.randn(50, 4) * spread
    objects = torch.cat([leaves, flowers]) / 255
    # 0 leaf, 1 flower: the larger of the first two outputs decides
    kind = torch.arange(2).repeat_interleave(50)
    network = models.MLP(config(n_embd=4, n_hidden=3, activation="relu", bias=True))
    losses = []
    for _ in range(200):
        loss = F.cross_entropy(network(objects[::2])[:, :2], kind[::2])
        network.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in network.parameters():
                # a small step in the direction where the loss goes down
                parameter -= 0.5 * parameter.grad
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    # also of the objects that it was not trained on
    assert (network(objects[1::2])[:, :2].argmax(dim=1) == kind[1::2]).all()


# --------------------------------------------------------------------------------------
# Letters as numbers, and then as vectors


def test_letters_are_the_numbers_of_their_positions_in_the_alphabet():
    idx = torch.from_numpy(LETTERS.encode("humpty dumpt"))
    numbers = NumberEmbedding(vocab_size=27, n_embd=1)(idx[None]) * 27
    letters = [8, 21, 13, 16, 20, 25, 27, 4, 21, 13, 16, 20]
    assert numbers.round().flatten().int().tolist() == letters
    # the article's are picked, not trained
    assert not list(NumberEmbedding(27, 1).parameters())


@pytest.mark.parametrize(
    "keys",
    [{"model": "number_mlp", "n_embd": 1}, {"model": "window_mlp", "n_embd": 10}],
    ids=["numbers", "vectors"],
)
def test_the_window_network_continues_the_text_letter_by_letter(keys):
    """humpty dumpt -> y, then umpty dumpty -> a space, then mpty dumpty_ -> s, ..."""
    torch.manual_seed(0)
    text = "humpty dumpty sat on a wall"
    keys |= {"window": 12, "block_size": 26, "n_hidden": 100}
    network = build(config(activation="relu", bias=True, **keys))
    idx = torch.from_numpy(LETTERS.encode(text))[None]
    overfit(network, {"idx": idx[:, :-1], "targets": idx[:, 1:]}, 200, lr=1e-2, until=0)
    (written,) = generate(network, idx[:, :12].tolist(), len(text) - 12, temperature=0)
    assert LETTERS.decode(written) == "y sat on a wall"


# --------------------------------------------------------------------------------------
# Attention


def test_self_attention_is_a_weighted_sum_of_values_with_weights_that_add_up_to_one():
    """u_i is the softmax of k_i . q_3 over three words. Each k, q and v is a matrix times the vector of a word."""
    torch.manual_seed(0)
    attention = SelfAttention(config(n_head=1))
    attention.o_proj.weight.data = torch.eye(8)
    words = torch.randn(1, 3, 8)  # humpty, dumpty, sat
    k, v = words[0] @ attention.k_proj.weight.T, words[0] @ attention.v_proj.weight.T
    q3 = attention.q_proj.weight @ words[0, 2]
    u = (k @ q3 / math.sqrt(8)).softmax(dim=0)
    assert u.sum().item() == pytest.approx(1)
    expected = u[0] * v[0] + u[1] * v[1] + u[2] * v[2]
    torch.testing.assert_close(attention(words, inputs(3))[0, 2], expected)


def test_without_positions_switching_two_words_makes_no_difference_and_with_them_it_does():
    torch.manual_seed(0)
    words = torch.randn(1, 3, 8)
    switched = words[:, [1, 0, 2]]
    for name, scheme in POSITIONS.items():
        position = scheme(config(position=name))
        attention = SelfAttention(config())
        outputs = [attention(position.embed(x, slice(0, 3)), inputs(3, position))[0, 2] for x in (words, switched)]
        assert torch.allclose(*outputs, atol=1e-6) == (name == "none"), name


def test_several_heads_are_single_heads_concatenated():
    torch.manual_seed(0)
    attention = SelfAttention(config(n_head=2))
    attention.o_proj.weight.data = torch.eye(8)
    words = torch.randn(1, 5, 8)
    heads = []
    for rows in (slice(0, 4), slice(4, 8)):
        part = [
            F.linear(words, layer.weight[rows])[:, None]
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        heads.append(attend(*part, inputs(5).masks[0])[:, 0])
    torch.testing.assert_close(attention(words, inputs(5)), torch.cat(heads, dim=-1))


# --------------------------------------------------------------------------------------
# Residual connections, layer normalization, positions


def test_a_residual_connection_adds_the_input_to_the_output_of_the_branch():
    torch.manual_seed(0)
    x = torch.randn(1, 5, 8)
    for name in ("pre_norm", "plain"):
        block = BLOCKS[name](config(norm="none", mlp="none"))
        residual = x if name == "pre_norm" else 0
        torch.testing.assert_close(block(x, inputs(5)), residual + block.attn(x, inputs(5)))


def test_layer_norm_is_x_minus_mean_over_standard_deviation_times_scale_plus_bias():
    torch.manual_seed(0)
    norm, x = LayerNorm(config(bias=True)), torch.randn(8) * 3 + 2
    norm.weight.data, norm.bias.data = torch.randn(8), torch.randn(8)
    mean = sum(x) / 8
    # divided by N as in the article; eps: never by zero
    deviation = math.sqrt(sum((x - mean) ** 2) / 8 + norm.eps)
    torch.testing.assert_close(norm(x), (x - mean) / deviation * norm.weight + norm.bias)
    assert norm.eps == 1e-5


def test_the_sinusoidal_encoding_is_the_papers():
    """sin(p / 10000^(i/C)) for even features i, and cos of the same angle for the odd feature after it."""
    position = POSITIONS["sinusoidal"](config(n_embd=10, block_size=50))
    nothing = torch.zeros(1, 50, 10)
    encoding = position.embed(nothing, slice(0, 50))[0]
    for p in (0, 1, 7, 49):
        for i in range(10):
            function = math.cos if i % 2 else math.sin
            assert encoding[p, i].item() == pytest.approx(function(p / 10000 ** ((i - i % 2) / 10)), abs=1e-5)
    words = torch.randn(1, 50, 10)
    torch.testing.assert_close(position.embed(words, slice(0, 50))[0], math.sqrt(10) * words[0] + encoding)
