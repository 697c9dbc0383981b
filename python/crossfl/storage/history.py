"""The history that a run has left, read back."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crossfl.errors import CrossFLError
from crossfl.protocol.history import RoundEntry, decode_line
from crossfl.protocol.layout import HISTORY_LINES


def flat(fields: Mapping[str, Any], separator: str) -> Iterator[tuple[str, Any]]:
    """Nested fields as pairs of name and value, names joined by a separator."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from ((f"{key}{separator}{name}", v) for name, v in flat(value, separator))
        else:
            yield key, value


def read_history(path: Path) -> list[RoundEntry]:
    """The rounds in a `history.jsonl`, or in the folder of results that holds one.

    Raises:
        CrossFLError: it cannot be read, or a line is not that of a round.
    """
    file = path / HISTORY_LINES if path.is_dir() else path
    try:
        with file.open("rb") as lines:
            return [decode_line(line, str(file)) for line in lines]
    except OSError as error:
        raise CrossFLError(f"{file} cannot be read: {error.strerror}") from None
