"""A GPT in plain Python, by additions and multiplications of numbers, without a package: python from_scratch.py

Each section is a chapter of the article that this project implements, under its name; all of it takes half a minute.
It is no toy: with the same weights, gpt() gives the numbers that model.py gives, to the ninth digit and beyond.
"""

import math
import random
from operator import mul

RHYME = """Humpty Dumpty sat on a wall,
Humpty Dumpty had a great fall;
All the king's horses and all the king's men
Couldn't put Humpty together again.
"""

# A simple neural network: four numbers go in, how red, green and blue a thing is, and its volume. Two come out, one for
# leaf and one for flower; the larger is the answer. Between them is a layer of three neurons. A neuron multiplies each
# number before it by a weight of its own, and adds up the products.
LEAVES = [[0.13, 0.42, 0.22, 0.01], [0.31, 0.48, 0.12, 0.02]]
FLOWERS = [[0.87, 0.73, 0.09, 0.06], [0.92, 0.35, 0.55, 0.04]]


class Vector:
    """Some numbers, such as a layer of neurons, or the weights of one of them; and the gradient of each number."""

    def __init__(self, numbers: list[float]):
        self.numbers = numbers
        self.gradient = [0.0] * len(numbers)
        self.mean = [0.0] * len(numbers)  # of the last gradients, for adamw()
        self.mean_square = [0.0] * len(numbers)


def matrix(rows: int, columns: int, scale: float) -> list[Vector]:
    """Random weights: a row for each neuron, with a weight for each number that it reads."""
    return [Vector([random.gauss(0, scale) for _ in range(columns)]) for _ in range(rows)]


def dot(a: list[float], b: list[float]) -> float:
    return sum(map(mul, a, b))


# How are these models trained? A loss says how wrong an answer is. The gradient of a weight says how much the loss
# would rise if the weight rose a little; so each weight moves a little the other way, again and again: gradient
# descent. A gradient could be found by nudging its weight and looking at the loss, for one weight after another. It
# also follows by a formula: each operation below notes on a tape how the gradient of its result becomes that of its
# inputs, and played backwards from the loss, the tape gives all gradients. Operations are on vectors: on single numbers
# the tape would be a hundred times as long.
tape = []
looked_at = []  # in attention, by each letter: for the table at the end


def linear(x: Vector, weights: list[Vector]) -> Vector:
    """A layer: for each neuron, the sum of the products of x and its weights."""
    y = Vector([dot(x.numbers, neuron.numbers) for neuron in weights])

    def backward() -> None:
        for gradient, neuron in zip(y.gradient, weights):
            pass_on(neuron, gradient, x.numbers)
            pass_on(x, gradient, neuron.numbers)

    tape.append(backward)
    return y


def pass_on(x: Vector, scale: float, numbers: list[float]) -> None:
    """Add scale times these numbers to the gradient of x, which may have been used several times."""
    if scale:
        x.gradient = [old + scale * number for old, number in zip(x.gradient, numbers)]


def relu(x: Vector) -> Vector:
    """Negative numbers become 0; without this, many layers could do no more than one."""
    y = Vector([max(0.0, number) for number in x.numbers])
    tape.append(lambda: pass_on(x, 1, [g * (n > 0) for g, n in zip(y.gradient, y.numbers)]))
    return y


def cross_entropy(scores: Vector, target: int) -> Vector:
    """The loss: 0 where the right answer has probability 1, and the larger the less probable it is."""
    probabilities = softmax(scores.numbers)
    loss = Vector([-math.log(probabilities[target])])
    probabilities[target] -= 1  # so that these are the gradients of the scores
    tape.append(lambda: pass_on(scores, loss.gradient[0], probabilities))
    return loss


def adamw(
    weights: list[Vector], losses: list[Vector], step: int, lr: float, decay: float = 0
) -> float:
    """Lower the mean loss, which is returned: move each weight by lr times its mean gradient over its usual size."""
    for loss in losses:
        loss.gradient = [1 / len(losses)]
    while tape:
        tape.pop()()
    for x in weights:
        for i, g in enumerate(x.gradient):
            x.mean[i] = 0.9 * x.mean[i] + 0.1 * g
            x.mean_square[i] = 0.99 * x.mean_square[i] + 0.01 * g * g
            mean = x.mean[i] / (1 - 0.9**step)  # the means began at 0
            size = math.sqrt(x.mean_square[i] / (1 - 0.99**step)) + 1e-8
            x.numbers[i] -= lr * (mean / size + decay * x.numbers[i])
        x.gradient = [0.0] * len(x.numbers)
    return sum(loss.numbers[0] for loss in losses) / len(losses)


