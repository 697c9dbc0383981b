"""The history of a federation: one line of JSON for each finished round."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from crossfl.protocol import decoding
from crossfl.protocol.fields import (
    Amount,
    Count,
    Digest,
    Loss,
    Name,
    Natural,
    Positive,
    Reason,
    Record,
    Seconds,
    doc,
    fields_of,
)
from crossfl.protocol.measurements import PhaseSeconds, UpdateMetrics

LARGEST_LINE = 16 << 20
"""Bytes of the line of one round; more is refused unread."""

FacilityStatus = Literal["complete", "partial", "absent", "late", "refused", "unused"]

COUNTED = ("complete", "partial")
"""States of an update that is in the model."""


class FacilityEntry(Record, frozen=True, kw_only=True):
    """What became of one facility's update in a round."""

    share: Annotated[Amount, doc("Coefficient of the update in the combined delta.")] = 0.0
    norm: Annotated[Amount | None, doc("L2 norm of the delta.")] = None
    status: Annotated[
        FacilityStatus,
        doc(
            "Whether the update counted whole or in part, was absent, refused or unused, or is "
            "late: its job goes on, and a later round takes it."
        ),
    ]
    staleness: Annotated[
        Natural,
        doc("Rounds between the one whose task the update is for and the one in which it counted."),
    ] = 0
    reason: Annotated[Reason | None, doc("Why it did not count, or not whole.")] = None
    tokens: Annotated[Count, doc("Tokens that counted in the loss.")] = 0
    samples: Annotated[Count, doc("Samples trained on.")] = 0
    steps: Annotated[Count, doc("Optimizer steps taken.")] = 0
    bytes: Annotated[Count, doc("Size of the delta.")] = 0
    seconds: Annotated[PhaseSeconds, doc("Duration of each phase.")] = PhaseSeconds()
    metrics: Annotated[UpdateMetrics, doc("What the facility measured.")] = UpdateMetrics()


class RoundEntry(Record, frozen=True, kw_only=True):
    """One finished round."""

    round: Annotated[Positive, doc("Number of the round, from 1.")]
    finished: Annotated[
        str, Meta(min_length=1, max_length=40), doc("When it ended, in ISO 8601, UTC.")
    ]
    seconds: Annotated[Seconds, doc("Seconds since the federation began.")]
    loss: Annotated[
        Loss | None, doc("Mean validation loss of the model that the round started from.")
    ] = None
    facilities: Annotated[
        dict[Name, FacilityEntry], Meta(max_length=10_000), doc("Each facility that was asked.")
    ] = msgspec.field(default_factory=dict)
    model: Annotated[Digest, doc("Digest of the global model after the round.")]
    skipped: Annotated[Reason | None, doc("Why the round was skipped, if it was.")] = None
    waits: Annotated[Natural, doc("Times that the round waited for its quorum.")] = 0


def encode_line(entry: RoundEntry) -> bytes:
    """The line of a round, without what is at its default; it ends in a newline.

    Raises:
        CrossFLError: a text in it is not Unicode.
    """
    return decoding.encode_compact(_without_defaults(entry)) + b"\n"


def decode_line(line: bytes, what: str) -> RoundEntry:
    """Read the line of a round, from a file whose sha256 has been checked.

    Args:
        line: the line, with or without its newline.
        what: name of the file, for the message.

    Raises:
        CrossFLError: it is not the line of a round.
    """
    return decoding.decode_own(line, RoundEntry, what, LARGEST_LINE)


def _without_defaults(record: Record) -> dict[str, Any]:
    values = ((field, getattr(record, field.name)) for field in fields_of(type(record)))
    return {
        field.name: _lean(value)
        for field, value in values
        if field.default is msgspec.NODEFAULT or value != field.default
    }


def _lean(value: Any) -> Any:
    if isinstance(value, Record):
        return _without_defaults(value)
    if isinstance(value, dict):
        return {key: _lean(value[key]) for key in sorted(value)}
    return value
