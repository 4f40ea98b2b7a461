"""A picture of where a model finds a text hard: its loss by position, and the words that surprised it most."""

import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from humptygpt.cli import UserError
from humptygpt.files import write_whole
from humptygpt.tokenizers import Tokenizer

WORDS = 15  # words shown
SHOWN = 45  # characters of text shown up to the end of each word


def draw(path: Path, in_windows: np.ndarray, block_size: int, words: list) -> None:
    """Write a PNG file. words: from surprising_words().

    in_windows: (T,), nats of each token, given those before it in its window of block_size tokens.
    """
    figure = Figure((13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    position = np.arange(len(in_windows)) % block_size + 1
    octave = np.ceil(np.log2(position)).astype(int)  # positions 1, 2, 3 to 4, 5 to 8, ...
    count, positions, nats = (
        np.bincount(octave, values) for values in (None, position, in_windows)
    )
    left.semilogx(positions / count, nats / count, "o-", base=2, color="#c2410c")
    left.xaxis.set_major_formatter("{x:.0f}")
    left.set(xlabel="tokens of context", ylabel="loss, nats per token")
    labels, nats = zip(*words[::-1], strict=True)
    right.barh(range(len(words)), nats, color="#9db4c8")
    right.set_yticks(range(len(words)), labels, parse_math=False)
    right.set(xlabel="nats of the last word", title="the most surprising words")
    write_whole(path, lambda file: figure.savefig(file, dpi=130, format="png"))


def surprising_words(
    tokenizer: Tokenizer, ids: np.ndarray, nats: np.ndarray
) -> list[tuple[str, float]]:
    """Find the words with the largest sum of nats, largest first. Returns (the text up to a word's end, its nats).

    ids, nats: (T,). A token that is partly in a word counts for it. Of a repeated word, only the largest sum is shown.
    Raises UserError if there is no word.
    """
    data = b"".join(tokenizer.pieces[i] for i in ids)
    ends = np.cumsum([len(tokenizer.pieces[i]) for i in ids])
    # letters and digits, or signs; in UTF-8, a letter beyond ASCII has bytes from 0x80 on
    words = re.finditer(rb"[\w'\x80-\xff]+|[^\w\s\x80-\xff]+", data)
    spans = np.array([word.span() for word in words])
    if not len(spans):
        raise UserError("the text has no words; leave out --picture")
    first, last = np.searchsorted(ends, spans - [0, 1], "right").T
    total = np.append(0, np.cumsum(nats))
    sums = total[last + 1] - total[first]
    shown = {}
    for i in np.argsort(-sums):
        start, end = spans[i]
        text = data[max(0, end - 2 * SHOWN) : end].decode("utf-8", "ignore")
        shown.setdefault(data[start:end], (" ".join(text.split())[-SHOWN:], sums[i]))
        if len(shown) == WORDS:
            break
    return [*shown.values()]
