"""Check every facility of a StreamFlow file before a job is spent: what fails, how to fix it."""

import argparse
import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from crossfl.engine.placement import check_placed, routed, targets_of
from crossfl.errors import CrossFLError
from crossfl.sites import bind
from crossfl.sites.environment import PLACEHOLDER
from crossfl.storage.job import Job

COMMAND = re.compile(r"{{\s*streamflow_command\s*}}")
FAILED = 1
"""Exit status where something fails."""
STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


class Finding(NamedTuple):
    """What one check found: `pass`, `warn`, `fail` or `skip`, and how to put it right."""

    status: str
    result: str
    fix: str = ""


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    facility: str
    check: str
    status: str
    result: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A deployment as a binding uses it: a facility, or the aggregation VM."""

    name: str
    kind: str
    config: Mapping[str, Any]
    service: str | None
    workdir: str | None
    wraps: "Site | None"
    script: Path | None
    datasets: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Federation:
    """What a StreamFlow file says, as far as it can be checked."""

    path: Path
    sites: tuple[Site, ...]
    results: list[Result] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> "Federation":
        """Read a StreamFlow file, and the workflow and the job file that it names.

        Raises:
            CrossFLError: one of them cannot be read, the engine refuses the file, a binding
                matches no step, or a facility of the job has no deployment.
        """
        document = _read(path)
        bind.validate(document)
        name, results = path.name, [Result(path.name, "schema", "pass", "the engine accepts it")]
        deployments = document.get("deployments") or {}
        targets: dict[tuple[str, str | None], None] = {}
        datasets: dict[str, list[str]] = {}
        for workflow in document["workflows"].values():
            config, bindings = workflow["config"], workflow.get("bindings") or []
            cwl = path.parent / config["file"]
            known = bind.steps(cwl) | {"/"}
            for binding in bindings:
                if "step" in binding and (step := binding["step"]) not in known:
                    raise CrossFLError(
                        f"{path}: a binding matches no step: {step!r}; {cwl} has "
                        f"{', '.join(sorted(known))}"
                    )
                for deployment, service in targets_of(binding):
                    if deployment not in deployments:
                        raise CrossFLError(f"{path}: a binding names no deployment: {deployment!r}")
                    targets[deployment, service] = None
            results.append(Result(name, "bindings", "pass", f"each matches a step of {cwl.name}"))
            if not routed(workflow, document):
                continue
            if "settings" not in config:
                warning = "no job file: neither facilities nor datasets are known"
                remedy = "name it as `settings`: crossfl bind --job"
                results.append(Result(name, "job file", "warn", warning, remedy))
                continue
            job_file = path.parent / config["settings"]
            job = Job.load(job_file)
            check_placed(document, path)
            for facility in job.facilities:
                datasets.setdefault(facility.name, []).append(facility.dataset)
            said = f"{len(job.facilities)} facilities of {job_file.name} have a deployment"
            results.append(Result(name, "job file", "pass", said))
        sites = [
            _site(path, deployments, deployment, service, datasets)
            for deployment, service in targets
        ]
        return cls(path=path, sites=tuple(sites), results=results)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CrossFLError(f"{path} cannot be read as a StreamFlow file: {error}") from None
    if not isinstance(document, dict):
        raise CrossFLError(f"{path} is not a StreamFlow file: it holds no fields")
    if "workflows" not in document and all(isinstance(v, dict) for v in document.values()):
        raise CrossFLError(
            f"{path} is not a StreamFlow file; if it holds settings, make one of it with "
            f"crossfl bind --from {path}"
        )
    return document


def _site(
    path: Path,
    deployments: Mapping[str, Any],
    name: str,
    service: str | None,
    datasets: Mapping[str, Sequence[str]],
) -> Site:
    """A deployment with what it wraps, and its job script."""
    deployment = deployments[name]
    config = deployment.get("config") or {}
    wraps = deployment.get("wraps")
    outer = wraps if isinstance(wraps, dict) else {"deployment": wraps}
    if wraps and outer["deployment"] not in deployments:
        raise CrossFLError(f"{path}: {name} wraps no deployment: {outer['deployment']!r}")
    services = config.get("services") or {}
    if service is not None and service not in services:
        raise CrossFLError(f"{path}: {name} has no service {service!r}")
    script = services.get(service, config)
    file = script if isinstance(script, str) else script.get("file")
    if file and not (path.parent / file).is_file():
        raise CrossFLError(f"{path}: the job script of {name} is not there: {path.parent / file}")
    return Site(
        name=name,
        kind=deployment["type"],
        config=config,
        service=service,
        workdir=deployment.get("workdir"),
        wraps=_site(path, deployments, outer["deployment"], outer.get("service"), {})
        if wraps
        else None,
        script=path.parent / file if file else None,
        datasets=tuple(datasets.get(name, ())),
    )


def offline(site: Site) -> Iterator[Result]:
    """What can be said of a facility from here: that all is filled in, and its job script."""
    settings = json.dumps([site.config, site.workdir, site.wraps and site.wraps.config])
    text = site.script.read_text() if site.script else ""
    where = f"crossfl bind --set {site.name}.NAME=VALUE"
    if left := sorted({*PLACEHOLDER.findall(settings + text)}):
        yield Result(site.name, "settings", "fail", f"not filled in: {', '.join(left)}", where)
    else:
        yield Result(site.name, "settings", "pass", "all filled in")
    if site.script is None:
        if site.kind != "crossfl.local":
            said = "the binding names no service: jobs run without one"
            remedy = "bind to a service, whose file is the job script"
            yield Result(site.name, "job script", "warn", said, remedy)
        return
    if not COMMAND.search(text):
        said = f"{site.script} has no {{{{streamflow_command}}}}"
        yield Result(site.name, "job script", "fail", said, "bind again")
        return
    command = ["bash", "-n"]
    yield _lint(site, "job script", command, COMMAND.sub("true", text))
    command = ["shellcheck", "--shell=bash", "--severity=warning", "--format=gcc", "-"]
    yield _lint(site, "shellcheck", command, COMMAND.sub("true", text))


def _lint(site: Site, check: str, command: list[str], text: str) -> Result:
    tool = " ".join(command[:2]) if command[1] == "-n" else command[0]
    if not shutil.which(command[0]):
        return Result(site.name, check, "skip", f"{command[0]} is not installed here")
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode == 0:
        return Result(site.name, check, "pass", f"{tool} finds nothing")
    said = (done.stdout + done.stderr).strip().splitlines()
    return Result(site.name, check, "fail", f"{tool}: {said[0]}", f"correct {site.script}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl check`."""
    parser.add_argument("file", type=Path, help="StreamFlow file, such as streamflow.yml")
    parser.add_argument(
        "--facility", action="append", metavar="NAME", help="check this one only; repeatable"
    )
    parser.add_argument("--offline", action="store_true", help="make no connection")
    parser.add_argument(
        "--submit", action="store_true", help="run a job of one minute at each facility"
    )
    parser.add_argument(
        "--wait",
        type=int,
        default=900,
        metavar="SECONDS",
        help="how long such a job may take, its time in the queue included; default 900",
    )
    parser.add_argument(
        "--room",
        type=float,
        default=10.0,
        metavar="GIB",
        help="free space that a work folder needs; default 10",
    )
    parser.add_argument("--format", choices=("text", "json"), default="text", help="of the table")


