"""Exit statuses of the `crossfl` command."""

from enum import IntEnum


class Exit(IntEnum):
    """What the exit status of a verb means."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    BAD_INPUT = 4
    INTERRUPTED = 130


MEANINGS = {
    Exit.DONE: "The verb did what it was asked for.",
    Exit.FAILED: (
        "An unexpected error, which is a bug: a step prints a traceback, any other verb names the "
        "file with it. Of `crossfl check`: a check failed."
    ),
    Exit.USAGE: "Wrong usage: a flag is unknown, missing or malformed.",
    Exit.BAD_INPUT: "Bad input or a full disk: one message says what, where and what to do.",
    Exit.INTERRUPTED: "The user interrupted it; what was published stays.",
}
"""Each status in a sentence."""
