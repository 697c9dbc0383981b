"""Quantiles of waits on a machine with other users, against an exponential average of them."""

import statistics

import pytest
from numpy.random import default_rng

from crossfl.server.planning.waits import Wait, quantile
from crossfl.simulation.virtual.clock import Clock
from crossfl.simulation.virtual.queues import DAY, Backfill, Request, synthetic

WALLTIMES = (1200.0, 3600.0, 7200.0)


def _probes(load: float, seed: int) -> list[Wait]:
    """Jobs of 8 nodes on a machine of 64, one every two hours for forty days."""
    clock = Clock(-4 * DAY)
    machine = Backfill(clock, 64, synthetic(default_rng(seed), 64, load))
    clock.run(lambda: False, 0.0)
    draw, waits = default_rng(seed + 100), [Wait(0.0, None, 0.0)] * 480
    started = 0

    def submit(place: int, walltime: float) -> None:
        begun = clock.now

        def start() -> None:
            nonlocal started
            started += 1
            waits[place] = Wait(begun, clock.now, walltime, 8)
            clock.after(0.75 * walltime, machine.release, request)

        request = Request(8, walltime, start)
        machine.submit(request)

    for place in range(len(waits)):
        clock.after(7200.0 * (place + draw.random() * 0.6), submit, place, WALLTIMES[place % 3])
    clock.run(lambda: started == len(waits), 1e9)
    return waits


def _loss(q: float, told: float, wait: float) -> float:
    """The pinball loss, which is least in the mean where q of the waits are shorter."""
    return max(q * (wait - told), (q - 1) * (wait - told))


@pytest.mark.slow
@pytest.mark.parametrize("q", [0.2, 0.9])
def test_a_quantile_of_its_own_says_more_than_an_average(q: float) -> None:
    ours, average = [], []
    for load, seed in ((0.8, 0), (0.88, 1), (0.88, 2)):
        waits = sorted(_probes(load, seed))
        for place in range(len(waits) // 2, len(waits)):
            now, _, walltime, _ = waits[place]
            seen = [
                w if (w.started or 0.0) <= now else w._replace(started=None) for w in waits[:place]
            ]
            exact = (waits[place].started or 0.0) - now
            told = quantile(seen, q, walltime, 8, now)
            smoothed = 0.0
            for wait in sorted((w for w in seen if w.started), key=lambda w: w.started or 0.0)[
                -40:
            ]:
                smoothed = 0.5 * ((wait.started or 0.0) - wait.submitted) + 0.5 * smoothed
            ours.append(_loss(q, told or 0.0, exact))
            average.append(_loss(q, smoothed, exact))
    assert statistics.fmean(ours) <= 0.8 * statistics.fmean(average)
