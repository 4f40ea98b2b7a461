"""Text -> numbers -> text, by characters, bytes, sentencepiece or byte pairs, behind one encode and decode.

A token stands for some bytes of UTF-8 (`pieces`), and a text is the bytes of its tokens one after another. Where a data
set has several documents, the token `eot` ends each; no ordinary text encodes to it.
"""

import base64
import codecs
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain, compress, zip_longest

import numpy as np

from humptygpt.configurator import UserError

END_OF_TEXT = "<|endoftext|>"
# How GPT-2 takes text apart before it pairs bytes: contractions, words and numbers with the space before them, signs,
# spaces. Source: Radford et al. 2019.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """What all tokenizers have in common. separated: the data's documents end in eot."""

    name: str
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
        """Pieces of text as soon as they are known: a character when the last of its bytes is there."""
        return codecs.iterdecode((self.pieces[i] for i in ids), "utf-8", errors="replace")

    def start(self) -> np.ndarray:
        """A prompt for when there is none: the end of the text before, or else a line break."""
        return np.array([self.eot]) if self.eot is not None else self.encode("\n")

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, (vocab_size,); none for eot, which is no text."""
        return np.array([0 if i == self.eot else len(piece) for i, piece in enumerate(self.pieces)])


class CharTokenizer(Tokenizer):
    """One number for each character of an alphabet, in the order of the alphabet."""

    name = "char"

    def __init__(self, alphabet: str, separated: bool = False):
        self.alphabet = alphabet
        self.pieces = [char.encode("utf-8", "surrogatepass") for char in alphabet] + [END_OF_TEXT.encode()] * separated
        self.eot = len(alphabet) if separated else None
        codes = code_points(alphabet)
        self._order = np.argsort(codes)
        self._sorted = codes[self._order]

    @classmethod
    def train(cls, texts: Iterable[str], separated: bool = False) -> "CharTokenizer":
        """The alphabet is every character of the texts, sorted."""
        seen = np.zeros(0x110000, dtype=bool)
        for text in texts:
            seen[code_points(text)] = True
        return cls("".join(map(chr, seen.nonzero()[0])), separated)

    def encode(self, text: str) -> np.ndarray:
        codes = code_points(text)
        place = np.searchsorted(self._sorted, codes).clip(max=len(self.alphabet) - 1)
        unknown = self._sorted[place] != codes
        if unknown.any():
            char = text[int(unknown.argmax())]
            raise UserError(
                f"character {char!r} (U+{ord(char):04X}) is not among the"
                f" {len(self.alphabet)} that this tokenizer knows"
            )
        return self._order[place]

    def start(self) -> np.ndarray:
        return super().start() if "\n" in self.alphabet or self.eot is not None else self.encode(self.alphabet[0])

    def state(self) -> dict:
        return {"tokenizer": self.name, "alphabet": self.alphabet, "separated": self.eot is not None}

    @classmethod
    def from_state(cls, state: dict) -> "CharTokenizer":
        return cls(state["alphabet"], state.get("separated", False))


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8: 256 tokens for every language there is, nothing to train and nothing unknown."""

    name = "byte"

    def __init__(self, separated: bool = False):
        self.pieces = [bytes([i]) for i in range(256)] + [END_OF_TEXT.encode()] * separated
        self.eot = 256 if separated else None

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(utf8(text), np.uint8).astype(np.int64)

    def state(self) -> dict:
        return {"tokenizer": self.name, "separated": self.eot is not None}

    @classmethod
    def from_state(cls, state: dict) -> "ByteTokenizer":
        return cls(state.get("separated", False))


