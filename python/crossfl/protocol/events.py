"""Events: what a step, or the engine, reports while it works, one line of JSON each.

The phases of a facility in a round, in the order in which they happen. Those of a batch job are
reported by the engine, which asks the scheduler.
"""

from typing import Annotated, Final, Literal

from msgspec import Meta

from crossfl.protocol import decoding
from crossfl.protocol.fields import Amount, Count, Name, Natural, Number, Record, Seconds, Time, doc

Message = Annotated[str, Meta(max_length=2000)]
"""A sentence for people."""
Word = Annotated[str, Meta(max_length=200)]
"""What a scheduler calls a job."""
SitePath = Annotated[str, Meta(max_length=4096)]

STAGED: Final = "staged"
"""The task is placed, and what the job needs is known."""
SENDING: Final = "sending"
"""The model is on its way to the facility."""
SENT: Final = "sent"
QUEUED: Final = "queued"
"""The job waits in the queue of its scheduler."""
RUNNING: Final = "running"
"""The job has its nodes."""
TRAIN: Final = "train"
"""The step counts optimizer steps."""
ENDED: Final = "ended"
"""The job has left the queue."""
UNREACHABLE: Final = "unreachable"
"""The scheduler cannot be asked."""
LATE: Final = "late"
"""The round has closed, and the job goes on."""
FETCHING: Final = "fetching"
"""What the job has made is on its way to the VM."""
FETCHED: Final = "fetched"
ADMITTED: Final = "admitted"
"""The update is as it should be."""
MERGED: Final = "merged"
"""The update is in the model."""
ABSENT: Final = "absent"
"""The facility delivers nothing for the round."""

AGGREGATED: Final = "aggregate"
"""A round is finished."""
REPORTED: Final = "report"
"""The federation is finished."""
ENGINE: Final = "engine"
"""A run of the engine has begun, with the command of the message."""
STOPPED: Final = "stopped"
"""A run of the engine has ended."""

QUIET: Final = frozenset(
    {STAGED, SENDING, SENT, FETCHING, FETCHED, ADMITTED, MERGED, ENGINE, STOPPED}
)
"""Phases that a log has no line for."""

FORMAT: Final = 1
"""Of events; readers skip others."""
LARGEST_EVENT = 16 << 10
"""Bytes of an event; more is refused unread."""


class Event(Record, frozen=True, kw_only=True):
    """One report of a step."""

    format: Annotated[Literal[1], doc("Format of the event.")] = FORMAT
    time: Annotated[Time, doc("When, in seconds since 1970.")]
    phase: Annotated[Name, doc("What the step does or has done.")]
    facility: Annotated[Name | None, doc("Facility that it is at; unset, the VM.")] = None
    round: Annotated[Natural | None, doc("Round that it belongs to.")] = None
    rounds: Annotated[Natural | None, doc("Rounds of the federation.")] = None
    step: Annotated[Count | None, doc("Optimizer steps taken.")] = None
    steps: Annotated[Count | None, doc("Optimizer steps asked for.")] = None
    loss: Annotated[Number | None, doc("Loss in nats per token.")] = None
    tokens_per_second: Annotated[Amount | None, doc("Training speed.")] = None
    seconds: Annotated[Seconds | None, doc("How long the phase took.")] = None
    message: Annotated[Message | None, doc("For people to read.")] = None
    run: Annotated[Name | None, doc("Run of the journal that begins or goes on.")] = None
    job: Annotated[Word | None, doc("The scheduler's own id of the job.")] = None
    since: Annotated[
        Time | None, doc("When the phase began, in seconds since 1970; unset, at `time`.")
    ] = None
    expected: Annotated[
        Time | None, doc("When the scheduler expects the job to start, in seconds since 1970.")
    ] = None
    nodes: Annotated[Natural | None, doc("Nodes of the job.")] = None
    bytes: Annotated[Count | None, doc("Bytes that crossed the wire so far.")] = None
    size: Annotated[Count | None, doc("Bytes that are to cross it.")] = None
    log: Annotated[SitePath | None, doc("File at the facility with what the job printed.")] = None


def encode_line(event: Event) -> bytes:
    """The line of an event, with its newline.

    Raises:
        CrossFLError: a text in it is not Unicode.
    """
    return decoding.encode_compact(event.asdict()) + b"\n"


def decode_line(line: bytes, what: str = "the event") -> Event:
    """Read the line of an event.

    Raises:
        CrossFLError: it is none.
    """
    return decoding.decode(line, Event, what, LARGEST_EVENT)


def decode_recorded(line: bytes, what: str = "the event") -> Event:
    """Read the line of an event that this machine has recorded, which was checked before.

    Raises:
        CrossFLError: it is none.
    """
    return decoding.decode_own(line, Event, what, LARGEST_EVENT)
