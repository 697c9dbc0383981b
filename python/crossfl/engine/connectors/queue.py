"""What the Slurm and the PBS connector share: the scheduler's word on a job is the last word.

The engine's connectors submit a job, ask from time to time whether it is still queued, and take the
exit code they are shown when it is not. Here the state that the scheduler gives decides; a query
that fails says nothing about the job, and is asked again; and no job outlives the run.
"""

from __future__ import annotations

import asyncio
import re
import shlex
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Coroutine
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from cachebox import cached
from streamflow.core.deployment import ExecutionLocation
from streamflow.core.exception import WorkflowExecutionException
from streamflow.deployment.connector.queue_manager import QueueManagerConnector
from streamflow.deployment.wrapper import get_inner_location
from streamflow.log_handler import logger

from crossfl.engine.private import PrivateFolders
from crossfl.engine.recovery.registry import REGISTRY
from crossfl.engine.shutdown import interrupt_on_termination
from crossfl.engine.transfer import SafeStreams

T = TypeVar("T")

QUERY_SECONDS = 60
"""A scheduler command that takes longer than this has failed."""

CANCEL_SECONDS = 20
"""How long an interrupted run may take to cancel its jobs at one site."""

FORGOTTEN_SECONDS = 20
"""How long accounting may lag behind a queue that a job has left, or the queue behind `qsub`."""

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

# What a kernel, a Slurm daemon and a PBS daemon write into the job's output when memory runs out.
OUT_OF_MEMORY_MARKS = "exceeded (job )?memory limit|oom[-_ ]kill|mem [0-9]+kb exceeded limit"


class StatusQueryError(Exception):
    """The scheduler could not be asked: nothing is known about any job."""


class NoHistoryError(WorkflowExecutionException):
    """The scheduler can be asked, but will never say how a job ended."""


@dataclass(frozen=True, kw_only=True)
class JobReport:
    """What the scheduler says of one job, in Slurm's words whichever the scheduler."""

    state: str
    exit_code: int = 0
    signal: int = 0
    reason: str = ""
    log: str = ""  # the file, at the site, with what the job printed

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
    def ending(self) -> str:
        """How it ended, for a person: the state, and what the scheduler adds to it."""
        extra = [self.reason] if self.reason not in ("", "None", "NonZeroExitCode") else []
        extra += [f"exit code {self.exit_code}"] if self.exit_code else []
        extra += [f"signal {self.signal}"] if self.signal else []
        return f"{self.state} ({', '.join(extra)})" if extra else self.state


