"""Compose facilities into a StreamFlow file: their deployments, their job scripts, the bindings."""

import argparse
import functools
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from crossfl.engine.placement import FILTER, VM
from crossfl.errors import CrossFLError
from crossfl.protocol.layout import JOURNAL
from crossfl.sites.environment import MARK, Environment, Place, fill, script
from crossfl.storage.files import write_files
from crossfl.storage.job import Job

ROOT = Path(__file__).resolve().parents[3]
FACILITY = re.compile(r"[a-z][a-zA-Z0-9._-]*")
"""What the engine accepts as the name of a deployment."""
FACILITY_STEPS = ("/federate/train", "/evaluate")
SERVICE = "train"
"""The job script of an environment, as its deployment calls it."""


def bind(
    places: Sequence[Place],
    vm: Place,
    environments: Path,
    workflow: Path,
    job: Path | None,
    out: Path,
) -> dict[Path, bytes]:
    """The files of a federation: the StreamFlow file `out`, and a job script for each remote place.

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
    if lost := [step for step in FACILITY_STEPS if step not in (found := steps(workflow))]:
        raise CrossFLError(f"{workflow} has no step {lost[0]}; it has {', '.join(sorted(found))}")

    deployments, targets, files = deploy([vm, *places], environments, out)
    if deployments[vm.name]["type"] == "crossfl.local":
        deployments[vm.name]["config"]["journal"] = f"{JOURNAL}/{out.stem}"
    config = {"file": relative(workflow, out)} | ({"settings": relative(job, out)} if job else {})
    bindings: list[dict[str, Any]] = [{"step": "/", "target": targets[vm.name]}]
    for step in FACILITY_STEPS:
        # The last target is the stand-in's, which says why a facility is absent.
        chosen = [dict(targets[name]) for name in [*names, vm.name]]
        bindings.append({"step": step, "target": chosen, "filters": ["by_facility"]})
    document = {
        "version": "v1.0",
        "workflows": {"federation": {"type": "cwl", "config": config, "bindings": bindings}},
        "bindingFilters": {"by_facility": {"type": FILTER, "config": {}}},
        "failureManager": {"type": "crossfl.facility", "config": {}},
        "deployments": deployments,
        "database": {"type": "default", "config": {"connection": ":memory:"}},
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
        CrossFLError: settings are missing or refused, all of them in one message.
    """
    deployments: dict[str, Any] = {}
    targets: dict[str, dict[str, str]] = {}
    files: dict[Path, bytes] = {}
    problems = []
    for place in places:
        environment = Environment.load(environments, place.environment)
        path = out.with_suffix(".d") / f"{place.name}.sh"
        try:
            values = place.values(environment, path.relative_to(out.parent).as_posix())
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
        raise CrossFLError(f"settings, to be given with --set or --from:\n  {listing}")
    return deployments, targets, files


