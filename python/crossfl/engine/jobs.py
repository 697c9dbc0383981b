"""The jobs of the federations in a StreamFlow file, checked before anything starts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from crossfl.engine.placement import routed
from crossfl.errors import CrossFLError
from crossfl.storage.job import REQUIRED, Job


def job_of(workflow: Mapping[str, Any], document: Mapping[str, Any], path: Path) -> Job | None:
    """The job of a workflow; None where it is no federation, or no job file is named.

    Args:
        workflow: one of the workflows of the document.
        document: a StreamFlow file.
        path: where that lies.

    Raises:
        CrossFLError: the job is not as it should be, or a facility of it has no deployment.
    """
    config, deployments = workflow["config"], routed(workflow, document)
    inputs = _inputs(path.parent / config["file"])
    if not deployments or "settings" not in config or not inputs.issuperset(REQUIRED):
        return None
    file = path.parent / config["settings"]
    job = Job.load(file, inputs)
    job.check(file)
    if absent := sorted({facility.name for facility in job.facilities} - deployments):
        raise CrossFLError(
            f"{file} has facilities without a deployment in {path}: "
            f"{', '.join(absent)}; bind again, or take them out of the job file"
        )
    return job


def _inputs(workflow: Path) -> set[str]:
    """The names of the inputs of a CWL workflow; none where the engine says better what it is."""
    try:
        inputs = yaml.safe_load(workflow.read_text("utf-8"))["inputs"]
        return {each["id"] for each in inputs} if isinstance(inputs, list) else set(inputs)
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        return set()
