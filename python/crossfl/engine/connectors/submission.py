"""Submissions that may be repeated: a job is submitted once, however often the command is given.

A connection may be lost in the midst of a submission, when the scheduler has taken the job already
or is about to. The command is then given anew, by the engine or here, and so it has to be one that
does no harm twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from abc import ABC
from collections.abc import MutableSequence
from typing import Any

import asyncssh
from streamflow.core.deployment import ExecutionLocation
from streamflow.core.utils import random_name
from streamflow.deployment.connector.queue_manager import QueueManagerConnector

COMMANDS = {"sbatch", "qsub"}
TRIES = 3
"""How often a submission is given; each reconnects as patiently as the login's `retries` say."""

# The first to make the folder submits, and goes on if nobody listens any more; another waits for
# what the first one was told. `$HOME` is shared by all login nodes of a site.
ONCE = """\
d="$HOME/.crossfl-submission-{token}"
if mkdir "$d" 2>/dev/null; then
    {{ {command}; }} >"$d/answer" 2>&1
    echo $? >"$d/ending"
    mv "$d/ending" "$d/status"
elif [ ! -d "$d" ]; then
    echo "no folder can be made in $HOME"
    exit 73
fi
n=0
while [ ! -e "$d/status" ] && [ "$n" -lt 60 ]; do n=$((n + 1)); sleep 1; done
cat "$d/answer"
[ -e "$d/status" ] || {{ echo "it is not known whether the job was submitted"; exit 75; }}
exit "$(cat "$d/status")"
"""


class SubmitOnce(QueueManagerConnector, ABC):
    """To be inherited from after the engine's connector, whose commands come by here."""

    async def run(
        self, location: ExecutionLocation, command: MutableSequence[str], *args: Any, **kwargs: Any
    ) -> tuple[str, int] | None:
        answer: tuple[str, int] | None
        if kwargs.get("job_name") or COMMANDS.isdisjoint(command):
            answer = await super().run(location, command, *args, **kwargs)
            return answer
        token = random_name()
        script = ONCE.format(token=token, command=" ".join(command))
        once = ["sh", "-c", shlex.quote(script)]
        for attempt in range(TRIES):
            try:
                answer = await super().run(location, once, *args, **kwargs)
                break
            except (asyncssh.Error, OSError):
                if attempt == TRIES - 1:
                    raise
                await asyncio.sleep(1)
        with contextlib.suppress(Exception):  # it is small, and in nobody's way
            await super().run(location, ["rm", "-rf", f"~/.crossfl-submission-{token}"])
        return answer
