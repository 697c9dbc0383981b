"""Quantiles of waits: with those that still wait, and of jobs that asked for about as much."""

import math
import random

import pytest

from crossfl.server.planning.waits import Wait, quantile


def _ended(*seconds: float, walltime: float = 600.0) -> list[Wait]:
    return [Wait(0.0, s, walltime) for s in seconds]


def _quantile(waits: list[Wait], q: float, now: float = 1e6) -> float | None:
    return quantile(waits, q, 600.0, 1, now)


def test_without_censoring_it_is_the_empirical_quantile() -> None:
    waits = _ended(50, 10, 40, 20, 30)
    assert [_quantile(waits, q) for q in (0.0, 0.2, 0.5, 0.9, 1.0)] == [10, 10, 30, 50, 50]


def test_who_still_waits_makes_the_queue_longer() -> None:
    waits = [*_ended(10, 20, 30), Wait(0.0, None, 600.0), Wait(0.0, None, 600.0)]
    assert _quantile(waits, 0.5, now=25) == 30
    assert _quantile(waits, 0.9, now=400) == 400  # it is at least that
    assert _quantile(_ended(10, 20, 30), 0.9) == 30


def test_jobs_of_another_size_are_left_out_where_there_are_enough() -> None:
    short, long = _ended(*range(10)), _ended(*range(1000, 1010), walltime=86400.0)
    assert _quantile([*short, *long], 0.5) == 4
    assert _quantile([*short[:9], *long], 0.9) == 1008


def test_of_a_queue_that_nobody_was_in_nothing_is_known() -> None:
    assert _quantile([], 0.5) is None


@pytest.mark.parametrize("q", [0.5, 0.9])
def test_censoring_does_not_bias_it(q: float) -> None:
    """Of exponential waits of which half are cut short, those that ended are far too short."""
    draw = random.Random(3)
    errors, naive = [], []
    for _ in range(400):
        waits, now = [], 1000.0
        for _ in range(20):
            lasts, since = draw.expovariate(1 / 100), draw.expovariate(1 / 100)
            waits.append(Wait(now - since, now - since + lasts if lasts < since else None, 600.0))
        exact = -100 * math.log(1 - q)
        errors.append((quantile(waits, q, 600.0, 1, now) or 0.0) - exact)
        ended = sorted(w.started - w.submitted for w in waits if w.started is not None) or [0.0]
        naive.append(ended[min(int(q * len(ended)), len(ended) - 1)] - exact)
    assert abs(sum(errors) / len(errors)) < 0.6 * abs(sum(naive) / len(naive))
