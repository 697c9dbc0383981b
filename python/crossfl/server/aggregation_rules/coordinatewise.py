"""Median and trimmed mean, coordinate by coordinate.

Yin et al. 2018, https://arxiv.org/abs/1803.01498. Both give every facility the same say, whatever
weight it claims.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor


def median(deltas: list[Tensor], num_byzantine: int) -> Tensor:
    """The middle value at each coordinate; of an even number, the mean of the middle two."""
    ordered, half = _sorted(deltas), len(deltas) // 2
    if len(deltas) % 2:
        return ordered[half]
    return ordered[half - 1] * 0.5 + ordered[half] * 0.5


def trimmed_mean(deltas: list[Tensor], num_byzantine: int) -> Tensor:
    """The mean without the smallest and the largest `num_byzantine` values at each coordinate."""
    middle = _sorted(deltas)[num_byzantine : len(deltas) - num_byzantine]
    total = middle[0].clone()
    for values in middle[1:]:
        total.add_(values)
    return total.div_(len(middle))


def _sorted(deltas: list[Tensor]) -> list[Tensor]:
    """The same numbers, so that at each coordinate the first tensor has the smallest, and so on.

    A sorting network of elementwise minima and maxima is some ten times faster than `torch.sort`
    across as few values as there are facilities.
    """
    rows = list(deltas)
    for low, high in _network(len(rows)):
        rows[low], rows[high] = (
            torch.minimum(rows[low], rows[high]),
            torch.maximum(rows[low], rows[high]),
        )
    return rows


@cache
def _network(n: int) -> tuple[tuple[int, int], ...]:
    """Comparators that sort n values: Batcher's merge exchange (Knuth, TAOCP 3, 5.2.2 M)."""
    return tuple(_merge_exchange(n)) if n > 1 else ()


def _merge_exchange(n: int) -> Iterator[tuple[int, int]]:
    top = 1 << ((n - 1).bit_length() - 1)
    p = top
    while p > 0:
        q, r, distance = top, 0, p
        while True:
            yield from ((i, i + distance) for i in range(n - distance) if i & p == r)
            if q == p:
                break
            distance, q, r = q - p, q >> 1, p
        p >>= 1