class SentencePieceTokenizer(Tokenizer):
    """Pieces of words, learnt from text by sentencepiece; what has no piece is spelled in bytes, so nothing is lost.

    proto: the model as sentencepiece writes it, with the settings of train() below. Its token 0 stands for the
    unknown and never occurs, so that ours are one less than its.
    Source: Kudo and Richardson 2018, arXiv:1808.06226.
    """

    name = "sentencepiece"

    def __init__(self, proto: bytes, separated: bool = False):
        import sentencepiece

        self._proto = proto
        self._model = model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.pieces = []
        for i in range(1, model.vocab_size()):
            piece = model.id_to_piece(i)
            spelled = bytes([int(piece[1:-1], 16)]) if model.is_byte(i) else piece.replace("▁", " ").encode()
            self.pieces.append(spelled)
        self.eot = model.eos_id() - 1 if separated else None
        self._newline = model.piece_to_id("\n")
        self._underscore = [model.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, model_type: str = "bpe", separated: bool = False
    ) -> "SentencePieceTokenizer":
        """model_type: bpe or unigram. Raises UserError where the texts allow no vocabulary of that size."""
        import io

        import sentencepiece

        proto = io.BytesIO()
        # Lines longer than sentencepiece reads are cut; line breaks are a token of their own and spaces belong to the
        # word behind them. Neither is changed or added: decoding gives back the text.
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
            if bound := re.search(r"too high .* value <= (\d+)", str(error)):
                rule = f"at most {int(bound[1]) - 1}"
            elif bound := re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error)):
                rule = f"at least {int(bound[1]) - 1}"
            else:
                raise UserError(f"sentencepiece cannot learn from this text: {error}") from error
            raise UserError(f"vocab_size={vocab_size}: this text allows {rule} sentencepiece tokens") from error
        return cls(proto.getvalue(), separated)

    def encode(self, text: str) -> np.ndarray:
        utf8(text)  # refuses what sentencepiece would silently replace
        # "▁" is sentencepiece's sign for a space, so that a real one has to be spelled in bytes
        parts = re.split("([\n▁])", text)
        separators = [[self._newline] if part == "\n" else self._underscore for part in parts[1::2]]
        encoded = self._model.encode(parts[::2], num_threads=1)
        ids = chain.from_iterable(chain.from_iterable(zip_longest(encoded, separators, fillvalue=())))
        return np.fromiter(ids, dtype=np.int64) - 1

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """All in one call of sentencepiece, which for sentences is ten times as fast as one by one."""
        texts = list(texts)
        for text in texts:
            utf8(text)
        simple = [not re.search("[\n▁]", text) for text in texts]
        encoded = iter(self._model.encode(list(compress(texts, simple)), num_threads=1))
        return [
            np.array(next(encoded), dtype=np.int64) - 1 if is_simple else self.encode(text)
            for text, is_simple in zip(texts, simple, strict=True)
        ]

    def spelled(self, counts: np.ndarray) -> int:
        """Characters for which there was no piece; counts: how often each token occurs."""
        starts = [
            i for i, piece in enumerate(self.pieces) if self._model.is_byte(i + 1) and not 0x80 <= piece[0] < 0xC0
        ]
        return int(counts[starts].sum())

    def state(self) -> dict:
        proto = base64.b64encode(self._proto).decode()
        return {"tokenizer": self.name, "separated": self.eot is not None, "proto": proto}

    @classmethod
    def from_state(cls, state: dict) -> "SentencePieceTokenizer":
        return cls(base64.b64decode(state["proto"]), state["separated"])


class BytePairTokenizer(Tokenizer):
    """GPT-2's scheme, run by tiktoken: the commonest pair of neighbouring tokens becomes a new token, again and again.

    pieces: the bytes of each token in the order in which they are paired; all 256 single bytes are among them.
    Source: Sennrich et al. 2015, arXiv:1508.07909; over bytes: Radford et al. 2019.
    """

    def __init__(self, name: str, pieces: list[bytes], separated: bool = False):
        self.name = name  # bpe, or gpt2 where the vocabulary is GPT-2's
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
    def gpt2(cls, separated: bool = False) -> "BytePairTokenizer":
        """GPT-2's own vocabulary: from tiktoken or else a package. Raises UserError where neither is reachable."""
        from humptygpt.download import gpt2_ranks

        ranks = gpt2_ranks()
        return cls("gpt2", sorted(ranks, key=ranks.get), separated)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, separated: bool = False) -> "BytePairTokenizer":
        """Learn the pairs from the texts. Raises UserError where they allow no vocabulary of that size."""
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        learner = Tokenizer(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
        learner.train_from_iterator(texts, trainer)
        ids = json.loads(learner.to_str())["model"]["vocab"]
        if len(ids) + 1 != vocab_size:
            least = "at most" if len(ids) + 1 < vocab_size else "at least"
            raise UserError(f"vocab_size={vocab_size}: this text allows {least} {len(ids) + 1} byte-pair tokens")
        byte_of = gpt2_byte_characters()
        return cls("bpe", [bytes(map(byte_of.get, word)) for word in sorted(ids, key=ids.get)], separated)

    def encode(self, text: str) -> np.ndarray:
        utf8(text)
        return self.engine.encode_to_numpy(text, disallowed_special=()).astype(np.int64)

    def state(self) -> dict:
        lines = b"\n".join(map(base64.b64encode, self.pieces[:-1]))
        packed = base64.b64encode(zlib.compress(lines, 9)).decode()
        return {"tokenizer": self.name, "separated": self.eot is not None, "pieces": packed}

    @classmethod
    def from_state(cls, state: dict) -> "BytePairTokenizer":
        lines = zlib.decompress(base64.b64decode(state["pieces"])).split(b"\n")
        return cls(state["tokenizer"], list(map(base64.b64decode, lines)), state["separated"])


TOKENIZERS = {
    "char": CharTokenizer,
    "byte": ByteTokenizer,
    "sentencepiece": SentencePieceTokenizer,
    "gpt2": BytePairTokenizer,
    "bpe": BytePairTokenizer,
}


def from_state(state: dict) -> Tokenizer:
    """The tokenizer that a meta.json or a checkpoint describes. Raises UserError for one that this program lacks."""
    name = state.get("tokenizer")
    if name not in TOKENIZERS:
        raise UserError(f"tokenizer {name!r} is not one of: {', '.join(TOKENIZERS)}")
    try:
        return TOKENIZERS[name].from_state(state)
    except (LookupError, TypeError, ValueError, RuntimeError, zlib.error) as error:
        raise UserError(f"the description of the tokenizer {name} is damaged: {error!r}") from error


def code_points(text: str) -> np.ndarray:
    """Unicode code points of the text, uint32 (length,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def utf8(text: str) -> bytes:
    """Raises UserError for what is no text, as a broken byte in an argument."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{text[error.start]!r} at position {error.start} is no character of UTF-8") from error


def gpt2_byte_characters() -> dict[str, int]:
    """The printable characters that byte-pair files write bytes as: a byte that prints is itself, others come after."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
