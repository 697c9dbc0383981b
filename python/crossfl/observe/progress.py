"""Progress of long work: events from the steps, shown as bars on a terminal and as lines in a log.

A step reports to the file that `CROSSFL_PROGRESS` names, one JSON object a line, or to its own
standard error. The StreamFlow plugin sets the variable and shows the events of all its local
deployments in one place.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, Self

VARIABLE = "CROSSFL_PROGRESS"
INTERVAL = 0.5
"""Seconds between two reports of the same phase."""
LOG_INTERVAL = 15.0
"""Seconds without a line from a facility before a step count is worth one in a log."""
MOVING = "train"
"""The phase that counts steps: a bar on a terminal, now and then a line in a log."""


class Progress:
    """Reports what a step is doing; the context (facility, round, rounds) is said once."""

    def __init__(self, **context: Any) -> None:
        self._context = context
        self._last: tuple[str, float] = ("", 0.0)
        path = os.environ.get(VARIABLE)
        self._file: IO[str] | None = Path(path).open("a", buffering=1) if path else None  # noqa: SIM115
        self._display = None if path else Display(sys.stderr)

    def __call__(self, phase: str, **fields: Any) -> None:
        """Report a step count, a loss, …; reports that follow too fast are left out."""
        now = time.monotonic()
        done = fields.get("step") == fields.get("steps")
        if not done and self._last[0] == phase and now - self._last[1] < INTERVAL:
            return
        self._last = (phase, now)
        event = {"phase": phase, **self._context, **fields}
        if self._file:
            self._file.write(json.dumps(event) + "\n")
        if self._display:
            self._display.show(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()
        if self._display:
            self._display.close()


class Display:
    """Shows events: lines, and on a terminal under them a bar for each facility that trains."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._logged: dict[str, float] = {}

    def show(self, event: dict[str, Any]) -> None:
        """Show one event."""
        if self._stream.isatty():
            self._show_bar(event)
        else:
            self._show_line(event)

    def close(self) -> None:
        """Take down the bars, leaving what they last showed."""
        if self._bars:
            self._bars.stop()
            self._bars = None

    def _show_line(self, event: dict[str, Any]) -> None:
        who, now = str(event.get("facility")), time.monotonic()
        since = now - self._logged.setdefault(who, now)
        if event["phase"] == MOVING and since < LOG_INTERVAL:
            return
        self._logged[who] = now
        print(describe(event), file=self._stream, flush=True)

    def _show_bar(self, event: dict[str, Any]) -> None:
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bars

            text = (TextColumn("{task.description:<14}"), TextColumn("{task.fields[text]}"))
            columns = (text[0], BarColumn(24), text[1])
            self._bars = Bars(*columns, console=Console(file=self._stream))
            self._bars.start()
        if event["phase"] != MOVING:
            self._bars.console.print(describe(event), markup=False, highlight=False)
            return
        who = event["facility"]
        if who not in self._tasks:
            self._tasks[who] = self._bars.add_task(who, text="")
        self._bars.update(
            self._tasks[who],
            completed=event["step"],
            total=event["steps"],
            text=describe({k: v for k, v in event.items() if k != "facility"}),
        )


def describe(event: dict[str, Any]) -> str:
    """One line for one event."""
    parts = []
    if "rounds" in event:
        parts.append(f"round {event['round']}/{event['rounds']}")
    parts += [str(event[k]) for k in ("facility", "phase") if event.get(k) is not None]
    if "steps" in event:
        parts.append(f"{event['step']}/{event['steps']}")
    if event.get("loss") is not None:
        parts.append(f"loss {event['loss']:.4f}")
    if "tokens_per_second" in event:
        parts.append(f"{event['tokens_per_second']:,.0f} tokens/s")
    if "seconds" in event:
        parts.append(f"{event['seconds']:.1f} s")
    if "message" in event:
        parts.append(event["message"])
    return "  ".join(parts)


class Follower(threading.Thread):
    """Shows the events that other processes append to a file, until it is stopped."""

    def __init__(self, path: Path, stream: IO[str]) -> None:
        super().__init__(daemon=True, name="crossfl-progress")
        self._path = path
        self._display = Display(stream)
        self._ended = threading.Event()

    def run(self) -> None:
        """Read the file as it grows."""
        with self._path.open() as lines:
            pending = ""
            while True:
                last = self._ended.is_set()
                pending += lines.read()
                *complete, pending = pending.split("\n")
                for line in complete:
                    self._display.show(json.loads(line))
                if last:
                    break
                self._ended.wait(0.2)
        self._display.close()

    def stop(self) -> None:
        """Show what is left and end."""
        self._ended.set()
        self.join(timeout=5)
