"""Events that steps and the engine append to the file of their run."""

from pathlib import Path

from crossfl.protocol.events import Event, decode_line


def read(path: Path) -> list[Event]:
    """The events in a file; each of its lines has to be one."""
    return [decode_line(line) for line in path.read_bytes().splitlines()]
