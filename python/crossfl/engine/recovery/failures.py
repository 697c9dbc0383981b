"""The failure manager `crossfl.facility`: a failure costs its facility its part, and nothing else.

A job of a facility is tried again, and after its last attempt the stand-in does it, on the
aggregation VM: there `crossfl train` and `crossfl evaluate` say that the facility is absent, and
why. Any other failure ends the run.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from streamflow.core.context import StreamFlowContext
from streamflow.core.exception import FailureHandlingException, UnrecoverableWorkflowException
from streamflow.core.recovery import FailureManager
from streamflow.core.utils import get_job_step_name
from streamflow.core.workflow import Job, Step, Token
from streamflow.workflow.step import ExecuteStep, ScheduleStep, TransferStep
from streamflow.workflow.token import JobToken, ListToken

from crossfl.engine import placement
from crossfl.engine.forkserver.process import ForkServer
from crossfl.engine.recovery.closing import LateError, Stage
from crossfl.engine.recovery.housekeeping import Housekeeping
from crossfl.engine.recovery.jobs import facility_job, has_task, is_stood_in
from crossfl.engine.recovery.policy import RecoveryPolicy
from crossfl.engine.recovery.registry import REGISTRY, RunRecovery
from crossfl.engine.recovery.replay import Replay, input_of
from crossfl.errors import CrossFLError
from crossfl.protocol.manifest import UpdateManifest
from crossfl.storage import manifest

Result = TypeVar("Result")

RETRY_SECONDS = 2
"""Between two attempts of a job."""


class FacilityFailureManager(FailureManager):
    """Tries the jobs of facilities again, and lets the stand-in do what cannot be done there.

    Args:
        context: that of the engine.
        keepFailed: for how many failed attempts, at each facility, what the job left there is kept.
    """

    def __init__(self, context: StreamFlowContext, keepFailed: int = 3) -> None:
        super().__init__(context)
        # Of a run, and not of a command about runs. While the engine reads the workflow, the
        # imports of the first step can be under way.
        if "path" in context.config and placement.runs_steps_here(context.config):
            ForkServer.shared()
        self._policy = RecoveryPolicy()
        self._housekeeping = Housekeeping(context, keepFailed)
        self._replay = Replay(context, self._housekeeping)
        self._producers: dict[str, Job] = {}
        """The job that made a file or folder, by the path of that."""
        self._run = RunRecovery(self._policy, context.deployment_manager)
        REGISTRY.enter(self._run)

    @classmethod
    def get_schema(cls) -> str:
        return files("crossfl.engine").joinpath("schemas", "failures.json").read_text("utf-8")

    async def close(self) -> None:
        REGISTRY.leave(self._run)
        await self._housekeeping.close()
        ForkServer.release(at_once=True)  # if nothing was deployed

    async def is_recovering(self, job_name: str) -> bool:
        return False

    async def notify(
        self, output_port: str, output_token: Token, job_token: JobToken | None = None
    ) -> None:
        """Remember who made a file or folder, which may be lost before it is fetched."""
        if job_token is None:
            return
        job: Job = job_token.value
        if has_task(job):
            self._succeed(job, output_token)
        elif any(isinstance(token, ListToken) for token in job.inputs.values()):
            # A step on the VM has used what the facilities made: nothing there is needed any more.
            producers, self._producers = self._producers, {}
            await self._housekeeping.tidy(producers.values())

    async def recover(self, job: Job, step: Step, exception: BaseException) -> None:
        """Make up for the failure of a step for a job; or raise, which ends the run."""
        if not has_task(job):
            if not isinstance(step, TransferStep):
                raise exception
            await self._fetch_items(job, step, exception)
            return
        self._fail(job, exception)
        if isinstance(step, ScheduleStep):
            await self._insist(job, lambda: self._replay.schedule(job, step))
        elif isinstance(step, TransferStep):
            await self._insist(job, lambda: self._replay.transfer(job, step))
        elif isinstance(step, ExecuteStep):
            tokens = await self._insist(job, lambda: self._execute(job, step))
            await self._replay.publish(job, step, tokens)
        else:
            raise exception

    def _fail(self, job: Job, error: BaseException) -> None:
        if isinstance(error, LateError):
            self._policy.note_late(facility_job(job), error)
            return
        self._policy.fail(facility_job(job), error)
        self._housekeeping.note_failure(job)

    def _succeed(self, job: Job, output: Token) -> None:
        if path := _path(output):
            self._producers[path] = job
            self._note_absence(job, Path(path))
        self._policy.succeed(facility_job(job))

    def _note_absence(self, job: Job, update: Path) -> None:
        """Take note where a job on this machine has delivered the reason for an absence.

        A connector takes note where a job at a site has.
        """
        turn = facility_job(job).turn
        if turn and update.is_dir():
            with contextlib.suppress(CrossFLError):
                if not manifest.read(update, UpdateManifest).files:
                    self._policy.rounds.note(turn, Stage.ABSENT)

    async def _insist(self, job: Job, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """Try a job until it succeeds; the binding filter decides where, at last at the stand-in.

        Raises:
            FailureHandlingException: the stand-in failed, which is a step on the VM like any other.
        """
        while True:
            if not self._policy.is_exhausted(facility_job(job)):
                await asyncio.sleep(RETRY_SECONDS)
            try:
                return await attempt()
            except UnrecoverableWorkflowException:
                raise
            except Exception as error:
                if is_stood_in(self.context, job):
                    raise FailureHandlingException(
                        f"{job.name} could not even be counted absent: {error}"
                    ) from error
                self._fail(job, error)

    async def _execute(self, job: Job, step: ExecuteStep) -> dict[str, Token]:
        executed, tokens = await self._replay.execute(job, step)
        for token in tokens.values():
            self._succeed(executed, token)
        return tokens

    async def _fetch_items(self, job: Job, step: TransferStep, exception: BaseException) -> None:
        """Fetch what the facilities made one by one, after fetching all of it failed."""
        name, token = input_of(step, job)
        if not isinstance(token, ListToken):
            raise exception
        copies = [await self._fetch(job, step, item, exception) for item in token.value]
        await self._replay.publish_transfer(job, step, name, token, copies)

    async def _fetch(
        self, job: Job, step: TransferStep, token: Token, exception: BaseException
    ) -> Token:
        """Fetch what one facility made; the stand-in makes what the facility cannot give."""
        try:
            return await step.transfer(job, token)
        except UnrecoverableWorkflowException:
            raise
        except Exception as error:
            producer = self._producers.get(_path(token) or "")
            if producer is None:
                raise exception from error
            self._fail(producer, error)
        producing_step = step.workflow.steps[get_job_step_name(producer.name)]

        async def fetch_again() -> Token:
            if self._policy.is_exhausted(facility_job(producer)):
                (substitute,) = (await self._execute(producer, producing_step)).values()
                return await step.transfer(job, substitute)
            return await step.transfer(job, token)

        return await self._insist(producer, fetch_again)


def _path(token: Token) -> str | None:
    """The path of a file or folder; None for any other value."""
    return token.value.get("path") if isinstance(token.value, dict) else None