def steps(workflow: Path, prefix: str = "") -> set[str]:
    """The steps of a CWL workflow and of those inside it, as bindings name them."""
    try:
        document = yaml.safe_load(workflow.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise CrossFLError(f"{workflow} cannot be read as a CWL workflow: {error}") from None
    if not isinstance(document, dict):
        raise CrossFLError(f"{workflow} is not a CWL document")
    found = set()
    for name, step in (document.get("steps") or {}).items():
        found.add(f"{prefix}/{name}")
        if isinstance(step["run"], str):
            found |= steps(workflow.parent / step["run"], f"{prefix}/{name}")
    return found


@functools.cache
def engine_validator() -> Any:
    """The engine's validator, with its extensions loaded, which may be done only once."""
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


def read_settings(path: Path) -> dict[str, dict[str, str]]:
    """Read a settings file: a mapping of facilities to their settings, every value as written.

    Raises:
        CrossFLError: it cannot be read, or it has another form.
    """
    try:
        # Not even numbers are converted: 01:00:00 is a time, and no sum of seconds.
        document = yaml.load(path.read_text(), Loader=yaml.BaseLoader)  # noqa: S506
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CrossFLError(f"{path} cannot be read as a settings file: {error}") from None
    if not isinstance(document, dict) or not all(isinstance(v, dict) for v in document.values()):
        raise CrossFLError(f"{path}: expected, for each facility, a mapping of its settings")
    for name, settings in document.items():
        if odd := [key for key, value in settings.items() if not isinstance(value, str)]:
            raise CrossFLError(f"{path}: {name}.{odd[0]} has to be one value")
    return document


def places_of(args: argparse.Namespace) -> tuple[list[Place], Place]:
    """The facilities and the aggregation VM that the command line asks for.

    Raises:
        CrossFLError: it is contradictory, or a setting belongs to none of them.
    """
    declared = read_settings(args.settings) if args.settings else {}
    environments = {name: values.pop("environment", name) for name, values in declared.items()}
    if args.facility:
        pairs = [word.partition("=") for word in args.facility]
        environments |= {name: other for name, _, other in pairs if other}
        names = [name for name, _, _ in pairs]
    elif args.job:
        names = [facility.name for facility in Job.load(args.job).facilities]
    else:
        names = [name for name in declared if name != VM]
    environments.setdefault(VM, "local")
    places = {
        name: Place(
            name=name,
            environment=environments.get(name, name),
            settings=dict(declared.get(name, {})),
        )
        for name in [*names, VM]
    }
    for word in args.set:
        target, equals, value = word.partition("=")
        name, _, setting = target.rpartition(".")
        if not equals or name not in places:
            raise CrossFLError(
                f"--set {word!r}: expected FACILITY.SETTING=VALUE, "
                f"the facility one of {', '.join(places)}"
            )
        if setting == "environment":
            places[name].environment = value
        else:
            places[name].settings[setting] = value
    return [places[name] for name in names], places[VM]


def ours(path: Path) -> bool:
    """Whether an earlier binding made this file."""
    return path.is_file() and MARK in path.read_text(errors="replace")


def stale(out: Path, files: Mapping[Path, bytes]) -> Iterator[Path]:
    """Job scripts of an earlier binding that this one has no use for."""
    for path in sorted(out.with_suffix(".d").glob("*.sh")):
        if path not in files and ours(path):
            yield path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl bind`."""
    parser.add_argument(
        "--facility",
        action="append",
        metavar="NAME[=ENVIRONMENT]",
        help="facility, of the environment of its name or of another; "
        "default: those of the job, else those of --from",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FACILITY.SETTING=VALUE",
        help="a setting; those of the aggregation machine are vm.SETTING",
    )
    parser.add_argument(
        "--from",
        dest="settings",
        type=Path,
        metavar="FILE",
        help="settings by facility, for example environments/eurohpc.yml; --set goes before it",
    )
    parser.add_argument("--job", type=Path, help="job file, the inputs of the workflow")
    parser.add_argument(
        "--workflow", type=Path, help="CWL workflow; default: workflows/federated.cwl"
    )
    parser.add_argument(
        "--environments", type=Path, help="folder of environments; default: the repository's"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("streamflow.yml"), help="StreamFlow file to write"
    )
    parser.add_argument(
        "--force", action="store_true", help="overwrite files that crossfl bind has not made"
    )


def main(args: argparse.Namespace) -> None:
    """Write the StreamFlow file and the job scripts, and say what comes next."""
    out = args.outdir / args.output
    if not out.parent.is_dir() or out.is_dir():
        raise CrossFLError(f"{out} cannot be a file: make {out.parent}, or choose another --output")
    places, vm = places_of(args)
    here = Path(os.path.relpath(ROOT))
    workflow = args.workflow or here / "workflows" / "federated.cwl"
    files = bind(places, vm, args.environments or here / "environments", workflow, args.job, out)
    if not args.force and (foreign := [path for path in files if path.exists() and not ours(path)]):
        raise CrossFLError(
            f"{foreign[0]} is there, and not made by 'crossfl bind': choose another --output, "
            "or overwrite it with --force"
        )
    try:
        for folder in {path.parent for path in files}:
            folder.mkdir(exist_ok=True)
        write_files(files)
        for path in stale(out, files):
            path.unlink()
    except OSError as error:
        raise CrossFLError(f"{out} cannot be written: {error}") from None
    print(f"wrote {', '.join(str(path) for path in files)}")
    todo = [] if args.job else ["bind again with --job"]
    print(f"next: {', then '.join([*todo, f'crossfl check {out}', f'streamflow run {out}'])}")
