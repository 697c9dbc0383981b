"""Showing events: lines in a log, and on a terminal a bar for each facility."""

import contextlib
import time
from typing import TYPE_CHECKING, TextIO

from crossfl.protocol import events
from crossfl.protocol.events import Event
from crossfl.protocol.formats import number, size
from crossfl.protocol.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

LOG_INTERVAL = 15.0
"""Seconds without a line from a facility before a step count is worth one in a log."""
STEPPING = events.TRAIN
"""The phase that counts steps: a bar on a terminal, now and then a line in a log."""
ON_BAR = frozenset({STEPPING, events.QUEUED, events.RUNNING, *events.QUIET})
"""Phases of a facility that its bar on a terminal tells, without a line."""
ONCE = frozenset({events.ABSENT, events.LATE})
"""Phases that both the engine and the step after it report."""


class Display:
    """Shows events on a stream. Where the stream is closed, nothing is shown."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._logged: dict[str, float] = {}
        self._told: dict[str, tuple[str, int | None]] = {}

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
        if event.phase in events.QUIET or self._is_told(event):
            return
        source, now = event.facility or "", time.monotonic()
        since = now - self._logged.setdefault(source, now)
        if event.phase == STEPPING and since < LOG_INTERVAL:
            return
        self._logged[source] = now
        print(self._encodable(describe(event)), file=self._stream, flush=True)

    def _is_told(self, event: Event) -> bool:
        """Whether a facility's absence, which two report, has been shown."""
        told, name = (event.phase, event.round), event.facility or ""
        if event.phase not in ONCE or self._told.get(name) != told:
            self._told[name] = told
            return False
        return True

    def _show_bar(self, event: Event) -> None:
        if event.facility is None and event.phase in events.QUIET:
            return
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
        if event.phase not in ON_BAR and not self._is_told(event):
            text = self._encodable(describe(event))
            self._bars.console.print(text, markup=False, highlight=False)
        if (source := event.facility) is None:
            return
        if source not in self._tasks:
            self._tasks[source] = self._bars.add_task(source, text="")
        done, all_of_it = event.step or 0, event.steps
        if event.size:
            done, all_of_it = event.bytes or 0, event.size
        elif all_of_it is None:  # no bar that moves, for what nobody counts
            all_of_it = 1
        self._bars.update(
            self._tasks[source],
            completed=done,
            total=all_of_it,
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
    if event.job is not None:
        parts.append(f"job {event.job}")
    if event.nodes is not None and event.phase in (events.RUNNING, events.ENDED):
        parts.append(f"{event.nodes} node" + ("" if event.nodes == 1 else "s"))
    if event.size is not None:
        parts.append(f"{size(event.bytes or 0)} of {size(event.size)}")
    if event.loss is not None:
        parts.append(f"loss {number(event.loss, '.4f')}")
    if event.tokens_per_second is not None:
        parts.append(f"{number(event.tokens_per_second, ',.0f')} tokens/s")
    if event.seconds is not None:
        parts.append(f"{number(event.seconds, '.1f')} s")
    if event.message is not None:
        parts.append(event.message)
    if event.expected is not None:
        parts.append(f"start expected {clock(event.expected)}")
    return printable("  ".join(parts))


def clock(moment: float, now: float | None = None) -> str:
    """A moment, in seconds since 1970, as a clock here shows it; with its date on another day."""
    try:
        local, today = time.localtime(moment), time.localtime(now)
    except (OverflowError, OSError, ValueError):
        return "at no time"
    form = "%H:%M" if local[:3] == today[:3] else "%Y-%m-%d %H:%M"
    return time.strftime(form, local)
