"""Find out how much of what a model writes stands word for word in its training text."""

from collections.abc import Iterable, Iterator

from torch import nn

from humptygpt.data import TokenDataset
from humptygpt.tasks import find_task

PIECE = 50  # characters
HALF = PIECE // 2


def describe(model: nn.Module, dataset: TokenDataset) -> str:
    """Let a model write texts or answer held-out questions, and say how much of that is its training text."""
    texts = find_task(dataset.task).write(model, dataset)
    chunks = (dataset.tokenizer.decode(ids) for _, ids in dataset.chunks("train"))
    share, longest = recited(texts, chunks)
    what = "replies" if dataset.task == "chat" else "texts"
    return (
        f"of its {what}, {share:.1%} of all pieces of {PIECE} characters stand word for word in the training text;"
        f" no run there is longer than {longest:,} characters"
    )


def recited(texts: list[str], chunks: Iterable[str]) -> tuple[float, int]:
    """Compare texts with the chunks of a training text.

    Returns the share of the texts' pieces that stand in the training text, and the characters of the longest run in
    which every piece does.
    """
    wanted = {piece for text in texts for piece in windows(text, PIECE)}
    halves = {half for text in texts for half in windows(text, HALF)}
    found = set()
    before = ""
    for chunk in chunks:
        training = before + chunk
        # a piece contains one of these halves, wherever it begins
        for start in range(0, len(training), HALF):
            if training[start : start + HALF] in halves:
                around = training[max(0, start - HALF) : start + PIECE]
                found |= wanted.intersection(windows(around, PIECE))
        before = training[1 - PIECE :]
    count = known = 0
    longest = PIECE - 1
    for text in texts:
        run = 0
        for piece in windows(text, PIECE):
            run = run + 1 if piece in found else 0
            known += piece in found
            count += 1
            longest = max(longest, run + PIECE - 1)
    return known / max(1, count), longest


def windows(text: str, size: int) -> Iterator[str]:
    """Yield every `size` characters in a row."""
    return (text[i : i + size] for i in range(len(text) - size + 1))
