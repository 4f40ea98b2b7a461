"""Continue a text together with somebody at the terminal."""

import sys
from collections.abc import Iterator
from itertools import chain

from humptygpt.config import UserError, note
from humptygpt.sampling import Context, encode_prompt, read_start, stream_texts


def typed_lines(advice: str = "Ctrl-D quits") -> Iterator[str]:
    """Print the advice, and yield lines from standard input, with "> " as the prompt if it is a terminal."""
    print(advice, file=sys.stderr)
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def converse(config, loaded, sampling: dict) -> None:
    """Read a line, print its continuation, and repeat. Everything read and printed stays in the context.

    config: a sample.SampleConfig. loaded: a sample.Pipeline. sampling: arguments of stream_texts().
    """
    tokenizer = loaded.tokenizer
    context = None
    first = [] if config.start is None else [read_start(config.start)]
    for turn, line in enumerate(
        chain(first, typed_lines("Ctrl-D quits; an empty line continues the text"))
    ):
        try:
            if context is None:  # the text starts with this line
                ids = encode_prompt(line, tokenizer) if line else tokenizer.start().tolist()
                context = Context(loaded.model, [ids], device=loaded.device)
            elif line:
                context.append([tokenizer.encode_rest(line).tolist()])
        except UserError as error:
            note(str(error))
            continue
        for piece in stream_texts(context, tokenizer, [turn], **sampling):
            print(piece.text, end="", flush=True)
        print(flush=True)
