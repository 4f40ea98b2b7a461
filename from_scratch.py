"""A GPT in plain Python, built from additions and multiplications with only the standard library.

Each section follows a chapter of the article linked in README.md. Two chapters are left out: subword tokenizers, since
a token is one letter here, and the encoder-decoder transformer. model.py has the same GPT in PyTorch, and a test checks
that both compute the same numbers. `python from_scratch.py` takes half a minute.
"""

import math
import random
from operator import mul

RHYME = """Humpty Dumpty sat on a wall,
Humpty Dumpty had a great fall;
All the king's horses and all the king's men
Couldn't put Humpty together again.
"""

# A simple neural network: four numbers go in (an object's red, green and blue, and its volume in litres). Two come out,
# one for leaf and one for flower; the larger one is the answer. In between is a layer of three neurons. Each neuron
# multiplies each of its inputs by a weight and adds up the products. (There are no biases here.)
LEAVES = [[0.13, 0.42, 0.22, 0.01], [0.31, 0.48, 0.12, 0.02]]
FLOWERS = [[0.87, 0.73, 0.09, 0.06], [0.92, 0.35, 0.55, 0.04]]


class Vector:
    """Numbers, such as the outputs of a layer or the weights of one neuron, and the gradient of each number."""

    def __init__(self, numbers: list[float]):
        self.numbers = numbers
        self.gradient = [0.0] * len(numbers)
        self.mean = [0.0] * len(numbers)  # mean of recent gradients, for adamw()
        self.mean_square = [0.0] * len(numbers)


def matrix(rows: int, columns: int, scale: float) -> list[Vector]:
    """Random weights: a row for each neuron, with a weight for each number that it reads."""
    return [Vector([random.gauss(0, scale) for _ in range(columns)]) for _ in range(rows)]


def dot(a: list[float], b: list[float]) -> float:
    return sum(map(mul, a, b))


# How are these models trained? A loss says how wrong an answer is. The gradient of a weight says how much the loss
# rises if the weight rises a little. Gradient descent moves each weight a little the other way, again and again.
# Backpropagation finds all gradients at once, by the chain rule: if y = w x, the gradient of w is x times that of y,
# and the gradient of x is w times that of y. Each operation below puts such a rule on a tape: a function backward(),
# to be called once the loss is known. With numbers instead of vectors, the tape would be a hundred times as long.
tape = []
looked_at = []  # attention weights, for the table at the end


def pass_on(x: Vector, factor: float, numbers: list[float]) -> None:
    """Add factor times these numbers to the gradient of x. Gradients add up, because x may be used several times."""
    if factor:
        x.gradient = [old + factor * number for old, number in zip(x.gradient, numbers)]


def linear(x: Vector, weights: list[Vector]) -> Vector:
    """A layer: each neuron multiplies the numbers in x by its weights and outputs the sum."""
    y = Vector([dot(x.numbers, neuron.numbers) for neuron in weights])

    def backward() -> None:
        for gradient, neuron in zip(y.gradient, weights):
            pass_on(neuron, gradient, x.numbers)
            pass_on(x, gradient, neuron.numbers)

    tape.append(backward)
    return y


def multiply(x: Vector, factors: list[float]) -> Vector:
    """Multiply each number in x by a factor that is not trained."""
    y = Vector(list(map(mul, x.numbers, factors)))
    tape.append(lambda: pass_on(x, 1, list(map(mul, y.gradient, factors))))
    return y


def relu(x: Vector) -> Vector:
    """Negative numbers become 0; without this, many layers could do no more than one layer."""
    return multiply(x, [1.0 if number > 0 else 0.0 for number in x.numbers])


def cross_entropy(scores: Vector, target: int) -> Vector:
    """The loss: 0 if the right answer has probability 1 (see softmax below). It rises as that probability falls."""
    probabilities = softmax(scores.numbers)
    loss = Vector([-math.log(probabilities[target])])
    gradients = probabilities.copy()  # the right score should rise, the others should fall
    gradients[target] -= 1
    tape.append(lambda: pass_on(scores, loss.gradient[0], gradients))
    return loss


# AdamW is gradient descent with steadier steps: a weight moves by lr, the learning rate, times the mean of its recent
# gradients divided by their usual size. decay, 0 by default, also pulls each weight towards 0. Returns the mean loss.
def adamw(weights: list[Vector], losses: list[Vector], step: int, lr: float, decay=0.0):
    for loss in losses:
        loss.gradient = [1 / len(losses)]
    while tape:
        backward = tape.pop()  # the last operation first
        backward()
    for x in weights:
        for i, g in enumerate(x.gradient):
            x.mean[i] = 0.9 * x.mean[i] + 0.1 * g
            x.mean_square[i] = 0.99 * x.mean_square[i] + 0.01 * g * g
            mean = x.mean[i] / (1 - 0.9**step)  # it began at 0, so at first it is too small
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
    another = relu(linear(Vector([0.22, 0.55, 0.15, 0.02]), hidden))
    leaf, flower = linear(another, output).numbers
    print(f"  scores of a new leaf: leaf {leaf:.1f}, flower {flower:.1f}")


