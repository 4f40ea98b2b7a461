"""check_schema() accepts content that fits a schema, and names the first entry that does not."""

import math

import pytest

from humptygpt.files import check_schema, parse_json

COUNT = range(100)
SCHEMA = {
    "name": str,
    "mean": float,
    "sizes": [COUNT],
    "best?": (int, None),
    "kind": {"text", "pairs"},
    "splits": {"train": {"tokens": COUNT, "done?": bool}},
}
FITTING = {
    "name": "a",
    "mean": 1,
    "sizes": [0, 99],
    "kind": "text",
    "splits": {"train": {"tokens": 3, "done": True}},
}
EDITS = {
    "the content must be dict": lambda value: [value],
    "name must be str": lambda value: value | {"name": 3},
    "mean must be float": lambda value: value | {"mean": True},
    r"sizes must be list": lambda value: value | {"sizes": (1, 2)},
    r"sizes\[1\] must be an int from 0 to 99": lambda value: value | {"sizes": [1, 100]},
    r"sizes\[0\] must be an int from 0 to 99": lambda value: value | {"sizes": [True]},
    "best must be int or None": lambda value: value | {"best": math.nan},
    "kind must be pairs or text": lambda value: value | {"kind": ["text"]},
    r"splits\.train must be dict": lambda value: value | {"splits": {"train": 3}},
    r"splits\.train\.tokens is missing": lambda value: value | {"splits": {"train": {"done": False}}},
}


def test_what_fits_passes_with_optional_and_further_entries_or_without():
    for more in ({}, {"best": None}, {"best": 3}, {"comment": object()}):
        check_schema(FITTING | more, SCHEMA)


@pytest.mark.parametrize("complaint", EDITS)
def test_the_entry_that_does_not_fit_is_named(complaint):
    with pytest.raises(ValueError, match=f"^{complaint}$"):
        check_schema(EDITS[complaint](FITTING), SCHEMA)


@pytest.mark.timeout(10)
def test_a_text_in_place_of_a_number_is_refused_at_once():
    with pytest.raises(ValueError, match=r"^iter must be an int from 0 to"):
        check_schema({"iter": "a"}, {"iter": range(2**53)})


@pytest.mark.parametrize(
    "text",
    ["", '{"a": 1', b"\xff\xfe\xff", "[" * 100_000, "1" * 5000, "NaN", "[3]"],
)
def test_what_is_no_json_or_does_not_fit_is_refused_in_one_line(text):
    with pytest.raises(ValueError) as error:
        parse_json(text, {"a": int})
    assert str(error.value) and "\n" not in str(error.value)
