"""Tokenizers from other projects, in Hugging Face's tokenizer.json format."""

import base64
import json
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import ClassVar, Self

import numpy as np

from humptygpt.convert.sentencepiece_model import convert_sentencepiece
from humptygpt.tokenizers import (
    Tokenizer,
    pack,
    printable_bytes,
    sentencepiece_bytes,
    unpack,
)

SENTENCEPIECE_DECODERS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
ENDS = {"eot": (int, None), "bos": (int, None)}


class PretrainedTokenizer(Tokenizer):
    """A tokenizer read from a tokenizer.json. Hugging Face's tokenizers library runs it, so ids and text are the same.

    content: the JSON. Its special tokens are recognised in a text, unlike the special tokens of our own tokenizers.
    Only byte-level and sentencepiece decoders are supported, because they decode each token on its own.
    """

    name = "tokenizer.json"
    schema: ClassVar = {"content": str, **ENDS}

    def __init__(self, content: str, eot: int | None, bos: int | None):
        self.content = content
        self.eot = eot
        self.bos = bos
        self._engine = load_engine(content)
        ids = self._engine.get_vocab(with_added_tokens=True)
        size = 1 + max(ids.values(), default=-1)
        if not ids or size > 2 * len(ids) + 1000 or not {eot, bos} <= {None, *ids.values()}:
            raise ValueError("its ids have gaps or do not include the end-of-text token")
        as_bytes = piece_decoder(json.loads(content).get("decoder"))
        self.pieces = [b""] * size
        for token, i in ids.items():
            self.pieces[i] = as_bytes(token)

    @cached_property
    def _rest(self):
        """The engine for text that continues an earlier text."""
        described = json.loads(self.content)
        steps = {key: described.get(key) for key in ("normalizer", "pre_tokenizer")}
        described |= json.loads(json.dumps(steps), object_hook=without_prefix)
        return load_engine(json.dumps(described))

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        encodings = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def encode_rest(self, text: str) -> np.ndarray:
        return np.array(
            self._rest.encode(text, add_special_tokens=False).ids, dtype=np.int64
        )

    def decode(self, ids: Iterable[int]) -> str:
        return self._engine.decode([int(i) for i in ids], skip_special_tokens=False)

    def state(self) -> dict:
        content = pack(self.content.encode())
        return {
            "tokenizer": self.name,
            "content": content,
            "eot": self.eot,
            "bos": self.bos,
        }

    @classmethod
    def from_state(cls, content: str, **entries) -> Self:
        return cls(unpack(content).decode(), **entries)


def load_engine(content: str):
    """Create a tokenizers.Tokenizer from a tokenizer.json, without truncation or padding. Raises ValueError."""
    import tokenizers

    try:
        engine = tokenizers.Tokenizer.from_str(content)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    # tokenizers raises a bare Exception for errors, and its panics derive directly from BaseException
    except BaseException as error:
        raise ValueError(f"tokenizers cannot read it: {error}") from error
    engine.no_truncation()
    engine.no_padding()
    return engine


def piece_decoder(decoder: dict | None) -> Callable[[str], bytes]:
    """Return a function that maps a token to its bytes. Raises ValueError if decoding it needs more than the token."""
    steps = decoder.get("decoders", [decoder]) if decoder else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        byte_of = printable_bytes()
        return lambda token: (
            bytes(map(byte_of.get, token))
            if byte_of.keys() >= set(token)
            else token.encode()
        )
    if not kinds or not set(kinds) <= SENTENCEPIECE_DECODERS:
        listed = ", ".join(kinds) or "none"
        raise ValueError(
            f"its decoder is {listed}; only ByteLevel and sentencepiece decoders are supported"
        )
    return lambda token: sentencepiece_bytes(token, "ByteFallback" in kinds)


def without_prefix(step: dict) -> dict:
    """Change a step of a tokenizer.json so that it adds no space before a text."""
    plain = {"prepend": "", "prepend_scheme": "never", "add_prefix_space": False}
    return step | {key: plain[key] for key in plain.keys() & step.keys()}


class SentencePieceModel(PretrainedTokenizer):
    """A tokenizer.model in data or a checkpoint from an earlier version. It is converted to a tokenizer.json."""

    name = "tokenizer.model"
    schema: ClassVar = {
        "proto": str,
        "special": {str: int},
        "space": {"every", "unless", "first"},
        **ENDS,
    }

    @classmethod
    def from_state(
        cls, proto: str, special: dict[str, int], space: str, **ends
    ) -> PretrainedTokenizer:
        engine = convert_sentencepiece(base64.b64decode(proto, validate=True), space)
        engine.add_special_tokens(sorted(special, key=special.get))
        return PretrainedTokenizer(engine.to_str(), **ends)


PRETRAINED = {kind.name: kind for kind in (PretrainedTokenizer, SentencePieceModel)}
