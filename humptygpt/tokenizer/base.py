"""What all tokenizers have in common.

A token stands for some bytes of UTF-8 (its piece), and a text is the pieces of its tokens one after another. Where a
data set has several documents, the token `eot` ends each; no ordinary text encodes to it.
"""

import base64
import codecs
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import ClassVar, Self

import numpy as np

from humptygpt.core.errors import UserError

END_OF_TEXT = "<|endoftext|>"
MAX_UNPACKED_BYTES = 1 << 26  # of a state; Llama 3's tokenizer.json takes 9 MB, Gemma's 33 MB


class Tokenizer:
    """A new one is a class and an entry of TOKENIZERS.

    train(texts, separated=..., and its options) makes one; texts is an iterator that it need not read. state() is plain
    data that from_state() takes back. separated: the data's documents end in eot.
    """

    name: str
    options: tuple[str, ...] = ()  # keys of prepare_data.py that train() takes
    needs_all_texts = False  # those for validation, too
    training_memory = 0, 0  # bytes that train() takes, and for each byte of the texts
    schema: ClassVar = {"separated?": bool}  # of state(), its name aside
    pieces: list[bytes]  # what each token stands for
    eot: int | None  # the token that ends a document, None where the data is one
    bos: int | None = None  # the token that every text starts with, of models that were trained so

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> np.ndarray:
        """Return token ids, int64 (length,), without bos. Raises UserError for text that it has no tokens for."""
        raise NotImplementedError

    def encode_rest(self, text: str) -> np.ndarray:
        """As encode(), of a text that continues one: where a space belongs before a text, it gets none."""
        return self.encode(text)

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text. Bytes that are not UTF-8, as a model may write them, become U+FFFD."""
        return "".join(self.decode_stream(ids))

    def decode_batch(self, batch: Iterable[Iterable[int]]) -> list[str]:
        return [self.decode(ids) for ids in batch]

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield text as soon as it is complete: a character when the last of its bytes is there."""
        return codecs.iterdecode((self.pieces[i] for i in ids), "utf-8", errors="replace")

    def start(self) -> np.ndarray:
        """Return the prompt where none is given, (1,): bos, the end of the text before, a line break, or token 0."""
        line_break = self.pieces.index(b"\n") if b"\n" in self.pieces else 0
        return np.array([next((i for i in (self.bos, self.eot) if i is not None), line_break)])

    def token_bytes(self) -> np.ndarray:
        """Return how many bytes of text each token stands for, (vocab_size,); 0 for eot and bos, which are not text."""
        sizes = np.array([len(piece) for piece in self.pieces])
        sizes[[i for i in (self.eot, self.bos) if i is not None]] = 0
        return sizes

    def state(self) -> dict:
        return {"tokenizer": self.name, "separated": self.eot is not None}

    @classmethod
    def from_state(cls, **entries) -> Self:
        """entries: those of state() but the name, which fit the schema. Raises ValueError where they are damaged."""
        return cls(**entries)


class VocabularyTooLarge(UserError):
    """The texts have fewer tokens to learn; most: how many there are."""

    def __init__(self, vocab_size: int, most: int, method: str):
        super().__init__(
            f"vocab_size={vocab_size} is too large: {method} finds at most {most} tokens in this text"
        )
        self.most = most


def utf8(text: str) -> bytes:
    """Raises UserError for what is not text, such as a broken byte in an argument."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{text[error.start]!r} at position {error.start} is not valid UTF-8"
        ) from error


def pack(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 9)).decode()


def unpack(packed: str) -> bytes:
    """Return what pack() was given; a small text may stand for a lot. Raises ValueError or zlib.error."""
    unpacker = zlib.decompressobj()
    content = unpacker.decompress(base64.b64decode(packed, validate=True), MAX_UNPACKED_BYTES)
    if not unpacker.eof:
        raise ValueError(f"it is truncated or would take more than {MAX_UNPACKED_BYTES:,} bytes")
    return content


def printable_bytes() -> dict[str, int]:
    """Return GPT-2's signs for bytes: those that print are themselves, the others are U+0100 and up in their order."""
    hidden = [byte for byte in range(256) if not chr(byte).isprintable() or chr(byte) == " "]
    signs = {chr(byte): byte for byte in range(256) if byte not in hidden}
    return signs | {chr(256 + number): byte for number, byte in enumerate(hidden)}


def sentencepiece_bytes(piece: str, byte_fallback: bool) -> bytes:
    """Return what a piece of sentencepiece stands for: its sign for a space, or a byte such as <0x41>."""
    if byte_fallback and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()
