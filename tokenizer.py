"""Text -> numbers -> text. Each tokenizer has encode, decode, vocab_size and a state of plain data for checkpoints."""

import codecs
from collections.abc import Iterable, Iterator

import numpy as np

from configurator import UserError


class CharTokenizer:
    """One number for each character of an alphabet, in the order of the alphabet."""

    name = "char"

    def __init__(self, alphabet: str):
        if not alphabet:
            raise UserError("an alphabet of no characters; the text is empty")
        self.alphabet = alphabet
        self.vocab_size = len(alphabet)
        codes = code_points(alphabet)
        self._order = np.argsort(codes)
        self._sorted = codes[self._order]

    @classmethod
    def train(cls, text: str) -> "CharTokenizer":
        """The alphabet is every character of the text, sorted."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int64 (length,). Raises UserError naming the first character that the alphabet lacks."""
        codes = code_points(text)
        place = np.searchsorted(self._sorted, codes).clip(max=self.vocab_size - 1)
        unknown = self._sorted[place] != codes
        if unknown.any():
            char = text[int(unknown.argmax())]
            raise UserError(
                f"character {char!r} (U+{ord(char):04X}) is not among the {self.vocab_size} that this tokenizer knows"
            )
        return self._order[place]

    def decode(self, ids) -> str:
        """ids: any sequence of ints."""
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Pieces of text as soon as they are known, while the ids are still coming."""
        return (self.alphabet[i] for i in ids)

    @property
    def default_start(self) -> str:
        """A prompt for when there is none: a line break, or where the alphabet lacks it, its first character."""
        return "\n" if "\n" in self.alphabet else self.alphabet[0]

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, (vocab_size,)."""
        return np.array([len(char.encode("utf-8", "surrogatepass")) for char in self.alphabet])

    def state(self) -> dict:
        return {"tokenizer": self.name, "alphabet": self.alphabet}

    @classmethod
    def from_state(cls, state: dict) -> "CharTokenizer":
        return cls(state["alphabet"])


class ByteTokenizer:
    """The bytes of UTF-8: 256 tokens for every language there is, nothing to train and nothing unknown."""

    name = "byte"
    vocab_size = 256
    default_start = "\n"

    @classmethod
    def train(cls, text: str) -> "ByteTokenizer":
        return cls()

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int64 (bytes,). Raises UserError for what is no text, as a broken byte in an argument."""
        try:
            return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64)
        except UnicodeEncodeError as error:
            raise UserError(f"{text[error.start]!r} at position {error.start} is no character of UTF-8") from error

    def decode(self, ids) -> str:
        """ids: any sequence of ints. Bytes that are not UTF-8 become U+FFFD."""
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Pieces of text as soon as they are known: a character when the last of its bytes is there."""
        return codecs.iterdecode((bytes([i]) for i in ids), "utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.ones(256, dtype=np.int64)

    def state(self) -> dict:
        return {"tokenizer": self.name}

    @classmethod
    def from_state(cls, state: dict) -> "ByteTokenizer":
        return cls()


TOKENIZERS = {"char": CharTokenizer, "byte": ByteTokenizer}


def from_state(state: dict):
    """The tokenizer that a meta.json or a checkpoint describes. Raises UserError for one that this program lacks."""
    name = state.get("tokenizer")
    if name not in TOKENIZERS:
        raise UserError(f"tokenizer {name!r} is not one of: {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name].from_state(state)


def code_points(text: str) -> np.ndarray:
    """Unicode code points of the text, uint32 (length,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
