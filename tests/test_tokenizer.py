import base64
import tracemalloc

import numpy as np
import pytest
from properties import given, settings, st
from texts import make_text

from humptygpt.cli import UserError
from humptygpt.data import vocabulary
from humptygpt.data.settings import OPTIONS as USED
from humptygpt.tokenizers import basic as tokenizer
from humptygpt.tokenizers.basic import END_OF_TEXT, CharTokenizer
from humptygpt.tokenizers.saved import from_state

TEXT = "Füße, 東京!\n🙂 and plain words\n" + make_text(3000)
ALPHABET = "".join(sorted(set(TEXT)))
OPTIONS = {"vocab_size": 350, "split_digits": False}
GPT2 = [*(bytes([i]) for i in range(256)), b" w", b"or"]


def made(name: str, separated: bool) -> tokenizer.Tokenizer:
    """A tokenizer as prepare_data.py makes one, with the options that it takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "gpt2_pieces", lambda: GPT2)
        keys = {key: OPTIONS[key] for key, users in USED.items() if name in users}
        return vocabulary.TRAINERS[name](iter([TEXT]), separated, **keys)


def all_made(separated: bool) -> dict[str, tokenizer.Tokenizer]:
    return {name: made(name, separated) for name in tokenizer.TOKENIZERS}


TOKENIZERS, SEPARATED = all_made(separated=False), all_made(separated=True)
EVERY = {**TOKENIZERS, **{f"{name}, separated": tok for name, tok in SEPARATED.items()}}
every = pytest.mark.parametrize("tok", EVERY.values(), ids=EVERY)

# signs that a subword tokenizer could mistake for its own
SIGNS = ["▁", " ", "\n", "\r\n", "\t", "\0", "<0x41>", "<unk>", "<s>", END_OF_TEXT]
SIGNS += ["\ufeff", "é", "e\u0301", "ﬁ", "　"]
anything = st.lists(st.sampled_from(SIGNS) | st.text(max_size=20)).map("".join)


@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("char")])
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(text=anything)
def test_decoding_gives_back_any_text_there_is(name, text):
    tok = EVERY[name]
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert ids.dtype == np.int64
    assert ((ids >= 0) & (ids < tok.vocab_size)).all()


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(text=st.text(ALPHABET))
def test_characters_give_back_any_text_of_their_alphabet(text):
    for tok in (EVERY["char"], EVERY["char, separated"]):
        assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize("name", [name for name in SEPARATED if name != "char"])
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(text=anything)
def test_the_end_of_text_token_never_comes_out_of_ordinary_text(name, text):
    tok = SEPARATED[name]
    assert tok.eot not in tok.encode(text + END_OF_TEXT)
    assert tok.decode([tok.eot]) == END_OF_TEXT


@every
def test_half_a_character_and_a_byte_that_is_not_utf_8_are_refused(tok):
    for char in ("\ud83d", "\udcff"):  # Python's form of such a byte on the command line
        with pytest.raises(UserError, match=r"has '\\ud|U\+D"):
            tok.encode(f"or{char}")


@every
def test_a_tokenizer_comes_back_from_its_state_of_plain_data(tok):
    state = tok.state()
    assert all(type(value) in (str, bool) for value in state.values())
    again = from_state(state)
    assert type(again) is type(tok) and again.state() == state and again.eot == tok.eot
    assert again.encode(TEXT).tolist() == tok.encode(TEXT).tolist()


def test_with_split_digits_each_digit_is_a_token_and_otherwise_a_frequent_number_is_one():
    text = "in 1984 and 1984 " * 20
    for split, expected in ((True, [b" ", b"1", b"9", b"8", b"4"]), (False, [b" 1984"])):
        tok = vocabulary.train_byte_pairs(iter([text]), False, 300, split_digits=split)
        assert [tok.pieces[i] for i in tok.encode(" 1984")] == expected


@every
def test_token_bytes_add_up_to_the_text(tok):
    assert tok.token_bytes()[tok.encode(TEXT)].sum() == len(TEXT.encode())
    assert tok.eot is None or tok.token_bytes()[tok.eot] == 0


def test_a_prompt_for_when_there_is_none_is_the_end_of_a_text_or_a_line_break():
    for name, tok in TOKENIZERS.items():
        assert tok.decode(tok.start()) == "\n"
        assert SEPARATED[name].start().tolist() == [SEPARATED[name].eot]
    assert CharTokenizer("ab").start().tolist() == [0]


@pytest.mark.parametrize("tok", [TOKENIZERS[name] for name in ("sentencepiece", "bpe")])
def test_sub_words_are_longer_than_characters_and_all_ids_can_be_decoded(tok):
    assert tok.vocab_size == 350
    assert len(tok.encode(TEXT)) < 0.6 * len(TEXT)
    assert all(tok.decode([i]) for i in range(350))


def test_byte_pairs_are_merged_in_the_order_in_which_they_were_found():
    tok = vocabulary.train_byte_pairs(["ab ab ab abc abc"] * 50, False, vocab_size=260)
    assert tok.pieces[256:] == [b"ab", b" ab", b" abc", END_OF_TEXT.encode()]
    assert tok.encode("ab abc abd").tolist() == [256, 258, 257, tok.pieces.index(b"d")]


def test_a_vocabulary_too_small_for_the_characters_of_the_text_is_refused():
    with pytest.raises(UserError, match="is smaller than required_chars"):
        vocabulary.train_sentencepiece([TEXT], False, vocab_size=257)


def test_byte_pair_encoding_learns_from_a_bounded_part_of_text_without_spaces(monkeypatch):
    monkeypatch.setattr(vocabulary, "FEW_SPACES", 600)
    plain = [make_text(200, seed) for seed in range(20)]
    spaceless = [40 * chr(0x4E00 + 64 * number) for number in range(20)]  # 120 bytes each
    texts = [text for both in zip(plain, spaceless, strict=True) for text in both]
    learned = vocabulary.train_byte_pairs(iter(texts), False, 500).pieces
    part = iter(texts[:10] + plain[5:])
    assert learned == vocabulary.train_byte_pairs(part, False, 500).pieces
    assert any(len(piece) > 2 and piece in spaceless[4].encode() for piece in learned)


def test_characters_are_numbered_in_their_order():
    tok = vocabulary.train_characters(["ban", "ana"], False)
    assert tok.encode("nab").tolist() == [2, 0, 1]
    # an alphabet from elsewhere keeps its own order
    assert CharTokenizer("nab").encode("nab").tolist() == [0, 1, 2]


def test_an_unknown_character_is_named():
    with pytest.raises(UserError, match=r"character 'é' \(U\+00E9\) is not among the 3"):
        CharTokenizer("abc").encode("abé")


@pytest.mark.parametrize("tok", [tok for name, tok in TOKENIZERS.items() if name != "char"])
def test_bytes_that_are_no_utf8_become_replacement_characters(tok):
    ids = [tok.pieces.index(b"\xff"), tok.pieces.index(b"A")]
    assert tok.decode(ids) == "\N{REPLACEMENT CHARACTER}A"


PROTO = TOKENIZERS["sentencepiece"].state()["proto"]
PIECES = [bytes([i]) for i in range(256)]


def packed(pieces: list[bytes]) -> str:
    return tokenizer.pack(b"\n".join(map(base64.b64encode, pieces)))


@pytest.mark.parametrize(
    "state",
    [
        {"tokenizer": "char"},
        {"tokenizer": ["char"]},
        {"tokenizer": "byte", 3: False},
        {"tokenizer": "sentencepiece", "separated": False, "proto": "ü"},
        {"tokenizer": "sentencepiece", "separated": False, "proto": PROTO[:-4]},
        {"tokenizer": "bpe", "separated": False, "pieces": packed(PIECES)[:-8]},
    ],
)
def test_a_damaged_description_is_refused(state):
    damaged = "cannot read the description of the tokenizer: "
    with pytest.raises(UserError, match=damaged) as error:
        from_state(state)
    assert "\n" not in str(error.value)


def test_a_small_description_of_a_huge_vocabulary_takes_little_memory(monkeypatch):
    monkeypatch.setattr(tokenizer, "MAX_UNPACKED_BYTES", 1 << 20)
    content = tokenizer.pack(bytes(1 << 24))
    state = {"tokenizer": "bpe", "separated": True, "pieces": content}
    tracemalloc.start()
    with pytest.raises(UserError, match="unpacks to more than 1,048,576 bytes"):
        from_state(state)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(content) < 1 << 16 and most < 1 << 22


def test_an_unknown_tokenizer_is_refused():
    kinds = ", ".join(tokenizer.TOKENIZERS)
    with pytest.raises(UserError, match=rf"tokenizer .* is not one of: {kinds}"):
        from_state({"tokenizer": "morse"})
