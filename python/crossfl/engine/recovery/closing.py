"""When a round closes, and who is late then.

Where a federation does not wait for everybody, a round closes when all whose jobs run have
delivered (`running`), when the first has (`first`), or after a number of seconds. It never closes
before as many updates as it needs are in. Nothing in this module imports the engine.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto


class LateError(Exception):
    """A round has closed, and a job goes on; the message says how far it is."""


class Stage(Enum):
    """How far one facility is in a round, as far as closing it is concerned."""

    WAITING = auto()
    """What the job needs is being sent, or the job is in its queue."""
    RUNNING = auto()
    DELIVERED = auto()
    ABSENT = auto()


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One facility's part in a round that may close before everybody has delivered.

    Attributes:
        federation: mark of the federation.
        facility: name of the facility.
        round: number of the round, from 1.
        closes: `running`, `first`, or a number of seconds.
        grace_seconds: how long the round stays open once `running` or `first` would close it.
        needed: updates without which the round does not close early.
        trains: whether the job trains; the last one evaluates.
    """

    federation: str
    facility: str
    round: int
    closes: str | int
    grace_seconds: float = 0.0
    needed: int = 1
    trains: bool = True


@dataclass
class _Round:
    opened: float
    stages: dict[str, Stage] = field(default_factory=dict)
    met_since: float | None = None
    """When the rule was met, without a break since."""


class Rounds:
    """Follows the rounds of a run, and tells when one is over.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rounds: dict[tuple[str, int], _Round] = {}

    def enter(self, turn: Turn) -> None:
        """A facility is asked for a round, which opens with the first that is."""
        round_ = self._rounds.setdefault(
            (turn.federation, turn.round), _Round(opened=self._clock())
        )
        round_.stages.setdefault(turn.facility, Stage.WAITING)

    def note(self, turn: Turn, stage: Stage) -> None:
        """A facility has come to a stage."""
        self._rounds[turn.federation, turn.round].stages[turn.facility] = stage

    def deliver(self, turn: Turn) -> None:
        """A facility has delivered; an update, unless it was noted to be absent."""
        stages = self._rounds[turn.federation, turn.round].stages
        if stages[turn.facility] is not Stage.ABSENT:
            stages[turn.facility] = Stage.DELIVERED

    def is_over(self, turn: Turn) -> bool:
        """Whether the round of a turn closes without the facility."""
        round_, now = self._rounds[turn.federation, turn.round], self._clock()
        delivered = sum(stage is Stage.DELIVERED for stage in round_.stages.values())
        met = delivered >= turn.needed
        if isinstance(turn.closes, int):
            return met and now - round_.opened >= turn.closes
        if turn.closes == "running":
            met = met and Stage.RUNNING not in round_.stages.values()
        if not met:
            round_.met_since = None
            return False
        if round_.met_since is None:
            round_.met_since = now
        return now - round_.met_since >= turn.grace_seconds
