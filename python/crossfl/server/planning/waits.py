"""How long the next job will wait, from the waits of those before it.

A job that still waits will wait longer than it has till now: it is *censored*, and leaving it
out would make every queue look shorter than it is. The estimate is the quantile of Kaplan and Meier
1958 (https://doi.org/10.1080/01621459.1958.10501452) over the last jobs that asked for about as
much.
"""

from collections.abc import Sequence
from typing import NamedTuple

RECENT = 20
"""Jobs that are looked at."""
ENOUGH = 10
"""Jobs that asked for about as much; with fewer, all of the last ones count."""
ALIKE = 2.0
"""Walltime and nodes of jobs that asked for about as much, over those of the next one."""


class Wait(NamedTuple):
    """The wait of one job."""

    submitted: float
    """When it was submitted, in seconds."""
    started: float | None
    """When it started; None while it waits."""
    walltime: float
    """Seconds of walltime that it asked for."""
    nodes: int = 1
    """Nodes that it asked for."""


def quantile(
    waits: Sequence[Wait], q: float, walltime: float, nodes: int, now: float
) -> float | None:
    """Seconds that the next job waits with probability q, or fewer.

    Args:
        waits: the jobs of one facility, oldest first.
        q: from 0 to 1.
        walltime: seconds of walltime that the next job asks for.
        nodes: nodes that it asks for.
        now: the moment, in seconds, until which those that wait have waited.

    Returns:
        The quantile; the longest wait seen where so many jobs still wait that it is longer than
        all of them; None without any job.
    """
    alike = [w for w in waits if _alike(w.walltime, walltime) and _alike(w.nodes, nodes)]
    recent = (alike if len(alike) >= ENOUGH else waits)[-RECENT:]
    if not recent:
        return None
    lasted = sorted(
        ((now if w.started is None else w.started) - w.submitted, w.started is None) for w in recent
    )
    waiting = 1.0
    """The share of jobs that wait longer than those looked at so far."""
    for number, (seconds, censored) in enumerate(lasted):
        if not censored:
            waiting *= 1 - 1 / (len(lasted) - number)
            if 1 - waiting >= q - 1e-9:
                return seconds
    return lasted[-1][0]


def _alike(one: float, other: float) -> bool:
    return other / ALIKE <= one <= other * ALIKE
