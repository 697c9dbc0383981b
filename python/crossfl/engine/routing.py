"""The binding filter `crossfl.facility`: a job goes to the deployment its facility names.

After the last attempt, it goes to the stand-in instead; and so it does at once where the last
attempt at the facility failed and its login node still does not answer.
"""

from collections.abc import MutableSequence
from importlib.resources import files
from typing import Any

from streamflow.core.deployment import BindingFilter, Target
from streamflow.core.exception import UnrecoverableWorkflowException, WorkflowDefinitionException
from streamflow.core.workflow import Job
from streamflow.deployment.future import FutureConnector
from streamflow.deployment.wrapper import ConnectorWrapper

from crossfl.engine.recovery.failures import TASK, FacilityFailureManager, field_of
from crossfl.sites.placement import VM


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
        chosen = [t for t in targets if t.deployment.name == facility]
        if not chosen or facility == self.stand_in:
            known = ", ".join(sorted({t.deployment.name for t in targets} - {self.stand_in}))
            raise WorkflowDefinitionException(
                f"Facility {facility!r} of {job.name} has no deployment among its targets "
                f"({known}): add it to the StreamFlow file, or take it out of the job file"
            )
        manager = FacilityFailureManager.current
        stand_in = [t for t in targets if t.deployment.name == self.stand_in]
        if manager is None or not stand_in or TASK not in job.inputs:
            return chosen
        if (seconds := field_of(job, "queue_timeout")) is not None:
            manager.queue_timeouts[job.name] = int(seconds)
        if facility in manager.down and not manager.is_given_up(job):
            connector = manager.context.deployment_manager.get_connector(facility)
            try:
                await probe(connector)
            except UnrecoverableWorkflowException:
                raise
            except Exception as error:
                manager.give_up(job, error)
        if not manager.is_given_up(job):
            return chosen
        manager.count_absent(job)
        return stand_in

    @classmethod
    def get_schema(cls) -> str:
        """The JSON Schema of its configuration."""
        return files("crossfl.engine").joinpath("schemas", "facility.json").read_text("utf-8")


async def probe(connector: Any) -> None:
    """Ask a connector, or the one inside it, whether its host answers; raises where it does not."""
    while isinstance(connector, ConnectorWrapper | FutureConnector):
        # A deployment that nothing has used yet holds nothing, and cannot be asked.
        lazy = isinstance(connector, FutureConnector)
        connector = connector._connector if lazy else connector.connector
    if ask := getattr(connector, "probe", None):
        await ask()


def _facility(job: Job) -> str:
    for port, field in (("facility", None), ("task", "facility")):
        if port in job.inputs:
            token = job.inputs[port] if field is None else job.inputs[port].value[field]
            return str(token.value)
    raise WorkflowDefinitionException(
        f"Job {job.name} has neither a 'facility' nor a 'task' input: the filter crossfl.facility "
        "cannot tell where it belongs"
    )
