"""--minutes: from a text, a machine and a time to a model and a training that fit; and the clock that it follows.

The law's constants are from runs of one to ten minutes by benchmarks/law.py, rounded; longer ones are extrapolated.
"""

import math
import statistics
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import model as models
from humptygpt import machine
from humptygpt.config import UserError, in_vain
from humptygpt.convert.huggingface import find_family
from humptygpt.data import Dataset
from humptygpt.device import autocast, free_memory, to_device
from humptygpt.evaluation import cost_of_whole_split
from humptygpt.files import write_whole
from humptygpt.memory import (
    check_training_fits,
    least_memory,
    without_memory,
)
from humptygpt.optimizers import make_optimizer
from humptygpt.run_folder import Progress
from humptygpt.settings import IN_VAIN, TrainConfig
from humptygpt.setup import make_model
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
HEAD_SIZE = 64
EVALUATIONS = 4
TIME_TO_TRAIN = 0.85  # of what is left after the choice: the rest evaluates
COMPILING = 60.0  # seconds that torch.compile is expected to take
PROBE_STEPS = 5
# seconds that loading the best model, a text by it, the picture and the exit take, beside an evaluation
ENDING = 1.5


class Clock:
    """How far a training is that ends with its minutes: steps follow the time, whatever else the machine does."""

    def __init__(self, started: float, minutes: float, earlier: float):
        """started: of the command, by time.monotonic(). earlier: seconds that earlier commands of the run took."""
        self.started = started - earlier
        self.end = self.started + 60 * minutes
        self.step = 0.0  # seconds of a step, by its trial
        # seconds of the last evaluation; before the first one, an estimate
        self.evaluation = 0.0
        # what the end takes, in evaluations: a text, and of a long run the whole validation split
        self.at_the_end = 1.0
        self.last_step = time.monotonic()

    def start(self, run) -> None:
        """Begin to train. Estimate what evaluations take, one batch of them a third of a batch of training."""
        config = run.config
        step = self.step or run.progress.seconds / run.progress.iter
        rows = len(run.dataset.val_starts(config.batch_size, config.evaluated_batches()))
        batches = rows / config.batch_size
        self.evaluation = step * batches / config.gradient_accumulation_steps / 3
        self.at_the_end += cost_of_whole_split(run)
        self.last_step = time.monotonic()

    def time_left(self, progress: Progress, config: TrainConfig) -> float:
        """Return the seconds until the run ends."""
        return self.end - time.monotonic()

    def leave_out(self, evaluation: float) -> None:
        """Leave out the time since advance(), which was an evaluation of so many seconds."""
        self.evaluation = evaluation
        self.last_step = time.monotonic()

    def seconds(self) -> float:
        """Return how long the run has taken, earlier commands included."""
        return time.monotonic() - self.started

    def seconds_left(self, position: float, config: TrainConfig) -> float:
        """Return the seconds that are left to train, without those of the evaluations to come and of the end."""
        last = (1 + self.at_the_end) * self.evaluation
        left = self.end - time.monotonic() - ENDING - last
        before = math.ceil((config.max_iters - position) / config.eval_interval) - 1
        # half of the time is for training, and evaluations for which there is no time are skipped
        return max(left - before * self.evaluation, left / 2)

    def planned(self, config: TrainConfig) -> float:
        """Return the seconds that a plan made now has to train."""
        ending = ENDING + COMPILING * bool(config.compile)
        return TIME_TO_TRAIN * (self.end - time.monotonic() - ending)

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
    memory: float  # bytes, at least


