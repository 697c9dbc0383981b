"""Check a facility without a connection: settings, job script, files on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from crossfl.engine.placement import LOCAL
from crossfl.sites.check import files
from crossfl.sites.check.findings import Result, Site
from crossfl.sites.environment import PLACEHOLDER

COMMAND = re.compile(r"{{\s*streamflow_command\s*}}")
"""Where the engine puts the step into a job script."""
BASH = ("bash", "-n")
SHELLCHECK = ("shellcheck", "--shell=bash", "--severity=warning", "--format=gcc", "-")


def examine(site: Site) -> Iterator[Result]:
    """Check the settings, the files on this machine and the job script of one site."""
    text = site.script.read_text(encoding="utf-8", errors="replace") if site.script else ""
    yield _settings(site, text)
    yield from files.examine(site)
    if site.script is None:
        if site.kind != LOCAL:
            warning = "the binding names no service: jobs run without one"
            remedy = "bind to a service, whose file is the job script"
            yield Result(site.name, "job script", "warn", warning, remedy)
        return
    if not COMMAND.search(text):
        problem = f"{site.script} has no {{{{streamflow_command}}}}"
        yield Result(site.name, "job script", "fail", problem, "bind again")
        return
    if not text.startswith("#!"):
        problem = f"{site.script} names none in its first line: /bin/sh runs it, or nothing does"
        remedy = "begin it with #!/bin/bash -l, as crossfl bind does"
        yield Result(site.name, "interpreter", "warn", problem, remedy)
    yield _lint(site, "job script", "bash -n", BASH, COMMAND.sub("true", text))
    yield _lint(site, "shellcheck", "shellcheck", SHELLCHECK, COMMAND.sub("true", text))


def _settings(site: Site, script: str) -> Result:
    values = json.dumps([site.config, site.workdir, site.wraps and site.wraps.config])
    if left := sorted({*PLACEHOLDER.findall(values + script)}):
        remedy = f"crossfl bind --set {site.name}.NAME=VALUE"
        return Result(site.name, "settings", "fail", f"not filled in: {', '.join(left)}", remedy)
    if problems := dict(files.problems(site)):
        remedies = "; ".join(dict.fromkeys(problems.values()))
        return Result(site.name, "settings", "fail", "; ".join(problems), remedies)
    return Result(site.name, "settings", "pass", "all filled in, and the files are there")


def _lint(site: Site, check: str, tool: str, command: tuple[str, ...], script: str) -> Result:
    # What pip installs lies beside our Python, which need not be in the PATH.
    places = f"{os.environ.get('PATH', os.defpath)}:{Path(sys.executable).parent}"
    if not (program := shutil.which(command[0], path=places)):
        return Result(site.name, check, "skip", f"{command[0]} is not installed here")
    process = subprocess.run(
        [program, *command[1:]],
        input=script,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if process.returncode == 0:
        return Result(site.name, check, "pass", f"{tool} finds nothing")
    problem = (process.stdout + process.stderr).strip().splitlines()[0]
    return Result(site.name, check, "fail", f"{tool}: {problem}", f"correct {site.script}")
