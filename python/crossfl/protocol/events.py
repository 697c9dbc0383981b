"""Events: what a step reports while it works, one line of JSON each."""

from typing import Annotated, Final, Literal

from msgspec import Meta

from crossfl.protocol import decoding
from crossfl.protocol.fields import Amount, Count, Name, Natural, Number, Record, Seconds, Time, doc

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
    message: Annotated[Annotated[str, Meta(max_length=2000)] | None, doc("For people to read.")] = (
        None
    )


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