def leaf_or_flower() -> None:
    hidden = matrix(3, 4, 0.7)
    output = matrix(2, 3, 0.7)
    for step in range(1, 151):
        scores = [linear(relu(linear(Vector(x), hidden)), output) for x in LEAVES + FLOWERS]
        losses = [cross_entropy(x, answer) for x, answer in zip(scores, (0, 0, 1, 1))]
        loss = adamw(hidden + output, losses, step, lr=0.03)
        if step % 50 == 0:
            print(f"  step {step:3}: loss {loss:.3f}")


# How does all this generate language? A number can stand for a letter. A network reads the last twelve letters, and has
# an output for each letter that may come next; the one with the largest is appended, and so on.
# Embeddings: but a letter is more than its place in the alphabet. So each has several numbers, trained like all others.
ALPHABET = sorted(set(RHYME))


def encode(text: str) -> list[int]:
    return [ALPHABET.index(letter) for letter in text]


def join(vectors: list[Vector]) -> Vector:
    y = Vector([number for x in vectors for number in x.numbers])

    def backward() -> None:
        size = len(vectors[0].numbers)
        for i, x in enumerate(vectors):
            pass_on(x, 1, y.gradient[i * size : (i + 1) * size])

    tape.append(backward)
    return y


def window_network(embedding: list[Vector], trained: list[Vector]) -> float:
    """Train it to read twelve letters and predict the next, and return its loss."""
    tokens = encode(RHYME)
    hidden = matrix(32, 12 * len(embedding[0].numbers), 0.2)
    output = matrix(len(ALPHABET), 32, 0.1)
    for step in range(1, 101):
        ends = random.sample(range(12, len(tokens)), 16)
        windows = [join([embedding[t] for t in tokens[end - 12 : end]]) for end in ends]
        scores = [linear(relu(linear(window, hidden)), output) for window in windows]
        losses = [cross_entropy(x, tokens[end]) for x, end in zip(scores, ends)]
        loss = adamw(hidden + output + trained, losses, step, lr=0.01)
    return loss


# Self Attention: which letters matter is no question of their places alone. Each letter asks for something, by a query;
# each letter up to it has a key; and the better the two fit, the more of that letter's value is in the answer.
# Softmax: how well they fit becomes fractions, positive and with the sum 1.
def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def attend(query: Vector, keys: list[Vector], values: list[Vector]) -> Vector:
    scale = len(query.numbers) ** -0.5
    weights = softmax([scale * dot(query.numbers, key.numbers) for key in keys])
    y = Vector([dot(weights, column) for column in zip(*(v.numbers for v in values))])

    def backward() -> None:
        gradients = [dot(y.gradient, value.numbers) for value in values]
        mean = dot(weights, gradients)
        for key, value, weight, gradient in zip(keys, values, weights, gradients):
            pass_on(value, weight, y.gradient)
            pass_on(query, scale * weight * (gradient - mean), key.numbers)
            pass_on(key, scale * weight * (gradient - mean), query.numbers)

    tape.append(backward)
    looked_at.append(weights)
    return y


# Residual connections: a layer adds to what it has read, so that nothing is lost and the gradient has a way past it.
def add(a: Vector, b: Vector) -> Vector:
    y = Vector([m + n for m, n in zip(a.numbers, b.numbers)])
    tape.append(lambda: [pass_on(x, 1, y.gradient) for x in (a, b)])
    return y


# Layer Normalization: sums of sums grow or vanish; here the numbers get the mean 0 and the deviation 1.
def layer_norm(x: Vector, scale: Vector) -> Vector:
    n = len(x.numbers)
    mean = sum(x.numbers) / n
    deviation = math.sqrt(sum((number - mean) ** 2 for number in x.numbers) / n + 1e-5)
    normed = [(number - mean) / deviation for number in x.numbers]
    y = Vector(list(map(mul, normed, scale.numbers)))

    def backward() -> None:
        pass_on(scale, 1, list(map(mul, y.gradient, normed)))
        gradient = list(map(mul, y.gradient, scale.numbers))
        slope = dot(gradient, normed) / n
        level = sum(gradient) / n
        pass_on(x, 1 / deviation, [g - level - slope * z for g, z in zip(gradient, normed)])

    tape.append(backward)
    return y


# Dropout: in training, random numbers are left out, so that no neuron can rely on a single other one.
def dropout(x: Vector, p: float) -> Vector:
    kept = [(random.random() >= p) / (1 - p) for _ in x.numbers]
    y = Vector(list(map(mul, x.numbers, kept)))
    tape.append(lambda: pass_on(x, 1, list(map(mul, y.gradient, kept))))
    return y


