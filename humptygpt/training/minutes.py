"""--minutes: choose a model and training settings for a text, a machine and a time limit, and end training on time.

The constants of the scaling law were fitted by benchmarks/law.py to runs of one to ten minutes with the recipe of
config/shakespeare_char.py, so for longer runs and other settings its predictions are extrapolations.
"""

import math
import statistics
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from humptygpt.cli import UserError
from humptygpt.data.dataset import TokenDataset
from humptygpt.formats.huggingface import find_family
from humptygpt.machine import is_out_of_memory
from humptygpt.model import ModelConfig
from humptygpt.training.memory import check_training_fits, limited_memory, model_on_meta
from humptygpt.training.ranks import Ranks
from humptygpt.training.run import Clock, Progress, Run
from humptygpt.training.settings import TrainConfig
from humptygpt.training.setup import assemble, make_model
from humptygpt.training.step import train_step

# (n_layer, n_embd) of the sizes to try: each is about twice as expensive as the one before
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
HEAD_SIZE = 64
CONTEXTS = (128, 256, 512)  # in tokens; the longest that the text allows is chosen
# tokens per step for a text of less than one byte per parameter, of one to two, and of more. If there is more text than
# a model can learn, reading more of it in large steps teaches more than many small steps do.
STEPS = (1024, 2048, 4096)
EVALUATIONS = 4  # number of evaluations in a run
TIME_TO_TRAIN = 0.85  # fraction of the remaining time to plan for training steps; the rest is for evaluations
PROBE_STEPS = 5  # steps run to measure the time per step
EPOCHS = 10  # epochs for each member of a small ensemble; a large one has twice as many
SMALL_ENSEMBLE = 6  # members
MOST_MEMBERS = 32


# --------------------------------------------------------------------------------------
# The scaling law

A = 8.0
ALPHA = 0.27
B = 30.0
BETA = 0.26
C = 1.0
GAMMA = 0.5
SMALL_STEPS = 0.1  # with 0, only the amount of text read would count; with 1, only the number of steps
PARAMETERS_PER_BYTE = 1.0  # parameters that each byte of text supports; any more are surplus and count for less
REPEATS = 1.0  # repetition and surplus parameters can add at most this multiple of the original amount
# The default weight decay was tuned for steps of RECIPE_STEP tokens and a text of RECIPE_TEXT tokens.
RECIPE_STEP = 1024
RECIPE_TEXT = 700_000


def loss(
    parameters: float,
    read: float,
    text: float,
    context: float = 256,
    step: float = 1024,
) -> float:
    """Predict a model's loss in bits per byte, minus the entropy of the text, which no model can avoid.

    The form follows Hoffmann et al. 2022, arXiv:2203.15556. Repeated text and surplus parameters are discounted as in
    Muennighoff et al. 2023, arXiv:2305.16264, eq. 5 and 6. Many small steps learn more from the same amount of text
    than a few large ones.

    parameters: excluding embeddings. read: bytes read in training, including repetitions. text: bytes of the text.
    context: bytes of context for a prediction. step: tokens per step.
    """
    taught = worth(parameters, PARAMETERS_PER_BYTE * text)
    learned = worth(read, text) * (1024 / step) ** SMALL_STEPS
    return A * taught**-ALPHA + B * learned**-BETA + C * context**-GAMMA


def worth(amount: float, once: float) -> float:
    """Effective amount after discounting what exceeds `once`, the amount available without repetition."""
    more = max(0.0, amount / once - 1)
    return min(amount, once) * (1 + REPEATS * (1 - math.exp(-more / REPEATS)))


def most_parameters(text: float) -> float:
    """Return the size of the largest model to try, in parameters excluding embeddings. text: its bytes.

    A larger model would memorise the text. In the same time, several members of this size learn more.
    """
    return 140 * text**0.75


def tokens_per_step(parameters: float, text: float) -> int:
    """Choose the size of a step. parameters: excluding embeddings. text: its bytes."""
    return STEPS[min(int(text / parameters), len(STEPS) - 1)]


def count_members(epochs: float) -> int:
    """Choose the number of members. epochs: how often one model could read the text in the time that there is.

    From SMALL_ENSEMBLE members on, reading the text more often helps more than another member does.
    """
    return max(1, round(min(epochs / EPOCHS, SMALL_ENSEMBLE)), round(epochs / EPOCHS / 2))


def dropout(epochs: float, parameters: float) -> float:
    """Choose a dropout rate: it grows with the epochs beyond 2.4, and with the model, because large ones memorise more.

    Any dropout makes a step about a tenth slower, so a rate of no more than 0.03 is left out.
    """
    rate = 0.05 * (parameters / 1e6) ** 0.4 * math.log2(max(epochs, 1) / 2.4)
    return round(min(0.3, rate), 2) if rate > 0.03 else 0.0


