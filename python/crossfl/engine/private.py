"""What a run makes, at a site or on this machine, can be read by its own user alone.

The engine makes job folders with mode 0777, at a site even past the user's umask, and gives a file
that it sends the mode that the file had here.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import MutableSequence, Sequence
from typing import Any

from streamflow.core.deployment import Connector, ExecutionLocation

UMASK = 0o077
UNDER_UMASK = ("umask", f"{UMASK:03o}", "&&")
"""What stands before every command at a site: its login shell may set a umask of its own."""


def heeding_umask(command: Sequence[str]) -> list[str]:
    """A command of the engine, without what sets modes past the umask."""
    match list(command):
        case ["mkdir", "-m", _, *rest]:
            return ["mkdir", *rest]
        case ["tar", "xpf", stream, *rest]:
            return ["tar", "xpf", stream, "--no-same-permissions", *rest]
        case words:
            return words


class PrivateFolders(Connector, ABC):
    """To be inherited from before the engine's connector: its commands run under our umask."""

    async def run(
        self,
        location: ExecutionLocation,
        command: MutableSequence[str],
        *args: Any,
        job_name: str | None = None,
        **kwargs: Any,
    ) -> tuple[str, int] | None:
        words = command if job_name else heeding_umask(command)
        answer: tuple[str, int] | None = await super().run(
            location, [*UNDER_UMASK, *words], *args, job_name=job_name, **kwargs
        )
        return answer
