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
from contextvars import ContextVar
from typing import Any

import asyncssh
from streamflow.core.deployment import ExecutionLocation
from streamflow.core.exception import WorkflowExecutionException
from streamflow.core.utils import random_name
from streamflow.deployment.connector.queue_manager import QueueManagerConnector

from crossfl.engine.recovery.policy import HopelessError

COMMANDS = {"sbatch", "qsub"}
TRIES = 3
"""How often a submission is given; each reconnects as patiently as the login's `retries` say."""
NOT_OVER = 75
"""The status of a submission that still goes on."""
ASK_SECONDS = 60
"""How long one command waits for its end."""
FOLDER: ContextVar[str | None] = ContextVar("FOLDER", default=None)
"""The folder at the site of a submission that a later run may ask for, too; it is kept."""

# The first to make the folder submits, and goes on if nobody listens any more; another waits for
# what the first one was told. `$HOME` is shared by all login nodes of a site. The answer comes
# last, apart from greetings and warnings.
ONCE = """\
d={folder}
if mkdir "$d" 2>/dev/null; then
    {{ {command}; }} >"$d/answer" 2>"$d/errors"
    echo $? >"$d/ending"
    mv "$d/ending" "$d/status"
elif [ ! -d "$d" ]; then
    echo "the folder $d cannot be made"
    exit 73
fi
n=0
while [ ! -e "$d/status" ] && [ "$n" -lt {seconds} ]; do n=$((n + 1)); sleep 1; done
[ -e "$d/status" ] || {{ echo "it is not known yet whether the job was submitted"; exit 75; }}
cat "$d/errors"
echo "{token}"
cat "$d/answer"
exit "$(cat "$d/status")"
"""


class BusyError(WorkflowExecutionException):
    """The scheduler takes no job now, and may take this one later.

    Args:
        message: its own words.
        full: whether it is there, and has as many jobs of ours as it takes.
    """

    def __init__(self, message: str, *, full: bool) -> None:
        super().__init__(message)
        self.full = full


class RefusedJobError(WorkflowExecutionException, HopelessError):
    """The scheduler will not take this job, however often it is asked."""


class SubmitOnce(QueueManagerConnector, ABC):
    """To be inherited from after the engine's connector, whose commands come by here."""

    statusTimeout: int  # noqa: N815 - the engine's style of settings

    def judge_refusal(self, answer: str, status: int) -> Exception | None:
        """What the status and the words of a submission mean that failed; None if they say little.

        A connector knows how its scheduler says "not now", and how it says "no".
        """
        return None

    async def run(
        self, location: ExecutionLocation, command: MutableSequence[str], *args: Any, **kwargs: Any
    ) -> tuple[str, int] | None:
        answer: tuple[str, int] | None
        if kwargs.get("job_name") or COMMANDS.isdisjoint(command):
            answer = await super().run(location, command, *args, **kwargs)
            return answer
        token = random_name()
        kept = FOLDER.get()
        folder = shlex.quote(kept) if kept else f'"$HOME/.crossfl-submission-{token}"'
        script = ONCE.format(
            folder=folder, token=token, seconds=ASK_SECONDS, command=" ".join(command)
        )
        once = ["sh", "-c", shlex.quote(script)]
        for _ in range(1 + self.statusTimeout // ASK_SECONDS):
            for attempt in range(TRIES):
                try:
                    answer = await super().run(location, once, *args, **kwargs)
                    break
                except (asyncssh.Error, OSError):
                    if attempt == TRIES - 1:
                        raise
                    await asyncio.sleep(1)
            output, status = answer or ("", 1)
            if status != NOT_OVER:
                break
        if not kept or status not in (0, NOT_OVER):
            with contextlib.suppress(Exception):  # it is small, and in nobody's way
                await super().run(location, ["rm", "-rf", folder])
        errors, _, words = output.partition(token)
        if status != 0 and (error := self.judge_refusal(errors + words, status)):
            raise error
        # `sbatch --test-only` answers among its errors.
        return words if status == 0 and words.strip() else errors + words, status
