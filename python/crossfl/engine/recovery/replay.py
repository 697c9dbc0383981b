"""Runs a job of the engine once more: places it, brings its inputs, executes it.

StreamFlow's own failure manager builds a second workflow from all the steps that led to a job.
Here the job alone runs anew, which is enough because its inputs are on the VM. The engine has no
public way to do that. This is the one module that calls private methods of the engine;
:func:`missing_names` says which of them an installed engine lacks.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from streamflow.core.context import StreamFlowContext
from streamflow.core.exception import WorkflowExecutionException
from streamflow.core.utils import get_entity_ids, get_job_tag
from streamflow.core.workflow import Job, Status, Step, Token
from streamflow.workflow.step import BaseStep, ExecuteStep, ScheduleStep, TransferStep
from streamflow.workflow.token import ListToken
from streamflow.workflow.utils import get_job_token

from crossfl.engine.compatibility import source_of
from crossfl.engine.recovery.housekeeping import Housekeeping
from crossfl.engine.recovery.policy import JOB_FAILED

StepType = TypeVar("StepType", bound=Step)

JOB_PORT = "__job__"
"""The input port by which a step learns of its job."""
PRIVATE: Sequence[tuple[type, str]] = (
    (BaseStep, "_persist_token"),
    (ScheduleStep, "_schedule"),
    (ScheduleStep, "_set_job_directories"),
    (TransferStep, "_run_transfer"),
)
"""The private methods that are called here."""
RECOVERABLE = (ScheduleStep, "_schedule"), (TransferStep, "_run_transfer")
"""Those that the engine wraps to report failures to us, and that are called without the wrapper."""


def missing_names() -> Iterator[str]:
    """What this module uses and the installed engine does not have."""
    for owner, name in PRIVATE:
        if not hasattr(owner, name):
            yield f"{owner.__module__}.{owner.__name__}.{name}"
    for owner, name in RECOVERABLE:
        if hasattr(owner, name) and not hasattr(getattr(owner, name), "__wrapped__"):
            yield f"the decorator @recoverable of {owner.__module__}.{owner.__name__}.{name}"
    if JOB_FAILED not in source_of("streamflow.workflow.step"):
        yield f"the message {JOB_FAILED!r} of streamflow.workflow.step"


class Replay:
    """Repeats single steps for single jobs.

    Args:
        context: that of the engine.
        housekeeping: is told where each attempt takes place.
    """

    def __init__(self, context: StreamFlowContext, housekeeping: Housekeeping) -> None:
        self._context = context
        self._housekeeping = housekeeping

    async def schedule(self, job: Job, step: ScheduleStep) -> None:
        """Place a job that could not be placed, and let its other steps go on."""
        await self._release(job, step)
        await ScheduleStep._schedule.__wrapped__(step, job)

    async def transfer(self, job: Job, step: TransferStep) -> None:
        """Place a job anew whose input could not be brought to it, and bring the input there."""
        await self._place(job, _schedule_step(step))
        name, token = input_of(step, job)
        await TransferStep._run_transfer.__wrapped__(step, job, {name: token}, name, token)

    async def execute(self, job: Job, step: ExecuteStep) -> tuple[Job, dict[str, Token]]:
        """Place, supply and execute a job from its beginning.

        Returns:
            the job as it was executed, and the token of each output by its name.

        Raises:
            WorkflowExecutionException: the job ended and has failed.
        """
        job = Job(job.name, job.workflow_id, dict(job.inputs), None, None, None)
        await self._place(job, _schedule_step(step))
        transfers = {
            transfer.output_ports[name]: transfer
            for transfer in _steps(step, TransferStep)
            for name in transfer.output_ports
        }
        for name, port in step.input_ports.items():
            if port in transfers:
                _, token = input_of(transfers[port], job)
                job.inputs[name] = await transfers[port].transfer(job, token)
        scheduler = self._context.scheduler
        await scheduler.notify_status(job.name, Status.RUNNING)
        output = asyncio.ensure_future(step.command.execute(job))
        if (await output).status != Status.COMPLETED:
            raise WorkflowExecutionException(f"{JOB_FAILED} {job.name}: {output.result().value}")
        tokens = {
            name: await processor.process(job, output, None, recoverable=True)
            for name, processor in step.output_processors.items()
        }
        await scheduler.notify_status(job.name, Status.COMPLETED)
        return job, tokens

    async def publish(self, job: Job, step: ExecuteStep, tokens: Mapping[str, Token]) -> None:
        """Give the outputs of a job to the steps that wait for them."""
        job_token = get_job_token(job.name, step.get_job_port().token_list)
        ids = get_entity_ids((*job.inputs.values(), job_token))
        for name, token in tokens.items():
            port = step.workflow.ports[step.output_ports[name]]
            port.put(await step._persist_token(token, port, ids))

    async def publish_transfer(
        self, job: Job, step: TransferStep, name: str, source: ListToken, copies: list[Token]
    ) -> None:
        """Give the copies of a list's items, as one list, to the step that waits for them."""
        port = step.get_output_port(name)
        job_token = get_job_token(job.name, step.get_input_port(JOB_PORT).token_list)
        ids = get_entity_ids((job_token, source))
        port.put(await step._persist_token(source.update(copies), port, ids))

    async def _release(self, job: Job, step: ScheduleStep) -> None:
        """Give back what a job holds, and let it begin with the directories of its step."""
        scheduler = self._context.scheduler
        if job.name in scheduler.job_allocations:
            await scheduler.notify_status(job.name, Status.ROLLBACK)
        job.input_directory = step.input_directory
        job.output_directory = step.output_directory
        job.tmp_directory = step.tmp_directory

    async def _place(self, job: Job, step: ScheduleStep) -> None:
        """Do what a schedule step does for a job, but for telling the steps that follow it."""
        await self._release(job, step)
        scheduler = self._context.scheduler
        await scheduler.schedule(job, step.binding_config, step.hardware_requirement)
        locations = scheduler.get_locations(job.name)
        await step._set_job_directories(scheduler.get_connector(job.name), locations, job)
        for location in locations:
            for directory in {job.input_directory, job.output_directory, job.tmp_directory}:
                self._context.data_manager.register_path(location, directory, directory)
        self._housekeeping.note_placement(job)


def input_of(step: TransferStep, job: Job) -> tuple[str, Token]:
    """What a transfer step brings for a job: the name of its port, and the token."""
    (name,) = (name for name in step.input_ports if name != JOB_PORT)
    tag = get_job_tag(job.name)
    return name, next(t for t in step.get_input_port(name).token_list if t.tag == tag)


def _steps(step: Step, kind: type[StepType]) -> list[StepType]:
    """The steps of one kind in the workflow of a step."""
    return [other for other in step.workflow.steps.values() if isinstance(other, kind)]


def _schedule_step(step: Step) -> ScheduleStep:
    """The step that decides where the jobs of this one run."""
    port = step.input_ports[JOB_PORT]
    return next(s for s in _steps(step, ScheduleStep) if port in s.output_ports.values())
