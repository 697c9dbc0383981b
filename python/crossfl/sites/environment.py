"""Environments: what a kind of place looks like to the engine, and what is the user's to set.

An environment is a folder of `environments/`. Settings stand in `<angle brackets>` where it uses
them; what they may look like is said here, once, so that none can mean anything to a shell, to a
scheduler or to a template.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from crossfl.engine.placement import VM
from crossfl.errors import CrossFLError

WAYS = ("venv", "container")
"""Settings that say where crossfl is installed, one of which is given; each ends its job script."""
MARK = "made by 'crossfl bind'"
PLACEHOLDER = re.compile(r"<([a-z_]+)>")
SAFE = r"[A-Za-z0-9][A-Za-z0-9._+-]*"
WORD = re.compile(SAFE)
HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]{1,5})?")
COUNT = re.compile(r"[1-9][0-9]{0,4}")
FLOOR = re.compile(r"[1-9][0-9]{0,8}")
TIME = re.compile(r"[0-9]{1,3}:[0-5][0-9]:[0-5][0-9]")
ABSOLUTE = re.compile(r"(/[A-Za-z0-9._+@-]+)+")
LOCAL = re.compile(rf"(~/|/|(\.\./)+)?\.?{SAFE}(/\.?{SAFE})*")
WORDS = re.compile(rf"{SAFE}(/{SAFE})*( {SAFE}(/{SAFE})*)*")


class Setting(NamedTuple):
    """What a setting means, and the only form it may have."""

    means: str
    form: re.Pattern[str] = WORD


SETTINGS = {
    "account": Setting("project that the jobs are charged to"),
    "chunk": Setting(
        "PBS resources of one node, like ncpus=64:ngpus=4",
        re.compile(rf"[a-z_]+={SAFE}(:[a-z_]+={SAFE})*"),
    ),
    "container": Setting("Apptainer image with crossfl at the facility, absolute", ABSOLUTE),
    "cpus": Setting("CPU cores of each rank", COUNT),
    "data": Setting("folder of the datasets at the facility, absolute", ABSOLUTE),
    "filesystems": Setting(
        "file systems that the jobs use, like home:eagle", re.compile(r"[a-z_]+(:[a-z_]+)*")
    ),
    "folder": Setting("folder of the datasets, relative to the StreamFlow file", LOCAL),
    "gpus": Setting("GPUs of each node", COUNT),
    "host": Setting("login node, host or host:port", HOST),
    "key": Setting("private ssh key on this machine, relative to the StreamFlow file", LOCAL),
    "known_hosts": Setting("file with the host keys to trust, on this machine", LOCAL),
    "min_samples": Setting("validation samples below which no metric leaves the facility", FLOOR),
    "min_tokens": Setting("predicted tokens below which no metric leaves the facility", FLOOR),
    "models": Setting("folder of base models at the facility, absolute, for LoRA", ABSOLUTE),
    "modules": Setting("environment modules to load, separated by blanks", WORDS),
    "nodes": Setting("nodes of each job", COUNT),
    "partition": Setting("Slurm partition"),
    "prompts": Setting(
        "`yes` lets the model complete the job's prompts there; left out, it does not",
        re.compile("yes"),
    ),
    "qos": Setting("Slurm quality of service"),
    "queue": Setting("PBS queue"),
    "ranks": Setting("ranks on each node, as a rule one for each GPU", COUNT),
    "staging": Setting(
        "folder of a compute node for copies of model and data, absolute, or a variable with it",
        re.compile(rf"[A-Z][A-Z0-9_]*|{ABSOLUTE.pattern}"),
    ),
    "time": Setting("wall-clock limit of each job, HH:MM:SS", TIME),
    "user": Setting("login name there"),
    "venv": Setting("virtual environment with crossfl at the facility, absolute", ABSOLUTE),
    "workdir": Setting("scratch folder there for jobs and caches, absolute", ABSOLUTE),
}


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A kind of place: its deployments, its job script, and the settings that it knows itself.

    A setting whose default is `None` may be left out; one without a default has to be given.
    """

    name: str
    deployments: Mapping[str, Any]
    script: str
    endings: Mapping[str, str]
    defaults: Mapping[str, str | None]

    @classmethod
    def load(cls, root: Path, name: str) -> "Environment":
        """Read `root/name`, over the environment that it names as its base.

        Raises:
            CrossFLError: there is no such environment.
        """
        known = sorted(path.parent.name for path in root.glob("*/deployment.yml"))
        if name not in known:
            raise CrossFLError(
                f"no environment {name!r} in {root}: choose one of {', '.join(known)}, "
                "for example with --facility NAME=slurm"
            )
        own = yaml.safe_load((root / name / "deployment.yml").read_text())
        base = own.get("base", name)
        parent = yaml.safe_load((root / base / "deployment.yml").read_text())
        defaults = {**(parent.get("settings") or {}), **(own.get("settings") or {})}
        # Directives come before commands, hence the header; what ends every job comes last.
        parts = [root / base / "header.sh", root / name / "train.sh", root / "footer.sh"]
        has_script = (root / name / "train.sh").is_file()
        endings = {way: (root / f"{way}.sh").read_text() for way in WAYS} if has_script else {}
        return cls(
            name=name,
            deployments=parent["deployments"],
            script="".join(p.read_text() for p in parts if p.is_file()) if has_script else "",
            endings=endings,
            defaults={k: None if v is None else str(v) for k, v in defaults.items()},
        )

    def placeholders(self) -> list[str]:
        """The settings that it uses, sorted."""
        texts = (yaml.safe_dump(self.deployments), self.script, *self.endings.values())
        return sorted({name for text in texts for name in PLACEHOLDER.findall(text)})


