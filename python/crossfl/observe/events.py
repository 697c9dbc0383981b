"""Reporting progress: a step appends events to a file, or shows them on its standard error.

The file is the one that `CROSSFL_PROGRESS` names. The StreamFlow plugin sets the variable and shows
the events of all its local deployments in one place.
"""

import contextlib
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, Self

from crossfl.observe.display import Display
from crossfl.protocol import variables
from crossfl.protocol.events import Event, encode_line
from crossfl.protocol.text import printable

INTERVAL = 0.5
"""Seconds between two reports of the same phase."""
LONGEST_MESSAGE = 2000
"""Characters of a message; a longer one is cut."""


def is_followed() -> bool:
    """Whether an engine follows what is reported here, and shows and records it."""
    return variables.PROGRESS in os.environ


class Progress:
    """Reports what a step does. A report that cannot be written is lost and harms nothing.

    Args:
        facility: where the step runs; unset, on the VM.
        round: round that the step belongs to.
        rounds: rounds of the federation.

    Raises:
        CrossFLError: the facility is no name, or a number is negative.
    """

    def __init__(
        self,
        *,
        facility: str | None = None,
        round: int | None = None,  # noqa: A002 - the name of the event's field
        rounds: int | None = None,
    ) -> None:
        self._context = Event(
            time=0.0, phase="begin", facility=facility, round=round, rounds=rounds
        )
        self._last: tuple[str, float] = ("", 0.0)
        path = os.environ.get(variables.PROGRESS)
        self._files = [_appending(path)] if path else []
        if own := os.environ.get(variables.JOB_PROGRESS):
            with contextlib.suppress(OSError):  # what the engine cannot see costs nothing
                self._files.append(_appending(own))
        self._display = None if path else Display(sys.stderr)

    def __call__(
        self,
        phase: str,
        *,
        step: int | None = None,
        steps: int | None = None,
        loss: float | None = None,
        tokens_per_second: float | None = None,
        seconds: float | None = None,
        message: str | None = None,
        **facts: Any,
    ) -> None:
        """Report a phase; reports of one phase that follow too fast are left out.

        Args:
            phase: what the step does or has done, in one word.
            step: optimizer steps taken.
            steps: optimizer steps asked for.
            loss: in nats per token; left out where it is not finite.
            tokens_per_second: training speed.
            seconds: how long the phase took.
            message: for people to read.
            facts: other fields of the event.
        """
        now = time.monotonic()
        if step == steps or self._last[0] != phase or now - self._last[1] >= INTERVAL:
            self._last = (phase, now)
            event = self._context.replace(
                time=time.time(),
                phase=phase,
                step=step,
                steps=steps,
                loss=loss if loss is not None and math.isfinite(loss) else None,
                tokens_per_second=tokens_per_second,
                seconds=seconds,
                message=None if message is None else printable(message, longest=LONGEST_MESSAGE),
                **facts,
            )
            for file in self._files:
                with contextlib.suppress(OSError):
                    file.write(encode_line(event))
            if self._display:
                self._display.show(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()
        if self._display:
            self._display.close()


def _appending(path: str) -> BinaryIO:
    """A file without a buffer: a line is one write, so those of several processes do not mix."""
    return Path(path).open("ab", buffering=0)
