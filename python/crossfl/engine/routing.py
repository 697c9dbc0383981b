"""The binding filter `crossfl.facility`: a job goes to the deployment its facility names.

After the last attempt, it goes to the stand-in instead; and so it does at once where the last
attempt at the facility failed and its login node still does not answer.
"""

from collections.abc import MutableSequence
from importlib.resources import files

from streamflow.core.deployment import BindingFilter, Target
from streamflow.core.exception import UnrecoverableWorkflowException, WorkflowDefinitionException
from streamflow.core.workflow import Job
from streamflow.log_handler import logger

from crossfl.engine.connectors.presence import deployed, probe
from crossfl.engine.live import report
from crossfl.engine.placement import VM
from crossfl.engine.recovery.jobs import TASK, facility_job, has_task
from crossfl.engine.recovery.registry import REGISTRY, RunRecovery
from crossfl.protocol import events


class FacilityFilter(BindingFilter):
    """Keeps the targets whose deployment has the name in the job's `task` (or `facility`) input.

    Args:
        name: that of the filter in the StreamFlow file.
        stand_in: the deployment that says a facility is absent.
    """

    def __init__(self, name: str, stand_in: str = VM) -> None:
        super().__init__(name)
        self.stand_in = stand_in

    async def get_targets(
        self, job: Job, targets: MutableSequence[Target]
    ) -> MutableSequence[Target]:
        """The targets at the job's facility, or the stand-in.

        Raises:
            WorkflowDefinitionException: the job names no facility, or none of the targets is it.
        """
        facility = _facility(job)
        own = [t for t in targets if t.deployment.name == facility]
        if not own or facility == self.stand_in:
            known = ", ".join(sorted({t.deployment.name for t in targets} - {self.stand_in}))
            raise WorkflowDefinitionException(
                f"Facility {facility!r} of {job.name} has no deployment among its targets "
                f"({known}): add it to the StreamFlow file, or take it out of the job file"
            )
        run = REGISTRY.run
        stand_in = [t for t in targets if t.deployment.name == self.stand_in]
        if run is None or not stand_in or not has_task(job):
            return own
        return stand_in if await _is_absent(job, run) else own

    @classmethod
    def get_schema(cls) -> str:
        """The JSON Schema of its configuration."""
        return files("crossfl.engine").joinpath("schemas", "facility.json").read_text("utf-8")


async def _is_absent(job: Job, run: RunRecovery) -> bool:
    """Whether the stand-in has to do a job, which is then told why.

    A facility that is down is asked first whether it answers: a job is not spent on one that does
    not. The engine places one job after another, so a connector whose jobs ask by themselves is
    not asked here.
    """
    policy, work = run.policy, facility_job(job)
    policy.note_task(work)
    if policy.is_down(work.facility) and not policy.is_exhausted(work):
        connector = run.deployments.get_connector(work.facility)
        try:
            if not getattr(deployed(connector), "asks_itself", False):
                await probe(connector)
        except UnrecoverableWorkflowException:
            raise
        except Exception as error:
            policy.give_up(work, error)
    if not policy.is_exhausted(work):
        report(work.facility, events.STAGED, job_name=work.name)
        return False
    reason = policy.declare_absent(work)
    absence = events.LATE if policy.is_late(work.name) else events.ABSENT
    if not report(work.facility, absence, job_name=work.name, message=reason):
        logger.warning(f"{work.facility} is {absence} in {work.name}: {reason}")
    return True


def _facility(job: Job) -> str:
    for port, field in (("facility", None), (TASK, "facility")):
        if port in job.inputs:
            token = job.inputs[port] if field is None else job.inputs[port].value[field]
            return str(token.value)
    raise WorkflowDefinitionException(
        f"Job {job.name} has neither a 'facility' nor a 'task' input: the filter crossfl.facility "
        "cannot tell where it belongs"
    )
