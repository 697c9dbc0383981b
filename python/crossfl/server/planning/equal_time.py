"""Equal time: each job trains for about as long, so that a fast facility takes more steps.

A facility's speed is the median of its last jobs, whose durations are in the ledger of the server
state. A first job takes the steps of the job file. A facility states its own durations: whatever
it states, it is asked for no more than `LARGEST_FACTOR` times the steps of the job file, and for no
less than that part of them.
"""

import math
import statistics
from collections.abc import Sequence

from crossfl.protocol.fields import LARGEST_INT
from crossfl.protocol.state import ServerState, Timing

LARGEST_FACTOR = 8
"""Most steps of a job over those of the job file, and the other way round."""
LEAST_SECONDS = 600.0
SHARE_OF_OTHER_WORK = 10.0
"""Seconds of training over those of all else that a job does, unless told."""
MARGIN, SPARE_SECONDS = 1.25, 300.0
"""Walltime to ask for over what the job is expected to take, and seconds more."""


def seconds_of(state: ServerState) -> float | None:
    """Seconds that each job is to train; None where the record has another planner.

    Unless the record tells, they are so many that loading the model is a small part of a job.
    """
    rules = state.aggregation
    if rules.planner != "equal_time":
        return None
    if rules.job_seconds is not None:
        return rules.job_seconds
    loads = [load_of(known.timings) for known in state.ledger.values() if known.timings]
    return max(LEAST_SECONDS, SHARE_OF_OTHER_WORK * statistics.median(loads or [0.0]))


def steps(timings: Sequence[Timing], seconds: float, usual: int) -> int:
    """Steps that a facility takes in so many seconds.

    Args:
        timings: the last jobs of the facility.
        seconds: how long a job is to train.
        usual: steps of the job file, of a facility without timings.
    """
    if not timings:
        return usual
    each = seconds_per_step(timings)
    most, least = usual * LARGEST_FACTOR, -(-usual // LARGEST_FACTOR)
    return most if each * most <= seconds else max(least, round(seconds / each))


def walltime(timings: Sequence[Timing], number: int) -> int:
    """Whole seconds of walltime to ask for a job of so many steps; the facility's jobs are known.

    They exceed what the job is expected to take, but for what no CWL `int` holds.
    """
    expected = load_of(timings) + number * seconds_per_step(timings)
    return math.ceil(min(MARGIN * expected + SPARE_SECONDS, LARGEST_INT))


def seconds_per_step(timings: Sequence[Timing]) -> float:
    """Median seconds of a step in the last jobs; 0 where there are none."""
    return statistics.median([t.train / max(t.steps, 1) for t in timings] or [0.0])


def load_of(timings: Sequence[Timing]) -> float:
    """Median seconds of what jobs did besides training; 0 where there are none."""
    return statistics.median([t.load for t in timings] or [0.0])
