import numpy as np
import pytest

import tokenizer
from configurator import UserError
from tokenizer import TOKENIZERS, ByteTokenizer, CharTokenizer

TEXT = "Füße, 東京!\n🙂 and plain words\n"


@pytest.mark.parametrize("kind", TOKENIZERS.values())
def test_decoding_gives_back_the_text(kind):
    tok = kind.train(TEXT)
    ids = tok.encode(TEXT)
    assert tok.decode(ids) == TEXT
    assert ids.dtype == np.int64 and ids.max() < tok.vocab_size


@pytest.mark.parametrize("kind", TOKENIZERS.values())
def test_a_tokenizer_comes_back_from_its_state(kind):
    tok = kind.train(TEXT)
    again = tokenizer.from_state(tok.state())
    assert type(again) is kind and again.encode(TEXT).tolist() == tok.encode(TEXT).tolist()


@pytest.mark.parametrize("kind", TOKENIZERS.values())
def test_token_bytes_add_up_to_the_text(kind):
    tok = kind.train(TEXT)
    assert tok.token_bytes()[tok.encode(TEXT)].sum() == len(TEXT.encode())


@pytest.mark.parametrize("kind", TOKENIZERS.values())
def test_the_default_start_can_be_encoded(kind):
    for text in ("abc", "a\nb"):
        tok = kind.train(text)
        assert len(tok.encode(tok.default_start)) == 1


def test_characters_are_numbered_in_their_order():
    assert CharTokenizer.train("banana").encode("nab").tolist() == [2, 0, 1]
    assert CharTokenizer("nab").encode("nab").tolist() == [0, 1, 2]  # an alphabet from elsewhere keeps its own order


def test_an_unknown_character_is_named():
    with pytest.raises(UserError, match=r"character 'é' \(U\+00E9\) is not among the 3"):
        CharTokenizer.train("abc").encode("abé")


def test_bytes_that_are_no_utf8_become_replacement_characters():
    assert ByteTokenizer().decode([0xFF, 65]) == "\N{REPLACEMENT CHARACTER}A"


def test_a_broken_byte_in_an_argument_is_named():
    with pytest.raises(UserError, match=r"'\\udcff' at position 1 is no character of UTF-8"):
        ByteTokenizer().encode("a\udcff")


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(UserError, match="tokenizer 'morse' is not one of: char, byte"):
        tokenizer.from_state({"tokenizer": "morse"})
