"""The failure manager `crossfl.facility`: a failure costs its facility its part, and nothing else.

A job of a facility is tried again, and after its last attempt the stand-in does it, on the
aggregation VM: there `crossfl train` and `crossfl evaluate` say that the facility is absent, and
why. What else fails ends the run. The engine's own manager replays all that led to a job in a
second workflow; here the job is placed, supplied and run anew, which is all that it needs, because
its inputs are on the VM.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping, MutableSequence
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TypeVar

from streamflow.core.context import StreamFlowContext
from streamflow.core.data import DataType
from streamflow.core.deployment import Connector, ExecutionLocation
from streamflow.core.exception import (
    FailureHandlingException,
    UnrecoverableWorkflowException,
    WorkflowExecutionException,
)
from streamflow.core.recovery import FailureManager
from streamflow.core.utils import get_entity_ids, get_job_step_name, get_job_tag
from streamflow.core.workflow import Job, Status, Step, Token
from streamflow.data.manager import DefaultDataManager
from streamflow.data.remotepath import StreamFlowPath
from streamflow.log_handler import logger
from streamflow.workflow.step import ExecuteStep, ScheduleStep, TransferStep
from streamflow.workflow.token import JobToken, ListToken
from streamflow.workflow.utils import get_job_token

from crossfl.facility import place
from crossfl.sites.placement import check_placed

T = TypeVar("T")

TASK = "task"
"""The input that makes a job one of a facility."""
RETRY_SECONDS = 2
"""Between two attempts of a job."""
TIDY_SECONDS = 20
"""For removing the directories of a round's jobs."""
OWN = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
LONGEST_REASON = 500
UNSAID = "FAILED Job"
"""How the engine begins a message that goes on with what the job printed."""


