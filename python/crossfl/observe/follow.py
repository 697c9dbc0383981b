"""Following a file of events that other processes append to."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from crossfl.errors import CrossFLError
from crossfl.observe.display import Display
from crossfl.protocol.events import LARGEST_EVENT, decode_line

CHUNK = 64 << 10
"""Bytes that are read at once."""
PAUSE = 0.2
"""Seconds between two looks at the file."""


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


class Follower(threading.Thread):
    """Shows the events that other processes append to a file, until it is stopped.

    A line that is no event is skipped: a process may end while it writes one.
    """

    def __init__(self, path: Path, stream: TextIO) -> None:
        super().__init__(daemon=True, name="crossfl-progress")
        self._path = path
        self._display = Display(stream)
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
                        self._show(line)
                self._ended.wait(PAUSE)
        self._display.close()

    def stop(self) -> None:
        """Show what is left and end."""
        self._ended.set()
        self.join(timeout=5)

    def _show(self, line: bytes) -> None:
        try:
            event = decode_line(line)
        except CrossFLError:
            return
        self._display.show(event)