def decay(weight_decay: float, tokens: float, text: int) -> float:
    """Scale the default weight decay to the size of the step and of the text.

    Weight decay makes the weights an average over recent updates. With this scaling, the average covers the same number
    of epochs for every text. Source: Wang & Aitchison 2024, arXiv:2405.13698.

    tokens: tokens per step. text: tokens in the text.
    """
    return float(f"{weight_decay * min(10, tokens / RECIPE_STEP * RECIPE_TEXT / text):.2g}")


# --------------------------------------------------------------------------------------
# The choice


def begin(
    config: TrainConfig,
    model_config: ModelConfig,
    given: Collection[str],
    dataset: TokenDataset,
    clock: Clock,
    device: torch.device,
) -> tuple[TrainConfig, ModelConfig]:
    """Choose the settings for which the scaling law predicts the lowest loss in the time left.

    A model loaded with init_from keeps its size, and a resumed run keeps all of its settings. Also sets the dataset's
    block_size, and the clock's estimate of an evaluation. Raises UserError if there is not enough time or memory for
    even one step.

    given: keys set by the user, which keep their values.
    """
    if dataset.task not in ("language modelling", "chat") or not dataset.splits:
        raise UserError(
            f"minutes={config.minutes:g} works only for prepared text and conversations, not for {config.dataset};"
            " use max_iters instead"
        )
    # compiling takes about a minute, so a timed run compiles only if the user asks for it
    config = replace(config, compile=bool(config.compile))
    progress = clock.progress
    if progress.iter:
        step = progress.seconds / progress.iter
    else:
        config, model_config, step = choose(config, model_config, given, dataset, clock, device)
    # an evaluation batch is assumed to take a third as long as a training batch
    rows = len(dataset.val_starts(config.batch_size, config.evaluated_batches()))
    batches = rows / config.batch_size
    clock.evaluation = step * batches / config.gradient_accumulation_steps / 3
    return config, model_config