# Multi-head Attention: several heads ask side by side, and a last matrix mixes their answers.
def attention(
    x: list[Vector], projections: list[list[Vector]], n_head: int
) -> list[Vector]:
    q_proj, k_proj, v_proj, o_proj = projections
    size = len(o_proj) // n_head
    heads = []
    for head in range(n_head):
        rows = slice(head * size, (head + 1) * size)
        q = [linear(a, q_proj[rows]) for a in x]
        k = [linear(a, k_proj[rows]) for a in x]
        v = [linear(a, v_proj[rows]) for a in x]
        heads.append([attend(q[t], k[: t + 1], v[: t + 1]) for t in range(len(x))])
    return [linear(join(answers), o_proj) for answers in zip(*heads)]


# Positional encoding and embedding: attention sees no order; so each position has an embedding, added to the letter's.
# The GPT architecture: attention and the network of the first chapter in turns, each with norm and residual.
def new_gpt(n_embd: int, n_layer: int, block_size: int) -> dict[str, list[Vector]]:
    """Random weights, by the names that they have in model.py."""
    weights = {"wte": matrix(len(ALPHABET), n_embd, 0.1)}
    weights["stack.position.wpe"] = matrix(block_size, n_embd, 0.1)
    weights["stack.norm"] = [Vector([1.0] * n_embd)]
    for block in [f"stack.blocks.{i}" for i in range(n_layer)]:
        for name in "qkvo":
            weights[f"{block}.attn.{name}_proj"] = matrix(n_embd, n_embd, 0.2)
        weights[f"{block}.mlp.up_proj"] = matrix(4 * n_embd, n_embd, 0.2)
        weights[f"{block}.mlp.down_proj"] = matrix(n_embd, 4 * n_embd, 0.1)
        for name in ("attn_norm", "mlp_norm"):
            weights[f"{block}.{name}"] = [Vector([1.0] * n_embd)]
    return weights


def gpt(tokens: list[int], weights: dict, n_head: int, p: float = 0) -> list[Vector]:
    """For each token, the scores of all letters to come next; p: of dropout."""
    x = [add(weights["wte"][a], b) for a, b in zip(tokens, weights["stack.position.wpe"])]
    blocks = [
        name.removesuffix(".attn_norm") for name in weights if name.endswith("attn_norm")
    ]
    for block in blocks:
        y = [layer_norm(a, *weights[f"{block}.attn_norm"]) for a in x]
        y = attention(y, [weights[f"{block}.attn.{name}_proj"] for name in "qkvo"], n_head)
        x = [add(a, dropout(b, p)) for a, b in zip(x, y)]
        y = [layer_norm(a, *weights[f"{block}.mlp_norm"]) for a in x]
        y = [relu(linear(a, weights[f"{block}.mlp.up_proj"])) for a in y]
        y = [linear(a, weights[f"{block}.mlp.down_proj"]) for a in y]
        x = [add(a, dropout(b, p)) for a, b in zip(x, y)]
    return [linear(layer_norm(a, *weights["stack.norm"]), weights["wte"]) for a in x]


def main() -> None:
    random.seed(1)
    print("A simple neural network learns to tell leaves from flowers:")
    leaf_or_flower()
    numbers = [Vector([i / len(ALPHABET)]) for i in range(len(ALPHABET))]
    vectors = matrix(len(ALPHABET), 4, 1.0)
    print("A network that reads twelve letters learns the rhyme. Its loss, if a letter is")
    print(f"  a number:         {window_network(numbers, trained=[]):.3f}")
    print(f"  a trained vector: {window_network(vectors, trained=vectors):.3f}")
    print("A GPT learns the rhyme:")
    tokens = encode(RHYME)
    weights = new_gpt(n_embd=16, n_layer=1, block_size=24)
    parameters = [x for rows in weights.values() for x in rows]
    for step in range(1, 501):
        start = random.randrange(0, len(tokens) - 12, 12)
        piece = tokens[start : start + 25]
        scores = gpt(piece[:-1], weights, n_head=2)
        losses = [cross_entropy(x, token) for x, token in zip(scores, piece[1:])]
        loss = adamw(parameters, losses, step, lr=0.01 * (1 - step / 501))
        if step % 100 == 0:
            print(f"  step {step:3}: loss {loss:.3f}")
    text = "Humpty Dumpt"
    looked_at.clear()
    while len(text) < len(RHYME):  # a full context continues with its newer half
        start = max(0, len(text) // 12 * 12 - 12)
        scores = gpt(encode(text[start:]), weights, n_head=2)[-1].numbers
        text += ALPHABET[scores.index(max(scores))]
    print("Where a head looks at each letter, in percent:")
    for letter, row in zip(text, looked_at[:12]):
        print(f"  {letter}" + "".join(f"{100 * weight:4.0f}" for weight in row))
    print(text)


if __name__ == "__main__":
    main()
