"""When things happened, from the events of a run: spans of each facility, and losses step by step.

Where there are no events (a simulation, another engine), the spans follow from the history: a
facility begins when its round does.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from crossfl.observe.page.svg import Span
from crossfl.protocol import events
from crossfl.protocol.events import Event
from crossfl.protocol.history import RoundEntry
from crossfl.protocol.measurements import PhaseSeconds

MOST_SPANS = 16_000
"""Spans that are remembered of one facility."""
MOST_STEPS = 400
"""Losses that are kept of one facility, evenly over its steps."""
KINDS = ("queue", "send", "load", "evaluate", "train", "save", "fetch", "merge")
"""Kinds of spans, in the order in which they happen."""


@dataclass
class Steps:
    """The losses of one facility by the steps it has taken; thinned as they grow."""

    points: list[tuple[float, float]] = field(default_factory=list)
    _stride: int = 1
    _seen: int = 0
    _before: int = 0
    _round: int | None = None
    _last: int = 0

    def add(self, round_: int | None, step: int, loss: float) -> None:
        """Take in the next loss."""
        if round_ != self._round or step < self._last:
            self._before += self._last
            self._round = round_
        self._last = step
        self._seen += 1
        if self._seen % self._stride == 0:
            self.points.append((float(self._before + step), loss))
        if len(self.points) > MOST_STEPS:
            self.points, self._stride = self.points[1::2], 2 * self._stride


@dataclass
class Lane:
    """What is known of one facility."""

    spans: deque[Span] = field(default_factory=lambda: deque(maxlen=MOST_SPANS))
    """Queue, send and fetch, in seconds since 1970."""
    runs: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=MOST_SPANS))
    """Begin and end of the work of its jobs or steps."""
    steps: Steps = field(default_factory=Steps)
    sent: int = 0
    nodes: int | None = None
    node_seconds: float = 0.0
    open: dict[str, float] = field(default_factory=dict)
    """Since when it is in a phase."""


class Timeline:
    """A run in time.

    Args:
        stream: its events, oldest first; read once.
    """

    def __init__(self, stream: Iterable[Event] = ()) -> None:
        self.lanes: dict[str, Lane] = {}
        self.merges: deque[Span] = deque(maxlen=MOST_SPANS)
        self.command: str | None = None
        for event in stream:
            self._take(event)

    def _take(self, event: Event) -> None:
        if event.facility is None:
            if event.phase == events.ENGINE:
                self.command = event.message
            elif event.phase == events.AGGREGATED:
                begun = event.time - (event.seconds or 0.0)
                self.merges.append(Span("merge", begun, event.time))
            return
        lane = self.lanes.setdefault(event.facility, Lane())
        begun = event.since if event.since is not None else event.time
        lane.nodes = event.nodes or lane.nodes
        if event.phase == events.SENDING:
            lane.open.setdefault("send", begun)
        elif event.phase == events.SENT:
            lane.sent += event.bytes or 0
            _close(lane, "send", event.time)
        elif event.phase == events.QUEUED:
            lane.open.setdefault("queue", begun)
        elif event.phase == events.RUNNING:
            _close(lane, "queue", begun)
            lane.open["run"] = begun
        elif event.phase == "load" and "run" not in lane.open:
            lane.open["run"] = begun
        elif event.phase in (events.ENDED, "trained"):
            lane.open.pop("queue", None)
            if (started := lane.open.pop("run", None)) is not None and event.time > started:
                lane.runs.append((started, event.time))
                lane.node_seconds += (event.time - started) * (event.nodes or 1)
        elif event.phase == events.FETCHING:
            lane.open.setdefault("fetch", begun)
        elif event.phase == events.FETCHED:
            _close(lane, "fetch", event.time)
        if event.phase == events.TRAIN and event.loss is not None and event.step is not None:
            lane.steps.add(event.round, event.step, event.loss)


def _close(lane: Lane, kind: str, end: float) -> None:
    begun = lane.open.pop(kind, None)
    if begun is not None and end > begun:
        lane.spans.append(Span(kind, begun, end))


class Gantt:
    """The spans of the last rounds, in seconds since the federation began.

    Args:
        timeline: from events.
        started: when the federation began, in seconds since 1970.
    """

    def __init__(self, timeline: Timeline, started: float) -> None:
        self._timeline, self._started = timeline, started
        self._taken: dict[str, int] = {}
        self.begin = 0.0
        """Of what is drawn, in seconds since the federation began."""
        self.end = 0.0

    def spans(self, entries: Iterable[tuple[RoundEntry, float]]) -> dict[str, list[Span]]:
        """By facility, and of the VM under an empty name.

        Args:
            entries: rounds with the moment each began, in seconds since the federation began.
        """
        found: dict[str, list[Span]] = {}
        listed = list(entries)
        self.begin = listed[0][1] if listed else 0.0
        self.end = listed[-1][0].seconds if listed else 0.0
        for entry, begun in listed:
            for name, update in entry.facilities.items():
                if update.bytes or update.seconds.total:
                    row = found.setdefault(name, [])
                    row += self._work(name, update.seconds, begun, entry.seconds)
        for name, lane in self._timeline.lanes.items():
            known = [
                Span(s.kind, s.start - self._started, s.end - self._started) for s in lane.spans
            ]
            found.setdefault(name, []).extend(self._within(known))
        merges = [span.since(self._started) for span in self._timeline.merges]
        if merges:
            found[""] = list(self._within(merges))
        return found

    def _within(self, spans: Iterable[Span]) -> list[Span]:
        return [span for span in spans if span.end >= self.begin and span.start <= self.end]

    def _work(self, name: str, took: PhaseSeconds, begun: float, ended: float) -> list[Span]:
        """What a job did, from when it began to run, or else from when its round began."""
        lane = self._timeline.lanes.get(name)
        start, queued = begun, took.queue
        if lane is not None:
            runs = lane.runs
            i = self._taken.get(name, 0)
            # The last run that ended before the round did, and that no round before has taken.
            while i + 1 < len(runs) and runs[i + 1][1] - self._started <= ended + 1:
                i += 1
            if i < len(runs) and runs[i][1] - self._started <= ended + 1:
                start, queued = runs[i][0] - self._started, 0.0
                self._taken[name] = i + 1
        spans, at = [], start
        for kind, seconds in (
            ("queue", queued),
            ("load", took.load),
            ("evaluate", took.evaluate),
            ("train", took.train),
            ("save", took.save),
        ):
            if seconds > 0:
                spans.append(Span(kind, at, at + seconds))
            at += seconds
        return spans