def choose(
    config: TrainConfig,
    model_config: ModelConfig,
    given: Collection[str],
    dataset: TokenDataset,
    clock: Clock,
    device: torch.device,
) -> tuple[TrainConfig, ModelConfig, float]:
    """Choose the settings that are not given: the size, members, dropout, steps and weight decay.

    Returns the settings, and the seconds that a step takes with them.
    """
    from_scratch = config.init_from == "scratch"
    size = choose_size(config, model_config, given, dataset, clock, device)
    config, model_config = size.config, size.model_config
    tokens = config.batch_size * config.gradient_accumulation_steps * model_config.block_size
    targets, text = tokens * dataset.target_fraction, dataset.train.targets
    epochs = planned(clock) / size.seconds * targets / text
    # a model that can be exported stays one that can
    may_have_members = from_scratch and model_config.model == "gpt"
    members = 1
    if may_have_members and not can_be_exported(model_config) and "n_members" not in given:
        members = min(MOST_MEMBERS, count_members(epochs))
    while True:
        model_config = size.model_config
        if members > 1:
            model_config = replace(model_config, n_members=members)
        if "dropout" not in given:
            rate = dropout(epochs / members, size.parameters)
            model_config = replace(model_config, dropout=rate)
        seconds = size.seconds
        if model_config == size.model_config:
            break
        try:  # members and dropout make steps slower
            seconds = seconds_per_step(config, model_config, dataset, device)
            break
        except Exception as error:
            if members == 1 or not is_out_of_memory(error):
                raise
            members //= 2
    steps = max(1, int(planned(clock) / seconds))
    chosen = {
        "max_iters": steps,
        "lr_decay_iters": None,
        "eval_interval": max(1, math.ceil(steps / EVALUATIONS)),
        "warmup_iters": min(config.warmup_iters, steps // 10),
    }
    if from_scratch:  # more weight decay would make a trained model forget
        chosen["weight_decay"] = decay(config.weight_decay, targets, text)
    chosen = {key: value for key, value in chosen.items() if key not in given}
    return replace(config, **chosen), model_config, seconds


class Size(NamedTuple):
    """A size that was tried, with the context and the batch that go with it."""

    config: TrainConfig
    model_config: ModelConfig
    parameters: int  # excluding embeddings
    seconds: float  # per step


def choose_size(
    config: TrainConfig,
    model_config: ModelConfig,
    given: Collection[str],
    dataset: TokenDataset,
    clock: Clock,
    device: torch.device,
) -> Size:
    """Time sizes in ascending order until the scaling law predicts a higher loss.

    The context follows from the text, and the batch from the text and the size.
    """
    shapes = [model_config]
    if config.init_from == "scratch":
        context = max(dataset.contexts(CONTEXTS), default=model_config.block_size)
        if "block_size" not in given:
            model_config = replace(model_config, block_size=context)
        shapes = sizes(model_config, given)
    context = model_config.block_size
    dataset.resize(context)
    bytes_per_token, share = dataset.val_bytes_per_token(), dataset.target_fraction
    text = dataset.train.targets * bytes_per_token
    row = context * config.gradient_accumulation_steps  # tokens per step with batch_size=1
    available = planned(clock)
    best, lowest = None, math.inf
    for shape in shapes:
        model = model_on_meta(config, shape)
        parameters = count_inner(model)
        if "batch_size" not in given:
            batch_size = max(1, tokens_per_step(parameters, text) // row)
            config = replace(config, batch_size=batch_size)
        if not best:
            check_training_fits(config, shape, device)
        elif parameters > most_parameters(text):
            break
        try:
            seconds = seconds_per_step(config, shape, dataset, device)
        except Exception as error:
            if best and is_out_of_memory(error):
                break
            raise
        if seconds > available:
            break
        tokens = config.batch_size * row
        read = available / seconds * tokens * share * bytes_per_token
        predicted = loss(parameters, read, text, context * bytes_per_token, tokens)
        if predicted > lowest:
            break
        best, lowest = Size(config, shape, parameters, seconds), predicted
    if not best:
        raise UserError(
            f"minutes={config.minutes:g} is too short for a single step, which takes {seconds:.2g} s;"
            " use more, or try again now that the data is prepared"
        )
    return best


def sizes(model_config: ModelConfig, given: Collection[str]) -> list[ModelConfig]:
    """List the sizes that the given keys allow, from the smallest up. If they allow none, list the model as configured.

    Each size has as many heads of HEAD_SIZE as fit, or fewer and larger heads if the given keys require it.
    """
    fixed = {key: value for key, value in vars(model_config).items() if key in given}
    shapes = {}  # a dict, used as an ordered set
    for n_layer, n_embd in SIZES:
        size = {"n_layer": n_layer, "n_embd": n_embd} | fixed
        most = size["n_embd"] // (model_config.head_size or HEAD_SIZE)
        for n_head in range(max(model_config.n_kv_head or 1, most), 0, -1):
            shape = replace(model_config, **{"n_head": n_head} | size)
            with suppress(ValueError):
                shape.validate()
                shapes[shape] = None
                break
    return [*shapes] or [model_config]


def count_inner(model: nn.Module) -> int:
    """Count the parameters of one member, excluding the embedding and the head."""
    inner = [p.numel() for name, p in model.named_parameters() if "wte" not in name and "lm_head" not in name]
    return sum(inner) // model.config.n_members


def planned(clock: Clock) -> float:
    """Seconds available for training steps, if the run is planned now."""
    return TIME_TO_TRAIN * (clock.end - time.perf_counter())


def seconds_per_step(
    config: TrainConfig,
    model_config: ModelConfig,
    dataset: TokenDataset,
    device: torch.device,
) -> float:
    """Train a model of this size for a few steps. Returns the median time per step, in seconds."""
    dataset.resize(model_config.block_size)
    # more micro-batches would take as long each
    trial = replace(config, gradient_accumulation_steps=1)
    model = make_model(trial, model_config)
    run = assemble(trial, dataset, model, Ranks(device), Clock(Progress()))
    with limited_memory(run):
        seconds = run.ranks.each(time_steps, run)
    return seconds * config.gradient_accumulation_steps


def time_steps(run: Run) -> float:
    times = []
    for _ in range(PROBE_STEPS):
        started = time.perf_counter()
        losses, _, _ = train_step(run)
        losses["train_loss"].item()  # waits for the GPU
        run.model.zero_grad()
        run.progress.iter += 1
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


# --------------------------------------------------------------------------------------
# Messages


def can_be_exported(model_config: ModelConfig) -> bool:
    with suppress(UserError):
        find_family(model_config)
        return True
    return False


def choice(run: Run) -> str:
    """Describe the model chosen for a run, and say whether it can be exported."""
    config = run.model.config
    try:
        export = f"as {find_family(config).name}"
    except UserError as error:
        export = f"not possible; {error}"
    several = f"{config.n_members} members of " if config.n_members > 1 else ""
    return (
        f"minutes: {run.config.minutes:g}; {several}{config.n_layer} layers of {config.n_embd} features,"
        f" a context of {config.block_size} tokens, dropout {config.dropout:g}\n"
        f"export: {export}"
    )
