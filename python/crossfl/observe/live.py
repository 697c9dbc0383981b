"""How a run stands, folded from its events: each facility's phase, its jobs, and what it used.

Whatever the events say, and in whatever order, the fold ends and takes memory for facilities and
rounds only.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.observe.follow import CHUNK, Lines
from crossfl.protocol import events
from crossfl.protocol.events import LARGEST_EVENT, Event, decode_recorded

UNDER_WAY = frozenset(
    {events.STAGED, events.SENDING, events.SENT, events.QUEUED, events.RUNNING, events.TRAIN}
    | {"load", events.FETCHING, events.UNREACHABLE}
)
"""Phases that end with the engine."""
MOST_WAITS = 200
"""Waits in the queue that are remembered of each facility."""
MOST_PACES = 10
"""Finished rounds from whose durations the end is foretold."""


class Recorded:
    """The events in a file that may grow; what is no event is skipped, and a missing file empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines, self._offset = Lines(LARGEST_EVENT), 0

    def new(self) -> Iterator[Event]:
        """Those that came since the last look, oldest first; half a line is for the next one."""
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            file.seek(self._offset)
            while chunk := file.read(CHUNK):
                self._offset += len(chunk)
                for line in self._lines.feed(chunk):
                    with contextlib.suppress(CrossFLError):
                        yield decode_recorded(line)


def read(path: Path) -> Iterator[Event]:
    """All events of a file, oldest first."""
    return Recorded(path).new()


@dataclass
class FacilityState:
    """One facility, as its last events tell."""

    phase: str = ""
    round: int | None = None
    since: float = 0.0
    """When the phase began, in seconds since 1970."""
    job: str | None = None
    nodes: int | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    bytes: int | None = None
    size: int | None = None
    message: str | None = None
    expected: float | None = None
    log: str | None = None
    started: float | None = None
    """When the job that runs began to, in seconds since 1970."""
    node_seconds: float = 0.0
    """Nodes times seconds of the jobs that have ended."""
    sent: int = 0
    """Bytes of models that were sent there."""
    waits: list[tuple[float, float | None]] = field(default_factory=list)
    """Submission and start of its jobs; None for the start of one that waits."""
    logs: dict[int, str] = field(default_factory=dict)
    """By round, the file at the facility with what the job printed."""

    def used(self, now: float) -> float:
        """Node-seconds, with those of the job that runs."""
        runs = 0.0 if self.started is None else max(0.0, now - self.started)
        return self.node_seconds + runs * (self.nodes or 1)


@dataclass
class Live:
    """A run, as its events tell."""

    round: int = 0
    """Rounds that are finished."""
    rounds: int | None = None
    loss: float | None = None
    begun: float | None = None
    last: float | None = None
    """When something was last heard, in seconds since 1970."""
    command: str | None = None
    stopped: str | None = None
    """What ended the engine last, empty where it just ended; None while it goes on."""
    finished: bool = False
    message: str | None = None
    ends: list[tuple[int, float]] = field(default_factory=list)
    """The last rounds that ended, and when; the first is that of the engine's begin."""
    facilities: dict[str, FacilityState] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Take in the next event."""
        self.begun = event.time if self.begun is None else self.begun
        self.last = event.time
        if event.rounds is not None and event.facility is None:
            self.rounds = event.rounds
        if event.facility is not None:
            facility = self.facilities.setdefault(event.facility, FacilityState())
            _take(facility, event)
            return
        if event.phase == events.ENGINE:
            self.command, self.stopped = event.message, None
            self.ends = [(self.round, event.time)]
        elif event.phase == events.AGGREGATED:
            self.round = event.round or self.round
            self.loss = event.loss if event.loss is not None else self.loss
            self.ends = [*self.ends, (self.round, event.time)][-MOST_PACES - 1 :]
        elif event.phase == events.REPORTED:
            self.finished, self.loss = True, event.loss
        elif event.phase == events.STOPPED:
            self.stopped = event.message or ""
            for facility in self.facilities.values():
                _close(facility, event.time)
                if facility.phase in UNDER_WAY:
                    facility.phase, facility.since = events.STOPPED, event.time
        self.message = event.message or self.message

    def expected_end(self) -> float | None:
        """When the last round ends if the rounds to come last as the last ones did, on average."""
        if self.rounds is None or self.finished or len(self.ends) < 2:
            return None
        (first, begun), (last, ended) = self.ends[0], self.ends[-1]
        if last <= first or ended <= begun:
            return None
        return ended + (ended - begun) / (last - first) * max(0, self.rounds - last)

    def node_hours(self, now: float) -> float:
        """Node-hours of all facilities."""
        return sum(facility.used(now) for facility in self.facilities.values()) / 3600


def fold(stream: Iterable[Event], live: Live | None = None) -> Live:
    """The run that these events tell, or one that goes on with them."""
    live = live or Live()
    for event in stream:
        live.take(event)
    return live


def _take(facility: FacilityState, event: Event) -> None:
    begins = event.since if event.since is not None else event.time
    if event.phase != facility.phase or event.since is not None:
        facility.since = begins
    if event.round is not None and event.round != facility.round:
        facility.round = event.round
        facility.step = facility.steps = facility.loss = facility.tokens_per_second = None
    facility.message, facility.expected = event.message, event.expected
    facility.bytes, facility.size = event.bytes, event.size
    if event.phase == events.QUEUED:
        _close(facility, event.time)
        facility.job, facility.started = event.job, None
        if not facility.waits or facility.waits[-1][1] is not None:
            facility.waits = [*facility.waits, (begins, None)][-MOST_WAITS:]
    elif event.phase == events.RUNNING:
        facility.job, facility.started = event.job, begins
        if facility.waits and facility.waits[-1][1] is None:
            facility.waits[-1] = (facility.waits[-1][0], max(begins, facility.waits[-1][0]))
    elif event.phase == events.ENDED:
        facility.node_seconds += (event.nodes or 1) * (event.seconds or 0.0)
        facility.started = None
        if facility.waits and facility.waits[-1][1] is None:
            facility.waits.pop()  # it never ran
        if event.log:
            facility.log = event.log
            if facility.round is not None:
                facility.logs[facility.round] = event.log
    elif event.phase == events.SENT:
        facility.sent += event.bytes or 0
    elif event.phase == "trained" and facility.job is None:
        facility.node_seconds += event.seconds or 0.0
    if event.nodes is not None:
        facility.nodes = event.nodes
    for name in ("step", "steps", "loss", "tokens_per_second"):
        if (value := getattr(event, name)) is not None:
            setattr(facility, name, value)
    facility.phase = event.phase


def _close(facility: FacilityState, now: float) -> None:
    """Count what a job used whose end nobody saw."""
    if facility.started is not None:
        facility.node_seconds = facility.used(now)
        facility.started = None
