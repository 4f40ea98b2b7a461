"""Evaluate a model: its validation loss in nats per token, in bits per byte and as perplexity, and what it writes."""

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from humptygpt.data.dataset import BLOCKS, Dataset, TokenDataset, count_targets
from humptygpt.device import autocast, to_device
from humptygpt.training.ranks import Ranks

if TYPE_CHECKING:  # run.py imports this file
    from humptygpt.training.run import Run

SAMPLE_TOKENS = 300  # length of the sample at the end of a run
LINE_TOKENS = 60  # length of the sample after each evaluation
Show = Callable[..., str]  # (model, dataset) -> text for the user
# fewest batches for a standard error: a dozen in each block, because neighbouring batches of one scene are alike
FEWEST_BATCHES = 96


@torch.no_grad()
def validation_loss(run: "Run", net: nn.Module, eval_iters: int | None) -> tuple[float, float | None]:
    """Compute the loss of net over an evaluation set, which ranks divide if net is what they train.

    Evaluation draws no random numbers, so it cannot affect training. Afterwards, net is in its previous mode again,
    training or evaluation. eval_iters: batches in the set; None: the whole validation split.
    Returns the mean loss in nats per token, and its standard error, or None if there are too few batches for that.
    """
    ranks = run.ranks if net is run.net else Ranks(run.device)
    was_training = net.training
    net.eval()
    losses, weights = [], []
    batches = run.dataset.val_batches(run.config.batch_size, eval_iters)
    for batch in own_batches(batches, ranks.rank, ranks.size):
        with autocast(run.device, run.dtype):
            _, loss, *_ = net(**to_device(batch, run.device))
        losses.append(loss)
        weights.append(count_targets(batch))
    net.train(was_training)
    # each rank fills its own rows, (mean loss, number of targets), and leaves 0 in the others
    table = torch.zeros(ranks.size * len(losses), 2, dtype=torch.float64)
    own = [*zip(torch.stack(losses).tolist(), weights, strict=True)]
    table[ranks.rank :: ranks.size] = torch.tensor(own, dtype=torch.float64)
    rows = np.array(ranks.sum(table).tolist())
    losses, weights = rows[rows[:, 1] > 0].T
    mean = losses @ weights / weights.sum()
    return float(mean), standard_error(losses - mean, weights)


def standard_error(deviations: np.ndarray, weights: np.ndarray) -> float | None:
    """Estimate the standard error of a weighted mean loss, as a measure of the loss on all text of this kind.

    Neighbouring batches are alike, so batches do not count as independent, but long blocks of neighbours do. Returns
    None if there are too few batches for that. deviations: each batch's loss minus the mean, (batches,).
    """
    if len(weights) < FEWEST_BATCHES:
        return None
    blocks = np.array_split(deviations * weights, BLOCKS)
    sums = np.array([block.sum() for block in blocks])
    return float(sums.std(ddof=1) * BLOCKS**0.5 / weights.sum())


def own_batches(batches: Iterable[dict], rank: int, size: int) -> Iterator[dict]:
    """Yield every size-th batch, starting at `rank`.

    All ranks get the same number of batches: if one is missing, a batch without targets takes its place.
    """
    for number, batch in enumerate(batches):
        if number % size == rank:
            yield batch
    if rank > number % size:
        yield batch | {"targets": torch.full_like(batch["targets"], -1)}


def cost_of_whole_split(run: "Run") -> float:
    """Return the cost of evaluating the whole validation split at the end, in units of a regular evaluation.

    A cost of 0 means that the run does not end with this evaluation. The run skips it if regular evaluations already
    cover the split, if it would take more than a twentieth of the training time, if eval_iters is set, or if torchrun
    has started several ranks.
    """
    config = run.config
    if config.eval_iters or run.ranks.by_torchrun:
        return 0
    batches = run.dataset.all_val_batches(config.batch_size)
    steps = config.max_iters * config.gradient_accumulation_steps
    cost = batches / config.evaluated_batches()
    return cost if cost > 1 and batches / 3 < steps / 20 else 0