class FacilityFailureManager(FailureManager):
    """Tries the jobs of facilities again, and lets the stand-in do what cannot be done there.

    Args:
        context: that of the engine.
        keepFailed: for how many failed attempts, at each facility, what the job left there is kept.
    """

    current: ClassVar[FacilityFailureManager | None] = None
    """That of this run, for the binding filter and the connectors, which are given no context."""

    def __init__(self, context: StreamFlowContext, keepFailed: int = 3) -> None:
        super().__init__(context)
        self.keep_failed = keepFailed
        if "path" in context.config:  # of a run, and not of a command about runs
            check_placed(context.config, Path(context.config["path"]))
        self.words: dict[str, str] = {}
        """The scheduler's word on how a job ended, where the engine would not hear it."""
        self.queue_timeouts: dict[str, int] = {}
        """Seconds that a job may wait in its queue, where its task says so."""
        self.absences: dict[str, str] = {}
        """Why a facility is absent, by the name of the job that the stand-in does for it."""
        self.down: set[str] = set()
        """Facilities whose last attempt failed."""
        self._failures: dict[str, list[str]] = {}
        self._hopeless: set[str] = set()
        self._makers: dict[str, Job] = {}
        self._placed: dict[str, list[StreamFlowPath]] = {}
        self._remains: dict[str, list[list[StreamFlowPath]]] = {}
        FacilityFailureManager.current = self

    @classmethod
    def get_schema(cls) -> str:
        return files("crossfl.engine").joinpath("schemas", "failures.json").read_text("utf-8")

    async def close(self) -> None:
        FacilityFailureManager.current = None

    async def is_recovering(self, job_name: str) -> bool:
        return False

    def is_given_up(self, job: Job) -> bool:
        """Whether a job has failed as often as its task allows."""
        failed = len(self._failures.get(job.name, ()))
        return job.name in self._hopeless or failed >= int(field_of(job, "attempts") or 1)

    def count_absent(self, job: Job) -> None:
        """Let the stand-in do a job, and tell it how the last attempt failed."""
        failures = self._failures[job.name]
        count = f" (attempt {len(failures)})" if len(failures) > 1 else ""
        self.absences[job.name] = failures[-1] + count
        logger.warning(f"{facility_of(job)} is absent from {job.name}: {failures[-1]}{count}")

    def fail(self, job: Job, error: BaseException) -> None:
        """Take note of an attempt that failed."""
        said = self.words.pop(job.name, None) or str(error) or type(error).__name__
        if said.startswith(UNSAID):
            # What the job printed stays in the log: it may quote the data it failed on.
            said = "the step failed there; what it printed is in the log of the run"
        reason = " ".join(said.split())[:LONGEST_REASON]
        self._failures.setdefault(job.name, []).append(reason)
        self.down.add(facility_of(job))
        directories = self._placed.pop(job.name, None) or self._directories(job)
        remains = self._remains.setdefault(facility_of(job), [])
        if directories and directories not in remains:
            remains.append(directories)

    def give_up(self, job: Job, error: BaseException) -> None:
        """Let a job be as one that has failed for the last time."""
        self.fail(job, error)
        self._hopeless.add(job.name)

    async def notify(
        self, output_port: str, output_token: Token, job_token: JobToken | None = None
    ) -> None:
        """Remember who made a file or folder, which may be lost before it is fetched."""
        if job_token is None:
            return
        if TASK in job_token.value.inputs:
            self._succeed(job_token.value, output_token)
        elif any(isinstance(token, ListToken) for token in job_token.value.inputs.values()):
            # A step on the VM has used what the facilities made: nothing there is needed any more.
            makers, self._makers = self._makers, {}
            spent = [path for job in makers.values() for path in self._directories(job)]
            for remains in self._remains.values():
                while len(remains) > self.keep_failed:
                    spent += remains.pop(0)
            try:
                await asyncio.wait_for(_remove(spent), TIDY_SECONDS)
            except TimeoutError:
                logger.warning("directories of jobs are left over at a facility that is slow")

    def _directories(self, job: Job) -> list[StreamFlowPath]:
        """What the engine made for a job at its facility: each has a random name of its own."""
        if job.name not in self.context.scheduler.job_allocations or self._is_stood_in(job):
            return []
        return [
            StreamFlowPath(directory, context=self.context, location=location)
            for location in self.context.scheduler.get_locations(job.name)
            for directory in (job.input_directory, job.output_directory, job.tmp_directory)
            if directory and OWN.fullmatch(PurePosixPath(directory).name)
        ]

    def _succeed(self, job: Job, token: Token) -> None:
        if path := _path(token):
            self._makers[path] = job
        if not self._failures.get(job.name):
            self.down.discard(facility_of(job))

    # --- making up for failures ---

    async def recover(self, job: Job, step: Step, exception: BaseException) -> None:
        """Make up for the failure of a step for a job; or raise, which ends the run."""
        if TASK not in job.inputs:
            if not isinstance(step, TransferStep):
                raise exception
            await self._fetch_each(job, step, exception)
            return
        self.fail(job, exception)
        if isinstance(step, ScheduleStep):
            await self._insist(job, lambda: self._schedule(job, step))
        elif isinstance(step, TransferStep):
            await self._insist(job, lambda: self._transfer(job, step))
        elif isinstance(step, ExecuteStep):
            tokens = await self._insist(job, lambda: self._execute(job, step))
            job_token = get_job_token(job.name, step.get_job_port().token_list)
            ids = get_entity_ids((*job.inputs.values(), job_token))
            for name, token in tokens.items():
                port = step.workflow.ports[step.output_ports[name]]
                port.put(await step._persist_token(token, port, ids))
        else:
            raise exception

    async def _insist(self, job: Job, attempt: Callable[[], Awaitable[T]]) -> T:
        """Try a job until it succeeds; the filter decides where, and comes to the stand-in."""
        while True:
            if not self.is_given_up(job):
                await asyncio.sleep(RETRY_SECONDS)
            try:
                return await attempt()
            except UnrecoverableWorkflowException:
                raise
            except Exception as error:
                if self._is_stood_in(job):
                    # The stand-in is a step on the VM like any other.
                    raise FailureHandlingException(
                        f"{job.name} could not even be counted absent: {error}"
                    ) from error
                self.fail(job, error)

    def _is_stood_in(self, job: Job) -> bool:
        allocation = self.context.scheduler.job_allocations.get(job.name)
        return allocation is not None and allocation.target.deployment.name != facility_of(job)

    async def _schedule(self, job: Job, step: ScheduleStep) -> None:
        await self._release(job, step)
        await ScheduleStep._schedule.__wrapped__(step, job)

    async def _transfer(self, job: Job, step: TransferStep) -> None:
        """Place a job anew, whose input could not be brought to it, and bring it there."""
        schedule = _schedule_step(step)
        await self._place(job, schedule)
        name, token = _input(step, job)
        await TransferStep._run_transfer.__wrapped__(step, job, {name: token}, name, token)

    async def _execute(self, job: Job, step: ExecuteStep) -> dict[str, Token]:
        """Place, supply and run a job from its beginning; the tokens of its outputs."""
        job = Job(job.name, job.workflow_id, dict(job.inputs), None, None, None)
        await self._place(job, _schedule_step(step))
        transfers = {
            s.output_ports[n]: s for s in _steps(step, TransferStep) for n in s.output_ports
        }
        for name, port in step.input_ports.items():
            if port in transfers:
                _, token = _input(transfers[port], job)
                job.inputs[name] = await transfers[port].transfer(job, token)
        scheduler = self.context.scheduler
        await scheduler.notify_status(job.name, Status.RUNNING)
        output = asyncio.ensure_future(step.command.execute(job))
        if (await output).status != Status.COMPLETED:
            raise WorkflowExecutionException(f"{UNSAID} {job.name}: {output.result().value}")
        tokens = {}
        for name, processor in step.output_processors.items():
            tokens[name] = await processor.process(job, output, None, recoverable=True)
            self._succeed(job, tokens[name])
        await scheduler.notify_status(job.name, Status.COMPLETED)
        return tokens

    async def _fetch_each(self, job: Job, step: TransferStep, exception: BaseException) -> None:
        """Bring what the facilities made one by one; the stand-in makes what one cannot give."""
        name, token = _input(step, job)
        if not isinstance(token, ListToken):
            raise exception
        brought = [await self._fetch(job, step, each, exception) for each in token.value]
        port = step.get_output_port(name)
        job_token = get_job_token(job.name, step.get_input_port("__job__").token_list)
        ids = get_entity_ids((job_token, token))
        port.put(await step._persist_token(token.update(brought), port, ids))

    async def _fetch(
        self, job: Job, step: TransferStep, token: Token, exception: BaseException
    ) -> Token:
        try:
            return await step.transfer(job, token)
        except UnrecoverableWorkflowException:
            raise
        except Exception as error:
            maker = self._makers.get(_path(token) or "")
            if maker is None:
                raise exception from error
            self.fail(maker, error)
        made_by = step.workflow.steps[get_job_step_name(maker.name)]

        async def again() -> Token:
            if self.is_given_up(maker):
                (anew,) = (await self._execute(maker, made_by)).values()
                return await step.transfer(job, anew)
            return await step.transfer(job, token)

        return await self._insist(maker, again)

    # --- where a job runs ---

    async def _release(self, job: Job, step: ScheduleStep) -> None:
        """Give back what a job holds, and let it begin with the directories of its step."""
        scheduler = self.context.scheduler
        if job.name in scheduler.job_allocations:
            await scheduler.notify_status(job.name, Status.ROLLBACK)
        job.input_directory = step.input_directory
        job.output_directory = step.output_directory
        job.tmp_directory = step.tmp_directory

    async def _place(self, job: Job, step: ScheduleStep) -> None:
        """Do what a schedule step does for a job, but for telling the steps that follow it."""
        await self._release(job, step)
        scheduler = self.context.scheduler
        await scheduler.schedule(job, step.binding_config, step.hardware_requirement)
        locations = scheduler.get_locations(job.name)
        await step._set_job_directories(scheduler.get_connector(job.name), locations, job)
        for location in locations:
            for directory in {job.input_directory, job.output_directory, job.tmp_directory}:
                self.context.data_manager.register_path(location, directory, directory)
        self._placed[job.name] = self._directories(job)


