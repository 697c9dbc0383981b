"""The connector `crossfl.pbs`: the engine's, with PBS's own word on how each job ended."""

from __future__ import annotations

import asyncio
import posixpath
import re
import shlex
from collections.abc import Collection, Mapping, MutableSequence
from importlib.resources import files
from typing import Any, ClassVar

from streamflow.core.deployment import ExecutionLocation
from streamflow.core.utils import random_name
from streamflow.deployment.connector.queue_manager import PBSConnector as EnginePBSConnector
from streamflow.deployment.connector.queue_manager import PBSService

from crossfl.engine.connectors.queue import CANCEL_SECONDS, QueueConnector
from crossfl.engine.connectors.reports import (
    JobReport,
    NoHistoryError,
    StatusQueryError,
    brief,
    joined,
)
from crossfl.engine.connectors.submission import BusyError, RefusedJobError, SubmitOnce
from crossfl.errors import CrossFLError
from crossfl.protocol.schedulers.pbs import Job, jobs_of, seconds

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

# `qsub` ends with PBS's number of the error, of which a status holds the last byte (``pbs_error.h``
# of OpenPBS). These are of a server, or a queue, that is down or overloaded: TOOMANY, SYSTEM,
# INTERNAL, QUNOENB, PROTOCOL, NOCONNECTS, NOSERVER, SVRDOWN, CONNFULL, SAVE_ERR, TRYAGAIN.
AWAY = {
    number % 256
    for number in (15006, 15010, 15011, 15021, 15031, 15033, 15034, 15060, 15117, 15161, 15208)
}
FULL = {number % 256 for number in (15046, 15142, 15143)}
"""MAXQUED, ENTLIMCT, ENTLIMRESC: as many jobs as the queue, or as we, may have."""

COMPLAINT = re.compile(r"^qsub: ", re.MULTILINE)
OVER_ALREADY = re.compile(
    f"{NO_SUCH_JOB}|Job has finished|Request invalid for state of job|[Dd]elete already in progress"
)
"""What `qdel` says of jobs that are over, exit, or are being deleted."""


def report_of(job: Job) -> JobReport:
    """Translate what PBS says of one job."""
    log, comment, status = job.Output_Path.partition(":")[2], str(job.comment), job.Exit_status
    if live := LIVE.get(job.job_state):
        held = f"held ({job.Hold_Types})" if job.job_state == "H" else ""
        return JobReport(state=live, reason=comment or held, log=log)
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
        elif kwargs["stdout"] == asyncio.subprocess.DEVNULL:
            kwargs["stdout"] = "/dev/null"
        for stream in ("stdout", "stderr"):
            if isinstance(kwargs[stream], str):
                kwargs[stream] = posixpath.join(kwargs["workdir"], kwargs[stream])
        if merged:
            kwargs["stderr"] = kwargs["stdout"]
        return await super()._run_batch_command(*args, **kwargs)

    def judge_refusal(self, answer: str, status: int) -> Exception | None:
        if not COMPLAINT.search(answer):
            return None  # it did not get as far as the server
        if status in AWAY | FULL:
            return BusyError(joined(answer), full=status in FULL)
        return RefusedJobError(f"PBS refuses the job: {joined(answer)} (status {status})")

    async def _is_ours(self, job_id: str, submission: Mapping[str, Any]) -> bool:
        try:
            job = (await self._qstat([job_id], submission["location"])).get(job_id)
        except StatusQueryError:
            return False
        return job is not None and job.Output_Path.partition(":")[2] == submission["stdout"]

    async def _poll(
        self, job_ids: Collection[str], location: ExecutionLocation
    ) -> dict[str, JobReport]:
        try:
            jobs = await self._qstat(job_ids, location)
        except StatusQueryError:
            if len(job_ids) == 1:
                raise
            jobs = {}  # one job may spoil the answer about all of them
        for job_id in job_ids:
            if job_id not in jobs:
                # Some versions print only the first of the jobs they are asked for.
                jobs |= await self._qstat([job_id], location)
        return {
            job_id: report_of(jobs[job_id]) if job_id in jobs else JobReport(state="UNKNOWN")
            for job_id in job_ids
        }

    async def _qstat(self, job_ids: Collection[str], location: ExecutionLocation) -> dict[str, Job]:
        """Ask about jobs; about a single one as text, where its JSON cannot be read."""
        forms: list[tuple[str, ...]] = [("-F", "json"), ()]
        for form in forms[: 2 if len(job_ids) == 1 else 1]:
            answer, status = await self._ask(location, "qstat", "-x", "-f", *form, *job_ids)
            if NO_HISTORY in answer:
                raise NoHistoryError(
                    f"Deployment {self.deployment_name}: this PBS server keeps no job history, so "
                    f"nobody can know how a job ended; ask the site for `job_history_enable=True`"
                )
            try:
                jobs = jobs_of(answer)
            except CrossFLError as error:
                problem = str(error)
            else:
                if jobs or NO_SUCH_JOB in answer:
                    return jobs
                problem = f"an answer without a job: {brief(answer)}"
        raise StatusQueryError(f"`qstat` ended with {status}: {problem}")

    async def _remove_jobs(self, location: ExecutionLocation, jobs: MutableSequence[str]) -> None:
        answer, status = await self._ask(location, "qdel", *jobs, seconds=CANCEL_SECONDS)
        if status != 0 and not all(map(OVER_ALREADY.search, answer.splitlines() or [""])):
            raise StatusQueryError(f"`qdel` ended with {status}: {joined(answer)}")
