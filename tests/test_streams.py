"""What is shown of a text while it is written."""

from hypothesis import given
from hypothesis import strategies as st

from humptygpt.generation.sampling import TextStream
from humptygpt.tokenizers.basic import ByteTokenizer, CharTokenizer

TEXTS = st.text(st.sampled_from("abü🙂\n"), max_size=30)


def shown(text: str, stop: tuple[str, ...], tokenizer=None) -> list[str]:
    """What each token of the text lets out, and the end."""
    tokenizer = tokenizer or ByteTokenizer()
    stream, pieces = TextStream(tokenizer, stop), []
    for token in tokenizer.encode(text).tolist():
        pieces.append(stream.feed(token))
        if stream.ended:
            break
    return [*pieces, stream.close()]


@given(TEXTS, st.lists(TEXTS.filter(bool), max_size=3).map(tuple))
def test_a_text_ends_before_the_first_stop_text_and_is_otherwise_whole(text, stop):
    ends = []
    for length in range(len(text) + 1):  # the stop text that is complete first counts
        ends = [length - len(s) for s in stop if text[:length].endswith(s)]
        if ends:
            break
    expected = text[: min(ends)] if ends else text
    assert "".join(shown(text, stop)) == expected
    if text:
        assert "".join(shown(text, stop, CharTokenizer("".join(sorted(set(text)))))) == expected


def test_only_what_may_begin_a_stop_text_is_held_back():
    assert shown("xENENDy", ("END",)) == ["x", "", "", "EN", "", "", ""]
    assert shown("aEN", ("END",)) == ["a", "", "", "EN"]


def test_a_character_comes_with_its_last_byte_and_a_broken_one_never():
    stream = TextStream(ByteTokenizer())
    assert [stream.feed(byte) for byte in "ü🙂a".encode()] == [
        "",
        "ü",
        "",
        "",
        "",
        "🙂",
        "a",
    ]
    assert [stream.feed(0xC3), stream.close()] == ["", ""]
    assert TextStream(ByteTokenizer()).feed(0xFF) == "\N{REPLACEMENT CHARACTER}"


def test_end_of_text_ends_it_and_is_not_shown():
    stream = TextStream(ByteTokenizer(separated=True), ("bc",))
    assert [stream.feed(token) for token in (97, 98, 256)] == [
        "a",
        "",
        "b",
    ] and stream.ended
