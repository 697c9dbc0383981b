"""The one exception that speaks to a user, and a stable code for each kind of failure."""

from enum import StrEnum
from typing import ClassVar


class Code(StrEnum):
    """What kind of failure a message is about; `docs/errors.md` has an entry for each."""

    USAGE = "CFL1"
    INPUT = "CFL2"
    SYSTEM = "CFL3"
    QUORUM = "CFL4"
    BUG = "CFL5"
    INTERRUPTED = "CFL6"


class CrossFLError(Exception):
    """Bad input or a broken contract; its message is all the user needs to see."""

    code: ClassVar[Code] = Code.INPUT
