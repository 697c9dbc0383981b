"""The record of a run: its events, appended to a file in the run's folder of the journal.

The folder is known once a step has told the name of the run; what came before is kept until then.
A write that fails costs its event, and nothing else. Step counts are thinned, and the file has an
end.
"""

import contextlib
from pathlib import Path
from typing import BinaryIO

from crossfl.protocol.events import TRAIN, Event, encode_line
from crossfl.protocol.layout import EVENTS, RUN

STEP_SECONDS = 5.0
"""Seconds between two step counts of one facility that are recorded, but for the first and last."""
MOST_PENDING = 1000
"""Events that are kept until the run has a name."""
MOST_BYTES = 256 << 20
"""Size of the file from which on no step counts are recorded; from twice that on, nothing is."""


class Record:
    """Appends events to the run that goes on."""

    def __init__(self, journal: Path | None = None) -> None:
        self.journal = journal
        self.run: Path | None = None
        """Folder of the run, once it is known."""
        self._pending: list[bytes] = []
        self._file: BinaryIO | None = None
        self._torn = False
        self._last: dict[str, tuple[int | None, float]] = {}

    def add(self, event: Event) -> None:
        """Record an event."""
        if not self._is_worth_it(event):
            return
        line = encode_line(event)
        if self._file is None:
            self._pending = [*self._pending, line][-MOST_PENDING:]
            if event.run is not None and self.journal is not None:
                self._open(self.journal / event.run)
            return
        self._write(self._file, line)

    def close(self) -> None:
        """Record no more."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _open(self, run: Path) -> None:
        with contextlib.suppress(OSError):
            if not (run / RUN).is_file():
                return
            self._file = (run / EVENTS).open("ab", buffering=0)
            self._torn = self._file.tell() > 0  # a run that was killed may have left half a line
            self.run = run
            for line in self._pending:
                self._write(self._file, line)
            self._pending = []

    def _write(self, file: BinaryIO, line: bytes) -> None:
        try:
            if file.tell() >= 2 * MOST_BYTES:
                return
            line = b"\n" + line if self._torn else line
            self._torn = file.write(line) < len(line)
        except (OSError, ValueError):
            self._torn = True

    def _is_worth_it(self, event: Event) -> bool:
        if event.phase != TRAIN:
            return True
        if self._file is not None and self._file.tell() >= MOST_BYTES:
            return False
        name = event.facility or ""
        number, when = self._last.get(name, (None, 0.0))
        edge = event.step == event.steps or number != event.round
        if not edge and 0 <= event.time - when < STEP_SECONDS:
            return False
        self._last[name] = event.round, event.time
        return True
