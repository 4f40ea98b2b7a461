"""Write a text, or talk, with a model at the terminal."""

import sys
from collections.abc import Iterator
from itertools import chain

from humptygpt.config import UserError, find, note
from humptygpt.sampling import Context, encode_prompt, read_start, stream_texts

TALK = "humptygpt.chat.talk:Talk"


def typed_lines(advice: str = "") -> Iterator[str]:
    """Print advice, and yield lines from standard input, with "> " as the prompt if it is a terminal."""
    print(f"Ctrl-D quits{advice}", file=sys.stderr)
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError("standard input is not valid UTF-8") from error


def converse(config, loaded, sampling: dict) -> None:
    """Read a line, print what the model writes after it, and repeat. Without --interactive, only --start is answered.

    config: a sample.SampleConfig. loaded: a sample.Pipeline. sampling: arguments of stream_texts().
    """
    is_chat = loaded.task == "chat"
    partner = find(TALK)(loaded, config.system) if is_chat else Text(loaded)
    first = [] if config.start is None else [read_start(config.start)]
    lines = typed_lines(partner.advice) if config.interactive or not first else []
    for turn, line in enumerate(chain(first, lines)):
        try:
            for text in partner.reply(line, turn, **sampling):
                print(text, end="", flush=True)
            print(flush=True)
        except (UserError, UnicodeEncodeError) as error:
            note(str(error))


class Text:
    """A text that is continued by turns. Everything that was read and written stays in the context.

    loaded: a sample.Pipeline.
    """

    advice = "; an empty line continues the text"  # printed after "Ctrl-D quits"

    def __init__(self, loaded):
        self.loaded = loaded
        self.context = None

    def reply(self, line: str, sample: int, **sampling) -> Iterator[str]:
        """Yield the continuation in pieces. sample: seeds it. Raises UserError if the line cannot be encoded."""
        tokenizer = self.loaded.tokenizer
        if self.context is None:  # the text starts with this line
            ids = encode_prompt(line, tokenizer) if line else tokenizer.start().tolist()
            self.context = Context(self.loaded.model, [ids], device=self.loaded.device)
        elif line:
            self.context.append([tokenizer.encode_rest(line).tolist()])
        for piece in stream_texts(self.context, tokenizer, [sample], **sampling):
            yield piece.text
