"""Following a file of events that other processes append to: show them, record them, tell others.

It is a thread of the engine. Nothing that it does can end the run or make it wait.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from crossfl.errors import CrossFLError
from crossfl.observe.display import Display
from crossfl.observe.record import Record
from crossfl.protocol import events, variables
from crossfl.protocol.events import LARGEST_EVENT, Event, decode_line, encode_line

CHUNK = 64 << 10
"""Bytes that are read at once."""
PAUSE = 0.2
"""Seconds between two looks at the file."""
PAGE_SECONDS = 15.0
"""Seconds between two pages of a run, which are written by a process of their own."""
TOLD = frozenset({events.ABSENT, events.REPORTED, events.STOPPED})
"""Phases for which the hook is called."""
MOST_HOOKS = 8
"""Hooks that may run at once; what would be one more is left out."""


class Lines:
    """Cuts a growing file into lines; what is left of a line that is too long is dropped."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._pending = b""
        self._dropping = False

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The lines that a chunk completes, without their newlines."""
        *complete, rest = (self._pending + chunk).split(b"\n")
        for line in complete:
            if not self._dropping and len(line) <= self._longest:
                yield line
            self._dropping = False
        self._dropping = self._dropping or len(rest) > self._longest
        self._pending = b"" if self._dropping else rest


class Hook:
    """A command that is run when a facility is absent, and at the end: for a mail or a chat.

    It gets the event as a line of JSON on its standard input. Nobody waits for it, and what it
    prints is thrown away.

    Args:
        command: for a shell; None, there is none.
    """

    def __init__(self, command: str | None = None) -> None:
        self.command = command
        self._running: list[subprocess.Popen[bytes]] = []
        self._told: set[tuple[str, str | None, int | None]] = set()

    def call(self, event: Event) -> None:
        """Run the command, if this event is for it."""
        key = (event.phase, event.facility, event.round)
        if self.command is None or event.phase not in TOLD or key in self._told:
            return
        self._told.add(key)
        self._running = [process for process in self._running if process.poll() is None]
        if len(self._running) >= MOST_HOOKS:
            return
        with contextlib.suppress(OSError):
            process = subprocess.Popen(
                ["/bin/sh", "-c", self.command],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=_own_environment(),
            )
            self._running.append(process)
            if process.stdin:
                with process.stdin:  # an event fits into the buffer of a pipe: nobody waits
                    process.stdin.write(encode_line(event))


class Pages:
    """Has the page of a run written after a round, by another process with little priority."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._last = time.monotonic()

    def renew(self, run: Path) -> None:
        """Begin to write it, unless that is going on, or was done just now."""
        busy = self._process is not None and self._process.poll() is None
        if busy or time.monotonic() - self._last < PAGE_SECONDS:
            return
        self._last = time.monotonic()
        words = [sys.executable, "-m", "crossfl", "export", str(run.parent), "--run", run.name]
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                ["nice", "-n", "19", *words, "--page"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=_own_environment(),
            )


def _own_environment() -> dict[str, str]:
    """This process's, without what makes a command a step of the run."""
    ours = {variables.PROGRESS, variables.ENGINE, variables.DEPLOYMENT, variables.FORKSERVER}
    return {name: value for name, value in os.environ.items() if name not in ours}


class Follower(threading.Thread):
    """Shows and records the events that other processes append to a file, until it is stopped.

    A line that is no event is skipped: a process may end while it writes one.

    Args:
        path: the file.
        stream: where they are shown.
        journal: folder of the journal in whose run they are recorded; None, they are not.
        hook: command for absences and the end.
    """

    def __init__(
        self, path: Path, stream: TextIO, journal: Path | None = None, hook: str | None = None
    ) -> None:
        super().__init__(daemon=True, name="crossfl-progress")
        self._path = path
        self._display = Display(stream)
        self.record = Record(journal)
        self.hook = Hook(hook)
        self._pages = Pages()
        self._ended = threading.Event()

    def run(self) -> None:
        """Read the file as it grows."""
        lines = Lines(LARGEST_EVENT)
        with self._path.open("rb") as file:
            last = False
            while not last:
                last = self._ended.is_set()
                while chunk := file.read(CHUNK):
                    for line in lines.feed(chunk):
                        with contextlib.suppress(CrossFLError):
                            self._take(decode_line(line))
                self._ended.wait(PAUSE)
        self._display.close()
        self.record.close()

    def stop(self) -> None:
        """Show what is left and end."""
        self._ended.set()
        self.join(timeout=5)

    def _take(self, event: Event) -> None:
        # Shown last: a terminal that is held with Ctrl-S blocks whoever writes to it.
        for use in (self.record.add, self.hook.call, self._renew_page, self._display.show):
            with contextlib.suppress(Exception):
                use(event)

    def _renew_page(self, event: Event) -> None:
        if event.phase == events.AGGREGATED and self.record.run is not None:
            self._pages.renew(self.record.run)
