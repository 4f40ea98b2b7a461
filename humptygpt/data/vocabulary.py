"""Make the tokenizer for a text: choose one that suits the text, and train it on the text."""

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain

from humptygpt.cli import UserError
from humptygpt.data.corpus import Corpus, draw, read_all
from humptygpt.data.settings import OPTIONS, PrepareConfig
from humptygpt.tokenizers.basic import (
    END_OF_TEXT,
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    gpt2_pieces,
    pieces_of,
)

# for tokenizer=auto: (minimum bytes of text, vocab_size). Smaller texts use characters. The last two entries are
# estimates.
AUTO = ((500_000, 512), (2_000_000, 2048), (50_000_000, 8192), (500_000_000, 32_768))
MOST_CHARACTERS = 256  # a small text with more distinct characters gets a byte tokenizer
SAMPLE_BYTES = 100_000_000  # from a larger corpus, a tokenizer is trained on a random sample of about this size
LINE = re.compile(".{1,1000}")  # what sentencepiece gets: a line, or part of a long one
# learn byte pairs from at most this many bytes of text with few spaces, because such text takes 100 times the memory
FEW_SPACES = 2_000_000


def make_tokenizer(corpus: Corpus) -> Tokenizer:
    """Train the tokenizer that the config names. On a small text, it may have fewer tokens than vocab_size."""
    config = corpus.config
    if config.tokenizer == "auto":
        config = choose_tokenizer(corpus)
    used = [key for key, users in OPTIONS.items() if config.tokenizer in users]
    options = {key: getattr(config, key) for key in used}
    # an alphabet needs every character of all splits
    texts = vocabulary_texts(corpus, everything=config.tokenizer == "char")
    return TRAINERS[config.tokenizer](texts, corpus.separated, **options)


def choose_tokenizer(corpus: Corpus) -> PrepareConfig:
    """Choose the tokenizer that suits the text, for tokenizer=auto, and print why. Returns the changed config."""
    size = corpus.text_size
    fitting = [vocab_size for least, vocab_size in AUTO if size >= least]
    measured = f"{size:,} bytes of text"
    if fitting:
        chosen = {"tokenizer": "bpe", "vocab_size": fitting[-1]}
    elif corpus.task == "chat":  # its users type any character
        chosen = {"tokenizer": "bpe", "vocab_size": AUTO[0][1]}
    else:
        items = read_all(corpus, "measuring the text")
        texts = chain.from_iterable(item.texts for _, item in items)
        characters = set(chain.from_iterable(texts))
        measured += f" with {len(characters):,} different characters"
        chosen = {"tokenizer": "char" if len(characters) <= MOST_CHARACTERS else "byte"}
    print(f"tokenizer={chosen['tokenizer']} is chosen for {measured}")
    return replace(corpus.config, **chosen)


def vocabulary_texts(corpus: Corpus, everything: bool) -> Iterator[str]:
    """Read the texts to train a tokenizer on.

    everything: True: read all splits; False: read a random sample of the training split.
    """
    fraction = SAMPLE_BYTES / corpus.text_size
    for split, item in read_all(corpus, "training the tokenizer"):
        for text in item.texts:
            if everything or (split == "train" and draw(text, "vocabulary") < fraction):
                yield text


# --------------------------------------------------------------------------------------
# Training


def train_characters(texts: Iterable[str], separated: bool) -> CharTokenizer:
    """Make an alphabet of all characters in the texts, sorted."""
    return CharTokenizer("".join(sorted(set(chain.from_iterable(texts)))), separated)


def train_sentencepiece(texts: Iterable[str], separated: bool, vocab_size: int) -> SentencePieceTokenizer:
    """Train a sentencepiece model of at most vocab_size tokens. Raises UserError if the texts need more.

    A line break is a token of its own, and a space belongs to the word after it. Neither is ever changed or added, so
    decoding restores the text exactly.
    """
    import sentencepiece

    proto = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain.from_iterable(map(LINE.findall, texts)),
            model_writer=proto,
            model_type="bpe",
            vocab_size=vocab_size + 1,
            hard_vocab_limit=False,
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
        raise UserError(f"sentencepiece cannot learn {vocab_size:,} pieces from the training split: {error}") from error
    return SentencePieceTokenizer(proto.getvalue(), separated)


def train_byte_pairs(
    texts: Iterable[str], separated: bool, vocab_size: int, split_digits: bool = False
) -> BytePairTokenizer:
    """Learn at most vocab_size tokens by byte-pair encoding, end-of-text included.

    split_digits: True: each digit is a token of its own, so that even a small model can learn to add.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split_digits:
        digits = pre_tokenizers.Digits(individual_digits=True)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, bpe.pre_tokenizer])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(bounded(texts), trainer)
    return BytePairTokenizer(pieces_of(bpe.get_vocab()), separated)


def bounded(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts, but of those with few spaces only the first FEW_SPACES bytes in total.

    Between spaces they have long "words", of which nearly all are distinct, and each distinct word takes memory.
    """
    size = 0
    for text in texts:
        length = len(text.encode())
        if length > 20 * len(text.split()):
            size += length
            if size > FEW_SPACES:
                continue
        yield text


TRAINERS = {  # functions of (texts, separated, **options) that make a tokenizer
    "char": train_characters,
    "byte": lambda texts, separated: ByteTokenizer(separated),
    "sentencepiece": train_sentencepiece,
    "gpt2": lambda texts, separated: GPT2Tokenizer(gpt2_pieces(), separated),
    "bpe": train_byte_pairs,
}
