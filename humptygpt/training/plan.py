"""--minutes: from a text, a machine and a time to a model and a training that fit; and the clock that it follows.

The law's constants are from runs of one to ten minutes by benchmarks/law.py, rounded; longer ones are extrapolated.
"""

import math
import statistics
import time
from collections.abc import Collection
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

import model as models
from humptygpt.core.errors import UserError
from humptygpt.core.files import write_whole
from humptygpt.data.batches import Dataset
from humptygpt.nn.layers import autocast, to_device
from humptygpt.training.optimizers import make_optimizer
from humptygpt.training.settings import TrainConfig
from model import ModelConfig

# What is tried. Of (n_layer, n_embd), each is some 1.5 times as expensive as the one before.
SIZES = (
    (2, 64),
    (2, 128),
    (4, 128),
    (4, 192),
    (6, 192),
    (6, 256),
    (8, 320),
    (8, 448),
    (10, 576),
    (12, 768),
)
CONTEXTS = (128, 256, 512)  # tokens
STEPS = (1024, 2048, 4096)  # tokens of a step
SIZE = {"n_layer", "n_head", "n_embd", "n_hidden"}  # keys
BATCH = {"batch_size", "gradient_accumulation_steps"}
HEAD_SIZE = 64
EVALUATIONS = 4
TIME_TO_TRAIN = 0.85  # of what is left after the choice: the rest evaluates
PROBE_STEPS = 5
# seconds that loading the best model, a text by it, the picture and the exit take, beside an evaluation
ENDING = 1.5


class Clock:
    """How far a training is that ends with its minutes: steps follow the time, whatever else the machine does."""

    def __init__(self, started: float, minutes: float, earlier: float):
        """started: of the command, by time.monotonic(). earlier: seconds that earlier commands of the run took."""
        self.started = started - earlier
        self.end = self.started + 60 * minutes
        self.evaluation = 0.0  # seconds that one takes, of the last ones most
        # what the end takes, in evaluations: a text, and of a long run the whole validation split
        self.at_the_end = 1.0
        self.last_step = time.monotonic()

    def leave_out(self, evaluation: float) -> None:
        """Leave out the time since advance(), which was an evaluation of so many seconds."""
        self.evaluation = (
            (self.evaluation + evaluation) / 2 if self.evaluation else evaluation
        )
        self.last_step = time.monotonic()

    def seconds(self) -> float:
        """Return how long the run has taken, earlier commands included."""
        return time.monotonic() - self.started

    def seconds_left(self, position: float, config: TrainConfig) -> float:
        """Return the seconds that are left to train, without those of the evaluations to come and of the end."""
        evaluations = math.ceil((config.max_iters - position) / config.eval_interval)
        evaluations += self.at_the_end
        return self.end - time.monotonic() - ENDING - evaluations * self.evaluation

    def planned(self) -> float:
        """Return the seconds that a plan made now has to train."""
        return TIME_TO_TRAIN * (self.end - time.monotonic() - ENDING)

    def advance(self, position: float, config: TrainConfig) -> float:
        """Return how far training is after a step, in steps of config.max_iters; position: before it."""
        now = time.monotonic()
        step = now - self.last_step
        self.last_step = now
        left = self.seconds_left(position, config)
        if left < step / 2:
            return config.max_iters
        return position + (config.max_iters - position) * step / (left + step)


# --------------------------------------------------------------------------------------
# The law

A = 8.0
ALPHA = 0.27
B = 30.0
BETA = 0.26
C = 1.0
GAMMA = 0.5
SMALL_STEPS = 0.1  # 0: only the text that was read counts, 1: only the steps
PARAMETERS_PER_BYTE = 1.0  # that a text can teach
MOST_PER_BYTE = 8.0  # with more of them, a model only learns the text by heart
REPEATS = 1.0  # how much reading again, and more parameters than that, are worth at most
# the recipe's weight decay is for steps of so many tokens of a text of so many
RECIPE_STEP = 1024
RECIPE_TEXT = 700_000


def loss(
    parameters: float,
    read: float,
    text: float,
    context: float = 256,
    step: float = 1024,
) -> float:
    """Predict bits per byte, beside those that no model can save, after reading so many bytes of a text.

    context: bytes that a prediction can see. step: tokens; more small steps learn more from as much text.

    Source of the form: Hoffmann et al. 2022, arXiv:2203.15556; of repeated text and of more parameters than it can
    teach: Muennighoff et al. 2023, arXiv:2305.16264, eq. 5 and 6.
    """
    taught = worth(parameters, PARAMETERS_PER_BYTE * text)
    learned = worth(read, text) * (1024 / step) ** SMALL_STEPS
    return A * taught**-ALPHA + B * learned**-BETA + C * context**-GAMMA


