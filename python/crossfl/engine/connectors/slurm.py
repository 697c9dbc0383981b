"""The connector `crossfl.slurm`: the engine's, with Slurm's own word on how each job ended."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, MutableSequence
from importlib.resources import files
from typing import Any, ClassVar

from streamflow.core.deployment import ExecutionLocation
from streamflow.deployment.connector.queue_manager import SlurmConnector as EngineSlurmConnector

from crossfl.engine.connectors.queue import CANCEL_SECONDS
from crossfl.engine.connectors.reports import JobReport, StatusQueryError, brief, joined
from crossfl.engine.connectors.submission import BusyError, RefusedJobError, SubmitOnce
from crossfl.engine.connectors.turns import Turns
from crossfl.errors import CrossFLError
from crossfl.protocol.schedulers.slurm import (
    QUEUE_FORMAT,
    JobRecord,
    ending_of,
    folders_of,
    limit_in,
    queue_of,
    record_of,
    seconds,
)

NO_SUCH_JOB = "Invalid job id"
# `sbatch` ends with 1 whatever is wrong; these are words of ``slurm_errno.c``.
AWAY = re.compile(
    "contact slurm controller|timed out on send/recv|temporarily unable to accept|"
    "in standby mode|not responding|Transport endpoint is not connected|Connection refused|"
    "Zero Bytes were transmitted|Resource temporarily unavailable|Database is busy|"
    "I/O error writing script",
    re.IGNORECASE,
)
"""A controller that is down or overloaded."""
UNANSWERED = re.compile("timed out on send/recv|Zero Bytes were transmitted", re.IGNORECASE)
"""One that may have taken the job all the same."""
FULL = re.compile(r"MaxSubmit\w*Limit")
"""As many jobs as the association, or the QOS, may have; the line after it names all limits."""
REFUSED = re.compile(r"^sbatch: (error|fatal):", re.MULTILINE)


class SlurmConnector(Turns, EngineSlurmConnector, SubmitOnce):
    """Jobs of one Slurm cluster; `QueueConnector` and `Turns` say what it adds."""

    scheduler: ClassVar[str] = "Slurm"
    job_id_pattern: ClassVar[re.Pattern[str]] = re.compile(r"^(\d+)(?:;\S+)?$", re.MULTILINE)

    @classmethod
    def get_schema(cls) -> str:
        return files("crossfl.engine").joinpath("schemas", "slurm.json").read_text("utf-8")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unanswered: set[str] = set()

    async def _submit(self, *args: Any, **kwargs: Any) -> str:
        """Submit a job, unless it is in the queue: a controller may take one and not answer."""
        name, location = kwargs["job_name"], kwargs["location"]
        if name in self._unanswered and (job_id := await self._taken(kwargs["workdir"], location)):
            self._names[job_id], self._scheduled_jobs[job_id] = name, location
        else:
            try:
                job_id = await super()._submit(*args, **kwargs)
            except BusyError as error:
                if UNANSWERED.search(str(error)):
                    self._unanswered.add(name)
                raise
        self._unanswered.discard(name)
        return job_id

    async def _taken(self, workdir: str, location: ExecutionLocation) -> str | None:
        """The job in the queue whose folder, which no other job has, is this one."""
        answer, status = await self._ask(location, "squeue", "-h", "--me", "-o", "%i|%Z")
        if status != 0:
            raise BusyError(joined(answer), full=False)
        return next((i for i, folder in folders_of(answer).items() if folder == workdir), None)

    def judge_refusal(self, answer: str, status: int) -> Exception | None:
        full = FULL.search(answer) is not None
        if full or AWAY.search(answer):
            return BusyError(joined(answer), full=full)
        if REFUSED.search(answer):
            return RefusedJobError(f"Slurm refuses the job: {joined(answer)}")
        return None

    def _walltime_limit(self, script: str, service: str | None) -> int | None:
        limit = getattr(self.services.get(service), "time", None) or limit_in(script)
        return None if limit is None else seconds(limit)

    async def _is_ours(self, job_id: str, submission: Mapping[str, Any]) -> bool:
        try:
            record = await self._record(job_id, submission["location"])
        except StatusQueryError:
            return False
        return record is not None and record.WorkDir == submission["workdir"]

    async def _poll(
        self, job_ids: Collection[str], location: ExecutionLocation
    ) -> dict[str, JobReport]:
        answer, status = await self._ask(
            location, "squeue", "-h", "-t", "all", "-j", ",".join(job_ids), "-o", QUEUE_FORMAT
        )
        if status != 0 and NO_SUCH_JOB not in answer:
            raise StatusQueryError(f"`squeue` ended with {status}: {brief(answer)}")
        try:
            entries = queue_of(answer)
        except CrossFLError as error:
            raise StatusQueryError(f"`squeue` gave {error}") from error
        queued = {
            job_id: JobReport(
                state=entry.state,
                reason=entry.reason,
                nodes=entry.nodes,
                elapsed=entry.elapsed,
                expected_wait=entry.expected_wait,
            )
            for job_id, entry in entries.items()
        }
        return {
            job_id: (
                report
                if (report := queued.get(job_id)) and not report.over
                else await self._final(job_id, location)
            )
            for job_id in job_ids
        }

    async def _record(self, job_id: str, location: ExecutionLocation) -> JobRecord | None:
        """The controller's record of a job; None once it has forgotten it."""
        answer, status = await self._ask(location, "scontrol", "show", "job", job_id)
        if status != 0 and NO_SUCH_JOB in answer:
            return None
        try:
            record = record_of(answer, job_id)
        except CrossFLError as error:
            raise StatusQueryError(f"`scontrol` gave {error}") from error
        if status != 0 or record is None:
            raise StatusQueryError(f"`scontrol` ended with {status}: {brief(answer)}")
        return record

    async def _final(self, job_id: str, location: ExecutionLocation) -> JobReport:
        """The controller's record of a job, and accounting's once the controller forgot it."""
        if (record := await self._record(job_id, location)) is None:
            return await self._accounted(job_id, location)
        return JobReport(
            state=record.JobState,
            exit_code=record.exit_code,
            signal=record.signal,
            reason=record.Reason,
            log=record.StdOut,
        )

    async def _accounted(self, job_id: str, location: ExecutionLocation) -> JobReport:
        for source in ([], ["-c"]):  # the accounting database, or else the job completion log
            answer, _ = await self._ask(
                location, "sacct", *source, "-n", "-P", "-j", job_id, "-o", "JobID,State,ExitCode"
            )
            try:
                ending = ending_of(answer, job_id)
            except CrossFLError as error:
                raise StatusQueryError(f"`sacct` gave {error}") from error
            if ending:
                return JobReport(
                    state=ending.state, exit_code=ending.exit_code, signal=ending.signal
                )
        return JobReport(state="UNKNOWN")

    async def _remove_jobs(self, location: ExecutionLocation, jobs: MutableSequence[str]) -> None:
        answer, status = await self._ask(location, "scancel", *jobs, seconds=CANCEL_SECONDS)
        if status != 0 and NO_SUCH_JOB not in answer:
            raise StatusQueryError(f"`scancel` ended with {status}: {joined(answer)}")
