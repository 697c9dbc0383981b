"""Live state: what the engine reports of the jobs and transfers of facilities, as events.

An event is a line in the file that `CROSSFL_PROGRESS` names. One that cannot be written is lost,
and no error leaves this module: what people watch can neither slow nor end a run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from crossfl.engine.recovery.registry import REGISTRY
from crossfl.observe.events import Progress
from crossfl.protocol import events, variables

PAUSE = 1.0
"""Seconds between two reports of one transfer."""
Count = Callable[[int], None]
TRANSFER: ContextVar[Count | None] = ContextVar("TRANSFER", default=None)
"""Takes the bytes of what is being sent; set for as long as a transfer is reported."""


def report(facility: str, phase: str, *, job_name: str | None = None, **facts: Any) -> bool:
    """Report a phase of a facility; without a file for events, nothing is reported.

    Returns:
        Whether it was.
    """
    if variables.PROGRESS not in os.environ:
        return False
    try:
        policy = REGISTRY.policy
        number = policy.round_of(job_name) if policy and job_name else None
        with Progress(facility=facility, round=number) as progress:
            progress(phase, **facts)
    except Exception as error:
        logging.getLogger(__name__).debug("an event was lost: %s", error)
        return False
    return True


class Transfer:
    """Counts the bytes of one transfer, and reports them now and then."""

    def __init__(self, facility: str, phase: str, size: int | None = None) -> None:
        self._facility, self._phase, self._size = facility, phase, size
        self._begun = self._last = time.monotonic()
        self.bytes = 0
        self._report(phase)

    def __call__(self, count: int) -> None:
        """Take note of more bytes."""
        self.bytes += count
        if (now := time.monotonic()) - self._last >= PAUSE:
            self._last = now
            self._report(self._phase)

    def end(self, phase: str) -> None:
        """Report that all came."""
        self._report(phase, seconds=time.monotonic() - self._begun)

    def _report(self, phase: str, **facts: Any) -> None:
        report(self._facility, phase, bytes=self.bytes, size=self._size, **facts)


@contextlib.contextmanager
def sending(facility: str, path: Path) -> Iterator[None]:
    """Report what is sent to a facility, unless what wraps this transfer does."""
    if TRANSFER.get() is not None:
        yield
        return
    transfer = Transfer(facility, events.SENDING, _size(path))
    token = TRANSFER.set(transfer)
    try:
        yield
    finally:
        TRANSFER.reset(token)
    transfer.end(events.SENT)


def _size(path: Path) -> int | None:
    try:
        files = path.rglob("*") if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files if file.is_file())
    except OSError:
        return None
