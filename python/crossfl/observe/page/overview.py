"""What the report shows of the history, gathered in one pass over it.

The history can be far larger than the page. Memory is bounded by the number of facilities, whatever
the number of rounds: losses are kept for some of the rounds, and rounds with nothing to tell are
left out of the list.
"""

import math
from array import array
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from crossfl.protocol.history import COUNTED, FacilityEntry, RoundEntry
from crossfl.protocol.measurements import PhaseSeconds

PHASES = PhaseSeconds.__struct_fields__
"""The phases of a facility's round, in the order they happen."""
MOST_POINTS = 200
"""Rounds whose losses are kept for a plot."""
MOST_BARS = 72
"""Facilities times rounds up to which the times of each round are kept; beyond, their sums only."""
MOST_ROWS = 1000
"""Updates that are listed, all rounds together."""
MOST_ROWS_OF_ROUND = 250
"""Updates that are listed of one round, where not all are."""


@dataclass
class FacilityOverview:
    """The rounds of one facility, summed up."""

    losses: "array[float]"
    """Validation loss of the global model, one in so many rounds; NaN where there is none."""
    first_loss: float | None = None
    """Validation loss in the first round of the federation."""
    asked: int = 0
    delivered: int = 0
    bytes: int = 0
    """Of all updates that arrived."""
    tokens: int = 0
    """Of the updates that counted."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    """Of all rounds, by phase."""


@dataclass(frozen=True)
class ListedRound:
    """A round of the list, with those of its updates that are listed."""

    entry: RoundEntry
    facilities: Mapping[str, FacilityEntry]

    @property
    def unlisted(self) -> int:
        """Updates of the round that are not listed."""
        return len(self.entry.facilities) - len(self.facilities)


class RoundList:
    """The rounds to list: all while they are few, otherwise the first, the last and the notable.

    A round is notable that was skipped or waited, or has an update that is not complete. Of a
    notable round the updates that are not complete are listed. When there are too many, the oldest
    notable rounds are left out.
    """

    def __init__(self) -> None:
        self.notable = 0
        """Notable rounds, listed or not."""
        self._all: list[ListedRound] | None = []
        self._ends: list[ListedRound] = []
        self._notable: deque[ListedRound] = deque()
        self._rows = self._notable_rows = 0

    @property
    def complete(self) -> bool:
        """Whether all rounds are listed."""
        return self._all is not None

    @property
    def listed_notable(self) -> int:
        """Notable rounds that are listed for being so."""
        return len(self._notable)

    def add(self, entry: RoundEntry) -> None:
        """Take in the next round."""
        self._rows += 1 + len(entry.facilities)
        if self._rows > MOST_ROWS:
            self._all = None
        if self._all is not None:
            self._all.append(ListedRound(entry, dict(sorted(entry.facilities.items()))))
        self._ends = [*self._ends[:1], _listed(entry, entry.facilities)]
        incomplete = {n: u for n, u in entry.facilities.items() if u.status != "complete"}
        if incomplete or entry.skipped is not None or entry.waits:
            self.notable += 1
            self._notable.append(_listed(entry, incomplete))
            self._notable_rows += 1 + len(self._notable[-1].facilities)
            while self._notable_rows > MOST_ROWS:
                self._notable_rows -= 1 + len(self._notable.popleft().facilities)

    def rounds(self) -> list[ListedRound]:
        """The rounds to list, in order."""
        if self._all is not None:
            return self._all
        by_number = {listed.entry.round: listed for listed in (*self._notable, *self._ends)}
        return [by_number[number] for number in sorted(by_number)]


class Overview:
    """What the report shows of a history.

    Args:
        history: the rounds, oldest first; read once.
        rounds: how many there are; losses are kept for at most `MOST_POINTS` of them.
    """

    def __init__(self, history: Iterable[RoundEntry], rounds: int) -> None:
        self.stride = max(1, math.ceil(rounds / MOST_POINTS))
        """The losses of one in so many rounds are kept."""
        self.points = range(0, rounds, self.stride)
        """For each loss that is kept, the number of rounds that the model had behind it."""
        self.facilities: dict[str, FacilityOverview] = {}
        self.times: list[tuple[int, str, PhaseSeconds]] | None = []
        """Round, facility and times of each update; None where they are too many."""
        self.list = RoundList()
        self.last: RoundEntry | None = None
        for entry in history:
            self._add(entry)

    @property
    def bytes(self) -> int:
        """Of all updates that arrived."""
        return sum(facility.bytes for facility in self.facilities.values())

    @property
    def tokens(self) -> int:
        """Of all updates that counted."""
        return sum(facility.tokens for facility in self.facilities.values())

    @property
    def asked(self) -> int:
        """Updates that were asked for."""
        return sum(facility.asked for facility in self.facilities.values())

    @property
    def delivered(self) -> int:
        """Updates that arrived."""
        return sum(facility.delivered for facility in self.facilities.values())

    def local_loss(self, facility: str) -> float | None:
        """Loss (nats per token) of a facility's own model after the last round's training."""
        update = self.last.facilities.get(facility) if self.last else None
        local = update.metrics.local if update else None
        return local.loss if local else None

    def _add(self, entry: RoundEntry) -> None:
        behind = entry.round - 1
        kept = behind in self.points
        for name, update in entry.facilities.items():
            if (facility := self.facilities.get(name)) is None:
                losses = array("d", [math.nan]) * len(self.points)
                facility = self.facilities[name] = FacilityOverview(losses)
            if (validation := update.metrics.validation) is not None:
                if kept:
                    facility.losses[behind // self.stride] = validation.loss
                if behind == 0:
                    facility.first_loss = validation.loss
            facility.asked += 1
            facility.delivered += update.bytes > 0
            facility.bytes += update.bytes
            facility.tokens += update.tokens if update.status in COUNTED else 0
            for phase in PHASES:
                facility.seconds[phase] += getattr(update.seconds, phase)
            if self.times is not None:
                self.times.append((entry.round, name, update.seconds))
        if self.times is not None and len(self.times) > MOST_BARS:
            self.times = None
        self.list.add(entry)
        self.last = entry


def _listed(entry: RoundEntry, updates: Mapping[str, FacilityEntry]) -> ListedRound:
    return ListedRound(
        entry, {name: updates[name] for name in sorted(updates)[:MOST_ROWS_OF_ROUND]}
    )
