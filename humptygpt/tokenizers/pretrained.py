"""Tokenizers from other projects, in Hugging Face's tokenizer.json format."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Self

import numpy as np

from humptygpt.cli import UserError, one_line
from humptygpt.tokenizers.basic import (
    Tokenizer,
    check_text,
    pack,
    printable_bytes,
    sentencepiece_bytes,
    unpack,
)
from humptygpt.tokenizers.chat import BEGIN, END

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Engine

SENTENCEPIECE_DECODERS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class PretrainedTokenizer(Tokenizer):
    """A tokenizer read from a tokenizer.json and run by Hugging Face's tokenizers library, so its results are the same.

    Unlike those of our own tokenizers, its special tokens are recognised in a text, except by encode_plain(), which is
    for what somebody says in a conversation. Only byte-level and sentencepiece decoders are supported, because they
    decode each token on its own.

    content: the JSON. eot, bos: ids of the end-of-text and start-of-text tokens; None if there is none.
    """

    name = "tokenizer.json"

    def __init__(self, content: str, eot: int | None, bos: int | None):
        self.content = content
        self.eot, self.bos = eot, bos
        self._engine = load_engine(content)
        ids = self._engine.get_vocab(with_added_tokens=True)
        size = 1 + max(ids.values())
        if size > 2 * len(ids) + 1000 or not {eot, bos} <= {None, *ids.values()}:
            raise ValueError("its ids have too many gaps, or its start-of-text or end-of-text token has no id")
        as_bytes = piece_decoder(json.loads(content).get("decoder"))
        self.pieces = [b""] * size
        for token, i in ids.items():
            self.pieces[i] = as_bytes(token)

    @cached_property
    def _rest(self) -> "Engine":
        return load_rest(self.content)

    def encode(self, text: str) -> np.ndarray:
        return encode_with(self._engine, [text])

    def encode_rest(self, text: str) -> np.ndarray:
        return encode_with(self._rest, [text])

    @cached_property
    def special(self) -> set[int]:
        """Ids of the special tokens, and of others that end a text or mark a turn."""
        added = self._engine.get_added_tokens_decoder().items()
        marks = {i for i, x in added if x.special or x.content in (BEGIN, END)}
        return {self.eot, self.bos, *marks}

    def encode_plain(self, text: str) -> np.ndarray:
        """As in the base class: each special token that is recognised is split into its characters."""
        with refuse_text():
            encoding = self._rest.encode(check_text(text), add_special_tokens=False)
        parts, end = [], 0
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self.special:
                parts += [text[end:start], *text[start:stop]]
                end = stop
        return encode_with(self._rest, [*parts, text[end:]])

    def decode(self, ids: Iterable[int]) -> str:
        return self._engine.decode([int(i) for i in ids], skip_special_tokens=False)

    def state(self) -> dict:
        return {
            "tokenizer": self.name,
            "content": pack(self.content.encode()),
            "eot": self.eot,
            "bos": self.bos,
        }

    @classmethod
    def from_state(cls, content: str, **entries) -> Self:
        return cls(unpack(content).decode(), **entries)


def load_engine(content: str) -> "Engine":
    """Create a tokenizer that neither truncates nor pads. Raises ValueError if its tokenizer.json is bad."""
    import tokenizers

    try:
        engine = tokenizers.Tokenizer.from_str(content)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    # tokenizers raises a bare Exception for errors, and its panics derive directly from BaseException
    except BaseException as error:
        raise ValueError(f"the tokenizers library reports: {error}") from error
    engine.no_truncation()
    engine.no_padding()
    return engine


def load_rest(content: str) -> "Engine":
    """Create an engine for text that continues an earlier text. It adds no space at the start."""
    return load_engine(json.dumps(json.loads(content, object_hook=without_prefix)))


def encode_with(engine: "Engine", texts: list[str]) -> np.ndarray:
    """Encode each of the texts on its own. Returns their token ids one after the other."""
    with refuse_text():
        checked = [check_text(text) for text in texts]
        encodings = engine.encode_batch_fast(checked, add_special_tokens=False)
    ids = chain.from_iterable(encoding.ids for encoding in encodings)
    return np.fromiter(ids, dtype=np.int64)


@contextmanager
def refuse_text() -> Iterator[None]:
    """Turn an error of the tokenizers library, such as an unknown character, into a UserError."""
    try:
        yield
    except Exception as error:  # it has no class of its own
        raise UserError(f"the text cannot be encoded: {one_line(error)}") from error


def piece_decoder(decoder: dict | None) -> Callable[[str], bytes]:
    """Return a function that maps a token to its bytes. Raises ValueError if tokens cannot be decoded one by one."""
    steps = decoder.get("decoders", [decoder]) if decoder else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        byte_of = printable_bytes()
        return lambda token: bytes(map(byte_of.get, token)) if byte_of.keys() >= set(token) else token.encode()
    if not kinds or not set(kinds) <= SENTENCEPIECE_DECODERS:
        raise ValueError(f"its decoder {kinds} is not supported; only ByteLevel and sentencepiece's decoders are")
    return lambda token: sentencepiece_bytes(token, "ByteFallback" in kinds)


def without_prefix(entry: dict) -> dict:
    """Change an entry of a tokenizer.json so that it adds no space before a text. Most entries stay unchanged."""
    plain = {"prepend": "", "prepend_scheme": "never", "add_prefix_space": False}
    # in a step of the tokenizer, "type" is a string; in its vocabulary, "type" may itself be a token, mapped to an id
    is_step = isinstance(entry.get("type"), str)
    return entry | {key: plain[key] for key in plain.keys() & entry.keys() if is_step}
