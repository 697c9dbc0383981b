"""Jobs that outlive their round: a facility's one job, and the turns that it may take.

Where rounds close before everybody has delivered, a facility has at most one batch job, which may
wait or run for longer than the round in which it was submitted. A *turn* is what one round asks of
the facility. A job takes the newest turn when it starts, and a later round collects what the job
has made of it. At the site there is one folder for each facility of a federation:

    <work folder>/turns/<federation>-<facility>/
        job              what the scheduler runs
        submission/      what the scheduler answered; see `SubmitOnce`
        <turn>/command   what this round asks for
        <turn>/folders   the engine's folders for this turn
        <turn>/made      where its outputs may lie; they are in the first of these that is there
        <turn>/status    exit status of the command
        next             link to the turn that the job is to take when it starts
        taken            link to the turn that the job has taken
        collected        the round that has the outputs

All that matters is at the site. A run that was killed and started again finds the job there.

What a job needs is sent by an *errand*, which outlives its round, too: over a slow line, an upload
that began anew in every round would never be over. A later round waits for it, and sends the
newest model after it if the job has not started.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from abc import ABC
from collections.abc import Iterator, MutableMapping, MutableSequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from streamflow.core.deployment import ExecutionLocation
from streamflow.core.exception import WorkflowExecutionException
from streamflow.core.utils import create_command
from streamflow.log_handler import logger

from crossfl.engine.connectors import submission
from crossfl.engine.connectors.model_store import COPY_SECONDS, ModelStore
from crossfl.engine.connectors.queue import CANCEL_SECONDS
from crossfl.engine.connectors.turn_scripts import (
    COLLECT,
    ENDED,
    FORGET,
    LOOK,
    PUBLISH,
    SUBMITTED,
    Request,
    published,
)
from crossfl.engine.recovery.closing import LateError, Rounds, Stage
from crossfl.engine.recovery.registry import REGISTRY
from crossfl.protocol import variables
from crossfl.protocol.layout import PROGRESS_FILE

WATCH_SECONDS = 1.0
"""How often a job that may be late asks whether its round is over."""
SILENCE_SECONDS = 5.0
"""A job of which the site has said nothing for so long is not known to run."""


@dataclass(frozen=True)
class Errand:
    """What brings a turn to its site and submits the job; its result is the id of the job."""

    request: Request
    task: asyncio.Task[str]


class Turns(ModelStore, ABC):
    """A queue manager whose jobs may outlive the round that asked for them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outliving: dict[PurePosixPath, str] = {}
        """The job of each facility that may be late, by the folder of its turns."""
        self._errands: dict[PurePosixPath, Errand] = {}
        """The last errand for each facility, by the folder of its turns."""
        self._kept: set[str] = set()
        """The engine's names of the jobs that an interrupted run leaves where they are."""
        self._watchers: dict[str, Request] = {}
        """The turn for which a job is watched."""
        self._given_up: set[asyncio.Task[int]] = set()

    async def run(
        self,
        location: ExecutionLocation,
        command: MutableSequence[str],
        environment: MutableMapping[str, str] | None = None,
        workdir: str | None = None,
        *args: Any,
        job_name: str | None = None,
        **kwargs: Any,
    ) -> tuple[str, int] | None:
        policy = REGISTRY.policy
        if job_name and workdir:
            own = str(PurePosixPath(workdir) / PROGRESS_FILE)
            self._progress_files[job_name] = own
            turn = policy.turn(job_name) if policy else None
            if policy and turn:
                request = Request(
                    turn=turn,
                    job_name=job_name,
                    location=location,
                    script=create_command(type(self).__name__, command, environment, workdir),
                    workdir=PurePosixPath(workdir),
                )
                if turn.trains:
                    taken = request.place / "taken" / PROGRESS_FILE
                    self._progress_files[job_name] = str(taken)
                    return "", await self._until_closed(request, policy.rounds)
                await self._forget(request)  # the federation is over
            environment = {**(environment or {}), variables.JOB_PROGRESS: own}
        answer: tuple[str, int] | None = await super().run(
            location, command, environment, workdir, *args, job_name=job_name, **kwargs
        )
        return answer

    async def _empty(self) -> None:
        tasks = {errand.task for errand in self._errands.values()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CANCEL_SECONDS)
        if self._unfinished:  # a submission, which tells the id of a job that is to be kept
            await asyncio.wait(self._unfinished, timeout=CANCEL_SECONDS)
        for job_id, name in self._names.items():
            if name in self._kept:
                self._scheduled_jobs.pop(job_id, None)
        await super()._empty()

    async def _until_closed(self, request: Request, rounds: Rounds) -> int:
        """The exit status of a turn.

        Raises:
            LateError: the round has closed before. The job goes on.
            WorkflowExecutionException: the job has failed.
        """
        self._kept.add(request.job_name)
        rounds.note(request.turn, Stage.WAITING)  # whatever an earlier attempt came to
        work = asyncio.create_task(self._take(request, rounds))
        try:
            while not (await asyncio.wait({work}, timeout=WATCH_SECONDS))[0]:
                if rounds.is_over(request.turn):
                    raise LateError(self._lateness(request))
            return await work
        finally:
            # Not waited for: a session at a site that is gone ends once the site is back.
            self._detach(work)
            errand = self._errands.get(request.place)
            if errand is None or errand.task.done() or errand.request is not request:
                self.forget(request.folders)

    def _lateness(self, request: Request) -> str:
        errand = self._errands.get(request.place)
        if errand and not errand.task.done():
            return "the site was still being sent what its job needs when the round closed"
        if (job_id := self._outliving.get(request.place)) is None:
            return "the site had not taken the job when the round closed"
        wait = self._waits.get(job_id)
        state = f"waits in the queue ({wait.reason or 'no reason'})" if wait else "runs"
        return f"{self.scheduler} job {job_id} {state}; a later round takes its update"

    async def _take(self, request: Request, rounds: Rounds) -> int:
        """Give the facility its turn, and wait for the outputs of the one that its job takes."""
        if errand := self._errands.get(request.place):
            await asyncio.wait({errand.task})
        progress = await self._script(LOOK, request, round=request.turn.round)
        if progress == "ended":
            job_id = None
        elif progress == "runs":
            job_id = await self._wait(request, await self._submit_turn(request), rounds)
        else:
            errand = Errand(request, asyncio.create_task(self._send_turn(request)))
            errand.task.add_done_callback(_tell)
            self._errands[request.place] = errand
            job_id = await self._wait(request, await asyncio.shield(errand.task), rounds)
        self.forget(request.folders)
        with self._suspecting(request, rounds):
            return await self._collect(request, job_id, rounds)

    async def _send_turn(self, request: Request) -> str:
        """Bring a turn to its site, and submit the job unless there is one; the id of the job."""
        await self.begin(request.location, request.job_name, request.root, request.folders)
        await self._script(PUBLISH, request, **published(request))
        return await self._submit_turn(request)

    async def _wait(self, request: Request, job_id: str, rounds: Rounds) -> str:
        """Wait for the end of a job; its id."""
        self._watchers[job_id], self._scheduled_jobs[job_id] = request, request.location
        async with self._jobs_cache_lock:
            self._jobs_cache.clear()  # an answer of before does not have the job
        try:
            while True:
                with self._suspecting(request, rounds):
                    async with self._jobs_cache_lock:
                        running = await self._get_running_jobs(request.location)
                if job_id not in running:
                    return job_id
                waits = job_id in self._waits or self._blind_since is not None
                rounds.note(request.turn, Stage.WAITING if waits else Stage.RUNNING)
                await asyncio.sleep(self.pollingInterval)
        finally:
            if self._watchers.get(job_id) is request:  # and no later turn
                self._scheduled_jobs.pop(job_id, None)

    def _detach(self, work: asyncio.Task[int]) -> None:
        """Give something up without waiting for its end."""
        work.cancel()
        self._given_up.add(work)
        work.add_done_callback(self._given_up.discard)

    @contextlib.contextmanager
    def _suspecting(self, request: Request, rounds: Rounds) -> Iterator[None]:
        """Take a job for one that waits where the site is silent: nobody waits for its end then."""
        loop = asyncio.get_running_loop()
        alarm = loop.call_later(SILENCE_SECONDS, rounds.note, request.turn, Stage.WAITING)
        try:
            yield
        finally:
            alarm.cancel()

    async def _submit_turn(self, request: Request) -> str:
        token = submission.FOLDER.set(str(request.place / "submission"))
        try:
            job_id = await self._run_batch_command(
                command=self.template_map.get_command(
                    command=f"sh {shlex.quote(str(request.place / 'job'))}",
                    template=request.location.service,
                    workdir=str(request.place),
                ),
                environment=request.location.environment,
                job_name=request.job_name,
                location=request.location,
                workdir=str(request.place),
                stdin=None,
                stdout=asyncio.subprocess.STDOUT,
                stderr=asyncio.subprocess.STDOUT,
                timeout=None,
            )
            self._outliving[request.place] = job_id
            return job_id
        finally:
            submission.FOLDER.reset(token)

    async def _collect(self, request: Request, job_id: str | None, rounds: Rounds) -> int:
        """Put the outputs of the turn that was taken where the engine looks; the exit status.

        Raises:
            WorkflowExecutionException: the job ended without an exit status of its command.
        """
        answer = await self._script(
            COLLECT, request, workdir=shlex.quote(str(request.workdir)), round=request.turn.round
        )
        ended = ENDED.search(answer)
        if ended and int(ended[2]) == 0:
            if int(ended[1]) != request.turn.round:
                logger.info(f"{request.turn.facility} delivers what round {ended[1]} asked for")
            if answer.startswith("absent"):
                rounds.note(request.turn, Stage.ABSENT)
            return 0
        await self._script(FORGET, request)
        if job_id in self._reports and job_id in self._names:
            return await self._get_returncode(job_id, request.location)
        raise WorkflowExecutionException(
            f"Deployment {self.deployment_name}: {self.scheduler} job {job_id} ended without "
            f"outputs: see what it printed in {request.place}"
        )

    async def _forget(self, request: Request) -> None:
        """Take a job that is left over out of the queue, and remove its turns."""
        answer = await self._script(SUBMITTED, request)
        for job_id in self.job_id_pattern.findall(answer)[-1:]:
            self._scheduled_jobs[job_id] = request.location
            await self._cancel([job_id])
        await self._script(FORGET, request)

    async def _script(self, script: str, request: Request, **values: str | int) -> str:
        """What a script prints on the login node.

        Raises:
            WorkflowExecutionException: it failed.
        """
        text = request.fill(script, **values)
        answer, status = await self._ask(request.location, "sh", "-c", text, seconds=COPY_SECONDS)
        if status:
            raise WorkflowExecutionException(
                f"Deployment {self.deployment_name}: {request.place} cannot be used (status "
                f"{status}): {answer.strip()}"
            )
        return answer.strip()


def _tell(task: asyncio.Task[str]) -> None:
    """Say why an errand failed, for which nobody may wait any more."""
    if not task.cancelled() and (error := task.exception()):
        logger.info(f"What a job needs was not brought to its site: {error}")
