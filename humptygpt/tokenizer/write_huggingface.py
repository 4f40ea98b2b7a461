"""A tokenizer of ours -> tokenizer.json, which the library tokenizers runs, and its settings, as transformers has them.

Ids and text are those of our own, with two exceptions. The text <|endoftext|> becomes the token of that name, as
everywhere in transformers. And each byte of a sequence that is not UTF-8, as a model may write it, becomes a U+FFFD of
its own where we write one for the sequence.
"""

import json
import math
from collections.abc import Iterator
from functools import cache, singledispatch
from itertools import pairwise
from typing import NamedTuple

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from humptygpt.core.errors import UserError
from humptygpt.tokenizer.pretrained import PretrainedSentencePiece, PretrainedTokenizer
from humptygpt.tokenizer.tokenizers import (
    END_OF_TEXT,
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    printable_bytes,
)


def tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, bytes]:
    """Return the content of each file, by its name. Raises UserError where it cannot be expressed."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,  # or "do n't" would be decoded as "don't"
    }
    if tokenizer.eot is not None:
        end = tokenizer.pieces[tokenizer.eot].decode()
        settings |= {"eos_token": end, "pad_token": end, "padding_side": "left"}
    if tokenizer.bos is not None:
        settings["bos_token"] = tokenizer.pieces[tokenizer.bos].decode()
    if isinstance(tokenizer, PretrainedSentencePiece):
        settings |= sentencepiece_settings(tokenizer)
        return {
            "tokenizer.model": tokenizer.proto,
            "tokenizer_config.json": as_json(settings),
        }
    if isinstance(tokenizer, PretrainedTokenizer):  # it goes out as it came in
        content = tokenizer.content
    else:
        content = build_tokenizer(tokenizer).to_str(pretty=True)
    return {"tokenizer.json": content.encode(), "tokenizer_config.json": as_json(settings)}


def sentencepiece_settings(tokenizer: PretrainedSentencePiece) -> dict:
    """Return what says which tokens of its tokenizer.model are special."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {
        str(i): {"content": token, **flags, "special": True}
        for token, i in sorted(tokenizer.special.items(), key=lambda item: item[1])
    }
    settings = {
        "added_tokens_decoder": added,
        "add_bos_token": tokenizer.bos is not None,
        "add_eos_token": False,
    }
    if tokenizer.space != "every":
        settings |= {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": tokenizer.space == "unless",
        }
    return settings


def as_json(content: dict) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def build_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Return the same in the library tokenizers."""
    theirs = convert(tokenizer)
    if (end := END_OF_TEXT.encode()) in tokenizer.pieces:
        theirs.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
        assert theirs.token_to_id(END_OF_TEXT) == tokenizer.pieces.index(end)
    assert theirs.get_vocab_size() == tokenizer.vocab_size
    return theirs


@singledispatch
def convert(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """build_tokenizer() without its special token."""
    raise AssertionError(f"{tokenizer.name} has files already")


@convert.register
def _(tokenizer: CharTokenizer) -> tokenizers.Tokenizer:
    if surrogates := [char for char in tokenizer.alphabet if "\ud800" <= char <= "\udfff"]:
        raise UserError(
            f"tokenizer=char has {surrogates[0]!r}, which is no character; export needs --tokenizer=byte"
        )
    # an unknown word is an error where there is no token for it; models.BPE would leave it out
    theirs = tokenizers.Tokenizer(
        models.WordLevel({char: i for i, char in enumerate(tokenizer.alphabet)}, "unknown")
    )
    theirs.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    theirs.decoder = decoders.Fuse()
    return theirs


@convert.register
def _(tokenizer: ByteTokenizer) -> tokenizers.Tokenizer:
    return byte_level(models.BPE(printable_bytes(), []), use_regex=False)


@convert.register
def _(tokenizer: BytePairTokenizer) -> tokenizers.Tokenizer:
    ids = {printable(piece): i for i, piece in enumerate(tokenizer.pieces[:-1])}
    # ignore_merges: a word that is a piece is taken as it is, which is what tiktoken does
    return byte_level(
        models.BPE(ids, byte_merges(tokenizer), ignore_merges=True), use_regex=True
    )


def byte_level(model: models.BPE, use_regex: bool) -> tokenizers.Tokenizer:
    """use_regex: GPT-2's pattern splits the text first."""
    theirs = tokenizers.Tokenizer(model)
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=use_regex
    )
    theirs.decoder = decoders.ByteLevel()
    return theirs


