"""Limits on JSON of another party that Python's own parser reads: its keys, and its values."""

from typing import Any

MOST_VALUES = 500_000
"""Values in a document that is parsed: each costs some hundred bytes of memory."""


def count_values(text: bytes) -> int:
    """How many values a JSON text has at most, by its separators; pieces of it may be summed."""
    return sum(text.count(mark) for mark in (b",", b"[", b"{"))


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a document, for `object_pairs_hook`.

    Raises:
        ValueError: a key is there twice.
    """
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key is there twice")
    return mapping
