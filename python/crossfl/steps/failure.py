"""What a failure of a step at a facility does: it ends the step, or makes the facility absent."""

import argparse
import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import crossfl
from crossfl.errors import CrossFLError
from crossfl.facility import launcher
from crossfl.protocol.records import Task
from crossfl.protocol.text import printable

PACKAGE = Path(crossfl.__file__).parent
LINES = "\n"
"""What lays out a traceback, and does nothing else."""


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Declare `--on-failure`."""
    parser.add_argument(
        "--on-failure",
        choices=("stop", "absent"),
        default="stop",
        help="what a failure does: stop this step, or count the facility as absent; default stop",
    )


@contextlib.contextmanager
def handled(
    policy: str, task: Task, delivery: Path, absent: Callable[[Task, str, Path], object]
) -> Iterator[None]:
    """Do what the policy says where the work inside fails.

    Args:
        policy: `stop` or `absent`.
        task: the work.
        delivery: what it leaves, which stands where it was left before the failure: a launcher may
            fail, for a signal or a rank that ends badly, after all was delivered.
        absent: writes, into the folder of the delivery, that the facility is absent, and why.
    """
    try:
        yield
    except Exception as error:
        if not delivery.exists():
            reason = reason_of(error, policy)
            if launcher.is_follower():
                raise
            absent(task, reason, delivery.parent)


def reason_of(error: Exception, policy: str = "absent") -> str:
    """Why the facility is absent; where failures stop the step, the error goes on instead.

    Words of our own may leave the facility. Of any other error, whose text may quote the data, only
    its class and the place in our code leave. The output of the job, which may leave as well, has
    the lines of code that led there, and no value.
    """
    if policy == "stop":
        raise error
    if isinstance(error, CrossFLError):
        return str(error)
    lines = "".join(traceback.format_tb(error.__traceback__))
    print(
        f"{printable(lines, keep=LINES)}{type(error).__name__}: its text may quote the data and "
        "is not shown here; --on-failure stop shows it",
        file=sys.stderr,
    )
    places = [
        f"{Path(frame.filename).relative_to(PACKAGE).as_posix()}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(PACKAGE)
    ]
    place = f" in crossfl/{places[-1]}" if places else ""
    return f"{type(error).__name__}{place}: the output of the job has the lines that led there"