def begin(
    config: TrainConfig,
    model_config: ModelConfig,
    given: Collection[str],
    saved: dict | None,
    dataset: Dataset,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[TrainConfig, ModelConfig, Clock]:
    """Start the clock and, unless a checkpoint is resumed, choose the settings. Parameters as those of choose()."""
    earlier = saved["progress"].get("run_seconds", 0.0) if saved else 0.0
    clock = Clock(machine.STARTED, config.minutes, earlier)
    # compiling takes about a minute, so here the user has to ask for it
    config = replace(config, compile=bool(config.compile))
    if not saved:
        config, model_config = choose(
            config, model_config, given, dataset, clock, device, dtype
        )
    return config, model_config, clock


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
    that is chosen, the clock with the time of a step. Raises UserError if not one step fits into the time or memory.
    """
    if dataset.task != "language modelling":
        raise UserError(
            f"minutes={config.minutes:g} is for text, and {config.dataset} has sentence pairs; take max_iters"
        )

    @cache
    def time_step(candidate: Candidate) -> float:
        dataset.block_size = candidate.model_config.block_size
        return seconds_per_step(*candidate[:2], dataset, device, dtype)

    tried = candidates(config, model_config, given, dataset, dtype)
    tried.sort(key=lambda candidate: candidate.operations)
    free = free_memory(device)
    if tried[0].memory > free:
        check_training_fits(*tried[0][:2], device, dtype)
    best = find_best(tried, free, dataset, clock, time_step)
    config, model_config, parameters, tokens, *_ = best
    if "dropout" not in given:  # which takes time, so the step is timed again
        epochs = clock.planned(config) / time_step(best) * tokens / len(dataset.train)
        model_config = replace(model_config, dropout=dropout(epochs, parameters))
        best = best._replace(model_config=model_config)
    clock.step = time_step(best)
    dataset.block_size = model_config.block_size
    steps = max(1, int(clock.planned(config) / clock.step))
    chosen = {
        "max_iters": steps,
        "lr_decay_iters": None,
        "eval_interval": max(1, math.ceil(steps / EVALUATIONS)),
        "warmup_iters": min(config.warmup_iters, steps // 10),
    }
    if config.init_from == "scratch":  # else what the model knows would be forgotten
        chosen["weight_decay"] = decay(config.weight_decay, tokens, len(dataset.train))
    config = replace(config, **{k: v for k, v in chosen.items() if k not in given})
    return config, model_config


def find_best(
    tried: list[Candidate],
    free: float,
    dataset: Dataset,
    clock: Clock,
    time_step: Callable[[Candidate], float],
) -> Candidate:
    """Return the candidate with the lowest loss by the law. The smallest, a middle one and the best are timed.

    tried: sorted by operations. free: bytes of memory before the trials, which may not give back what they take.
    """
    bytes_per_token = dataset.val_bytes_per_token()
    text = len(dataset.train) * bytes_per_token
    most = max(MOST_PER_BYTE * text, tried[0].parameters)
    tried = [x for x in tried if x.parameters <= most and x.memory <= free]

    def seconds(candidate: Candidate) -> float:
        """A step takes some time whatever the size, and more by what it computes."""
        more = candidate.operations - small.operations
        return times.get(candidate) or times[small] + slope * more

    def promise(candidate: Candidate) -> float:
        context, tokens = candidate.model_config.block_size, candidate.tokens
        read = available / seconds(candidate) * tokens * bytes_per_token
        return loss(candidate.parameters, read, text, context * bytes_per_token, tokens)

    small, large = tried[0], tried[len(tried) // 2]
    times = {small: time_step(small)}
    available = clock.planned(small.config)
    if available < times[small]:
        raise UserError(
            f"minutes={small.config.minutes:g} is too short: {clock.seconds():.1f} s are over before the first step,"
            f" which takes {times[small]:.2g} s"
        )
    times[large] = time_step(large)
    more = large.operations - small.operations
    slope = max(0.0, times[large] - times[small]) / max(1, more)
    # the best one is timed, too, and may then be no longer the best
    while (best := min(tried, key=promise)) not in times:
        times[best] = time_step(best)
    return best


def candidates(
    config: TrainConfig,
    model_config: ModelConfig,
    given: Collection[str],
    dataset: Dataset,
    dtype: torch.dtype,
) -> list[Candidate]:
    """Return the model as it is, and in every other size, context and batch that the given keys allow.

    A size has as many heads of HEAD_SIZE as it can, or fewer and larger ones if the given keys ask for that.
    """
    fixed = vars(model_config)  # a model to start from stays as it is
    if config.init_from == "scratch":
        fixed = {key: value for key, value in fixed.items() if key in given}
    contexts = [context for context in CONTEXTS if context < len(dataset.train)]
    shapes = {model_config: None}  # in order, each once
    for (n_layer, n_embd), context in product(SIZES, contexts):
        size = {"n_layer": n_layer, "n_embd": n_embd, "block_size": context} | fixed
        most = size["n_embd"] // (model_config.head_size or HEAD_SIZE)
        for n_head in range(max(model_config.n_kv_head or 1, most), 0, -1):
            shape = replace(model_config, **{"n_head": n_head} | size)
            with suppress(ValueError):
                shape.validate()
                shapes[shape] = None
                break
    found = []
    for shape in shapes:
        model = without_memory(config, shape)
        parameters, per_token, per_step = cost(model)
        if config.optimizer == "adamw":
            per_step = 0
        of_each = shape.block_size * config.gradient_accumulation_steps  # tokens of a step
        batches = {max(1, tokens // of_each) for tokens in STEPS}
        if "batch_size" in given:
            batches = {config.batch_size}
        for batch_size in batches:
            batch = replace(config, batch_size=batch_size)
            tokens = batch_size * of_each
            operations = tokens * per_token + per_step
            memory = least_memory(batch, model, dtype, 1).total
            found.append(Candidate(batch, shape, parameters, tokens, operations, memory))
    return found


def cost(model: nn.Module) -> tuple[int, int, int]:
    """Return the parameters beside the embeddings, and the operations of a token and of a step of Muon."""
    config = model.config
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
    model = make_model(config, model_config).to(device)
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
# What the user is told


def choice(run) -> str:
    """Describe what was chosen for a train.Run, and whether the model can be exported."""
    config = run.model.config
    try:
        export = f"as {find_family(config)}"
    except UserError as error:
        export = f"not of this model; {error}"
    return (
        f"minutes: {run.config.minutes:g}; chosen: {config.n_layer} layers of {config.n_embd} features,"
        f" a context of {config.block_size} tokens, dropout {config.dropout:g}; what is given is obeyed\n"
        f"export: {export}"
    )


def closing(run, out_dir: Path) -> str:
    """Write plan.py, name it, and say what would lower the loss most."""
    path = out_dir / "plan.py"
    write_plan(path, run)
    bytes_per_token = run.dataset.val_bytes_per_token()
    parameters, *_ = cost(run.model)
    text = len(run.dataset.train) * bytes_per_token
    read = run.progress.tokens * bytes_per_token
    return (
        f"{path} is a config file that repeats this, step by step\n"
        f"{advice(parameters, read, text)}"
    )


# --------------------------------------------------------------------------------------
# plan.py


def write_plan(path: Path, run) -> None:
    """Write a config file that repeats a run step by step, and that a person edits to go on. run: a train.Run."""
    settings = asdict(run.config) | asdict(run.model.config)
    # the clock took more or fewer steps than were planned
    for key in ("max_iters", "lr_decay_iters", "warmup_iters", "eval_interval"):
        if settings[key]:
            steps = settings[key] * run.progress.iter / run.progress.position
            settings[key] = max(1, round(steps))
    unused = in_vain(settings, settings, IN_VAIN)
    left_out = {"minutes", "input", "overwrite", "parallel", "backend", *unused}
    lines = [
        f"# What --minutes chose for {run.config.dataset}, step by step.",
        "#",
        f"#   python train.py {path} --out_dir=out/again",
        "",
    ]
    # also defaults, since a run that starts from a model has others
    lines += [f"{key} = {settings[key]!r}" for key in settings if key not in left_out]
    text = "\n".join(lines) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
