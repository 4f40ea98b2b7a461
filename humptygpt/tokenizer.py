"""Text -> token ids -> text: characters, bytes, sentencepiece or byte-pair encoding, all with the same methods.

A token stands for some bytes of UTF-8 (its piece), and a text is the pieces of its tokens one after another. Where a
data set has several documents, the token `eot` ends each; no ordinary text encodes to it.
"""

import base64
import codecs
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain
from typing import ClassVar, Self

import numpy as np

from humptygpt.configurator import UserError
from humptygpt.schema import check_schema

END_OF_TEXT = "<|endoftext|>"
# How GPT-2 splits text before byte pairs are merged: contractions, words and numbers with the space before them,
# punctuation, spaces. Source: Radford et al. 2019.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAX_PIECES_BYTES = 1 << 24  # of a byte-pair vocabulary, unpacked; a vocabulary of 200,000 tokens takes 3 MB


class VocabularyTooLarge(UserError):
    """The texts have fewer tokens to find; most: how many there are."""

    def __init__(self, vocab_size: int, most: int, finder: str):
        super().__init__(f"vocab_size={vocab_size} is too large: {finder} finds at most {most} tokens in this text")
        self.most = most


class Tokenizer:
    """What all tokenizers have in common; a new one is a class and a line in TOKENIZERS.

    train(texts, separated=..., and its options) makes one; texts is an iterator that it need not read. state() is plain
    data that from_state() takes back. separated: the data's documents end in eot.
    """

    name: str
    options: tuple[str, ...] = ()  # keys of prepare_data.py that train() takes
    needs_all_texts = False  # those for validation, too
    schema: ClassVar = {"separated?": bool}  # of state(), its name aside
    pieces: list[bytes]  # what each token stands for
    eot: int | None  # the token that ends a document, None where the data is one

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int64 (length,). Raises UserError for text that it has no tokens for."""
        raise NotImplementedError

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are not UTF-8, as a model may write them, become U+FFFD."""
        return "".join(self.decode_stream(ids))

    def decode_batch(self, batch: Iterable[Iterable[int]]) -> list[str]:
        return [self.decode(ids) for ids in batch]

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text as soon as it is complete: a character when the last of its bytes is there."""
        return codecs.iterdecode((self.pieces[i] for i in ids), "utf-8", errors="replace")

    def start(self) -> np.ndarray:
        """The prompt where none is given, (1,): the end of the text before, a line break, or else the first token."""
        line_break = self.pieces.index(b"\n") if b"\n" in self.pieces else 0
        return np.array([line_break if self.eot is None else self.eot])

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, (vocab_size,); 0 for eot, which is not text."""
        return np.array([0 if i == self.eot else len(piece) for i, piece in enumerate(self.pieces)])

    def state(self) -> dict:
        return {"tokenizer": self.name, "separated": self.eot is not None}

    @classmethod
    def from_state(cls, **entries) -> Self:
        """entries: those of state() but the name, which fit the schema. Raises ValueError where they are damaged."""
        return cls(**entries)