@dataclass(kw_only=True)
class Place:
    """A facility, or the aggregation VM, as the user declares it."""

    name: str
    environment: str
    settings: dict[str, str] = field(default_factory=dict)

    def values(self, environment: Environment, template: str) -> dict[str, str | None]:
        """A value for each placeholder of the environment; `None` where it is left out.

        Raises:
            CrossFLError: settings are missing, unknown or malformed, all of them in one message.
        """
        facility = None if self.name == VM else self.name
        built_in = {"name": self.name, "facility": facility, "template": template}
        needs_no_data = {"data": None, "folder": None} if facility is None else {}
        values = {**environment.defaults, **needs_no_data, **self.settings, **built_in}
        used = [name for name in environment.placeholders() if name not in built_in]
        chosen = [way for way in WAYS if values.get(way) is not None]
        values |= {way: None for way in WAYS if chosen and way not in chosen}
        values.setdefault("container", None)
        problems = [
            f"{self.name}.{name} is unknown; {environment.name} has {', '.join(used)}"
            for name in sorted(set(self.settings) - set(used))
        ]
        for name in used:
            means, form = SETTINGS[name]
            if name not in values:
                problems.append(f"{self.name}.{name} is missing: {means}")
            elif (value := values[name]) is not None and not form.fullmatch(value):
                problems.append(
                    f"{self.name}.{name} is {value!r}: {means}, of the form {form.pattern}"
                )
        if len(chosen) > 1:
            problems.append(f"{self.name} has {' and '.join(chosen)}: give one of them")
        if values["container"] is not None and values.get("nodes", "1") != "1":
            problems.append(
                f"{self.name}.nodes is {values['nodes']}: jobs in a container have one node; "
                "give `venv` instead for more"
            )
        if problems:
            raise CrossFLError("\n  ".join(problems))
        return values


def fill(node: Any, values: Mapping[str, str | None]) -> Any:
    """The fragment with its placeholders replaced; entries without a value are left out."""
    if isinstance(node, Mapping):
        filled = {fill(key, values): fill(value, values) for key, value in node.items()}
        return {key: value for key, value in filled.items() if value is not None}
    if isinstance(node, list):
        return [value for item in node if (value := fill(item, values)) is not None]
    if not isinstance(node, str):
        return node
    if any(values[name] is None for name in PLACEHOLDER.findall(node)):
        return None
    return PLACEHOLDER.sub(lambda match: str(values[match[1]]), node)


def script(place: Place, environment: Environment, values: Mapping[str, str | None]) -> str:
    """The job script of a place; lines without a value are left out."""
    way = next(way for way in WAYS if values[way] is not None)
    lines = (
        PLACEHOLDER.sub(lambda match: str(values[match[1]]), line)
        for line in (environment.script + environment.endings[way]).splitlines(keepends=True)
        if all(values[name] is not None for name in PLACEHOLDER.findall(line))
    )
    heading = f"#!/bin/bash -l\n# The jobs of {place.name}, {MARK} from {environment.name}.\n"
    return heading + "".join(lines)