# How does all this help generate language? A number can stand for a letter. A network reads the last twelve letters and
# has an output for each possible next letter. The letter with the largest output is appended, and so on: see main().
# Embeddings: a letter is more than its place in the alphabet, so each gets several numbers, trained like weights.
ALPHABET = sorted(set(RHYME))
TOKENS = [ALPHABET.index(letter) for letter in RHYME]


def join(vectors: list[Vector]) -> Vector:
    y = Vector([number for x in vectors for number in x.numbers])

    def backward() -> None:
        size = len(vectors[0].numbers)
        for i, x in enumerate(vectors):
            pass_on(x, 1, y.gradient[i * size : (i + 1) * size])

    tape.append(backward)
    return y


def window_network(embedding: list[Vector], trained: list[Vector]) -> float:
    """Train a network to predict the next letter from the last twelve, and return its loss."""
    hidden = matrix(32, 12 * len(embedding[0].numbers), 0.2)
    output = matrix(len(ALPHABET), 32, 0.1)
    for step in range(1, 101):
        ends = random.sample(range(12, len(TOKENS)), 16)
        windows = [join([embedding[t] for t in TOKENS[end - 12 : end]]) for end in ends]
        scores = [linear(relu(linear(window, hidden)), output) for window in windows]
        losses = [cross_entropy(x, TOKENS[end]) for x, end in zip(scores, ends)]
        loss = adamw(hidden + output + trained, losses, step, lr=0.01)
    return loss


# Self Attention: which letters matter depends on more than their positions. Each letter has a query, a key and a
# value. The query is compared with the keys of all letters so far. The better a key fits, the more its letter counts.
# Softmax: the scores, which say how well the keys fit, are turned into positive fractions that add up to 1.
def softmax(scores: list[float]) -> list[float]:
    highest = max(scores)  # subtracted to keep the powers small; no fraction changes
    powers = [math.exp(score - highest) for score in scores]
    return [power / sum(powers) for power in powers]


def attend(query: Vector, keys: list[Vector], values: list[Vector]) -> Vector:
    scale = len(query.numbers) ** -0.5  # otherwise longer vectors would give larger scores
    weights = softmax([scale * dot(query.numbers, key.numbers) for key in keys])
    looked_at.append(weights)
    y = Vector([dot(weights, column) for column in zip(*[v.numbers for v in values])])

    def backward() -> None:
        gradients = [dot(y.gradient, value.numbers) for value in values]
        mean = dot(weights, gradients)  # more weight for one letter is less for the others
        for key, value, weight, gradient in zip(keys, values, weights, gradients):
            pass_on(value, weight, y.gradient)
            pass_on(query, scale * weight * (gradient - mean), key.numbers)
            pass_on(key, scale * weight * (gradient - mean), query.numbers)

    tape.append(backward)
    return y


# Residual connections: a layer's output is added to its input, so nothing is lost and gradients can bypass the layer.
def add(a: Vector, b: Vector) -> Vector:
    y = Vector([m + n for m, n in zip(a.numbers, b.numbers)])
    tape.append(lambda: pass_on(a, 1, y.gradient))
    tape.append(lambda: pass_on(b, 1, y.gradient))
    return y


# Layer Normalization: numbers grow or shrink from layer to layer, so x is brought to mean 0 and standard deviation 1,
# and then multiplied by a trained scale.
def layer_norm(x: Vector, scale: Vector) -> Vector:
    n = len(x.numbers)
    mean = sum(x.numbers) / n
    deviation = math.sqrt(sum((number - mean) ** 2 for number in x.numbers) / n + 1e-5)
    normed = [(number - mean) / deviation for number in x.numbers]
    y = Vector(list(map(mul, normed, scale.numbers)))

    def backward() -> None:
        pass_on(scale, 1, list(map(mul, y.gradient, normed)))
        gradient = list(map(mul, y.gradient, scale.numbers))
        shift = sum(gradient) / n  # shifting or stretching x does not change y
        stretch = dot(gradient, normed) / n
        rest = [g - shift - stretch * z for g, z in zip(gradient, normed)]
        pass_on(x, 1 / deviation, rest)

    tape.append(backward)
    return y


# Dropout: in training, numbers chosen at random become 0, so that no neuron can rely on any single input. The others
# are scaled up to make up for it. main() does not use dropout, because the GPT should learn its text by heart.
def dropout(x: Vector, p: float) -> Vector:
    return multiply(x, [0.0 if random.random() < p else 1 / (1 - p) for _ in x.numbers])