def main(args: argparse.Namespace) -> int:
    """Print the table, and say whether all is well."""
    if args.wait < 1 or args.room < 0:
        raise CrossFLError("--wait takes at least 1 second, and --room at least 0 GiB")
    if args.offline and args.submit:
        raise CrossFLError("--submit needs a connection: leave out --offline")
    federation = Federation.load(args.file)
    sites = federation.sites
    if args.facility:
        names = {site.name for site in sites}
        if unknown := sorted(set(args.facility) - names):
            raise CrossFLError(
                f"{args.file} has no facility {unknown[0]!r}; it has {', '.join(sorted(names))}"
            )
        sites = tuple(site for site in sites if site.name in args.facility)
    results = [*federation.results, *(result for site in sites for result in offline(site))]
    if not args.offline:
        from crossfl.sites.check import preflight

        live = preflight.run(
            sites, args.file.parent, room=args.room, wait=args.wait if args.submit else None
        )
        results += asyncio.run(live)
    order = {name: i for i, name in enumerate((args.file.name, *(site.name for site in sites)))}
    results.sort(key=lambda result: order[result.facility])
    failed = any(result.status == "fail" for result in results)
    if args.format == "json":
        rows = [asdict(result) for result in results]
        print(json.dumps({"file": str(args.file), "passed": not failed, "results": rows}, indent=1))
    else:
        show(results)
    return FAILED if failed else 0


def show(results: Sequence[Result]) -> None:
    """Print the table, grouped by facility, and a sum."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    table = Table("facility", "check", "", "result", "how to fix", show_lines=False)
    last = results[0].facility if results else ""
    for result in results:
        if result.facility != last:
            table.add_section()
            last = result.facility
        status = Text(result.status, style=STYLES[result.status])
        table.add_row(*map(Text, (result.facility, result.check)), status,
                      *map(Text, (result.result, result.fix)))  # fmt: skip
    console.print(table)
    counts = {status: sum(r.status == status for r in results) for status in STYLES}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items() if count))
