"""Find out how much of what a model writes stands word for word in its training text."""

from collections.abc import Iterable, Iterator

from torch import nn

from humptygpt import cli
from humptygpt.data.dataset import Dataset, TokenDataset
from humptygpt.data.open import open_data
from humptygpt.models.build import make_model_config
from humptygpt.training.evaluation import find_task
from humptygpt.training.resume import check_same_data
from humptygpt.training.settings import TrainConfig

PIECE = 50  # characters


def describe(model: nn.Module, dataset: TokenDataset) -> str:
    """Let a model write texts or answer held-out questions, and say how much of that is its training text."""
    texts = find_task(dataset.task).write(model, dataset)
    chunks = (dataset.tokenizer.decode(ids) for _, ids in dataset.chunks("train"))
    what = "replies" if dataset.task == "chat" else "texts"
    return (
        f"of its {what}, {recited(texts, chunks):.1%} of all pieces of {PIECE} characters"
        " stand word for word in the training text"
    )


def recited(texts: list[str], chunks: Iterable[str]) -> float:
    """Compute the share of the texts' pieces that stand in a training text, which comes in chunks."""
    written = [piece for text in texts for piece in pieces(text)]
    wanted, found = set(written), set()
    before = ""
    for chunk in chunks:
        training = before + chunk
        found |= wanted.intersection(pieces(training))
        before = training[1 - PIECE :]
    return sum(piece in found for piece in written) / max(1, len(written))


def pieces(text: str) -> Iterator[str]:
    """Yield all pieces of a text, one for each position at which it fits."""
    return (text[i : i + PIECE] for i in range(len(text) - PIECE + 1))


def training_data(run: dict) -> Dataset:
    """Open the data that a run was trained on. run: as in Pipeline. Raises UserError if it is not there any more."""
    config = cli.restore(TrainConfig, run["train_config"])
    model_config = make_model_config(run["model_config"])
    dataset = open_data(config.dataset, model_config, config.seed)
    check_same_data(run, dataset, config.out_dir)
    return dataset
