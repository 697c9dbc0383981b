"""The order in which samples are drawn: a pure function of a seed and a position.

Every sample is drawn once before any is drawn twice, whatever the rounds, ranks and attempts. A
facility remembers nothing but how many samples it has seen. A position is a Python integer, of any
size. What is kept in memory does not grow with the data.

Groups are drawn before samples as in Charles et al. 2023, https://arxiv.org/abs/2307.09619.
"""

import hashlib
import random
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Protocol

LISTED = 1 << 17
"""A pass over so many samples or fewer is shuffled as a list, which is the faster way there."""
ROUNDS = 6
"""Of the Feistel network; four make it pseudorandom (Luby and Rackoff 1988)."""
CYCLE = 1000
"""Draws after which each part of a mixture has had its share, to the sample."""
WORD = (1 << 64) - 1


class Drawn(Protocol):
    """An order of samples."""

    def __getitem__(self, position: int) -> int:
        """The index of the sample at a position, counted from 0 over all passes."""


def order(size: int, seed: int, start: int, count: int) -> list[int]:
    """Indices of `count` samples after the first `start`."""
    drawn = Passes(size, str(seed))
    return [drawn[start + i] for i in range(count)]


def permutation(size: int, seed: str) -> Callable[[int], int]:
    """A function that gives every number below `size` another one, or itself, each once."""
    if size > LISTED:
        return Feistel(size, seed)
    shuffled = list(range(size))
    random.Random(seed).shuffle(shuffled)  # noqa: S311 (not a secret)
    return shuffled.__getitem__


class Feistel:
    """A permutation of the numbers below `size`, of which each is computed by itself.

    A Feistel network permutes the numbers of an even number of bits. A number beyond `size` is
    permuted again until it is below (cycle walking: Black and Rogaway 2002,
    https://doi.org/10.1007/3-540-45760-7_9), which takes fewer than four turns on average. The
    halves are mixed as in SplitMix64 (Steele et al. 2014,
    https://doi.org/10.1145/2660193.2660195).
    """

    def __init__(self, size: int, seed: str) -> None:
        self._size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        digest = hashlib.blake2b(seed.encode(), digest_size=8 * ROUNDS).digest()
        self._keys = [int.from_bytes(digest[i : i + 8]) for i in range(0, len(digest), 8)]

    def __call__(self, number: int) -> int:
        """The number in place of one below `size`."""
        while True:
            left, right = number >> self._half, number & self._mask
            for key in self._keys:
                left, right = right, left ^ (_mixed(right ^ key) & self._mask)
            number = left << self._half | right
            if number < self._size:
                return number


def _mixed(word: int) -> int:
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & WORD
    return word ^ word >> 31


class Passes:
    """One pass over all samples after the other, each in an order of its own."""

    def __init__(self, size: int, seed: str) -> None:
        self._size, self._seed = size, seed
        self._number, self._pass = -1, permutation(1, "")

    def __getitem__(self, position: int) -> int:
        """The index of the sample at a position."""
        number, offset = divmod(position, self._size)
        if number != self._number:
            self._number, self._pass = number, permutation(self._size, f"{self._seed}/{number}")
        return self._pass(offset)


class Groups:
    """A group is drawn before a sample of it: a small group counts as much as a large one.

    Every group is drawn once before any is drawn twice, and so is every sample of a group.

    Args:
        ends: the samples of group i are members `ends[i]` to `ends[i + 1]`; begins with 0.
        members: indices of samples, those of a group together.
        seed: decides on the order.
    """

    def __init__(self, ends: Sequence[int], members: Sequence[int], seed: str) -> None:
        self._ends, self._members, self._seed = ends, members, seed
        self._groups = Passes(len(ends) - 1, f"{seed}/groups")

    def __getitem__(self, position: int) -> int:
        """The index of the sample at a position."""
        group = self._groups[position]
        begin, end = int(self._ends[group]), int(self._ends[group + 1])
        number, offset = divmod(position // (len(self._ends) - 1), end - begin)
        place = Feistel(end - begin, f"{self._seed}/{group}/{number}")(offset)
        return int(self._members[begin + place])


class Mixture:
    """Parts that are drawn by their weights, each in its own order.

    Args:
        parts: the order of each part.
        counts: how often each is drawn in a cycle, at least once.
        begins: the index of the first sample of each part.
        seed: decides on the order of the parts.
    """

    def __init__(
        self, parts: Sequence[Drawn], counts: Sequence[int], begins: Sequence[int], seed: str
    ) -> None:
        self._parts, self._counts, self._begins = parts, counts, begins
        self._ends = list(accumulate(counts))
        self._slots = Passes(self._ends[-1], f"{seed}/mixture")

    def __getitem__(self, position: int) -> int:
        """The index of the sample at a position."""
        slot = self._slots[position]
        part = bisect_right(self._ends, slot)
        count = self._counts[part]
        turn = position // self._ends[-1] * count + slot - (self._ends[part] - count)
        return self._begins[part] + self._parts[part][turn]


def shares(weights: Mapping[str, float]) -> list[int]:
    """How often each part is drawn in a cycle: in proportion, by largest remainder, at least once.

    Args:
        weights: positive numbers.
    """
    total = sum(weights.values())
    exact = [CYCLE * weight / total for weight in weights.values()]
    counts = [max(1, int(value)) for value in exact]
    rest = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in rest[: max(0, CYCLE - sum(counts))]:
        counts[i] += 1
    return counts
