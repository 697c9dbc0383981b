"""What the Slurm and the PBS connector share: the scheduler's word on a job is the last word.

The engine's connectors submit a job, ask from time to time whether it is still queued, and take the
exit code they are shown when it is not. Here the state that the scheduler gives decides; a query
that fails says nothing about the job, and is asked again; and no job outlives the run, but one that
`Turns` keeps. The module is long because it extends one class of the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Coroutine, Mapping
from typing import Any, ClassVar, TypeVar

from cachebox import cached
from streamflow.core.deployment import ExecutionLocation
from streamflow.core.exception import WorkflowExecutionException
from streamflow.core.utils import random_name
from streamflow.deployment.wrapper import get_inner_location
from streamflow.log_handler import logger

from crossfl.engine.connectors.live_jobs import LiveJobs, parts_of, tails
from crossfl.engine.connectors.reports import (
    ADVICE,
    LAUNCH_FAILED,
    OUT_OF_MEMORY_MARKS,
    JobReport,
    NoHistoryError,
    StatusQueryError,
    Wait,
    joined,
)
from crossfl.engine.connectors.submission import BusyError, RefusedJobError, SubmitOnce
from crossfl.engine.interruption import INTERRUPTION, finish
from crossfl.engine.private import PrivateFolders
from crossfl.engine.recovery.registry import REGISTRY
from crossfl.engine.transfer import SafeStreams
from crossfl.protocol.text import printable

T = TypeVar("T")

QUERY_SECONDS = 60
"""A scheduler command that takes longer than this has failed."""

PROGRESS_SECONDS = 10
"""How long a look at the events of jobs may take."""

CANCEL_SECONDS = 20
"""How long an interrupted run may take to cancel its jobs at one site."""

FORGOTTEN_SECONDS = 20
"""How long accounting may lag behind a queue that a job has left, or the queue behind `qsub`."""

SHOW_SECONDS = 60
"""A job that waits for longer than this is worth a line that says why."""

LONGEST_PAUSE = 60
"""Seconds between two submissions to a scheduler that takes no job."""


class QueueConnector(PrivateFolders, SafeStreams, SubmitOnce, ABC):
    """A queue manager whose jobs end as their scheduler says, and never outlive the run.

    Args:
        queueTimeout: seconds that a job may wait in the queue, or before one that is full; then it
            is cancelled and its state is ``QUEUE_TIMEOUT``. Without it a job waits for as long as
            it takes.
        statusTimeout: seconds for which the scheduler may be out of reach, when a job is submitted
            or asked for, before the job is given up (and cancelled, if that can still be done).
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
        self._undeployed = False
        self._unfinished: set[asyncio.Task[Any]] = set()
        self._names: dict[str, str] = {}
        self._reports: dict[str, JobReport] = {}
        self._waits: dict[str, Wait] = {}
        self._forgotten_since: dict[str, float] = {}
        self._blind_since: float | None = None
        self._live = LiveJobs(self.deployment_name)
        self._progress_files: dict[str, str] = {}
        """Where the job of a name writes its events, at the site."""
        self._reading: asyncio.Task[None] | None = None

    @abstractmethod
    async def _poll(
        self, job_ids: Collection[str], location: ExecutionLocation
    ) -> dict[str, JobReport]:
        """Ask the scheduler about these jobs, each of them answered; or raise StatusQueryError."""

    @abstractmethod
    async def _is_ours(self, job_id: str, submission: Mapping[str, Any]) -> bool:
        """Whether the scheduler knows a job of this id, with what this submission asked for."""

    @abstractmethod
    def _walltime_limit(self, script: str, service: str | None) -> int | None:
        """Seconds that a job script, or its service, asks for; None where neither says.

        Raises:
            ValueError: it says so in a way that is not understood.
        """

    @property
    def waiting(self) -> str:
        """Why the jobs that wait do so, as the scheduler says; empty where it says nothing."""
        return "; ".join(dict.fromkeys(wait.reason for wait in self._waits.values() if wait.reason))

    async def _ask(
        self, location: ExecutionLocation, *words: str, seconds: int = QUERY_SECONDS
    ) -> tuple[str, int]:
        """Run a command on the login node, and give what it prints (errors too) and its status.

        ``timeout`` runs at the site, so that nothing is left there of a scheduler that does not
        answer. The command has a session of its own: the shell that the engine's commands share
        would wait for it, and show the next one what is left of a command that was given up.
        """
        answer = await self.connector.run(
            location=get_inner_location(location),
            command=["timeout", str(seconds), shlex.join(words), "2>&1"],
            stdin=asyncio.subprocess.DEVNULL,
            capture_output=True,
        )
        if answer is None:
            raise StatusQueryError(f"`{words[0]}` gave no answer")
        output, status = answer
        return output, status

    # --- submitting ---

    def _format_stream(self, stream: int | str) -> str:
        """The path of a stream; the engine puts it between double quotes, after quoting it once."""
        if stream == asyncio.subprocess.DEVNULL:
            return "/dev/null"
        return re.sub(r'([\\"$`])', r"\\\1", str(stream))

    async def _run_batch_command(self, *args: Any, **kwargs: Any) -> str:
        """Submit a job, as soon as the scheduler takes it.

        An interrupt in the midst of a submission still learns the job's id.
        """
        if self._undeployed:
            raise WorkflowExecutionException(f"Deployment {self.deployment_name}: the run is over")
        walltime = self._walltime(kwargs["job_name"], kwargs["command"], kwargs["location"])
        kwargs["timeout"] = walltime or kwargs.get("timeout")
        begun, pause = time.monotonic(), float(self.pollingInterval)
        full = False
        while True:
            try:
                job_id = await self._to_the_end(self._submit(*args, **kwargs))
                wait = self._waits.setdefault(job_id, Wait(begun if full else time.monotonic()))
                waited = time.monotonic() - wait.since
                self._live.see(job_id, kwargs["job_name"], JobReport(state="PENDING"), waited)
                return job_id
            except BusyError as error:
                full = error.full
                limit = self._queue_limit(kwargs["job_name"]) if full else self.statusTimeout
                waited = time.monotonic() - begun
                message = (
                    f"Deployment {self.deployment_name}: {self.scheduler} takes no job now: {error}"
                )
                if limit is not None and waited >= limit:
                    setting = "queue_timeout" if full else "statusTimeout"
                    raise WorkflowExecutionException(
                        f"{message}; given up after {limit} s, see `{setting}`"
                    ) from error
            pause = min(pause, LONGEST_PAUSE, max(0.0, (limit or 1e9) - waited))
            logger.warning(f"{message}; submitting again in {pause:.0f} s")
            await asyncio.sleep(pause)
            pause = 2 * pause

    def _walltime(self, job_name: str, script: str, location: ExecutionLocation) -> int | None:
        """Seconds to ask for as the task of a job says, and no more than its template asks for.

        None leaves it to the template. A job knows its end from the scheduler, and stops in time.
        """
        policy = REGISTRY.policy
        if (wanted := policy.walltime(job_name) if policy else None) is None:
            return None
        try:
            limit = self._walltime_limit(script, location.service)
        except ValueError as error:
            logger.info(
                f"Deployment {self.deployment_name}: the template's walltime stays: {error}"
            )
            return None
        return wanted if limit is None else min(wanted, limit)

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something that an interrupt does not stop halfway; `undeploy` waits for it."""
        task = asyncio.create_task(work)
        self._unfinished.add(task)
        task.add_done_callback(self._unfinished.discard)
        return await asyncio.shield(task)

    async def _submit(self, *args: Any, **kwargs: Any) -> str:
        try:
            answer = await super()._run_batch_command(*args, **kwargs)
        except BusyError:
            raise
        except WorkflowExecutionException as error:
            refused = isinstance(error, RefusedJobError)
            kind = RefusedJobError if refused else WorkflowExecutionException
            raise kind(f"Deployment {self.deployment_name}: {error}") from error
        job_ids = list(dict.fromkeys(self.job_id_pattern.findall(answer)))
        if not job_ids:
            raise WorkflowExecutionException(
                f"Deployment {self.deployment_name}: {self.scheduler} took job "
                f"{kwargs['job_name']} but gave no id: {joined(answer)!r}"
            )
        if len(job_ids) > 1:
            # Wrappers of sites print numbers of their own.
            job_ids = [i for i in job_ids if await self._is_ours(i, kwargs)] or job_ids
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
            elif report.killed:
                reports[job_id] = await self._explain_kill(report, location)
            elif report.pending:
                reports[job_id] = await self._judge_wait(job_id, report)
            else:
                self._waits.pop(job_id, None)
            wait = self._waits.get(job_id)
            waited = time.monotonic() - wait.since if wait else 0.0
            self._live.see(job_id, self._names.get(job_id), reports[job_id], waited)
        running = [i for i, r in reports.items() if not r.over and not r.pending]
        self._read_progress(running, location)
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
                f"{message} for {self.statusTimeout} s; they may still run: {joined(str(error))}"
            ) from error
        self._live.cannot_see(f"{self.scheduler} cannot be asked: {joined(str(error))}")
        logger.warning(f"{message}; asking again in {self.pollingInterval} s: {joined(str(error))}")

    def _read_progress(self, job_ids: Collection[str], location: ExecutionLocation) -> None:
        """Look, beside all else, how far jobs are by their own account; a failure is no matter."""
        files = {i: self._progress_files.get(self._names.get(i, ""), "") for i in job_ids}
        files = {job_id: path for job_id, path in files.items() if path}
        if files and (self._reading is None or self._reading.done()):
            self._reading = asyncio.create_task(self._read(files, location))

    async def _read(self, files: dict[str, str], location: ExecutionLocation) -> None:
        with contextlib.suppress(Exception):
            mark = f"crossfl-{random_name()}"
            script = tails(files, mark)
            answer, _ = await self._ask(location, "sh", "-c", script, seconds=PROGRESS_SECONDS)
            for job_id, content in parts_of(answer, mark).items():
                if job_id in files:
                    self._live.say(job_id, self._names.get(job_id), content)

    async def _judge_wait(self, job_id: str, report: JobReport) -> JobReport:
        """Say why a job waits, and end a wait that is too long or that never ends."""
        wait = self._waits.setdefault(job_id, Wait(time.monotonic()))
        waited, limit = time.monotonic() - wait.since, self._queue_limit(self._names[job_id])
        wait.reason = "" if report.reason == "None" else printable(report.reason, longest=300)
        if LAUNCH_FAILED.search(report.reason):
            await self._cancel([job_id], forget=False)
            return JobReport(state="LAUNCH_FAILED", reason=wait.reason)
        if limit is not None and waited >= limit:
            await self._cancel([job_id], forget=False)
            reason = f"pending for {limit} s: {wait.reason or 'no reason'}"
            return JobReport(state="QUEUE_TIMEOUT", reason=reason)
        if waited >= SHOW_SECONDS and wait.reason != wait.shown:
            logger.warning(
                f"Deployment {self.deployment_name}: {self.scheduler} job {job_id} "
                f"({self._names[job_id]}) has waited for {waited:.0f} s: {wait.reason}"
            )
            wait.shown = wait.reason
        return report

    def _queue_limit(self, job_name: str) -> int | None:
        """Seconds that a job may wait: as its task says, or else the deployment."""
        policy = REGISTRY.policy
        limit = policy.queue_timeout(job_name) if policy else None
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
        return JobReport(state="OUT_OF_MEMORY", signal=signal.SIGKILL, log=report.log)

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
        self._waits.pop(job_id, None)
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
        cancellation = INTERRUPTION.cancel(self.deployment_name, self.scheduler, jobs)
        removal = self._remove_jobs(next(iter(locations.values())), jobs)
        try:
            await self._to_the_end(asyncio.wait_for(removal, CANCEL_SECONDS))
            cancellation.problem = None
        except Exception as error:
            cancellation.problem = str(error) or type(error).__name__
            logger.error(
                f"Deployment {self.deployment_name}: could not cancel {self.scheduler} jobs "
                f"{' '.join(jobs)}; cancel them by hand: {cancellation.problem}"
            )

    async def undeploy(self, external: bool) -> None:
        self._undeployed = True
        if self._reading:
            self._reading.cancel()
        await finish(self._empty())
        await super().undeploy(external)

    async def _empty(self) -> None:
        """Take every job of ours out of the queue, those too whose submission is under way."""
        if self._unfinished:
            await asyncio.wait(self._unfinished, timeout=CANCEL_SECONDS)
        await self._cancel(list(self._scheduled_jobs))
