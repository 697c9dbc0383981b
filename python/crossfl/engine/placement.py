"""Which deployment a job goes to, as a StreamFlow file says it; read without the engine."""

from collections.abc import Iterator, Mapping
from typing import Any

VM = "vm"
"""The deployment of the aggregation machine, which also stands in for absent facilities."""
FILTER = "crossfl.facility"
"""The type of the binding filter that sends a job to the deployment of its facility."""
LOCAL = "crossfl.local"
"""The type of a deployment on the engine's machine."""


def targets_of(binding: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """The deployments, each with its service, that a binding of a StreamFlow file names."""
    targets = binding["target"]
    for target in targets if isinstance(targets, list) else [targets]:
        yield target.get("deployment", target.get("model")), target.get("service")


def routed(workflow: Mapping[str, Any], document: Mapping[str, Any]) -> set[str]:
    """The deployments among which a workflow's jobs go to the one that their facility names."""
    kinds = {k: v.get("type") for k, v in (document.get("bindingFilters") or {}).items()}
    deployments = set()
    for binding in workflow.get("bindings") or []:
        filters = binding.get("filters") or []
        names = [filters] if isinstance(filters, str) else filters
        if any(kinds.get(name) == FILTER for name in names):
            deployments |= {deployment for deployment, _ in targets_of(binding)}
    return deployments


def runs_steps_here(document: Mapping[str, Any]) -> bool:
    """Whether a deployment of a StreamFlow file is on the engine's machine."""
    deployments = document.get("deployments") or {}
    return any(deployment.get("type") == LOCAL for deployment in deployments.values())
