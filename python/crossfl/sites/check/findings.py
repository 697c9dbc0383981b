"""What is checked, and what a check finds: the facilities of a StreamFlow file, and results."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from crossfl.engine.jobs import job_of
from crossfl.engine.placement import routed, targets_of
from crossfl.errors import CrossFLError
from crossfl.sites.streamflow_file import read, steps_of, validate

Status = Literal["pass", "warn", "fail", "skip"]


class Finding(NamedTuple):
    """What one check found, and how to put it right."""

    status: Status
    result: str
    fix: str = ""


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    facility: str
    check: str
    status: Status
    result: str
    fix: str = ""


class Base(NamedTuple):
    """A base model of adapters that a facility has to hold."""

    name: str
    digest: str | None
    """Of its weights, if the job says it."""
    model: Path | None
    """On this machine, the model with those weights, if the job names it."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A deployment as a binding uses it: a facility, or the aggregation VM."""

    name: str
    kind: str
    folder: Path
    """That of the StreamFlow file, from which paths count."""
    config: Mapping[str, Any]
    service: str | None
    workdir: str | None
    wraps: "Site | None"
    script: Path | None
    datasets: tuple[str, ...]
    bases: tuple[Base, ...]

    def setting(self, name: str) -> str:
        """How to change a setting of this site."""
        return f"crossfl bind --set {self.name}.{name}=…"


@dataclass(frozen=True, kw_only=True)
class Federation:
    """What a StreamFlow file says, as far as it can be checked, and what is found in the file."""

    path: Path
    sites: tuple[Site, ...]
    results: tuple[Result, ...]

    @classmethod
    def load(cls, path: Path) -> "Federation":
        """Read a StreamFlow file, and the workflow and the job file that it names.

        Raises:
            CrossFLError: one of them cannot be read, the engine refuses the file, a binding
                matches no step, or a facility of the job has no deployment.
        """
        document = read(path)
        validate(document)
        results = [Result(path.name, "schema", "pass", "the engine accepts it")]
        deployments = document.get("deployments") or {}
        targets: dict[tuple[str, str | None], None] = {}
        datasets: dict[str, list[str]] = {}
        bases: dict[str, list[Base]] = {}
        for workflow in document["workflows"].values():
            config = workflow["config"]
            targets |= dict.fromkeys(_targets(path, workflow, deployments))
            matched = f"each matches a step of {Path(config['file']).name}"
            results.append(Result(path.name, "bindings", "pass", matched))
            if not routed(workflow, document):
                continue
            if "settings" not in config:
                warning = "no job file: neither facilities nor datasets are known"
                remedy = "name it as `settings`: crossfl bind --job"
                results.append(Result(path.name, "job file", "warn", warning, remedy))
                continue
            job = job_of(workflow, document, path)
            if job is None:
                continue  # another workflow's
            for facility in job.facilities:
                datasets.setdefault(facility.name, []).append(facility.dataset)
                if lora := job.lora:
                    base = Base(lora.base_model, lora.base_digest, job.model)
                    bases.setdefault(facility.name, []).append(base)
            name = Path(config["settings"]).name
            placed = f"{len(job.facilities)} facilities of {name} have a deployment"
            results.append(Result(path.name, "job file", "pass", placed))
        sites = [
            _site(path, deployments, deployment, service, datasets, bases)
            for deployment, service in targets
        ]
        return cls(path=path, sites=tuple(sites), results=tuple(results))


def _targets(
    path: Path, workflow: Mapping[str, Any], deployments: Mapping[str, Any]
) -> Iterator[tuple[str, str | None]]:
    """The deployments, each with its service, of a workflow whose bindings match its steps."""
    cwl = path.parent / workflow["config"]["file"]
    steps = steps_of(cwl) | {"/"}
    for binding in workflow.get("bindings") or []:
        if "step" in binding and (step := binding["step"]) not in steps:
            raise CrossFLError(
                f"{path}: a binding matches no step: {step!r}. Name one of the steps of {cwl}: "
                f"{', '.join(sorted(steps))}"
            )
        for deployment, service in targets_of(binding):
            if deployment not in deployments:
                raise CrossFLError(
                    f"{path}: a binding names a deployment that does not exist: {deployment!r}. "
                    f"Name one of {', '.join(sorted(deployments))}"
                )
            yield deployment, service


def _site(
    path: Path,
    deployments: Mapping[str, Any],
    name: str,
    service: str | None,
    datasets: Mapping[str, Sequence[str]] = MappingProxyType({}),
    bases: Mapping[str, Sequence[Base]] = MappingProxyType({}),
) -> Site:
    """A deployment with what it wraps, and its job script."""
    deployment = deployments[name]
    config = deployment.get("config") or {}
    wraps = deployment.get("wraps")
    outer = wraps if isinstance(wraps, dict) else {"deployment": wraps}
    if wraps and outer["deployment"] not in deployments:
        raise CrossFLError(
            f"{path}: {name} wraps a deployment that does not exist: {outer['deployment']!r}. "
            f"Name one of {', '.join(sorted(deployments))}"
        )
    services = config.get("services") or {}
    if service is not None and service not in services:
        raise CrossFLError(
            f"{path}: a binding names service {service!r} of {name}, which has "
            f"{', '.join(sorted(services)) or 'none'}. Correct the binding, or bind again"
        )
    for script in (config, *services.values()):
        if (file := _script(script)) and not (path.parent / file).is_file():
            raise CrossFLError(
                f"{path}: the job script of {name} does not exist: {path.parent / file}. Bind again"
            )
    file = _script(services.get(service, config))
    return Site(
        name=name,
        kind=deployment["type"],
        folder=path.parent,
        config=config,
        service=service,
        workdir=deployment.get("workdir"),
        wraps=_site(path, deployments, outer["deployment"], outer.get("service"))
        if wraps
        else None,
        script=path.parent / file if file else None,
        datasets=tuple(datasets.get(name, ())),
        bases=tuple(bases.get(name, ())),
    )


def _script(service: Any) -> str | None:
    """The job script of a service, or of a deployment without services."""
    file: str | None = service if isinstance(service, str) else service.get("file")
    return file
