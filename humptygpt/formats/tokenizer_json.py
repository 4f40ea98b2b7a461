"""Export our tokenizers as tokenizer.json and tokenizer_config.json, for Hugging Face's tokenizers and transformers.

They produce the same ids and text as ours, with two exceptions. The text <|endoftext|> is encoded as the token of that
name, as always in transformers, and so are <|im_start|> and <|im_end|> with a chat model. And if a model generates
several bytes that are not valid UTF-8, each becomes a U+FFFD, whereas ours writes one U+FFFD for all of them.
"""

import json
import re
from functools import singledispatch

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from humptygpt.cli import UserError
from humptygpt.tokenizers.basic import (
    END_OF_TEXT,
    GPT2_PATTERN,
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    printable_bytes,
)
from humptygpt.tokenizers.chat import BEGIN, END, ChatTokenizer
from humptygpt.tokenizers.pretrained import PretrainedTokenizer, load_engine, load_rest
from humptygpt.tokenizers.sentencepiece_model import find_merges, subword_model


def tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, str | dict]:
    """Convert a tokenizer to files. Returns {file name: content}. Raises UserError if it cannot be exported."""
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
    if tokenizer.chat_template:
        settings["chat_template"] = tokenizer.chat_template
    return {
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": settings,
    }


def tokenizer_json(tokenizer: Tokenizer) -> str:
    if isinstance(tokenizer, PretrainedTokenizer):
        return tokenizer.content  # unchanged
    return build_tokenizer(tokenizer).to_str(pretty=True)


def build_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Build the equivalent tokenizer of Hugging Face's tokenizers library."""
    theirs = convert(tokenizer)
    if END_OF_TEXT.encode() in tokenizer.pieces:
        theirs.add_special_tokens([END_OF_TEXT])
    return theirs


@singledispatch
def convert(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Convert a tokenizer without its end-of-text token."""
    raise UserError(f"tokenizer={tokenizer.name} cannot be exported: tokenizer.json cannot represent it")


@convert.register
def _(tokenizer: CharTokenizer) -> tokenizers.Tokenizer:
    # since "unknown" is not in the vocabulary, an unknown character raises an error; models.BPE would drop it
    theirs = tokenizers.Tokenizer(models.WordLevel({char: i for i, char in enumerate(tokenizer.alphabet)}, "unknown"))
    theirs.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    theirs.decoder = decoders.Fuse()
    return theirs


@convert.register
def _(tokenizer: ByteTokenizer | BytePairTokenizer) -> tokenizers.Tokenizer:
    sign_of = {byte: sign for sign, byte in printable_bytes().items()}
    texts = ["".join(map(sign_of.get, piece)) for piece in tokenizer.pieces if piece != END_OF_TEXT.encode()]
    ids = {text: i for i, text in enumerate(texts)}
    # ignore_merges: a word that is itself a piece becomes a single token, as in tiktoken
    theirs = tokenizers.Tokenizer(models.BPE(ids, find_merges(texts), ignore_merges=True))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=isinstance(tokenizer, BytePairTokenizer)
    )
    theirs.decoder = decoders.ByteLevel()
    return theirs


@convert.register
def _(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """Write spaces in pieces as spaces, not as sentencepiece's ▁, so that a ▁ in a text is encoded as bytes."""
    theirs = tokenizers.Tokenizer(subword_model(tokenizer.model, " ", first=1))
    theirs.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return theirs


@convert.register
def _(tokenizer: ChatTokenizer) -> tokenizers.Tokenizer:
    theirs = load_rest(tokenizer_json(tokenizer.base))
    theirs.add_special_tokens([BEGIN, END])
    return with_replies(theirs, tokenizer.replies) if tokenizer.replies else theirs


def with_replies(engine: tokenizers.Tokenizer, replies: dict[str, int]) -> tokenizers.Tokenizer:
    """Add replies, {text: id}, to a byte-pair tokenizer. Each is one token if it is the whole turn of the assistant.

    An added token would be found inside other texts, too. So a reply is a word of the vocabulary, and the text between
    two special tokens is split into words such that a reply is one word.
    """
    content = json.loads(engine.to_str())
    sign_of = {byte: sign for sign, byte in printable_bytes().items()}
    words = {"".join(map(sign_of.get, text.encode())): i for text, i in replies.items()}
    content["model"]["vocab"] = engine.get_vocab(with_added_tokens=True) | words
    engine = load_engine(json.dumps(content))
    whole = rf"(?<=\Aassistant\n)(?:{'|'.join(map(re.escape, replies))})\z"
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{whole}|{GPT2_PATTERN}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return engine
