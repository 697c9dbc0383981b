"""The connector `crossfl.pbs`: the engine's, with PBS's own word on how each job ended."""

from __future__ import annotations

import asyncio
import json
import posixpath
import re
import shlex
from collections.abc import Collection, MutableSequence
from importlib.resources import files
from typing import Any, ClassVar

import msgspec
from streamflow.core.deployment import ExecutionLocation
from streamflow.core.utils import random_name
from streamflow.deployment.connector.queue_manager import PBSConnector as EnginePBSConnector
from streamflow.deployment.connector.queue_manager import PBSService

from crossfl.engine.connectors.queue import (
    CANCEL_SECONDS,
    JobReport,
    NoHistoryError,
    QueueConnector,
    StatusQueryError,
)
from crossfl.engine.connectors.submission import SubmitOnce

NO_SUCH_JOB = "Unknown Job Id"
NO_HISTORY = "not configured to maintain job history"
LIVE = {
    **dict.fromkeys("QHWT", "PENDING"),
    **dict.fromkeys("RSUBE", "RUNNING"),  # E: it exits, and has no exit status yet
}
# The exit statuses with which PBS says that it ended a job itself (``job.h`` of OpenPBS).
OWN_VERDICTS = {
    **dict.fromkeys((-4, -5, -6), "NODE_FAIL"),  # the node's daemon came up anew
    **dict.fromkeys((-26, -27), "OUT_OF_MEMORY"),
    **dict.fromkeys((-28, -29), "TIMEOUT"),  # of CPU, and of the wall clock
}
SIGNAL_BASE = 256
DELETED = 91  # the substate of a job that `qdel` ended


def seconds(clock: str) -> int:
    """Seconds in PBS's ``hours:minutes:seconds``, of which the first may be missing."""
    total = 0
    for part in clock.split(":"):
        total = 60 * total + int(part)
    return total


class Resources(msgspec.Struct):
    """What a job was given, or has used."""

    walltime: str = ""


class Job(msgspec.Struct):
    """What is read of a job in the answer of ``qstat -x -f -F json``, by PBS's names."""

    job_state: str
    Exit_status: int | None = None
    substate: int = 0
    comment: str = ""
    Output_Path: str = ""
    resources_used: Resources = msgspec.field(default_factory=Resources)
    Resource_List: Resources = msgspec.field(default_factory=Resources)


class Answer(msgspec.Struct):
    """What is read of that answer."""

    Jobs: dict[str, Job] = msgspec.field(default_factory=dict)


def report_of(job: Job) -> JobReport:
    """Translate what PBS says of one job."""
    log, comment, status = job.Output_Path.partition(":")[2], job.comment, job.Exit_status
    if live := LIVE.get(job.job_state):
        return JobReport(state=live, reason=comment, log=log)
    if job.job_state != "F":
        return JobReport(state="UNKNOWN", reason=f"job_state {job.job_state}", log=log)
    number = status - SIGNAL_BASE if status is not None and status > SIGNAL_BASE else 0
    if status in OWN_VERDICTS:
        return JobReport(state=OWN_VERDICTS[status], reason=comment, log=log)
    if number or status is None or job.substate == DELETED:
        used, granted = job.resources_used.walltime or "0", job.Resource_List.walltime
        if granted and seconds(used) >= seconds(granted):
            state = "TIMEOUT"
        elif "preempt" in comment.lower():
            state = "PREEMPTED"
        elif status is None or job.substate == DELETED:
            state = "CANCELLED"
        else:
            state = "FAILED"
        return JobReport(state=state, signal=number, reason=comment, log=log)
    if status < 0:
        return JobReport(state="FAILED", reason=f"PBS gave up on it: {status}, {comment}", log=log)
    return JobReport(state="FAILED" if status else "COMPLETED", exit_code=status, log=log)


class PBSConnector(QueueConnector, EnginePBSConnector, SubmitOnce):
    """Jobs of one PBS server; see :class:`QueueConnector` for what it adds.

    The server must keep job history (``job_history_enable=True``).
    """

    scheduler: ClassVar[str] = "PBS"
    job_id_pattern: ClassVar[re.Pattern[str]] = re.compile(r"^(\d+\.\S+)$", re.MULTILINE)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # What a binding without a service gets; the engine would look for attributes of None.
        self.services.setdefault(None, PBSService())

    @classmethod
    def get_schema(cls) -> str:
        return files("crossfl.engine").joinpath("schemas", "pbs.json").read_text("utf-8")

    async def run(
        self,
        location: ExecutionLocation,
        command: MutableSequence[str],
        *args: Any,
        stdin: int | str | None = None,
        **kwargs: Any,
    ) -> tuple[str, int] | None:
        if kwargs.get("job_name") and isinstance(stdin, str):
            # `qsub` has no option for it.
            command, stdin = [*command, "<", shlex.quote(stdin)], None
        return await super().run(location, command, *args, stdin=stdin, **kwargs)

    async def _run_batch_command(self, *args: Any, **kwargs: Any) -> str:
        # `qsub` runs in the login directory, whatever the job's: relative paths would land there.
        merged = kwargs["stdout"] == kwargs["stderr"]
        if kwargs["stdout"] == asyncio.subprocess.STDOUT:
            kwargs["stdout"] = f"{random_name()}.log"
        for stream in ("stdout", "stderr"):
            if isinstance(kwargs[stream], str):
                kwargs[stream] = posixpath.join(kwargs["workdir"], kwargs[stream])
        if merged:
            kwargs["stderr"] = kwargs["stdout"]
        return await super()._run_batch_command(*args, **kwargs)

    async def _poll(
        self, job_ids: Collection[str], location: ExecutionLocation
    ) -> dict[str, JobReport]:
        jobs = await self._qstat(job_ids, location)
        for job_id in job_ids:
            if job_id not in jobs:
                # Some versions print only the first of the jobs they are asked for.
                jobs |= await self._qstat([job_id], location)
        return {
            job_id: report_of(jobs[job_id]) if job_id in jobs else JobReport(state="UNKNOWN")
            for job_id in job_ids
        }

    async def _qstat(self, job_ids: Collection[str], location: ExecutionLocation) -> dict[str, Job]:
        answer, status = await self._ask(location, "qstat", "-x", "-f", "-F", "json", *job_ids)
        if NO_HISTORY in answer:
            raise NoHistoryError(
                f"Deployment {self.deployment_name}: this PBS server keeps no job history, so "
                f"nobody can know how a job ended; ask the site for `job_history_enable=True`"
            )
        try:
            # Errors about some of the jobs may stand before and after the document.
            document, _ = json.JSONDecoder().raw_decode(answer[answer.index("{") :])
        except ValueError as error:
            if NO_SUCH_JOB in answer:
                return {}
            raise StatusQueryError(f"`qstat` ended with {status}: {answer}") from error
        try:
            # Numbers may come as words.
            jobs = msgspec.convert(document, Answer, strict=False).Jobs
        except msgspec.ValidationError as error:
            raise StatusQueryError(f"`qstat` gave another answer than PBS's: {error}") from error
        if not jobs and NO_SUCH_JOB not in answer:
            raise StatusQueryError(f"`qstat` ended with {status} and named no job: {answer}")
        return jobs

    async def _remove_jobs(self, location: ExecutionLocation, jobs: MutableSequence[str]) -> None:
        answer, status = await self._ask(location, "qdel", *jobs, seconds=CANCEL_SECONDS)
        if status != 0 and NO_SUCH_JOB not in answer and "Job has finished" not in answer:
            raise StatusQueryError(f"`qdel` ended with {status}: {answer}")