class QueueConnector(PrivateFolders, SafeStreams, QueueManagerConnector, ABC):
    """A queue manager whose jobs end as their scheduler says, and never outlive the run.

    Args:
        queueTimeout: seconds that a job may wait in the queue; then it is cancelled and its state
            is ``QUEUE_TIMEOUT``. Without it a job waits for as long as it takes.
        statusTimeout: seconds for which the scheduler may be out of reach, once a job is
            submitted, before the job is given up (and cancelled, if that can still be done).
    """

    scheduler: ClassVar[str]
    job_id_pattern: ClassVar[re.Pattern[str]]

    def __init__(
        self,
        *args: Any,
        queueTimeout: int | None = None,
        statusTimeout: int = 3600,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.queueTimeout = queueTimeout
        self.statusTimeout = statusTimeout
        self._unfinished: set[asyncio.Task[Any]] = set()
        self._names: dict[str, str] = {}
        self._reports: dict[str, JobReport] = {}
        self._pending_since: dict[str, float] = {}
        self._forgotten_since: dict[str, float] = {}
        self._blind_since: float | None = None

    @abstractmethod
    async def _poll(
        self, job_ids: Collection[str], location: ExecutionLocation
    ) -> dict[str, JobReport]:
        """Ask the scheduler about these jobs, each of them answered; or raise StatusQueryError."""

    async def deploy(self, external: bool) -> None:
        interrupt_on_termination()
        await super().deploy(external)

    async def _ask(
        self, location: ExecutionLocation, *words: str, seconds: int = QUERY_SECONDS
    ) -> tuple[str, int]:
        """Run a command on the login node, and give what it prints (errors too) and its status.

        ``timeout`` runs at the site, so that a scheduler that does not answer does not block the
        shell that all commands share.
        """
        answer = await self.connector.run(
            location=get_inner_location(location),
            command=["timeout", str(seconds), shlex.join(words), "2>&1"],
            capture_output=True,
        )
        if answer is None:
            raise StatusQueryError(f"`{words[0]}` gave no answer")
        output, status = answer
        return output, status

    # --- submitting ---

    async def _run_batch_command(self, *args: Any, **kwargs: Any) -> str:
        """Submit a job; an interrupt in the midst of it still learns the job's id."""
        return await self._to_the_end(self._submit(*args, **kwargs))

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something that an interrupt does not stop halfway; `undeploy` waits for it."""
        task = asyncio.create_task(work)
        self._unfinished.add(task)
        task.add_done_callback(self._unfinished.discard)
        return await asyncio.shield(task)

    async def _submit(self, *args: Any, **kwargs: Any) -> str:
        try:
            answer = await super()._run_batch_command(*args, **kwargs)
        except WorkflowExecutionException as error:
            raise WorkflowExecutionException(
                f"Deployment {self.deployment_name}: {error}"
            ) from error
        # Sites greet and warn on stderr, which the engine reads as one with stdout.
        if not (job_ids := self.job_id_pattern.findall(answer)):
            raise WorkflowExecutionException(
                f"Deployment {self.deployment_name}: {self.scheduler} took job "
                f"{kwargs['job_name']} but gave no id: {answer!r}"
            )
        job_id = str(job_ids[-1])
        self._names[job_id] = kwargs["job_name"]
        self._scheduled_jobs[job_id] = kwargs["location"]
        return job_id

    async def run(self, *args: Any, **kwargs: Any) -> tuple[str, int] | None:
        try:
            answer: tuple[str, int] | None = await super().run(*args, **kwargs)
            return answer
        except BaseException:
            # Nobody waits for the job any more: a retry would submit it a second time.
            if job_name := kwargs.get("job_name"):
                await self._cancel([i for i, name in self._names.items() if name == job_name])
            raise

    # --- watching ---

    @cached(cache=lambda self: self._jobs_cache, key_maker=lambda *_, **__: "running_jobs")
    async def _get_running_jobs(self, location: ExecutionLocation) -> Collection[str]:
        watched = list(self._scheduled_jobs)
        try:
            reports = await self._poll(watched, location)
        except NoHistoryError:
            raise
        except Exception as error:
            # Whatever went wrong in asking, the jobs may well be running.
            self._endure(error)
            return watched
        self._blind_since = None
        for job_id, report in list(reports.items()):
            if report.state == "UNKNOWN" and self._may_be_remembered(job_id):
                reports[job_id] = JobReport(state="COMPLETING")
            elif report.over and report.signal == signal.SIGKILL and report.state == "FAILED":
                reports[job_id] = await self._explain_kill(report, location)
            elif report.pending and LAUNCH_FAILED.search(report.reason):
                await self._cancel([job_id], forget=False)
                reports[job_id] = JobReport(state="LAUNCH_FAILED", reason=report.reason)
            elif report.pending and self._waited_too_long(job_id):
                await self._cancel([job_id], forget=False)
                waited = f"pending for {self._queue_limit(job_id)} s"
                reports[job_id] = JobReport(
                    state="QUEUE_TIMEOUT", reason=f"{waited}: {report.reason or 'no reason'}"
                )
            elif not report.pending:
                self._pending_since.pop(job_id, None)
        self._reports |= {job_id: report for job_id, report in reports.items() if report.over}
        return [job_id for job_id in watched if not reports[job_id].over]

    def _endure(self, error: Exception) -> None:
        """Bear with a scheduler that cannot be asked, for `statusTimeout` seconds."""
        now = time.monotonic()
        self._blind_since = self._blind_since or now
        message = (
            f"Deployment {self.deployment_name}: {self.scheduler} could not be asked about its jobs"
        )
        if now - self._blind_since >= self.statusTimeout:
            raise WorkflowExecutionException(
                f"{message} for {self.statusTimeout} s; they may still run: {error}"
            ) from error
        logger.warning(f"{message}; asking again in {self.pollingInterval} s: {error}")

    def _waited_too_long(self, job_id: str) -> bool:
        since = self._pending_since.setdefault(job_id, time.monotonic())
        limit = self._queue_limit(job_id)
        return limit is not None and time.monotonic() - since >= limit

    def _queue_limit(self, job_id: str) -> int | None:
        """Seconds that a job may wait: as its task says, or else the deployment."""
        policy = REGISTRY.policy
        limit = policy.queue_timeout(self._names[job_id]) if policy else None
        return self.queueTimeout if limit is None else limit

    def _may_be_remembered(self, job_id: str) -> bool:
        since = self._forgotten_since.setdefault(job_id, time.monotonic())
        return time.monotonic() - since < FORGOTTEN_SECONDS

    async def _explain_kill(self, report: JobReport, location: ExecutionLocation) -> JobReport:
        """Tell a kill for memory from another where the scheduler does not.

        Only whether the site's own words are there crosses to us, nothing of what the job printed.
        """
        if not report.log:
            return report
        _, status = await self._ask(location, "grep", "-qiE", OUT_OF_MEMORY_MARKS, report.log)
        if status != 0:
            return report
        return JobReport(state="OUT_OF_MEMORY", signal=report.signal, log=report.log)

    # --- ending ---

    async def _get_output(self, job_id: str, location: ExecutionLocation) -> str:
        report = self._reports[job_id]
        if report.state != "COMPLETED" or not (log := report.log):
            # What a failed job printed stays at the site: it may quote the data it failed on.
            return ""
        answer = await self.connector.run(
            location=get_inner_location(location),
            command=["cat", shlex.quote(log)],
            capture_output=True,
        )
        return answer[0].strip() if answer else ""

    async def _get_returncode(self, job_id: str, location: ExecutionLocation) -> int:
        report = self._reports.pop(job_id)
        job_name = self._names.pop(job_id)
        self._pending_since.pop(job_id, None)
        self._forgotten_since.pop(job_id, None)
        if report.state == "COMPLETED" and report.exit_code == 0:
            return 0
        message = (
            f"Deployment {self.deployment_name}: {self.scheduler} job {job_id} ({job_name}) ended "
            f"in {report.ending}: {ADVICE.get(report.state, ADVICE['FAILED'])}"
            + (f"; its output is at the site in {report.log}" if report.log else "")
        )
        if report.state == "FAILED" and report.exit_code and not report.signal:
            # The command's own verdict: the workflow may call some exit codes a success.
            logger.error(message)
            if policy := REGISTRY.policy:
                policy.note_verdict(job_name, message)
            return report.exit_code
        raise WorkflowExecutionException(message)

    async def _cancel(self, job_ids: Collection[str], *, forget: bool = True) -> None:
        """Take jobs out of the queue; those that are over, or that we never had, are left alone."""
        locations = {i: self._scheduled_jobs[i] for i in job_ids if i in self._scheduled_jobs}
        if forget:
            for job_id in job_ids:
                self._scheduled_jobs.pop(job_id, None)
                self._names.pop(job_id, None)
        if not locations:
            return
        jobs = list(locations)
        logger.warning(
            f"Deployment {self.deployment_name}: cancelling {self.scheduler} jobs {' '.join(jobs)}"
        )
        removal = self._remove_jobs(next(iter(locations.values())), jobs)
        try:
            await self._to_the_end(asyncio.wait_for(removal, CANCEL_SECONDS))
        except Exception as error:
            logger.error(
                f"Deployment {self.deployment_name}: could not cancel {self.scheduler} jobs "
                f"{' '.join(jobs)}; cancel them by hand: {error or type(error).__name__}"
            )

    async def undeploy(self, external: bool) -> None:
        if self._unfinished:
            await asyncio.wait(self._unfinished, timeout=CANCEL_SECONDS)
        await self._cancel(list(self._scheduled_jobs))
        await super().undeploy(external)