# Multi-head Attention: heads work side by side, each with its own rows of the matrices. o_proj mixes their outputs.
def attention(x: list[Vector], matrices: list[list[Vector]], n_head: int) -> list[Vector]:
    q_proj, k_proj, v_proj, o_proj = matrices
    size = len(o_proj) // n_head
    heads = []
    for head in range(n_head):
        rows = slice(head * size, (head + 1) * size)
        q, k, v = ([linear(a, each[rows]) for a in x] for each in (q_proj, k_proj, v_proj))
        # up to t, so that no letter sees the later ones, which it has to predict
        heads.append([attend(q[t], k[: t + 1], v[: t + 1]) for t in range(len(x))])
    return [linear(join(answers), o_proj) for answers in zip(*heads)]


# Positional encoding and embedding: attention ignores order, so each position's embedding is added to the letter's.
# The GPT architecture: a stack of blocks. Each is attention followed by a network like the one at the top of this
# file, and both have a norm and a residual connection.
def new_gpt(n_embd: int, n_layer: int, block_size: int) -> dict[str, list[Vector]]:
    """Random weights, keyed by their names in model.py. wte: letter embeddings. wpe: position embeddings."""
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


def gpt(tokens: list[int], weights: dict, n_layer: int, n_head: int, p=0.0) -> list[Vector]:
    """For each token, a score for every letter that may come next. p: dropout probability."""
    x = [add(weights["wte"][a], b) for a, b in zip(tokens, weights["stack.position.wpe"])]
    for block in [f"stack.blocks.{i}" for i in range(n_layer)]:
        y = [layer_norm(a, weights[f"{block}.attn_norm"][0]) for a in x]
        y = attention(y, [weights[f"{block}.attn.{name}_proj"] for name in "qkvo"], n_head)
        x = [add(a, dropout(b, p)) for a, b in zip(x, y)]
        y = [layer_norm(a, weights[f"{block}.mlp_norm"][0]) for a in x]
        y = [relu(linear(a, weights[f"{block}.mlp.up_proj"])) for a in y]
        y = [linear(a, weights[f"{block}.mlp.down_proj"]) for a in y]
        x = [add(a, dropout(b, p)) for a, b in zip(x, y)]
    x = [layer_norm(a, weights["stack.norm"][0]) for a in x]
    return [linear(a, weights["wte"]) for a in x]  # how well each letter's embedding fits


def main() -> None:
    random.seed(1)
    print(f"A network tells leaves from flowers (loss when guessing: {math.log(2):.3f}):")
    leaf_or_flower()
    print(f"Another predicts letters (loss when guessing: {math.log(len(ALPHABET)):.3f}):")
    numbers = [Vector([i / len(ALPHABET)]) for i in range(len(ALPHABET))]
    vectors = matrix(len(ALPHABET), 4, 1.0)
    print(f"  letters as numbers:         loss {window_network(numbers, trained=[]):.3f}")
    print(f"  letters as trained vectors: loss {window_network(vectors, vectors):.3f}")
    print("A GPT learns the rhyme from a random piece of it at each step:")
    weights = new_gpt(n_embd=16, n_layer=1, block_size=24)
    parameters = [x for rows in weights.values() for x in rows]
    for step in range(1, 501):
        start = random.randrange(0, len(TOKENS) - 12, 12)
        piece = TOKENS[start : start + 25]  # the letters to read, and one more to predict
        scores = gpt(piece[:-1], weights, n_layer=1, n_head=2)
        losses = [cross_entropy(x, token) for x, token in zip(scores, piece[1:])]
        loss = adamw(parameters, losses, step, lr=0.01 * (1 - step / 501))
        if step % 100 == 0:
            print(f"  step {step:3}: loss {loss:.3f}")
    tokens = TOKENS[:12]
    looked_at.clear()
    while len(tokens) < len(TOKENS):
        # start at a multiple of 12, as the training pieces do
        start = max(0, len(tokens) // 12 * 12 - 12)
        scores = gpt(tokens[start:], weights, n_layer=1, n_head=2)[-1].numbers
        tokens.append(scores.index(max(scores)))
    text = "".join(ALPHABET[token] for token in tokens)
    print(f"Given the first twelve letters, it continues:\n{text}")
    print("How much each of these letters attends to the letters up to it, in percent:")
    letters = text[:12].replace(" ", "_")
    print(" " * 3 + "".join(f"{letter:>4}" for letter in letters))
    for letter, row in zip(letters, looked_at):
        print(f"  {letter}" + "".join(f"{100 * weight:4.0f}" for weight in row))


if __name__ == "__main__":
    main()
