"""The history that a run has left, read back."""

from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.protocol.history import RoundEntry, decode_line
from crossfl.protocol.layout import HISTORY_LINES


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
