"""Find out how much of what a model writes stands word for word in its training text."""

from collections.abc import Iterable

import numpy as np
from torch import nn

from humptygpt.data import TokenDataset
from humptygpt.sampling import Context, stream_texts

PIECE = 50  # characters
TEXTS = 20  # written by the model
LENGTH = 500  # characters of a text, about
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no character's bits are lost


def describe(model: nn.Module, dataset: TokenDataset) -> str:
    """Let a model write texts or answer held-out questions, and say how much of that is its training text."""
    texts = write_texts(model, dataset)
    ids = (ids for _, ids in dataset.chunks("train"))
    share, longest = recited(texts, map(dataset.tokenizer.decode, ids))
    what = "replies" if dataset.task == "chat" else "texts"
    if not longest:
        return f"of its {what}, no {PIECE} characters in a row stand in the training text"
    return (
        f"of its {what}, {share:.1%} of all pieces of {PIECE} characters stand word for word in the training text;"
        f" the longest run has {longest:,} characters"
    )


def write_texts(model: nn.Module, dataset: TokenDataset) -> list[str]:
    tokenizer, device = dataset.tokenizer, next(model.parameters()).device
    if dataset.task == "chat":
        from humptygpt.chat.task import QUESTIONS, answer

        asked = dataset.asked(QUESTIONS)
        longest = max((each.length for each in asked), default=0)
        return answer(model, dataset, asked, longest)
    context = Context(model, [tokenizer.start().tolist()] * TEXTS, device=device)
    tokens = round(LENGTH / dataset.val_bytes_per_token())
    texts = [""] * TEXTS
    for piece in stream_texts(
        context, tokenizer, range(TEXTS), max_new_tokens=tokens, temperature=0.8
    ):
        texts[piece.row] += piece.text
    return texts


def recited(texts: list[str], training: Iterable[str]) -> tuple[float, int]:
    """Compare texts with a training text, which comes in parts.

    Returns the share of the texts' pieces that stand in the training text, and the characters of the longest run in
    which every piece does.
    """
    pieces = [hashes(text) for text in texts]
    found = [np.zeros(len(each), dtype=bool) for each in pieces]
    text = ""
    for part in training:
        text = text[-PIECE + 1 :] + part
        known = np.unique(hashes(text))
        for each, is_known in zip(pieces, found, strict=True):
            is_known |= np.isin(each, known)
    longest = 0
    for is_known in found:
        # runs of True lie between neighbouring places that are False
        ends = np.flatnonzero(~np.concatenate([[False], is_known, [False]]))
        longest = max(longest, int(np.diff(ends).max()) - 1)
    share = np.concatenate(found).mean() if any(map(len, found)) else 0.0
    return float(share), longest + PIECE - 1 if longest else 0


def hashes(text: str) -> np.ndarray:
    """Hash each piece of a text, (len(text) - PIECE + 1,)."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    codes = codes.astype(np.uint64)
    result = np.zeros(max(0, len(codes) - PIECE + 1), dtype=np.uint64)
    for i in range(PIECE):
        result = result * FACTOR + codes[i : i + len(result)]
    return result