@lru_cache(1)
def evaluated(dataset: Dataset, batch_size: int, eval_iters: int | None) -> dict:
    """Return the number of tokens that an evaluation predicts, and a checksum of their text.

    The checksum covers only how often each character occurs, so it depends on neither the tokenizer nor the order of
    sentence pairs.
    """
    batches = dataset.val_batches(batch_size, eval_iters)
    targets = torch.cat([batch["targets"].flatten() for batch in batches])
    targets = targets[targets >= 0].numpy()
    # the first token of the split is not predicted, but how much text it covers depends on the tokenizer
    ids = np.append(dataset.read("val", np.array([0]), 1), targets)
    counts = sorted(Counter(dataset.tokenizer.decode(ids)).items())
    checksum = zlib.crc32(repr(counts).encode())
    return {"val_tokens": len(targets), "val_text": f"{checksum:08x}"}


def measures(run: "Run", net: nn.Module, eval_iters: int | None) -> dict[str, float | str]:
    """Evaluate, and return a row of metrics: the loss in several units, and a fingerprint of the text."""
    loss, error = validation_loss(run, net, eval_iters)
    bits_per_nat = 1 / math.log(2) / run.dataset.val_bytes_per_token()  # bits per byte
    row = {
        "val_loss": loss,
        "val_bits_per_byte": loss * bits_per_nat,
        "val_perplexity": math.exp(min(loss, 700)),  # exp overflows beyond 700
    }
    if error:
        row["val_standard_error"] = error
        row["val_bits_standard_error"] = error * bits_per_nat
    if run.ranks.first:
        row |= evaluated(run.dataset, run.config.batch_size, eval_iters)
        if run.dataset.trains_on_all:  # the loss compares with no other
            row["val_text"] += " trained on"
    return row


def evaluation_line(row: dict[str, float]) -> str:
    """Format an evaluation's metrics, for example: val loss 2.0123 ± 0.0160 (2.903 bits per byte, perplexity 7.48)"""
    bits, perplexity = row["val_bits_per_byte"], row["val_perplexity"]
    text = f"val loss {row['val_loss']:.4f}"
    if error := row.get("val_standard_error"):
        text += f" ± {error:.4f}"
    return f"{text} ({bits:.3f} bits per byte, perplexity {perplexity:.2f})"


# --------------------------------------------------------------------------------------
# What a run shows and scores, by task


@dataclass(frozen=True)
class Task:
    """What a run shows and scores. The functions get the model on its device, in evaluation mode, under autocast."""

    batches_vary: bool = False  # batches differ in shape
    # shown after each evaluation; its third argument is the number of examples
    evaluation_examples: Show | None = None
    final_examples: Show | None = None  # shown at the end of a run
    # (model, dataset) -> how many held-out questions it answers right, by which the best model is chosen
    count_right: Callable[..., int] | None = None
    # at the end of a run and with --eval_only: a text to show, and {name: number} for metrics.jsonl
    score: Callable[..., tuple[str, dict[str, float]]] | None = None
    sample_label: str = "more of this"  # label printed before sample_command
    sample_command: str = "python sample.py {}"  # {} is the argument that names the run


def find_task(name: str) -> Task:
    """Return what a run of this task shows and scores."""
    if name == "chat":
        from humptygpt.training import chat

        return Task(
            evaluation_examples=chat.show_replies,
            final_examples=chat.show_answers,
            count_right=chat.count_right,
            sample_label="talk to it",
        )
    if name == "translation":
        from humptygpt.training import translation

        return Task(
            batches_vary=True,
            evaluation_examples=translation.translate_examples,
            score=translation.score_translations,
            sample_label="translate",
            sample_command='python sample.py {} --start="..."',
        )
    return TEXT


def sample(model: nn.Module, dataset: TokenDataset, length: int) -> str:
    """Generate a text of `length` tokens without a prompt."""
    tokenizer = dataset.tokenizer
    start = torch.from_numpy(tokenizer.start()).to(next(model.parameters()).device)
    row = model.generate(start[None], length, temperature=0.8)[0, len(start) :]
    # ids beyond the tokenizer's only pad the vocabulary
    return tokenizer.decode(row[row < tokenizer.vocab_size].tolist()).strip()


def sample_line(model: nn.Module, dataset: TokenDataset, count: int = 1) -> str:
    line = " ".join(sample(model, dataset, LINE_TOKENS).split())
    return f"  > {line[:100]}"


def sample_text(model: nn.Module, dataset: TokenDataset) -> str:
    return f"\n{sample(model, dataset, SAMPLE_TOKENS)}\n"


TEXT = Task(evaluation_examples=sample_line, final_examples=sample_text)