def worth(amount: float, once: float) -> float:
    """Return what an amount is worth of which only so much is new."""
    more = max(0.0, amount / once - 1)
    return min(amount, once) * (1 + REPEATS * (1 - math.exp(-more / REPEATS)))


def advice(parameters: int, read: float, text: float) -> str:
    """Return what would lower the loss most: more minutes, more text or a larger model."""
    now = loss(parameters, read, text)
    gains = {
        "twice the minutes": now - loss(parameters, 2 * read, text),
        "twice the text": now - loss(parameters, read, 2 * text),
        "twice the parameters, in twice the minutes": now
        - loss(2 * parameters, read, text),
    }
    best = max(gains, key=gains.get)
    return f"what would help most: {best}, by about {gains[best]:.2f} bits per byte"


def dropout(epochs: float, parameters: float) -> float:
    """Return the dropout for a text that is read so often: a large model learns more of it by heart."""
    much = 0.05 * (parameters / 1e6) ** 0.4 * math.log2(max(epochs, 1) / 2.4)
    return round(min(0.3, max(0.0, much)), 2)


def decay(weight_decay: float, tokens: int, text: int) -> float:
    """Return the weight decay for steps of so many tokens of a text of so many; weight_decay: the recipe's.

    So the weights remember as many epochs of each text. Source: Wang & Aitchison 2024, arXiv:2405.13698.
    """
    return float(f"{weight_decay * min(10, tokens / RECIPE_STEP * RECIPE_TEXT / text):.2g}")


# --------------------------------------------------------------------------------------
# The choice


class Candidate(NamedTuple):
    """What could be trained, and what it takes."""

    config: TrainConfig
    model_config: ModelConfig
    parameters: int  # beside the embeddings
    tokens: int  # of a step
    operations: int  # of a step: the model's and, of Muon, the optimizer's


