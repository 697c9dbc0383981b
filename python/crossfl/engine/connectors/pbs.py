"""The connector `crossfl.pbs`: the engine's, with PBS's own word on how each job ended."""

from __future__ import annotations

import asyncio
import contextlib
import posixpath
import re
import shlex
import time
from collections.abc import Collection, Mapping, MutableSequence, Sequence
from importlib.resources import files
from typing import Any, ClassVar

from streamflow.core.deployment import ExecutionLocation
from streamflow.core.utils import random_name
from streamflow.deployment.connector.queue_manager import PBSConnector as EnginePBSConnector
from streamflow.deployment.connector.queue_manager import PBSService
from streamflow.log_handler import logger

from crossfl.engine.connectors.queue import CANCEL_SECONDS
from crossfl.engine.connectors.reports import (
    JobReport,
    NoHistoryError,
    StatusQueryError,
    brief,
    joined,
)
from crossfl.engine.connectors.submission import BusyError, RefusedJobError, SubmitOnce
from crossfl.engine.connectors.turns import Turns
from crossfl.errors import CrossFLError
from crossfl.protocol.schedulers.pbs import Job, jobs_of, limit_in, seconds

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
        return JobReport(
            state=live,
            # Of a job that is held, the comment may be an older one.
            reason="; ".join(filter(None, (held, comment))),
            log=log,
            nodes=job.nodes,
            elapsed=job.elapsed if live == "RUNNING" else None,
            expected_wait=job.expected_wait,
        )
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


class UnreadableAnswerError(StatusQueryError):
    """PBS was asked and answered, but not in a form that can be read."""


class PBSConnector(Turns, EnginePBSConnector, SubmitOnce):
    """Jobs of one PBS server; `QueueConnector` and `Turns` say what it adds.

    The server must keep job history (``job_history_enable=True``).
    """

    scheduler: ClassVar[str] = "PBS"
    job_id_pattern: ClassVar[re.Pattern[str]] = re.compile(r"^(\d+\.\S+)$", re.MULTILINE)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # What a binding without a service gets; the engine would look for attributes of None.
        self.services.setdefault(None, PBSService())
        self._unreadable_since: dict[str, float] = {}

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

    def _walltime_limit(self, script: str, service: str | None) -> int | None:
        limit = self.services[service].resources.get("walltime") or limit_in(script)
        return None if limit is None else seconds(limit)

    async def _is_ours(self, job_id: str, submission: Mapping[str, Any]) -> bool:
        try:
            job = (await self._qstat_alone(job_id, submission["location"])).get(job_id)
        except StatusQueryError:
            return False
        return job is not None and job.Output_Path.partition(":")[2] == submission["stdout"]

    async def _poll(
        self, job_ids: Collection[str], location: ExecutionLocation
    ) -> dict[str, JobReport]:
        jobs: dict[str, Job] = {}
        with contextlib.suppress(UnreadableAnswerError):  # for one job, maybe: see each alone
            jobs = await self._qstat(job_ids, location)
        unreadable: dict[str, UnreadableAnswerError] = {}
        for job_id in job_ids:
            if job_id not in jobs:
                # Some versions print only the first of the jobs they are asked for.
                try:
                    jobs |= await self._qstat_alone(job_id, location)
                except UnreadableAnswerError as error:
                    unreadable[job_id] = error
        if len(unreadable) == len(job_ids):
            raise unreadable[job_id]
        return {
            job_id: report_of(jobs[job_id]) if job_id in jobs else self._unseen(job_id, unreadable)
            for job_id in job_ids
        }

    def _unseen(self, job_id: str, unreadable: Mapping[str, StatusQueryError]) -> JobReport:
        """A job that PBS does not know, or whose answer cannot be read while others' can."""
        if job_id in unreadable:
            since = self._unreadable_since.setdefault(job_id, time.monotonic())
            if time.monotonic() - since < self.statusTimeout:
                logger.warning(f"Deployment {self.deployment_name}: {job_id}: {unreadable[job_id]}")
                return JobReport(state="RUNNING")
        return JobReport(state="UNKNOWN")

    async def _qstat_alone(self, job_id: str, location: ExecutionLocation) -> dict[str, Job]:
        """Ask about one job; as text, where its JSON cannot be read."""
        try:
            return await self._qstat([job_id], location)
        except UnreadableAnswerError:
            return await self._qstat([job_id], location, form=())

    async def _qstat(
        self,
        job_ids: Collection[str],
        location: ExecutionLocation,
        form: Sequence[str] = ("-F", "json"),
    ) -> dict[str, Job]:
        answer, status = await self._ask(location, "qstat", "-x", "-f", *form, *job_ids)
        if NO_HISTORY in answer:
            raise NoHistoryError(
                f"Deployment {self.deployment_name}: this PBS server keeps no job history, so "
                f"nobody can know how a job ended; ask the site for `job_history_enable=True`"
            )
        try:
            jobs = jobs_of(answer)
        except CrossFLError as error:
            raise UnreadableAnswerError(f"`qstat` ended with {status}: {error}") from error
        if not jobs and NO_SUCH_JOB not in answer:
            raise StatusQueryError(f"`qstat` ended with {status}, no job: {brief(answer)}")
        return jobs

    async def _remove_jobs(self, location: ExecutionLocation, jobs: MutableSequence[str]) -> None:
        answer, status = await self._ask(location, "qdel", *jobs, seconds=CANCEL_SECONDS)
        if status != 0 and not all(map(OVER_ALREADY.search, answer.splitlines() or [""])):
            raise StatusQueryError(f"`qdel` ended with {status}: {joined(answer)}")
