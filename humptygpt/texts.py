"""The text around sampling: prompts -> token ids, and sampled tokens -> characters."""

import codecs
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from humptygpt.config import UserError, nearest_path, note, refuse
from humptygpt.sampling import Context, continue_texts
from humptygpt.tokenizers import END_OF_TEXT, Tokenizer

# --------------------------------------------------------------------------------------
# Prompts -> token ids


class Prompt(NamedTuple):
    number: int  # from 0
    text: str  # without a leading end-of-text
    ids: np.ndarray  # (T,)


def read_prompts(
    start: str | None, prompts: str | None, tokenizer: Tokenizer, block_size: int
) -> list[Prompt]:
    """Read the prompts that --start and --prompts name. Raises UserError."""
    if prompts is not None:
        texts = read_text(prompts).removesuffix("\n").split("\n")
        if texts == [""]:
            raise UserError(f"{prompts} has no prompts; write one per line")
    elif start is not None:
        texts = [read_start(start)]
    else:
        ids = tokenizer.start()
        return [Prompt(0, "" if tokenizer.eot is not None else tokenizer.decode(ids), ids)]
    found = []
    for number, text in enumerate(texts):
        with refuse(f"prompt {number + 1:,}: "):
            ids = encode_prompt(text, tokenizer)
        if len(ids) > block_size:
            note(
                f"prompt {number + 1:,} has {len(ids):,} tokens; only the last {block_size:,} are used"
            )
        found.append(Prompt(number, text.removeprefix(END_OF_TEXT), ids))
    return found


def encode_prompt(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Return the token ids of a prompt, (T,). Raises UserError if it is empty or has unknown characters."""
    if not text:
        raise UserError(
            "the prompt is empty; give at least one character, or leave out --start"
        )
    # nanoGPT's users write end-of-text before a prompt
    separated = tokenizer.eot is not None and text.startswith(END_OF_TEXT)
    if separated:
        text = text.removeprefix(END_OF_TEXT)
    before = tokenizer.start()[: int(separated or tokenizer.bos is not None)]
    return np.concatenate([before, tokenizer.encode(text)]) if text else before


def read_start(start: str) -> str:
    """Return the text of --start, or the content of the file that it names."""
    if start.startswith("FILE:"):
        return read_text(os.path.expanduser(start[5:]))  # noqa: PTH111
    return read_text(start) if start == "-" else start


def read_text(path: str) -> str:
    """Read a text file, or standard input if path is "-"."""
    try:
        if path == "-":
            return sys.stdin.read()
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the text {path}: it is not UTF-8") from error
    except OSError as error:
        near = nearest_path(path) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"cannot read the text {path}: {error.strerror}{near}") from error


def typed_lines() -> Iterator[str]:
    """Yield lines from standard input, and print "> " before each if it is a terminal."""
    print("Ctrl-D ends; an empty line continues the text", file=sys.stderr)
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def pad(texts: list[np.ndarray]) -> Tensor:
    """Combine texts, (T,) token ids each, into one batch, (B, T), padded with -1 on the left."""
    rows = [torch.from_numpy(ids) for ids in texts]
    return pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")


# --------------------------------------------------------------------------------------
# Token -> characters


class TextStream:
    """The text of one sample: feed() its tokens and show the characters that it returns.

    A character is shown once its last byte has arrived; an incomplete one is never shown. The text ends before the
    first stop text. Text that may begin a stop text is held back until later tokens decide.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self.pieces = tokenizer.pieces
        self.eot = tokenizer.eot
        self.stop = stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""
        self.ended = False

    def feed(self, token: int) -> str:
        """Return the characters that can be shown now."""
        if token == self.eot:
            self.ended = True
            return self.close()
        self.held += self.decoder.decode(self.pieces[token])
        ends = [self.held.index(text) for text in self.stop if text in self.held]
        if ends:
            self.ended = True
            return self.close()[: min(ends)]
        for n in range(len(self.held)):
            if any(text.startswith(self.held[n:]) for text in self.stop):
                shown, self.held = self.held[:n], self.held[n:]
                return shown
        return self.close()

    def close(self) -> str:
        """Return all characters that were held back."""
        shown, self.held = self.held, ""
        return shown


class Piece(NamedTuple):
    """Text that became printable with one new token or, at the end of a text, the text that was held back."""

    row: int  # the number of the text in the batch
    text: str
    token: int | None = None  # None at the end of a text
    logits: Tensor | None = None  # (V,), from which the token was drawn


def stream_texts(
    context: Context,
    tokenizer: Tokenizer,
    samples: Collection[int],
    max_new_tokens: int,
    stop: tuple[str, ...] = (),
    **sampling,
) -> Iterator[Piece]:
    """Continue the texts of the context. stop: as for TextStream. samples, sampling: arguments for Sampler."""
    streams = [TextStream(tokenizer, stop) for _ in samples]
    stopped = set()
    for step in continue_texts(
        context,
        max_new_tokens,
        tokenizer.vocab_size,
        samples=samples,
        eot=tokenizer.eot,
        stopped=stopped,
        **sampling,
    ):
        for row, token, logits in zip(step.rows, step.ids, step.logits, strict=True):
            yield Piece(row, streams[row].feed(token), token, logits)
            if streams[row].ended:
                stopped.add(row)
    for row, stream in enumerate(streams):
        yield Piece(row, stream.close())
