"""Discounts of stale updates."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossfl.server.staleness import Discount, discount


def test_closed_forms() -> None:
    assert discount("constant", 100) == 1
    assert discount("polynomial", 3, a=0.5) == 0.5
    assert [discount("hinge", age, a=10, b=4) for age in (4, 5)] == [1, 1 / 11]


@pytest.mark.parametrize("kind", get_args(Discount))
@given(st.integers(0, 10_000), st.floats(0, 20), st.floats(0, 50))
def test_older_never_counts_for_more(kind: Discount, age: int, a: float, b: float) -> None:
    fresh = discount(kind, 0, a, b)
    assert fresh == 1
    assert 0 <= discount(kind, age + 1, a, b) <= discount(kind, age, a, b) <= fresh