def choose(
    config: TrainConfig,
    model_config: ModelConfig,
    given: Collection[str],
    dataset: Dataset,
    clock: Clock,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[TrainConfig, ModelConfig]:
    """Return the settings by which the law promises the lowest loss in the time that is left.

    given: keys that stay as they are; so does the size of a model to start from. The dataset is left with the context
    that is chosen. Raises UserError where not one step would fit.
    """
    if dataset.task != "language modelling":
        raise UserError(
            f"minutes={config.minutes:g} is for text, and {config.dataset} has sentence pairs; take max_iters"
        )
    bytes_per_token = dataset.val_bytes_per_token()
    text = len(dataset.train) * bytes_per_token
    tried = candidates(config, model_config, given, dataset)
    most = max(MOST_PER_BYTE * text, min(candidate.parameters for candidate in tried))
    tried = [candidate for candidate in tried if candidate.parameters <= most]
    times = {}  # of a step, of the candidates that were timed

    def time_step(i: int) -> None:
        if i in times:
            return
        dataset.block_size = tried[i].model_config.block_size
        times[i] = seconds_per_step(*tried[i][:2], dataset, device, dtype)

    def seconds(i: int) -> float:
        """A step takes some time whatever the size, and more by what it computes."""
        more = tried[i].operations - tried[small].operations
        return times.get(i) or times[small] + slope * more

    def promise(i: int) -> float:
        context, tokens = tried[i].model_config.block_size, tried[i].tokens
        read = available / seconds(i) * tokens * bytes_per_token
        return loss(tried[i].parameters, read, text, context * bytes_per_token, tokens)

    by_operations = sorted(range(len(tried)), key=lambda i: tried[i].operations)
    small, large = by_operations[0], by_operations[len(tried) // 2]
    time_step(small)
    available = clock.planned()
    if available < times[small]:
        raise UserError(
            f"minutes={config.minutes:g} is too short: {clock.seconds():.1f} s are over before the first step,"
            f" which takes {times[small]:.2g} s"
        )
    time_step(large)
    more = tried[large].operations - tried[small].operations
    slope = max(0.0, times[large] - times[small]) / max(1, more)
    # the best one is timed, too, and may then be no longer the best
    while (best := min(range(len(tried)), key=promise)) not in times:
        time_step(best)
    config, model_config, *_ = tried[best]
    dataset.block_size = model_config.block_size
    steps = max(1, int(clock.planned() / times[best]))
    tokens = tried[best].tokens
    epochs = steps * tokens / len(dataset.train)
    chosen = {
        "max_iters": steps,
        "lr_decay_iters": None,
        "eval_interval": max(1, math.ceil(steps / EVALUATIONS)),
        "warmup_iters": min(config.warmup_iters, steps // 10),
    }
    if config.init_from == "scratch":  # else what the model knows would be forgotten
        chosen["weight_decay"] = decay(config.weight_decay, tokens, len(dataset.train))
    config = replace(config, **{k: v for k, v in chosen.items() if k not in given})
    if "dropout" not in given:
        rate = dropout(epochs, tried[best].parameters)
        model_config = replace(model_config, dropout=rate)
    return config, model_config


def candidates(
    config: TrainConfig,
    model_config: ModelConfig,
    given: Collection[str],
    dataset: Dataset,
) -> list[Candidate]:
    """Return every size, context and batch that is not given."""
    sizes, contexts = [model_config], [model_config.block_size]
    if config.init_from == "scratch":
        if not SIZE.intersection(given):
            sizes = [sized(model_config, n_layer, n_embd) for n_layer, n_embd in SIZES]
        if "block_size" not in given:
            contexts = [context for context in CONTEXTS if context < len(dataset.train)]
    found = []
    for size, context in product(sizes, contexts):
        shape = replace(size, block_size=context)
        parameters, per_token, per_step = cost(shape)
        if config.optimizer == "adamw":
            per_step = 0
        of_each = context * config.gradient_accumulation_steps  # tokens of a step
        batches = {max(1, tokens // of_each) for tokens in STEPS}
        if BATCH.intersection(given):
            batches = {config.batch_size}
        for batch_size in sorted(batches):
            batch = replace(config, batch_size=batch_size)
            tokens = batch_size * of_each
            operations = tokens * per_token + per_step
            found.append(Candidate(batch, shape, parameters, tokens, operations))
    return found


def sized(config: ModelConfig, n_layer: int, n_embd: int) -> ModelConfig:
    """Return the same architecture in another size."""
    n_head = max(1, n_embd // HEAD_SIZE)
    return replace(
        config,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_kv_head=config.n_kv_head and math.gcd(n_head, config.n_kv_head),
        head_size=None,
        n_hidden=None,
    )


def cost(config: ModelConfig) -> tuple[int, int, int]:
    """Return the parameters beside the embeddings, and the operations of a token and of a step of Muon."""
    model = models.build_on_meta(config)
    embeddings = config.vocab_size * config.n_embd * (1 if config.tie_weights else 2)
    parameters = models.count_parameters(model) - embeddings
    # of a matrix m x n, m <= n, three products in each of five rounds, and m is the width of nearly all
    per_step = 5 * 6 * parameters * config.n_embd
    return parameters, models.flops_per_token(model), per_step


def seconds_per_step(
    config: TrainConfig,
    model_config: ModelConfig,
    dataset: Dataset,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Train a model of this size for a few steps and return the median of their times."""
    torch.manual_seed(config.seed)
    model = models.build(model_config).to(device)
    optimizer = make_optimizer(config, model)
    times = []
    for index in range(PROBE_STEPS):
        started = time.monotonic()
        batch = to_device(dataset.batch(index, config.batch_size), device)
        with autocast(device, dtype):
            _, value = model(**batch)
        value.backward()
        optimizer.step()
        model.zero_grad()
        value.item()  # waits for a GPU
        times.append(time.monotonic() - started)
    return statistics.median(times[1:]) * config.gradient_accumulation_steps


# --------------------------------------------------------------------------------------
# plan.py


def write_plan(
    path: Path, config: TrainConfig, model_config: ModelConfig, steps: int
) -> None:
    """Write a config file that repeats a run of so many steps, and that a person edits to go on."""
    interval = round(config.eval_interval * steps / config.max_iters)
    config = replace(
        config,
        minutes=None,
        input=None,
        max_iters=steps,
        eval_interval=max(1, interval),
    )
    lines = [
        f"# What --minutes chose for {config.dataset}, step by step.",
        "#",
        f"#   python train.py {path}",
        "",
    ]
    for part in (config, model_config):
        for field in fields(part):
            value = getattr(part, field.name)
            if value != field.default:
                lines.append(f"{field.name} = {value!r}")
    text = "\n".join(lines) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