class CharTokenizer(Tokenizer):
    """One token for each character of an alphabet, in the order of the alphabet."""

    name = "char"
    needs_all_texts = True
    schema: ClassVar = {"alphabet": str, "separated?": bool}

    def __init__(self, alphabet: str, separated: bool = False):
        self.alphabet = alphabet
        self.pieces = [char.encode("utf-8", "surrogatepass") for char in alphabet] + [END_OF_TEXT.encode()] * separated
        self.eot = len(alphabet) if separated else None
        codes = code_points(alphabet)
        self._ids = np.full(int(codes.max(initial=0)) + 2, -1)  # the last entry stands for all characters beyond
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
            known = f"the {len(self.alphabet)} characters of this tokenizer"
            raise UserError(f"character {char!r} (U+{ord(char):04X}) is not among {known}")
        return ids

    def state(self) -> dict:
        return {"tokenizer": self.name, "alphabet": self.alphabet, "separated": self.eot is not None}

    @classmethod
    def from_state(cls, alphabet: str, separated: bool = False) -> Self:
        if not alphabet or len(set(alphabet)) < len(alphabet):
            raise ValueError("the alphabet is empty or has a character twice")
        return cls(alphabet, separated)


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
    schema: ClassVar = {"separated": bool, "proto": str}

    def __init__(self, proto: bytes, separated: bool = False):
        import sentencepiece

        self._proto = proto
        self._model = model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.pieces = []
        for i in range(1, model.vocab_size()):
            piece = model.id_to_piece(i)  # a byte's is "<0x41>"
            self.pieces.append(bytes([int(piece[1:-1], 16)]) if model.is_byte(i) else piece.replace("▁", " ").encode())
        self.eot = model.eos_id() - 1 if separated else None
        # "▁" is sentencepiece's sign for a space, so that a real one has to be spelled in bytes
        underscore = [model.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
        self._separators = {"\n": [model.piece_to_id("\n")], "▁": underscore}
        if (model.unk_id(), model.eos_id()) != (0, 1) or 0 in chain(*self._separators.values()):
            raise ValueError("the model lacks a token that every text may need")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, model_type: str = "bpe", separated: bool = False) -> Self:
        """model_type: bpe or unigram. Raises UserError where the texts allow no vocabulary of that size."""
        import sentencepiece

        proto = io.BytesIO()
        # Lines longer than sentencepiece reads are cut; line breaks are a token of their own and spaces belong to the
        # word after them. Neither is changed or added: decoding gives back the text.
        lines = (line[i : i + 1000] for text in texts for line in text.split("\n") for i in range(0, len(line), 1000))
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
                raise VocabularyTooLarge(vocab_size, int(most[1]) - 1, "sentencepiece") from error
            if least := re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error)):
                why = f"too small: sentencepiece needs at least {int(least[1]) - 1} tokens for this text's characters"
            else:
                raise UserError(f"sentencepiece cannot be trained on this text: {error}") from error
            raise UserError(f"vocab_size={vocab_size} is {why}") from error
        return cls(proto.getvalue(), separated)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """All in one call of sentencepiece, which for sentences is ten times as fast as one by one."""
        split = [re.split("([\n▁])", utf8(text).decode()) for text in texts]
        plain = [part for part in chain(*split) if part not in self._separators]
        encoded = iter(self._model.encode(plain, num_threads=1))
        ids = ([self._separators.get(part) or next(encoded) for part in parts] for parts in split)
        return [np.fromiter(chain(*lists), dtype=np.int64) - 1 for lists in ids]

    def spelled(self, counts: np.ndarray) -> int:
        """Characters for which there was no piece. counts: (vocab_size,), how often each token occurs."""
        first_bytes = [i for i, p in enumerate(self.pieces) if self._model.is_byte(i + 1) and not 0x80 <= p[0] < 0xC0]
        return int(counts[first_bytes].sum())

    def state(self) -> dict:
        return super().state() | {"proto": base64.b64encode(self._proto).decode()}

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
    schema: ClassVar = {"separated": bool, "pieces": str}

    def __init__(self, pieces: list[bytes], separated: bool = False):
        if len(set(pieces)) < len(pieces) or not {bytes([i]) for i in range(256)} <= set(pieces):
            raise ValueError("a piece is there twice, or one of the 256 bytes is not")
        self.pieces = [*pieces, END_OF_TEXT.encode()]
        self.eot = len(pieces) if separated else None

    @cached_property
    def engine(self):
        """The tiktoken.Encoding."""
        import tiktoken

        ranks = {piece: rank for rank, piece in enumerate(self.pieces[:-1])}
        special = {END_OF_TEXT: len(ranks)}
        return tiktoken.Encoding(self.name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, separated: bool = False) -> Self:
        """Find the merges in the texts. Raises UserError where they allow no vocabulary of that size."""
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        if vocab_size < 257:
            why = "byte-pair encoding needs at least 257 tokens (256 bytes and end-of-text)"
            raise UserError(f"vocab_size={vocab_size} is too small: {why}")
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
        bpe.train_from_iterator(texts, trainer)
        ids = json.loads(bpe.to_str())["model"]["vocab"]
        if len(ids) + 1 < vocab_size:
            raise VocabularyTooLarge(vocab_size, len(ids) + 1, "byte-pair encoding")
        # tokenizers writes a byte as the character of that number where it prints, the others as U+0100 and up in order
        byte_of = {char: ord(char) for char in alphabet if ord(char) < 256}
        other_bytes = sorted(set(range(256)) - set(byte_of.values()))
        byte_of |= zip(sorted(set(alphabet) - set(byte_of)), other_bytes, strict=True)
        return cls([bytes(map(byte_of.get, word)) for word in sorted(ids, key=ids.get)], separated)

    def encode(self, text: str) -> np.ndarray:
        utf8(text)
        return self.engine.encode_to_numpy(text, disallowed_special=()).astype(np.int64)

    def state(self) -> dict:
        lines = b"\n".join(map(base64.b64encode, self.pieces[:-1]))
        return super().state() | {"pieces": base64.b64encode(zlib.compress(lines, 9)).decode()}

    @classmethod
    def from_state(cls, pieces: str, separated: bool) -> Self:
        unpacker = zlib.decompressobj()
        lines = unpacker.decompress(base64.b64decode(pieces, validate=True), MAX_PIECES_BYTES)
        if not unpacker.eof:
            raise ValueError(f"its pieces are truncated or take more than {MAX_PIECES_BYTES:,} bytes")
        return cls([base64.b64decode(line, validate=True) for line in lines.split(b"\n")], separated)


class GPT2Tokenizer(BytePairTokenizer):
    """GPT-2's own vocabulary."""

    name = "gpt2"
    options = ()

    @classmethod
    def train(cls, texts: Iterable[str] = (), separated: bool = False) -> Self:
        """From tiktoken's download or else a package. Raises UserError where neither can be reached."""
        from humptygpt.download import gpt2_ranks

        ranks = gpt2_ranks()
        return cls(sorted(ranks, key=ranks.get), separated)


TOKENIZERS = {
    kind.name: kind for kind in (CharTokenizer, ByteTokenizer, SentencePieceTokenizer, GPT2Tokenizer, BytePairTokenizer)
}


def from_state(state: object) -> Tokenizer:
    """The tokenizer that a meta.json or a checkpoint describes. Raises UserError where it is damaged or unknown."""
    name = state.get("tokenizer") if isinstance(state, dict) else None
    if not isinstance(name, str):
        raise UserError("the description of the tokenizer is damaged: it does not say which tokenizer")
    if name not in TOKENIZERS:
        raise UserError(f"tokenizer {name!r} is not one of: {', '.join(TOKENIZERS)}")
    try:
        check_schema(state, TOKENIZERS[name].schema)
        return TOKENIZERS[name].from_state(**{key: value for key, value in state.items() if key != "tokenizer"})
    except (TypeError, ValueError, RuntimeError, zlib.error) as error:  # RuntimeError: sentencepiece's
        raise UserError(f"the description of the tokenizer {name} is damaged: {error!r}") from error


def code_points(text: str) -> np.ndarray:
    """Unicode code points of the text, uint32 (length,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def utf8(text: str) -> bytes:
    """Raises UserError for what is not text, such as a broken byte in an argument."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{text[error.start]!r} at position {error.start} is not valid UTF-8") from error
