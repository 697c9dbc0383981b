"""The binding filter `crossfl.facility`: a job goes to the deployment its facility names."""

from collections.abc import MutableSequence
from importlib.resources import files

from streamflow.core.deployment import BindingFilter, Target
from streamflow.core.exception import WorkflowExecutionException
from streamflow.core.workflow import Job


class FacilityFilter(BindingFilter):
    """Keeps the targets whose deployment has the name in the job's `task` (or `facility`) input."""

    async def get_targets(
        self, job: Job, targets: MutableSequence[Target]
    ) -> MutableSequence[Target]:
        """The targets at the job's facility.

        Raises:
            WorkflowExecutionException: the job names no facility, or none of the targets is it.
        """
        facility = _facility(job)
        if chosen := [t for t in targets if t.deployment.name == facility]:
            return chosen
        known = ", ".join(sorted({t.deployment.name for t in targets}))
        raise WorkflowExecutionException(
            f"Facility {facility!r} of {job.name} has no deployment among its targets ({known}): "
            "add it to the StreamFlow file, or take it out of the job file"
        )

    @classmethod
    def get_schema(cls) -> str:
        """The JSON Schema of its configuration."""
        return files(__package__).joinpath("schemas", "facility.json").read_text("utf-8")


def _facility(job: Job) -> str:
    for port, field in (("facility", None), ("task", "facility")):
        if port in job.inputs:
            token = job.inputs[port] if field is None else job.inputs[port].value[field]
            return str(token.value)
    raise WorkflowExecutionException(
        f"Job {job.name} has neither a 'facility' nor a 'task' input: the filter crossfl.facility "
        "cannot tell where it belongs"
    )
