"""StreamFlow files: compose one from facilities, validate one, read one."""

import functools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from crossfl.engine.placement import FILTER, LOCAL, VM
from crossfl.errors import CrossFLError
from crossfl.protocol.layout import DATABASE, JOURNAL
from crossfl.sites.environment import MARK, Environment, fill, script
from crossfl.sites.settings import Place
from crossfl.storage.job import Job

FACILITY = re.compile(r"[a-z][a-zA-Z0-9._-]*")
"""What the engine accepts as the name of a deployment."""
FACILITY_STEPS = ("/federate/train", "/evaluate")
"""The steps of the workflow that run at facilities."""
SERVICE = "train"
"""The job script of an environment, as its deployment calls it."""


def compose(
    places: Sequence[Place],
    vm: Place,
    environments: Path,
    workflow: Path,
    job: Path | None,
    out: Path,
) -> dict[Path, bytes]:
    """The files of a federation: the StreamFlow file `out`, and a job script for each remote place.

    Args:
        places: the facilities.
        vm: the aggregation machine.
        environments: folder of the environments.
        workflow: CWL workflow of the federation.
        job: job file, the inputs of the workflow, if there is one yet.
        out: path of the StreamFlow file; the others are beside it. Nothing is written.

    Raises:
        CrossFLError: a setting is missing or refused, a binding matches no step of the workflow,
            a facility of the job is not among the places, or the engine refuses the result.
    """
    names = [place.name for place in places]
    if bad := [n for n in names if not FACILITY.fullmatch(n) or n == VM]:
        raise CrossFLError(
            f"facility {bad[0]!r}: use letters, digits, '.', '_' and '-', a small letter first, "
            f"and not {VM!r}, which is the aggregation machine"
        )
    if not names or len(set(names)) < len(names):
        raise CrossFLError("name each facility once, with --facility or in the job file")
    if job and (missing := {f.name for f in Job.load(job).facilities} - set(names)):
        raise CrossFLError(
            f"{job} has facilities without a deployment: {', '.join(sorted(missing))}; "
            "name them with --facility"
        )
    steps = steps_of(workflow)
    if lost := [step for step in FACILITY_STEPS if step not in steps]:
        raise CrossFLError(
            f"{workflow} has no step {lost[0]}; it has {', '.join(sorted(steps))}. "
            "Give the workflow of a federation with --workflow"
        )

    deployments, targets, files = deploy([vm, *places], environments, out)
    journal = f"{JOURNAL}/{out.stem}"
    if deployments[vm.name]["type"] == LOCAL:
        deployments[vm.name]["config"]["journal"] = journal
    config = {"file": relative(workflow, out)} | ({"settings": relative(job, out)} if job else {})
    bindings: list[dict[str, Any]] = [{"step": "/", "target": targets[vm.name]}]
    for step in FACILITY_STEPS:
        # The last target is the stand-in's, which says why a facility is absent.
        choices = [dict(targets[name]) for name in [*names, vm.name]]
        bindings.append({"step": step, "target": choices, "filters": ["by_facility"]})
    document = {
        "version": "v1.0",
        "workflows": {"federation": {"type": "cwl", "config": config, "bindings": bindings}},
        "bindingFilters": {"by_facility": {"type": FILTER, "config": {}}},
        "failureManager": {"type": "crossfl.facility", "config": {}},
        "deployments": deployments,
        "database": {"type": "default", "config": {"connection": f"{journal}/{DATABASE}"}},
    }
    validate(document)
    heading = f"# {', '.join(names)}: {MARK}. To change it, change a setting and bind again.\n"
    files[out] = (heading + yaml.safe_dump(document, sort_keys=False)).encode()
    return files


def deploy(
    places: Sequence[Place], environments: Path, out: Path
) -> tuple[dict[str, Any], dict[str, dict[str, str]], dict[Path, bytes]]:
    """The deployments of places, the target that each is for a binding, and their job scripts.

    Raises:
        CrossFLError: settings are missing or refused, all of them in one message; or two places
            need a deployment of the same name.
    """
    deployments: dict[str, Any] = {}
    targets: dict[str, dict[str, str]] = {}
    files: dict[Path, bytes] = {}
    problems = []
    for place in places:
        environment = Environment.load(environments, place.environment)
        path = out.with_suffix(".d") / f"{place.name}.sh"
        try:
            values = environment.values(place, path.relative_to(out.parent).as_posix())
        except CrossFLError as error:
            problems.append(str(error))
            continue
        targets[place.name] = {"deployment": place.name}
        if environment.script:
            targets[place.name]["service"] = SERVICE
            files[path] = script(place, environment, values).encode()
        fragment = fill(environment.deployments, values)
        if clash := sorted(set(fragment) & set(deployments)):
            raise CrossFLError(f"two places need a deployment {clash[0]!r}: rename a facility")
        deployments |= fragment
    if problems:
        listing = "\n  ".join(problems)
        raise CrossFLError(f"correct these settings with --set or --from:\n  {listing}")
    return deployments, targets, files


def read(path: Path) -> dict[str, Any]:
    """Read a StreamFlow file.

    Raises:
        CrossFLError: it cannot be read, or it is another kind of file.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CrossFLError(f"{path} cannot be read as a StreamFlow file: {error}") from None
    if not isinstance(document, dict):
        raise CrossFLError(
            f"{path} is not a StreamFlow file: it holds no fields. Make one with crossfl bind"
        )
    if "workflows" not in document and all(isinstance(v, dict) for v in document.values()):
        raise CrossFLError(
            f"{path} is not a StreamFlow file. If it holds settings, make a StreamFlow file of "
            f"them with crossfl bind --from {path}"
        )
    return document


def steps_of(workflow: Path, prefix: str = "") -> set[str]:
    """The steps of a CWL workflow and of those inside it, as bindings name them.

    Raises:
        CrossFLError: one of the workflows cannot be read.
    """
    try:
        document = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CrossFLError(f"{workflow} cannot be read as a CWL workflow: {error}") from None
    if not isinstance(document, dict):
        raise CrossFLError(f"{workflow} is not a CWL document: it holds no fields")
    names = set()
    for name, step in (document.get("steps") or {}).items():
        names.add(f"{prefix}/{name}")
        if isinstance(step["run"], str):
            names |= steps_of(workflow.parent / step["run"], f"{prefix}/{name}")
    return names


@functools.cache
def engine_validator() -> Any:
    """The engine's validator, with its extensions loaded, which may be done only once.

    Raises:
        CrossFLError: the engine is not installed.
    """
    try:
        from streamflow.config.validator import SfValidator
        from streamflow.ext.utils import load_extensions
        from streamflow.log_handler import logger
    except ImportError:
        raise CrossFLError("the engine is not installed: pip install 'crossfl[engine]'") from None
    logger.setLevel(logging.WARNING)
    load_extensions()
    return SfValidator


def validate(document: Mapping[str, Any]) -> None:
    """Check a StreamFlow document against the schemas of the engine and of its extensions.

    Raises:
        CrossFLError: it does not fit them, or the engine is not installed.
    """
    validator = engine_validator()
    from streamflow.core.exception import WorkflowDefinitionException

    try:
        validator().validate(document)
    except WorkflowDefinitionException as error:
        raise CrossFLError(f"the engine refuses the file: {error}") from None


def relative(path: Path, out: Path) -> str:
    """A path as the StreamFlow file has to name it; absolute only where the user made it so."""
    return str(path) if path.is_absolute() else os.path.relpath(path, out.parent)
