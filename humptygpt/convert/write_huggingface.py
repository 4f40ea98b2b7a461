"""Convert one of our tokenizers to tokenizer.json, for Hugging Face's tokenizers library, and tokenizer_config.json.

Ids and text are the same as ours, with two exceptions. The text <|endoftext|> is encoded as the token of that name, as
everywhere in transformers. And if a model generates bytes that are not valid UTF-8, each of them becomes a U+FFFD,
whereas we write one U+FFFD for all of them.
"""

import json
from functools import singledispatch

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from humptygpt.config import UserError
from humptygpt.convert.pretrained import PretrainedTokenizer
from humptygpt.convert.sentencepiece_model import find_merges, subword_model
from humptygpt.tokenizers import (
    END_OF_TEXT,
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    printable_bytes,
)


def tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, bytes]:
    """Return the content of each file by name. Raises UserError if the tokenizer cannot be exported."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,  # otherwise "do n't" would be decoded as "don't"
    }
    if tokenizer.eot is not None:
        end = tokenizer.pieces[tokenizer.eot].decode()
        settings |= {"eos_token": end, "pad_token": end, "padding_side": "left"}
    if tokenizer.bos is not None:
        settings["bos_token"] = tokenizer.pieces[tokenizer.bos].decode()
    if isinstance(tokenizer, PretrainedTokenizer):  # it is exported unchanged
        content = tokenizer.content
    else:
        content = build_tokenizer(tokenizer).to_str(pretty=True)
    return {
        "tokenizer.json": content.encode(),
        "tokenizer_config.json": f"{json.dumps(settings, indent=2)}\n".encode(),
    }


def build_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Build the same tokenizer for Hugging Face's tokenizers library."""
    theirs = convert(tokenizer)
    if (end := END_OF_TEXT.encode()) in tokenizer.pieces:
        theirs.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
        assert theirs.token_to_id(END_OF_TEXT) == tokenizer.pieces.index(end)
    assert theirs.get_vocab_size() == tokenizer.vocab_size
    return theirs


@singledispatch
def convert(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Build a tokenizer without its special token."""
    raise UserError(
        f"tokenizer={tokenizer.name} cannot be exported: tokenizer.json cannot express it"
    )


@convert.register
def _(tokenizer: CharTokenizer) -> tokenizers.Tokenizer:
    if surrogates := [char for char in tokenizer.alphabet if "\ud800" <= char <= "\udfff"]:
        raise UserError(
            f"tokenizer=char has {surrogates[0]!r}, which is not a valid character; export needs --tokenizer=byte"
        )
    # "unknown" is not in the vocabulary, so an unknown character is an error; models.BPE would drop it
    theirs = tokenizers.Tokenizer(
        models.WordLevel({char: i for i, char in enumerate(tokenizer.alphabet)}, "unknown")
    )
    theirs.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    theirs.decoder = decoders.Fuse()
    return theirs


@convert.register
def _(tokenizer: ByteTokenizer | BytePairTokenizer) -> tokenizers.Tokenizer:
    sign_of = {byte: sign for sign, byte in printable_bytes().items()}
    pieces = [piece for piece in tokenizer.pieces if piece != END_OF_TEXT.encode()]
    texts = ["".join(map(sign_of.get, piece)) for piece in pieces]
    ids = {text: i for i, text in enumerate(texts)}
    # ignore_merges: a word that is a piece itself becomes one token, as in tiktoken
    model = models.BPE(ids, list(find_merges(texts)), ignore_merges=True)
    theirs = tokenizers.Tokenizer(model)
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=isinstance(tokenizer, BytePairTokenizer)
    )
    theirs.decoder = decoders.ByteLevel()
    return theirs


@convert.register
def _(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """Pieces contain spaces instead of sentencepiece's ▁, so that a ▁ in the text itself is encoded as bytes."""
    processor = SentencePieceProcessor(model_proto=tokenizer.proto)
    theirs = tokenizers.Tokenizer(subword_model(processor, " ", first=1))
    if isinstance(theirs.model, models.Unigram):
        # otherwise the text "<0x41>" would be encoded as that byte
        byte_like = Regex("<(?=0x[0-9A-F]{2}>)")
        theirs.pre_tokenizer = pre_tokenizers.Split(byte_like, "merged_with_previous")
    theirs.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return theirs