@convert.register
def _(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """Pieces have spaces where sentencepiece writes its sign for them, so that the sign itself is spelled in bytes."""
    entries = sentencepiece_entries(tokenizer)
    if is_merged(entries):
        ids = {entry.text: i for i, entry in enumerate(entries)}
        normal = [entry for entry in entries if entry.kind == "normal"]
        normal.sort(key=lambda entry: -entry.score)
        merges = list(find_merges([entry.text for entry in normal]))
        theirs = tokenizers.Tokenizer(models.BPE(ids, merges, byte_fallback=True))
    else:
        # unk_id marks what has no piece until it is spelled in bytes; any token will do
        scores = [(entry.text, entry.score) for entry in entries]
        theirs = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
        # or it would take the text "<0x41>" for the byte
        byte_like = Regex("<(?=0x[0-9A-F]{2}>)")
        theirs.pre_tokenizer = pre_tokenizers.Split(byte_like, "merged_with_previous")
    theirs.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return theirs


# --------------------------------------------------------------------------------------
# What our tokenizers leave unsaid


class Entry(NamedTuple):
    """A token as sentencepiece's file has it."""

    text: str  # with spaces; of a byte "<0x41>"
    kind: str  # normal, byte, end of text, line break
    score: float  # of merges, the higher the sooner; else a log-probability


def sentencepiece_entries(tokenizer: SentencePieceTokenizer) -> list[Entry]:
    """Return an entry of each token; the file's first one, which stands for the unknown, is none of ours."""
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.proto)

    entries = []
    for i in range(1, model.vocab_size()):
        text = model.id_to_piece(i)
        kind = "byte" if model.is_byte(i) else "line break" if text == "\n" else "normal"
        if i == model.eos_id():
            kind = "end of text"
        entries.append(Entry(text.replace("▁", " "), kind, model.get_score(i)))
    return entries


def is_merged(entries: list[Entry]) -> bool:
    """Whether sentencepiece was trained with model_type=bpe: its scores are 0, -1, -2, ..., else log-probabilities."""
    return all(entry.score.is_integer() for entry in entries)


@cache
def bytes_to_printable() -> dict[int, str]:
    return {byte: char for char, byte in printable_bytes().items()}


def printable(piece: bytes) -> str:
    """As GPT-2's files have it: see printable_bytes()."""
    return "".join(map(bytes_to_printable().get, piece))


def byte_merges(tokenizer: BytePairTokenizer) -> list[tuple[str, str]]:
    return [(printable(a), printable(b)) for a, b in find_merges(tokenizer.pieces[:-1])]


def find_merges(pieces: list[bytes] | list[str]) -> Iterator[tuple]:
    """The pair that each piece longer than 1 is merged from, in the order of the pieces, which is that of the merges.

    tiktoken and sentencepiece merge whatever neighbours make a piece, those that make the first piece first. When a
    piece's own time has come, all merges before it are done; so its text is always the same pair, and that is found
    here. A piece whose text is then more than a pair is never merged, and left out.
    """
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    for rank, piece in enumerate(pieces):
        parts = [piece[i : i + 1] for i in range(len(piece))]
        while len(parts) > 2:
            pair_ranks = [ranks.get(a + b, math.inf) for a, b in pairwise(parts)]
            first = min(pair_ranks)
            if first >= rank:
                break
            at = pair_ranks.index(first)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            yield tuple(parts)
