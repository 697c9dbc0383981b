"""Example data for the templates of `crossfl init`: made by rule, different at each facility."""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

Row = dict[str, Any]
ROWS, HELD_OUT = 240, 40
"""Rows of a dataset, and how many of them are for validation."""
SIDE = 8
"""Pixels of an image, in each direction."""
ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
WORDS = {
    "north": (
        ["grey", "cold", "wide", "old", "quiet", "northern"],
        ["boat", "fisher", "seal", "harbour", "lighthouse", "gull"],
        ["waits", "drifts", "returns", "listens", "sleeps"],
        ["storm", "tide", "fjord", "island", "winter"],
    ),
    "south": (
        ["warm", "dusty", "golden", "slow", "southern", "bright"],
        ["farmer", "olive", "mule", "village", "baker", "lizard"],
        ["rests", "ripens", "wanders", "sings", "works"],
        ["harvest", "noon", "hill", "road", "summer"],
    ),
}
"""Adjectives, nouns, verbs and what they are near, at each facility."""
INSTRUCTIONS = {"north": "Write the number in words.", "south": "Add the numbers, in words."}


def rows(kind: str, facility: str) -> list[Row]:
    """The rows of a dataset, the same in every call.

    Args:
        kind: `sentences`, `instructions` or `images`.
        facility: `north` or `south`.
    """
    generator = random.Random(f"{kind} {facility}")  # noqa: S311 (not a secret)
    return list(itertools.islice(MAKERS[kind](facility, generator), ROWS))


def in_words(number: int) -> str:
    """A number from 0 to 99 in English words."""
    if number < len(ONES):
        return ONES[number]
    ten, one = divmod(number, 10)
    return TENS[ten - 2] + (f"-{ONES[one]}" if one else "")


def _sentences(facility: str, generator: random.Random) -> Iterator[Row]:
    adjectives, nouns, verbs, places = WORDS[facility]
    while True:
        adjective, noun, verb, place = map(generator.choice, (adjectives, nouns, verbs, places))
        yield {"text": f"The {adjective} {noun} {verb} before the {place}."}


def _instructions(facility: str, generator: random.Random) -> Iterator[Row]:
    while True:
        first, second = generator.randrange(50), generator.randrange(50)
        given, answer = {
            "north": (str(first), in_words(first)),
            "south": (f"{first} {second}", in_words(first + second)),
        }[facility]
        yield {"instruction": INSTRUCTIONS[facility], "input": given, "output": answer}


def _images(facility: str, generator: random.Random) -> Iterator[Row]:
    """Bars: horizontal (0) and vertical (1) in the north; falling (2) and rising (3) south."""
    while True:
        label, at = generator.randrange(2), generator.randrange(-2, 3)
        image = [[generator.random() * 0.3 for _ in range(SIDE)] for _ in range(SIDE)]
        for i in range(SIDE):
            if facility == "north":
                row, column = ((SIDE // 2 + at, i), (i, SIDE // 2 + at))[label]
            else:
                row, column = ((i, i + at), (i, SIDE - 1 - i + at))[label]
            if 0 <= row < SIDE and 0 <= column < SIDE:
                image[row][column] = 1.0
        pixels = [[round(value, 3) for value in line] for line in image]
        yield {"pixels": [pixels], "label": label + 2 * (facility == "south")}


MAKERS: dict[str, Callable[[str, random.Random], Iterator[Row]]] = {
    "sentences": _sentences,
    "instructions": _instructions,
    "images": _images,
}
