"""The server state: what the federation remembers from one round to the next, but its tensors.

The history is not in it: planning and aggregation need the ledger only, whose size does not grow
with the rounds.
"""

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from crossfl.protocol import decoding
from crossfl.protocol.fields import (
    Amount,
    Count,
    Digest,
    Int,
    Loss,
    Name,
    Natural,
    Positive,
    Reason,
    Record,
    Seconds,
    Time,
    doc,
)
from crossfl.protocol.manifest import FORMAT
from crossfl.protocol.records import Aggregation, Allowance, Retention
from crossfl.protocol.seeds import derive_seed

LARGEST_STATE = 64 << 20
"""Bytes of the document of a state; more is refused unread."""
MOST_PAST_NORMS = 5
"""Rounds of a facility whose norms are remembered."""
MOST_TIMINGS = 5
"""Jobs of a facility whose durations are remembered."""


class PastNorm(Record, frozen=True, kw_only=True):
    """The norm of an update that counted, and the training behind it."""

    norm: Annotated[Amount, doc("L2 norm of the delta.")]
    effective_steps: Annotated[
        Amount, doc("Steps taken, each weighted by its learning rate over the peak.")
    ]


class Timing(Record, frozen=True, kw_only=True):
    """How long a job took, as its facility stated it."""

    steps: Annotated[Count, doc("Optimizer steps taken.")]
    train: Annotated[Seconds, doc("Seconds of training.")]
    load: Annotated[Seconds, doc("Seconds of all else that the job did.")]
    queue: Annotated[Seconds, doc("Seconds that the job waited in the queue.")] = 0.0


class OpenTask(Record, frozen=True, kw_only=True):
    """A task whose update is late: it may still count, once."""

    round: Annotated[Positive, doc("Round of the task.")]
    base: Annotated[Digest, doc("Digest of the global model that the task starts from.")]
    version: Annotated[Count, doc("Updates that had counted when the task was issued.")]
    allowance: Annotated[
        Allowance | None, doc("What the update may claim; unset where it was not told.")
    ] = None


class FacilityLedger(Record, frozen=True, kw_only=True):
    """What is remembered of a facility's updates that counted."""

    samples: Annotated[Count, doc("Samples trained on, in all rounds.")] = 0
    steps: Annotated[Count, doc("Optimizer steps taken, in all rounds.")] = 0
    counted: Annotated[
        Natural, doc("Round of the task of the last update that counted; 0, none did.")
    ] = 0
    last_tokens: Annotated[Count, doc("Tokens of the last update.")] = 0
    last_samples: Annotated[Count, doc("Samples of the last update.")] = 0
    last_steps: Annotated[Count, doc("Steps of the last update.")] = 0
    loss: Annotated[Loss | None, doc("Last validation loss that the facility gave.")] = None
    recent: Annotated[
        tuple[PastNorm, ...],
        Meta(max_length=MOST_PAST_NORMS),
        doc("Norms of the last updates, oldest first."),
    ] = ()
    timings: Annotated[
        tuple[Timing, ...],
        Meta(max_length=MOST_TIMINGS),
        doc("How long the jobs of the last updates took, oldest first."),
    ] = ()
    credit: Annotated[
        Amount | None,
        doc("Weight of the facility's next update; unset where rounds wait for everybody."),
    ] = None
    open: Annotated[
        tuple[OpenTask, ...],
        Meta(max_length=10_000),
        doc("Tasks whose updates are late, oldest first."),
    ] = ()

    def with_timing(self, timing: Timing) -> "FacilityLedger":
        """The ledger with one more timing; the oldest is forgotten."""
        return self.replace(timings=(*self.timings, timing)[-MOST_TIMINGS:])

    def with_norm(self, past: PastNorm) -> "FacilityLedger":
        """The ledger with one more norm; the oldest is forgotten."""
        return self.replace(recent=(*self.recent, past)[-MOST_PAST_NORMS:])


class ServerState(Record, frozen=True, kw_only=True):
    """What plan reads and aggregate renews; its tensors lie beside it in the same directory."""

    format: Annotated[Literal[2], doc("Format of the document.")] = FORMAT
    rounds: Annotated[Natural, doc("Rounds to run.")]
    seed: Annotated[Int, doc("Seed of the whole federation.")] = 0
    aggregation: Annotated[Aggregation, doc("How updates become the next global model.")]
    started: Annotated[Time, doc("When the federation was initialised, in seconds since 1970.")]
    model: Annotated[Digest, doc("Digest of the current global model.")]
    round: Annotated[Natural, doc("Rounds finished.")] = 0
    updates: Annotated[Count, doc("Updates that have counted.")] = 0
    participations: Annotated[
        Natural, doc("Times that as many updates counted as the federation has members.")
    ] = 0
    towards: Annotated[Natural, doc("Updates that have counted since the last such time.")] = 0
    run: Annotated[Name | None, doc("Name of the run in the journal; unset without one.")] = None
    retention: Annotated[Retention, doc("Which rounds the journal keeps.")] = Retention()
    held: Annotated[
        tuple[Name, ...],
        Meta(max_length=10_000),
        doc("Facilities whose updates of the round to come lie in the state already."),
    ] = ()
    waits: Annotated[
        Natural, doc("Times that the round to come was below its quorum and is asked for again.")
    ] = 0
    loss: Annotated[
        Loss | None,
        doc(
            "Mean validation loss of the last round over the members of the federation, each taken "
            "as half of their median at least; target_loss and keep_best look at it."
        ),
    ] = None
    skipped: Annotated[Reason | None, doc("Why the last round was skipped, if it was.")] = None
    ledger: Annotated[
        dict[Name, FacilityLedger],
        Meta(max_length=10_000),
        doc("What is remembered of each facility."),
    ] = msgspec.field(default_factory=dict)
    best: Annotated[
        tuple[tuple[Natural, Loss], ...],
        Meta(max_length=10_000),
        doc("Rounds whose models had the lowest validation loss, and that loss."),
    ] = ()

    @property
    def federation(self) -> str:
        """The mark of the federation on what facilities keep and deliver for it."""
        return f"{derive_seed(self.seed, repr(self.started)):08x}"

    def out_of_time(self, now: float) -> bool:
        """Whether the time budget is used up at a moment, in seconds since 1970."""
        budget = self.aggregation.budget_seconds
        return now - self.started >= (math.inf if budget is None else budget)

    def is_target_met(self) -> bool:
        """Whether the last round's loss is as low as the federation was to come."""
        target = self.aggregation.target_loss
        return target is not None and self.loss is not None and self.loss <= target

    @property
    def finished(self) -> int:
        """How many of the `rounds` to run are done.

        Where rounds close before all have delivered, as many updates as there are members make one.
        """
        return self.round if self.aggregation.waits_for_all else self.participations

    def more(self, now: float) -> bool:
        """Whether another round follows: rounds and time are left, the target is not met."""
        left = self.finished < self.rounds
        return left and not self.is_target_met() and not self.out_of_time(now)

    def ledger_of(self, facility: str) -> FacilityLedger:
        """What is remembered of a facility; of a new one, nothing."""
        return self.ledger.get(facility, FacilityLedger())


def decode(content: bytes, what: str) -> ServerState:
    """Read `state.json`.

    Args:
        content: the document.
        what: name of the document, for the message.

    Raises:
        CrossFLError: it is of another format, damaged, or out of its limits.
    """
    decoding.check_format(decoding.read_head(content, what, LARGEST_STATE), FORMAT, what)
    return decoding.decode(content, ServerState, what, LARGEST_STATE)
