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
MOST_CELLS = 4000
"""Facilities times rounds, of the last rounds, whose times are drawn one by one."""
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
    shares: "array[float]" = field(default_factory=lambda: array("d"))
    """Sum of the shares of its updates till then, one in so many rounds."""
    share: float = 0.0
    """Sum of the shares of all its updates."""
    statuses: dict[str, int] = field(default_factory=dict)
    """How many of its updates had each status."""
    staleness: int = 0
    """Sum over the updates that counted."""
    stalest: int = 0
    steps: int = 0
    peak_memory: int = 0
    """Most bytes that a rank of it held, in any round."""
    joules: dict[str, float] = field(default_factory=dict)
    utilisation: float = 0.0
    """Seconds of training, each times the utilisation stated for it."""
    utilised: float = 0.0
    """Seconds of training for which a utilisation is stated."""
    rank_seconds: float = 0.0
    """Seconds of work times ranks."""
    ranks: int = 0
    tokens_per_second: float | None = None
    """Of its last update that says so."""
    device: str | None = None
    software: str | None = None

    @property
    def counted(self) -> int:
        """Updates that are in the model."""
        return sum(self.statuses.get(status, 0) for status in COUNTED)

    @property
    def flops_utilisation(self) -> float | None:
        """Mean over the time for which it is stated."""
        return self.utilisation / self.utilised if self.utilised else None

    def measure(self, update: FacilityEntry) -> None:
        """Take in what an update cost."""
        training = update.metrics.training
        if training is None:
            return
        self.peak_memory = max(self.peak_memory, training.peak_memory)
        for kind, joules in training.joules.items():
            self.joules[kind] = self.joules.get(kind, 0.0) + joules
        if training.flops_utilisation is not None:
            self.utilisation += update.seconds.train * training.flops_utilisation
            self.utilised += update.seconds.train
        self.ranks = training.ranks
        self.rank_seconds += update.seconds.working * training.ranks
        self.tokens_per_second = training.tokens_per_second or self.tokens_per_second
        self.device = training.device or self.device
        self.software = training.software or self.software


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
        self.clock = array("d", [math.nan]) * len(self.points)
        """When the model of each loss that is kept was made, in seconds since the beginning."""
        self.window: deque[tuple[RoundEntry, float]] = deque()
        """The last rounds, each with the moment it began, in seconds since the beginning."""
        self._cells = 0
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
    def share(self) -> float:
        """Of all updates that counted."""
        return sum(facility.share for facility in self.facilities.values())

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
        begun = self.last.seconds if self.last else 0.0
        if kept:
            self.clock[behind // self.stride] = begun
        self.window.append((entry, min(begun, entry.seconds)))
        self._cells += len(entry.facilities)
        while self._cells > MOST_CELLS and len(self.window) > 1:
            self._cells -= len(self.window.popleft()[0].facilities)
        for name, update in entry.facilities.items():
            if (facility := self.facilities.get(name)) is None:
                losses = array("d", [math.nan]) * len(self.points)
                shares = array("d", [math.nan]) * len(self.points)
                facility = self.facilities[name] = FacilityOverview(losses, shares=shares)
            if (validation := update.metrics.validation) is not None:
                if kept:
                    facility.losses[behind // self.stride] = validation.loss
                if behind == 0:
                    facility.first_loss = validation.loss
            facility.asked += 1
            facility.delivered += update.bytes > 0
            facility.bytes += update.bytes
            facility.statuses[update.status] = facility.statuses.get(update.status, 0) + 1
            if update.status in COUNTED:
                facility.tokens += update.tokens
                facility.steps += update.steps
                facility.share += update.share
                facility.staleness += update.staleness
                facility.stalest = max(facility.stalest, update.staleness)
                facility.measure(update)
            for phase in PHASES:
                facility.seconds[phase] += getattr(update.seconds, phase)
        if kept:
            for facility in self.facilities.values():
                facility.shares[behind // self.stride] = facility.share
        self.list.add(entry)
        self.last = entry


def _listed(entry: RoundEntry, updates: Mapping[str, FacilityEntry]) -> ListedRound:
    return ListedRound(
        entry, {name: updates[name] for name in sorted(updates)[:MOST_ROWS_OF_ROUND]}
    )
