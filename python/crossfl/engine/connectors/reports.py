"""What a scheduler says of one job, in one vocabulary, and what a person can do about it."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from typing import ClassVar

from streamflow.core.exception import WorkflowExecutionException

from crossfl.protocol.text import ELLIPSIS, printable

ADVICE = {
    "BOOT_FAIL": "a node did not boot; run it again, and tell the site if it happens twice",
    "CANCELLED": "somebody cancelled it, you or the site",
    "DEADLINE": "it could not end before its deadline; raise `deadline`",
    "FAILED": "the command itself failed; read its output",
    "LAUNCH_FAILED": "its node could not start it; run it again, and tell the site if that repeats",
    "NODE_FAIL": "a node failed under it; run it again",
    "OUT_OF_MEMORY": "ask for more memory, or train with smaller batches",
    "PREEMPTED": "jobs of higher priority took its nodes; choose another partition or QOS",
    "QUEUE_TIMEOUT": "raise `queue_timeout`, or choose a partition with a shorter queue",
    "SPECIAL_EXIT": "the site holds it; look at it with the scheduler's own commands",
    "TIMEOUT": "raise its wall-clock limit, or give it less to do",
    "UNKNOWN": "it left the queue, and neither job history nor accounting knows how it ended",
}

# Why Slurm and PBS hold a job that nodes could not start; it pends until an administrator frees it.
LAUNCH_FAILED = re.compile("launch.failed.requeued.held|JobHoldMaxRequeue|too many failed attempts")

# What a kernel, a Slurm daemon, a PBS daemon and PBS's cgroup hook write into the job's output when
# memory runs out.
OUT_OF_MEMORY_MARKS = (
    "exceeded (job )?memory limit|oom[-_ ]kill|v?mem [0-9]+kb exceeded limit"
    "|cgroup mem(sw|ory)? limit exceeded"
)

SHELL_BASE = 128
"""A shell says that its last command was killed by a signal with this more than the signal."""


class StatusQueryError(Exception):
    """The scheduler could not be asked: nothing is known about any job."""


class NoHistoryError(WorkflowExecutionException):
    """The scheduler can be asked, but will never say how a job ended."""


@dataclass
class Wait:
    """The time that a job spends in its queue."""

    since: float
    reason: str = ""
    shown: str = ""  # the last reason that was logged


@dataclass(frozen=True, kw_only=True)
class JobReport:
    """What the scheduler says of one job, in Slurm's words whichever the scheduler."""

    state: str
    exit_code: int = 0
    signal: int = 0
    reason: str = ""
    log: str = ""  # the file, at the site, with what the job printed
    nodes: int = 0
    elapsed: float | None = None  # seconds that it has run
    expected_wait: float | None = None  # seconds from submission to the start that is expected

    PENDING: ClassVar[frozenset[str]] = frozenset({"PENDING", "CONFIGURING", "REQUEUED"})
    RUNNING: ClassVar[frozenset[str]] = frozenset(
        {"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"}
        | {"REQUEUE_HOLD", "REQUEUE_FED", "REVOKED"}
    )

    @property
    def pending(self) -> bool:
        return self.state in self.PENDING

    @property
    def over(self) -> bool:
        return not self.pending and self.state not in self.RUNNING

    @property
    def killed(self) -> bool:
        """Whether it failed for a SIGKILL, of the job or of the last command in its script."""
        killed_inside = self.exit_code == SHELL_BASE + signal.SIGKILL
        return self.state == "FAILED" and (self.signal == signal.SIGKILL or killed_inside)

    @property
    def ending(self) -> str:
        """How it ended, for a person: the state, and what the scheduler adds to it."""
        extra = [self.reason] if self.reason not in ("", "None", "NonZeroExitCode") else []
        extra += [f"exit code {self.exit_code}"] if self.exit_code else []
        extra += [f"signal {self.signal}"] if self.signal else []
        return f"{self.state} ({', '.join(extra)})" if extra else self.state


def brief(answer: str, longest: int = 200) -> str:
    """The last line of what a command printed, short: the rest may list a job's environment."""
    return printable((answer.strip().splitlines() or ["nothing"])[-1].strip(), longest=longest)


def joined(answer: str, longest: int = 500) -> str:
    """What a command printed, in one line; of a long answer the end, for greetings come first."""
    line = printable(" ".join(answer.split()))
    return line if len(line) <= longest else ELLIPSIS + line[1 - longest :]
