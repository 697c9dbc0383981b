"""The connector `crossfl.slurm`: the engine's, with Slurm's own word on how each job ended."""

from __future__ import annotations

import re
from collections.abc import Collection, MutableSequence
from importlib.resources import files
from typing import ClassVar

from streamflow.core.deployment import ExecutionLocation
from streamflow.deployment.connector.queue_manager import SlurmConnector as EngineSlurmConnector

from crossfl.engine.connectors.queue import (
    CANCEL_SECONDS,
    JobReport,
    QueueConnector,
    StatusQueryError,
)
from crossfl.engine.connectors.submission import SubmitOnce

NO_SUCH_JOB = "Invalid job id"
STATE_LINE = re.compile(r"^(\d+)\|([A-Z_]+)\|(.*)$", re.MULTILINE)
EXIT_CODE = re.compile(r"(\d+):(\d+)")


class SlurmConnector(QueueConnector, EngineSlurmConnector, SubmitOnce):
    """Jobs of one Slurm cluster; see :class:`QueueConnector` for what it adds."""

    scheduler: ClassVar[str] = "Slurm"
    job_id_pattern: ClassVar[re.Pattern[str]] = re.compile(r"^(\d+)(?:;\S+)?$", re.MULTILINE)

    @classmethod
    def get_schema(cls) -> str:
        return files("crossfl.engine").joinpath("schemas", "slurm.json").read_text("utf-8")

    async def _poll(
        self, job_ids: Collection[str], location: ExecutionLocation
    ) -> dict[str, JobReport]:
        answer, status = await self._ask(
            location, "squeue", "-h", "-t", "all", "-j", ",".join(job_ids), "-o", "%i|%T|%r"
        )
        if status != 0 and NO_SUCH_JOB not in answer:
            raise StatusQueryError(f"`squeue` ended with {status}: {answer}")
        queued = {
            job_id: JobReport(state=state, reason=reason)
            for job_id, state, reason in STATE_LINE.findall(answer)
        }
        return {
            job_id: (
                report
                if (report := queued.get(job_id)) and not report.over
                else await self._final(job_id, location)
            )
            for job_id in job_ids
        }

    async def _final(self, job_id: str, location: ExecutionLocation) -> JobReport:
        """The controller's record of a job, and accounting's once the controller forgot it."""
        answer, status = await self._ask(location, "scontrol", "show", "job", "-o", job_id)
        if status != 0 and NO_SUCH_JOB in answer:
            return await self._accounted(job_id, location)
        fields = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", answer))
        if status != 0 or "JobState" not in fields:
            raise StatusQueryError(f"`scontrol` ended with {status}: {answer}")
        exit_code, signal = EXIT_CODE.findall(fields["ExitCode"])[0]
        return JobReport(
            state=fields["JobState"],
            exit_code=int(exit_code),
            signal=int(signal),
            reason=fields["Reason"],
            log=fields.get("StdOut", ""),
        )

    async def _accounted(self, job_id: str, location: ExecutionLocation) -> JobReport:
        for source in ([], ["-c"]):  # the accounting database, or else the job completion log
            answer, _ = await self._ask(
                location, "sacct", *source, "-n", "-P", "-j", job_id, "-o", "JobID,State,ExitCode"
            )
            # A controller that lost its state gives ids again: the last line is the last job's.
            for line in reversed(answer.splitlines()):
                if line.startswith(f"{job_id}|") and (code := EXIT_CODE.search(line)):
                    # "CANCELLED by 1000" is one of its ways to say CANCELLED.
                    return JobReport(
                        state=line.split("|")[1].split()[0],
                        exit_code=int(code[1]),
                        signal=int(code[2]),
                    )
        return JobReport(state="UNKNOWN")

    async def _remove_jobs(self, location: ExecutionLocation, jobs: MutableSequence[str]) -> None:
        answer, status = await self._ask(location, "scancel", *jobs, seconds=CANCEL_SECONDS)
        if status != 0 and NO_SUCH_JOB not in answer:
            raise StatusQueryError(f"`scancel` ended with {status}: {answer}")
