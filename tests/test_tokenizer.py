import numpy as np
import pytest
from conftest import make_text
from hypothesis import given, settings
from hypothesis import strategies as st

from humptygpt import tokenizer
from humptygpt.configurator import UserError
from humptygpt.tokenizer import END_OF_TEXT, BytePairTokenizer, ByteTokenizer, CharTokenizer, SentencePieceTokenizer

TEXT = "Füße, 東京!\n🙂 and plain words\n" + make_text(3000)
ALPHABET = "".join(sorted(set(TEXT)))
MAKERS = {
    "char": lambda **keys: CharTokenizer.train([TEXT], **keys),
    "byte": lambda **keys: ByteTokenizer(**keys),
    "sentencepiece-bpe": lambda **keys: SentencePieceTokenizer.train([TEXT], 350, **keys),
    "sentencepiece-unigram": lambda **keys: SentencePieceTokenizer.train([TEXT], 350, model_type="unigram", **keys),
    "bpe": lambda **keys: BytePairTokenizer.train([TEXT], 350, **keys),
}
TOKENIZERS = {name: make() for name, make in MAKERS.items()}
SEPARATED = {name: make(separated=True) for name, make in MAKERS.items()}
EVERY = {**TOKENIZERS, **{f"{name}, separated": tok for name, tok in SEPARATED.items()}}
every = pytest.mark.parametrize("tok", EVERY.values(), ids=EVERY)

# what a sub-word tokenizer could take for its own signs, among any other text
SIGNS = ["▁", " ", "\n", "\r\n", "\t", "\0", "<0x41>", "<unk>", "<s>", END_OF_TEXT, "\ufeff", "é", "e\u0301", "ﬁ", "　"]
anything = st.lists(st.sampled_from(SIGNS) | st.text(max_size=20)).map("".join)


@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("char")])
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(text=anything)
def test_decoding_gives_back_any_text_there_is(name, text):
    tok = EVERY[name]
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert ids.dtype == np.int64 and (len(ids) == 0 or (ids.min() >= 0 and ids.max() < tok.vocab_size))


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
def test_a_tokenizer_comes_back_from_its_state_of_plain_data(tok):
    state = tok.state()
    assert all(type(value) in (str, bool) for value in state.values())
    again = tokenizer.from_state(state)
    assert type(again) is type(tok) and again.state() == state and again.eot == tok.eot
    assert again.encode(TEXT).tolist() == tok.encode(TEXT).tolist()


@every
def test_batches_are_encoded_and_decoded_one_by_one(tok):
    texts = ["plain", "", "words\n"]
    batch = tok.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tok.encode(text).tolist() for text in texts]
    assert tok.decode_batch(batch) == texts


@every
def test_token_bytes_add_up_to_the_text(tok):
    assert tok.token_bytes()[tok.encode(TEXT)].sum() == len(TEXT.encode())
    assert tok.eot is None or tok.token_bytes()[tok.eot] == 0


@every
def test_text_comes_out_while_its_tokens_still_come_in(tok):
    ids = tok.encode("naïve 東") if "char" not in tok.name else tok.encode("東 words")
    pieces = list(tok.decode_stream(iter(ids)))
    assert len(pieces) > 2 and all(pieces) and "".join(pieces) == tok.decode(ids)


def test_a_prompt_for_when_there_is_none_is_the_end_of_a_text_or_a_line_break():
    for name, tok in TOKENIZERS.items():
        assert tok.decode(tok.start()) == "\n"
        assert SEPARATED[name].start().tolist() == [SEPARATED[name].eot]
    assert CharTokenizer("ab").start().tolist() == [0]


@pytest.mark.parametrize("tok", [TOKENIZERS[name] for name in ("sentencepiece-bpe", "sentencepiece-unigram", "bpe")])
def test_sub_words_are_longer_than_characters_and_all_ids_can_be_decoded(tok):
    assert tok.vocab_size == 350
    assert len(tok.encode(TEXT)) < 0.6 * len(TEXT)
    assert all(tok.decode([i]) for i in range(350))


def test_sentencepiece_counts_the_characters_that_have_no_piece():
    tok = TOKENIZERS["sentencepiece-bpe"]
    counts = np.bincount(tok.encode("plain \U0001f680 words 鳥▁"), minlength=350)
    assert tok.spelled(counts) == 3
    assert tok.spelled(np.bincount(tok.encode(TEXT), minlength=350)) < 10


def test_byte_pairs_are_merged_in_the_order_in_which_they_were_learnt():
    tok = BytePairTokenizer.train(["ab ab ab abc abc"] * 50, 260)
    assert tok.pieces[256:] == [b"ab", b" ab", b" abc", END_OF_TEXT.encode()]
    assert tok.encode("ab abc abd").tolist() == [256, 258, 257, tok.pieces.index(b"d")]


@pytest.mark.parametrize("kind", [SentencePieceTokenizer, BytePairTokenizer])
def test_a_vocabulary_larger_than_the_text_allows_is_refused_with_the_largest_that_is_possible(kind):
    with pytest.raises(UserError, match=r"vocab_size=5000: this text allows at most \d+ ") as error:
        kind.train(["too little text"], 5000)
    most = int(str(error.value).split()[6])
    assert kind.train(["too little text"], most).vocab_size == most


@pytest.mark.parametrize("kind", [SentencePieceTokenizer, BytePairTokenizer])
def test_a_vocabulary_too_small_for_the_text_is_refused_with_the_smallest_that_is_possible(kind):
    with pytest.raises(UserError, match=r"vocab_size=20: this text allows at least \d+ ") as error:
        kind.train([TEXT], 20)
    least = int(str(error.value).split()[6])
    assert kind.train([TEXT], least).vocab_size == least


def test_characters_are_numbered_in_their_order():
    assert CharTokenizer.train(["ban", "ana"]).encode("nab").tolist() == [2, 0, 1]
    assert CharTokenizer("nab").encode("nab").tolist() == [0, 1, 2]  # an alphabet from elsewhere keeps its own order


def test_an_unknown_character_is_named():
    with pytest.raises(UserError, match=r"character 'é' \(U\+00E9\) is not among the 3"):
        CharTokenizer.train(["abc"]).encode("abé")


@pytest.mark.parametrize("tok", [tok for name, tok in TOKENIZERS.items() if name != "char"])
def test_bytes_that_are_no_utf8_become_replacement_characters(tok):
    ids = [tok.pieces.index(b"\xff"), tok.pieces.index(b"A")]
    assert tok.decode(ids) == "\N{REPLACEMENT CHARACTER}A"


@pytest.mark.parametrize("tok", [tok for name, tok in TOKENIZERS.items() if name != "char"])
def test_a_broken_byte_in_an_argument_is_named(tok):
    with pytest.raises(UserError, match=r"'\\udcff' at position 1 is no character of UTF-8"):
        tok.encode("a\udcff")


@pytest.mark.parametrize(
    "state",
    [
        {"tokenizer": "char"},
        {"tokenizer": "sentencepiece", "separated": False, "proto": "AAAA"},
        {"tokenizer": "bpe", "separated": False, "pieces": "AAAA"},
        {"tokenizer": "gpt2", "separated": False, "pieces": 3},
    ],
)
def test_a_damaged_description_is_refused(state):
    with pytest.raises(UserError, match=f"the description of the tokenizer {state['tokenizer']} is damaged"):
        tokenizer.from_state(state)


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(UserError, match="tokenizer 'morse' is not one of: char, byte, sentencepiece, gpt2, bpe"):
        tokenizer.from_state({"tokenizer": "morse"})
