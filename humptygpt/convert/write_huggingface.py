"""One of our tokenizers -> tokenizer.json, which the library tokenizers runs, and tokenizer_config.json.

Ids and text are the same as ours, with two exceptions. The text <|endoftext|> becomes the token of that name, as
everywhere in transformers. And if a model writes bytes that are not UTF-8, each of them becomes a U+FFFD, whereas we
write one U+FFFD for all of them.
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
    """Make the content of each file, by its name. Raises UserError if a tokenizer cannot be expressed."""
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
    if isinstance(tokenizer, PretrainedTokenizer):  # it is exported as it came
        content = tokenizer.content
    else:
        content = build_tokenizer(tokenizer).to_str(pretty=True)
    return {
        "tokenizer.json": content.encode(),
        "tokenizer_config.json": f"{json.dumps(settings, indent=2)}\n".encode(),
    }


def build_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Build the same tokenizer in the library tokenizers."""
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
        f"tokenizer={tokenizer.name} cannot be exported: it has no tokenizer.json"
    )


@convert.register
def _(tokenizer: CharTokenizer) -> tokenizers.Tokenizer:
    if surrogates := [char for char in tokenizer.alphabet if "\ud800" <= char <= "\udfff"]:
        raise UserError(
            f"tokenizer=char has {surrogates[0]!r}, which is no character; export needs --tokenizer=byte"
        )
    # "unknown" is no token, so that an unknown character is an error; models.BPE would leave it out
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
    # ignore_merges: a word that is a piece is taken as it is, as in tiktoken
    model = models.BPE(ids, list(find_merges(texts)), ignore_merges=True)
    theirs = tokenizers.Tokenizer(model)
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=isinstance(tokenizer, BytePairTokenizer)
    )
    theirs.decoder = decoders.ByteLevel()
    return theirs


@convert.register
def _(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """Pieces have spaces instead of sentencepiece's sign for them, so that the sign itself is spelled in bytes."""
    processor = SentencePieceProcessor(model_proto=tokenizer.proto)
    theirs = tokenizers.Tokenizer(subword_model(processor, " ", first=1))
    if isinstance(theirs.model, models.Unigram):
        # otherwise the text "<0x41>" would become the byte
        byte_like = Regex("<(?=0x[0-9A-F]{2}>)")
        theirs.pre_tokenizer = pre_tokenizers.Split(byte_like, "merged_with_previous")
    theirs.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return theirs
