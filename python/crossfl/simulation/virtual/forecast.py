"""What if: when a federation would end, what it would cost, and how sure that is.

The federation is played in virtual time, without training, under many draws of queues, speeds and
failures. What is told are quantiles over the draws.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Annotated

from crossfl.errors import CrossFLError
from crossfl.protocol.fields import Amount, Count, Name, Record, Share, doc
from crossfl.simulation.virtual.federation import Federation
from crossfl.simulation.virtual.queues import DAY
from crossfl.simulation.virtual.sites import Site
from crossfl.storage.job import Job

HORIZON = 366 * DAY
"""Seconds after which a federation that has not ended is given up."""
LOW, HIGH = 0.1, 0.9


class Spread(Record, frozen=True, kw_only=True):
    """A quantity over the draws."""

    low: Annotated[Amount, doc("Its 10 % quantile.")]
    median: Annotated[Amount, doc("Its median.")]
    high: Annotated[Amount, doc("Its 90 % quantile.")]


class FacilityForecast(Record, frozen=True, kw_only=True):
    """One facility, over all draws."""

    updates: Annotated[Amount, doc("Mean number of its updates in the model.")]
    weight: Annotated[Share, doc("Part of all weight that they had.")]
    node_hours: Annotated[Amount, doc("Mean node-hours of its jobs.")]
    wait_median: Annotated[Amount, doc("Median seconds in its queue.")]
    wait_high: Annotated[Amount, doc("90 % quantile of the seconds in its queue.")]


class Forecast(Record, frozen=True, kw_only=True):
    """What would become of a federation."""

    draws: Annotated[Count, doc("Times that it was played.")]
    unfinished: Annotated[Count, doc("Times that it did not end within a year.")]
    hours: Annotated[Spread, doc("Hours until it ends.")]
    merges: Annotated[Spread, doc("Merges until it ends.")]
    node_hours: Annotated[Spread, doc("Node-hours of all jobs.")]
    thrown_away: Annotated[Spread, doc("Node-hours of work that is in no model.")]
    facilities: Annotated[dict[Name, FacilityForecast], doc("Each facility.")]


def forecast(job: Job, sites: Mapping[str, Site], draws: int) -> Forecast:
    """Play a federation so many times.

    Raises:
        CrossFLError: a facility is not described, its queue cannot be played, or a round of the
            federation ends below its quorum and the record says to stop.
    """
    if draws < 1:
        raise CrossFLError(f"draws is {draws}: it must be at least 1")
    played, finished = [], 0
    for seed in range(draws):
        federation = Federation(job, sites, seed)
        finished += federation.run(HORIZON)
        played.append(federation)
    accounts = {name: [f.accounts[name] for f in played] for name in played[0].accounts}
    everything = sum(a.weight for kept in accounts.values() for a in kept) or 1.0
    facilities = {}
    for name, kept in accounts.items():
        waits = sorted(seconds for account in kept for seconds in account.waits)
        facilities[name] = FacilityForecast(
            updates=statistics.fmean(a.merged for a in kept),
            weight=sum(a.weight for a in kept) / everything,
            node_hours=statistics.fmean(a.node_seconds for a in kept) / 3600,
            wait_median=_at(waits, 0.5),
            wait_high=_at(waits, HIGH),
        )
    return Forecast(
        draws=draws,
        unfinished=draws - finished,
        hours=_spread([f.clock.now / 3600 for f in played]),
        merges=_spread([float(f.state.updates) for f in played]),
        node_hours=_spread([f.machines.node_seconds / 3600 for f in played]),
        thrown_away=_spread([f.machines.thrown_away / 3600 for f in played]),
        facilities=facilities,
    )


def table(told: Forecast) -> str:
    """The forecast for people."""
    rows = [
        ("ends after, hours", told.hours),
        ("updates in the model", told.merges),
        ("node-hours", told.node_hours),
        ("node-hours thrown away", told.thrown_away),
    ]
    lines = [f"{'':<24}{'10 %':>10}{'median':>10}{'90 %':>10}   of {told.draws} draws"]
    lines += [f"{n:<24}{s.low:>10.1f}{s.median:>10.1f}{s.high:>10.1f}" for n, s in rows]
    heads = ("updates", "weight", "node-hours", "wait, s", "90 %, s")
    lines += ["", f"{'facility':<24}" + "".join(f"{head:>12}" for head in heads)]
    lines += [
        f"{name:<24}{f.updates:>12.1f}{f.weight:>12.3f}{f.node_hours:>12.1f}"
        f"{f.wait_median:>12.0f}{f.wait_high:>12.0f}"
        for name, f in told.facilities.items()
    ]
    if told.unfinished:
        lines += ["", f"{told.unfinished} of {told.draws} did not end within a year"]
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> Spread:
    ordered = sorted(values)
    return Spread(low=_at(ordered, LOW), median=_at(ordered, 0.5), high=_at(ordered, HIGH))


def _at(ordered: Sequence[float], q: float) -> float:
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)] if ordered else 0.0
