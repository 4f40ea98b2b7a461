"""Tokens, one by one -> the characters that can already be shown."""

import codecs

from humptygpt.tokenizer.tokenizers import Tokenizer


class TextStream:
    """The text of one sample: feed() its tokens and show what comes back.

    A character comes when the last of its bytes is there; one that is never completed does not come. The text ends
    before the first of the stop texts, and what may be the beginning of one is held back until that is known.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self.pieces, self.eot, self.stop = tokenizer.pieces, tokenizer.eot, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""
        self.ended = False

    def feed(self, token: int) -> str:
        if token == self.eot:
            self.ended = True
            return self.close()
        self.held += self.decoder.decode(self.pieces[token])
        found = [at for text in self.stop if (at := self.held.find(text)) >= 0]
        if found:
            self.ended = True
            self.held = self.held[: min(found)]
            return self.close()
        return self.release(len(self.held) - self.uncertain())

    def uncertain(self) -> int:
        """How many of the last characters may be the beginning of a stop text."""
        longest = min(max(map(len, self.stop), default=1) - 1, len(self.held))
        return next(
            (
                n
                for n in range(longest, 0, -1)
                if any(t.startswith(self.held[-n:]) for t in self.stop)
            ),
            0,
        )

    def release(self, n: int) -> str:
        shown, self.held = self.held[:n], self.held[n:]
        return shown

    def close(self) -> str:
        """What was held back: there is no next token."""
        return self.release(len(self.held))
