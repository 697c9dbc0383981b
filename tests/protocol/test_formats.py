"""Numbers as people read them: closed examples, and no number that raises."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossfl.protocol.formats import count, duration, moment, number, passage, size, text

ANY_NUMBER = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.sampled_from([10**5000, -(10**5000), math.inf, -math.inf, math.nan, 5e-324, 1.7e308]),
)


@pytest.mark.parametrize(
    ("value", "form", "written"),
    [
        (1234567, ",", "1,234,567"),
        (1.23456, ".4f", "1.2346"),
        (-0.25, "+.4f", "-0.2500"),
        (0.125, ".1%", "12.5%"),
        (None, ".4f", "–"),
        (True, ",", "–"),
        ("7", ",", "–"),
        (math.nan, ".4f", "–"),
        (math.inf, ".4f", "∞"),
        (-math.inf, ".4f", "-∞"),
        (10**400, ",", "∞"),
        (10**20, ",", "1.00e+20"),
    ],
)
def test_numbers(value: object, form: str, written: str) -> None:
    assert number(value, form) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [(999_999_999, "999,999,999"), (15_639_406_080, "15.6 billion"), (10**16, "1.00e+16")],
)
def test_counts(value: int, written: str) -> None:
    assert count(value) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.7, "1.00 kB"),
        (1627816, "1.63 MB"),
        (999_960_000, "1.00 GB"),
        (53e9, "53.0 GB"),
        (2**53, "9.01 PB"),
        (math.inf, "∞ YB"),
        (None, "–"),
    ],
)
def test_sizes(value: object, written: str) -> None:
    assert size(value) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (7.94, "7.9 s"),
        (99.96, "1 min 40 s"),
        (200, "3 min 20 s"),
        (9900, "2 h 45 min"),
        (1e9, "11,574 d 1 h"),
        (math.inf, "∞ s"),
        (None, "–"),
    ],
)
def test_durations(value: object, written: str) -> None:
    assert duration(value) == written


def test_texts_are_printable_and_short() -> None:
    assert text("a\x1b[2J\n\u202e\ud800è") == "a\\x1b[2J\\n\\u202e\\ud800è"
    assert text(None) == "–"
    assert len(text("\x1b" * 2000)) == 500
    assert passage("a\nb\x07") == "a\nb\\x07"
    assert len(passage("x" * 100_000)) == 1000
    assert moment("2026-01-02T03:04:05+00:00") == "2026-01-02 03:04:05 UTC"


@given(ANY_NUMBER)
def test_no_number_raises_and_none_is_long(value: object) -> None:
    for form in (",", ".4f", "+.4f", ".1%", ",.0f", "#.4g", ".4g"):
        assert 0 < len(number(value, form)) < 30
    for written in (count(value), size(value), duration(value)):
        assert 0 < len(written) < 30
