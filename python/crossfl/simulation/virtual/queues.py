"""Where jobs wait: for times that are drawn, or were recorded, or on a machine with other users."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from numpy.random import Generator, default_rng

from crossfl.simulation.virtual.clock import Clock

DAY = 86_400.0


@dataclass(eq=False)
class Request:
    """A batch job that waits for its nodes."""

    nodes: int
    walltime: float
    """Seconds that it asks for."""
    start: Callable[[], None]
    """Called when it starts."""
    end_by: float = 0.0
    """When its nodes are free at the latest, once it has started."""


class Queue(Protocol):
    """What the jobs of one facility wait in."""

    def submit(self, request: Request) -> None:
        """Take a job in; its `start` is called when it starts."""
        ...

    def release(self, request: Request) -> None:
        """Take back the nodes of a job that has ended."""
        ...


class Drawn:
    """Waits that are drawn one by one; jobs start in the order they came in.

    Args:
        clock: the clock.
        wait: draws the seconds that a job waits which is submitted now.
    """

    def __init__(self, clock: Clock, wait: Callable[[float], float]) -> None:
        self._clock, self._wait, self._last = clock, wait, float("-inf")

    def submit(self, request: Request) -> None:
        """Take a job in."""
        now = self._clock.now
        self._last = max(self._last, now + self._wait(now))
        self._clock.after(self._last - now, request.start)

    def release(self, request: Request) -> None:
        """Nobody else needs the nodes."""


def lognormal(draw: Generator, median: float, sigma: float) -> Callable[[float], float]:
    """Waits of a lognormal distribution, whatever the moment."""
    return lambda _now: median * draw.lognormal(0.0, sigma)


def recorded(draw: Generator, seconds: Sequence[float]) -> Callable[[float], float]:
    """Waits that were seen before, any of them at any moment."""
    return lambda _now: seconds[int(draw.integers(len(seconds)))]


class Spell(NamedTuple):
    """What a queue is like for a while."""

    median: float
    """Seconds of a lognormal wait."""
    sigma: float
    lasts: float
    """Mean seconds of such a spell."""


def modulated(draw: Generator, calm: Spell, busy: Spell) -> Callable[[float], float]:
    """Waits of a queue that is calm and busy in turns, of exponential lengths.

    A job that would wait beyond the end of a busy spell starts soon after it.
    """
    ends: list[float] = []
    is_busy = [draw.random() < busy.lasts / (busy.lasts + calm.lasts)]

    def wait(now: float) -> float:
        while not ends or ends[-1] <= now:
            spell = busy if is_busy[-1] else calm
            ends.append((ends[-1] if ends else now) + draw.exponential(spell.lasts))
            is_busy.append(not is_busy[-1])
        number = bisect.bisect_right(ends, now)
        spell = busy if is_busy[number] else calm
        seconds = spell.median * draw.lognormal(0.0, spell.sigma)
        left = ends[number] - now
        if is_busy[number] and seconds > left:
            return left + calm.median * draw.lognormal(0.0, calm.sigma)
        return seconds

    return wait


class TraceJob(NamedTuple):
    """A job of other users."""

    gap: float
    """Seconds after the one before it."""
    nodes: int
    seconds: float
    """How long it runs."""
    walltime: float
    """How long it asks for."""


class Backfill:
    """A machine with other users: first come, first served, with EASY backfilling.

    The first job in the queue has a reservation, by the walltimes that running jobs have asked for.
    A job behind it starts at once if it ends before that by its own walltime, or takes nodes that
    are left over even then (Lifka 1995, https://doi.org/10.1007/3-540-60153-8_35).

    Args:
        clock: the clock; the machine is filled from its present moment on.
        nodes: nodes of the machine.
        others: draws the next job of other users.
    """

    def __init__(self, clock: Clock, nodes: int, others: Callable[[], TraceJob]) -> None:
        self._clock, self._idle, self._others = clock, nodes, others
        self.nodes = nodes
        self._queue: list[Request] = []
        self._running: list[Request] = []
        self._next()

    @property
    def busy(self) -> int:
        """Nodes that are in use."""
        return self.nodes - self._idle

    def submit(self, request: Request) -> None:
        """Take a job in."""
        self._queue.append(request)
        self._schedule()

    def release(self, request: Request) -> None:
        """Take back the nodes of a job that has ended."""
        self._running.remove(request)
        self._idle += request.nodes
        self._schedule()

    def _next(self) -> None:
        job = self._others()
        self._clock.after(job.gap, self._arrive, job)

    def _arrive(self, job: TraceJob) -> None:
        def run() -> None:
            self._clock.after(min(job.seconds, job.walltime), self.release, request)

        request = Request(min(job.nodes, self.nodes), job.walltime, run)
        self._next()
        self.submit(request)

    def _launch(self, request: Request) -> None:
        self._idle -= request.nodes
        request.end_by = self._clock.now + request.walltime
        self._running.append(request)
        request.start()

    def _schedule(self) -> None:
        queue = self._queue
        while queue and queue[0].nodes <= self._idle:
            self._launch(queue.pop(0))
        if not queue or not self._idle:
            return
        free, shadow = self._idle, float("inf")
        for running in sorted(self._running, key=lambda r: r.end_by):
            free += running.nodes
            if free >= queue[0].nodes:
                shadow = running.end_by
                break
        spare = free - queue[0].nodes
        for request in queue[1:]:
            ends_before = self._clock.now + request.walltime <= shadow
            if request.nodes <= self._idle and (ends_before or request.nodes <= spare):
                spare -= 0 if ends_before else request.nodes
                queue.remove(request)
                self._launch(request)


SIZES, ODDS = (1, 2, 4, 8, 16, 32), (0.30, 0.15, 0.20, 0.18, 0.12, 0.05)
LIMITS = (1800.0, 3600.0, 7200.0, 14_400.0, 28_800.0, 43_200.0, DAY)
MEDIAN_RUN, SIGMA_RUN = 2400.0, 1.3
OVERSTATED = 1.5
"""Mean of what users ask for beyond what their jobs take, over that."""


def synthetic(draw: Generator, nodes: int, load: float) -> Callable[[], TraceJob]:
    """Jobs of other users that keep a machine busy to a load.

    Sizes are powers of two, runs of lognormal length, walltimes overstated up to the next usual
    limit.
    """

    def seconds() -> float:
        return min(MEDIAN_RUN * draw.lognormal(0.0, SIGMA_RUN), DAY)

    sizes = [size for size in SIZES if size <= nodes]
    odds = [odd / sum(ODDS[: len(sizes)]) for odd in ODDS[: len(sizes)]]
    mean_size = sum(size * odd for size, odd in zip(sizes, odds, strict=True))
    runs = MEDIAN_RUN * default_rng(7).lognormal(0.0, SIGMA_RUN, 20_000)
    gap = mean_size * float(runs.clip(max=DAY).mean()) / (load * nodes)

    def job() -> TraceJob:
        runs = seconds()
        asked = runs * (1 + draw.exponential(OVERSTATED))
        limit = LIMITS[min(bisect.bisect_left(LIMITS, asked), len(LIMITS) - 1)]
        return TraceJob(draw.exponential(gap), int(draw.choice(sizes, p=odds)), runs, limit)

    return job


def replayed(
    draw: Generator, trace: Sequence[TraceJob], nodes: int, load: float
) -> Callable[[], TraceJob]:
    """The jobs of a trace from a random one on, round and round, squeezed in time to a load."""
    work = sum(min(job.nodes, nodes) * job.seconds for job in trace)
    squeeze = work / (load * nodes) / max(sum(job.gap for job in trace), 1.0)
    place = [int(draw.integers(len(trace)))]

    def job() -> TraceJob:
        place[0] = (place[0] + 1) % len(trace)
        return trace[place[0]]._replace(gap=trace[place[0]].gap * squeeze)

    return job
