"""Showing events: lines in a log, and on a terminal a bar for each facility that trains."""

import contextlib
import time
from typing import TYPE_CHECKING, TextIO

from crossfl.protocol.events import Event
from crossfl.protocol.formats import number
from crossfl.protocol.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

LOG_INTERVAL = 15.0
"""Seconds without a line from a facility before a step count is worth one in a log."""
STEPPING = "train"
"""The phase that counts steps: a bar on a terminal, now and then a line in a log."""


class Display:
    """Shows events on a stream. Where the stream is closed, nothing is shown."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._logged: dict[str, float] = {}

    def show(self, event: Event) -> None:
        """Show one event."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            if self._stream.isatty():
                self._show_bar(event)
            else:
                self._show_line(event)

    def close(self) -> None:
        """Take down the bars, leaving what they last showed."""
        if self._bars:
            self._bars.stop()
            self._bars = None

    def _show_line(self, event: Event) -> None:
        source, now = event.facility or "", time.monotonic()
        since = now - self._logged.setdefault(source, now)
        if event.phase == STEPPING and since < LOG_INTERVAL:
            return
        self._logged[source] = now
        print(self._encodable(describe(event)), file=self._stream, flush=True)

    def _show_bar(self, event: Event) -> None:
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bars

            self._bars = Bars(
                TextColumn("{task.description:<14}", markup=False),
                BarColumn(24),
                TextColumn("{task.fields[text]}", markup=False),
                console=Console(file=self._stream),
            )
            self._bars.start()
        if event.phase != STEPPING:
            text = self._encodable(describe(event))
            self._bars.console.print(text, markup=False, highlight=False)
            return
        source = event.facility or ""
        if source not in self._tasks:
            self._tasks[source] = self._bars.add_task(source, text="")
        self._bars.update(
            self._tasks[source],
            completed=event.step or 0,
            total=event.steps,
            text=self._encodable(describe(event.replace(facility=None))),
        )

    def _encodable(self, text: str) -> str:
        """Text with what the stream's encoding lacks escaped."""
        encoding = self._stream.encoding or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)


def describe(event: Event) -> str:
    """One printable line for one event."""
    parts = []
    if event.round is not None:
        total = "" if event.rounds is None else f"/{event.rounds}"
        parts.append(f"round {event.round}{total}")
    if event.facility is not None:
        parts.append(event.facility)
    parts.append(event.phase)
    if event.steps is not None:
        parts.append(f"{event.step or 0}/{event.steps}")
    if event.loss is not None:
        parts.append(f"loss {number(event.loss, '.4f')}")
    if event.tokens_per_second is not None:
        parts.append(f"{number(event.tokens_per_second, ',.0f')} tokens/s")
    if event.seconds is not None:
        parts.append(f"{number(event.seconds, '.1f')} s")
    if event.message is not None:
        parts.append(event.message)
    return printable("  ".join(parts))