class StandsIn(Connector):
    """To be inherited from before the engine's connector: a stand-in is told why it stands in."""

    async def run(
        self,
        location: ExecutionLocation,
        command: MutableSequence[str],
        environment: MutableMapping[str, str] | None = None,
        *args: Any,
        job_name: str | None = None,
        **kwargs: Any,
    ) -> tuple[str, int] | None:
        manager = FacilityFailureManager.current
        if manager and job_name and (reason := manager.absences.get(job_name)):
            said = {place.ABSENT: base64.b64encode(reason.encode()).decode()}
            environment = {**(environment or {}), **said}
        answer: tuple[str, int] | None = await super().run(
            location, command, environment, *args, job_name=job_name, **kwargs
        )
        return answer


async def _remove(directories: Collection[StreamFlowPath]) -> None:
    for path in directories:
        try:
            await path.rmtree()
        except Exception as error:
            logger.warning(f"{path} is left over at {path.location.deployment}: {error}")


def facility_of(job: Job) -> str:
    """The facility that a job with a task belongs to."""
    return str(field_of(job, "facility"))


def field_of(job: Job, name: str) -> Any:
    """A field of a job's task."""
    token = job.inputs[TASK].value.get(name)
    return token.value if isinstance(token, Token) else token


def _path(token: Token) -> str | None:
    value = token.value
    return value.get("path") if isinstance(value, dict) else None


def _steps(step: Step, kind: type[T]) -> list[T]:
    return [each for each in step.workflow.steps.values() if isinstance(each, kind)]


def _schedule_step(step: Step) -> ScheduleStep:
    """The step that decides where the jobs of this one run."""
    port = step.input_ports["__job__"]
    return next(s for s in _steps(step, ScheduleStep) if port in s.output_ports.values())


def _input(step: TransferStep, job: Job) -> tuple[str, Token]:
    """What a transfer step brings for a job: the name of its port, and the token."""
    (name,) = (name for name in step.input_ports if name != "__job__")
    tag = get_job_tag(job.name)
    return name, next(t for t in step.get_input_port(name).token_list if t.tag == tag)


# --- data that did not arrive ---


class DataManager(DefaultDataManager):
    """The engine's, in which a copy that failed is not waited for ever after."""

    async def transfer_data(self, *args: Any, **kwargs: Any) -> None:
        try:
            await super().transfer_data(*args, **kwargs)
        except BaseException:
            path = kwargs["dst_path"]
            for location in kwargs["dst_locations"]:
                for copy in self.path_mapper.get(path, None, location.deployment, location.name):
                    if copy.path == path:
                        copy.data_type = DataType.INVALID
                        copy.available.set()
            raise
