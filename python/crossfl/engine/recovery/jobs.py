"""The engine's jobs, as the policy sees them."""

from typing import Any

from streamflow.core.context import StreamFlowContext
from streamflow.core.workflow import Job, Token

from crossfl.engine.recovery.closing import Turn
from crossfl.engine.recovery.policy import FacilityJob

ALL = "all"
"""A round that waits for everybody."""
TASK = "task"
"""The input that makes a job one of a facility."""


def has_task(job: Job) -> bool:
    """Whether a job belongs to a facility."""
    return TASK in job.inputs


def facility_job(job: Job) -> FacilityJob:
    """What the task of a job says; the job must have one."""
    timeout, number = _field(job, "queue_timeout"), _field(job, "round")
    walltime = _field(job, "walltime_seconds")
    return FacilityJob(
        name=job.name,
        facility=str(_field(job, "facility")),
        attempts=int(_field(job, "attempts") or 1),
        queue_timeout=None if timeout is None else int(timeout),
        walltime_seconds=None if walltime is None else int(walltime),
        turn=_turn(job),
        round=None if number is None else int(number),
    )


def _turn(job: Job) -> Turn | None:
    """What the round asks of the facility; None where the round waits for everybody."""
    closes = _field(job, "closes") or ALL
    if closes == ALL:
        return None
    return Turn(
        federation=str(_field(job, "federation")),
        facility=str(_field(job, "facility")),
        round=int(_field(job, "round")),
        closes=closes,
        grace_seconds=float(_field(job, "grace_seconds")),
        needed=int(_field(job, "quorum")),
        trains=int(_field(job, "local_steps")) > 0,
    )


def _field(job: Job, name: str) -> Any:
    value = job.inputs[TASK].value.get(name)
    return value.value if isinstance(value, Token) else value


def is_stood_in(context: StreamFlowContext, job: Job) -> bool:
    """Whether a job of a facility has been placed elsewhere, which is at the stand-in."""
    allocation = context.scheduler.job_allocations.get(job.name)
    return (
        allocation is not None and allocation.target.deployment.name != facility_job(job).facility
    )
