"""Environments: what a kind of place looks like to the engine.

An environment is a folder of `environments/`. Where it uses a setting of the user's, the name of
the setting stands in `<angle brackets>`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from crossfl.engine.placement import VM
from crossfl.errors import CrossFLError
from crossfl.sites.settings import SETTINGS, Place

WAYS = ("venv", "container")
"""Settings that say where crossfl is installed, one of which is given; each ends its job script."""
MARK = "made by 'crossfl bind'"
"""In every file that `crossfl bind` makes."""
DIRECTIVES = "directives"
"""The setting that is several words, each of them a directive of the job script."""
PLACEHOLDER = re.compile(r"<([a-z_]+)>")


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
        own = yaml.safe_load((root / name / "deployment.yml").read_text(encoding="utf-8"))
        base = own.get("base", name)
        parent = yaml.safe_load((root / base / "deployment.yml").read_text(encoding="utf-8"))
        defaults = {**(parent.get("settings") or {}), **(own.get("settings") or {})}
        # Directives come before commands, hence the header; what ends every job comes last.
        parts = [root / base / "header.sh", root / name / "train.sh", root / "footer.sh"]
        has_script = (root / name / "train.sh").is_file()
        endings = (
            {way: (root / f"{way}.sh").read_text(encoding="utf-8") for way in WAYS}
            if has_script
            else {}
        )
        return cls(
            name=name,
            deployments=parent["deployments"],
            script="".join(p.read_text(encoding="utf-8") for p in parts if p.is_file())
            if has_script
            else "",
            endings=endings,
            defaults={k: None if v is None else str(v) for k, v in defaults.items()},
        )

    def placeholders(self) -> list[str]:
        """The settings that it uses, sorted."""
        texts = (yaml.safe_dump(self.deployments), self.script, *self.endings.values())
        return sorted({name for text in texts for name in PLACEHOLDER.findall(text)})

    def values(self, place: Place, template: str) -> dict[str, str | None]:
        """A value for each placeholder, at a place; `None` where it is left out.

        Args:
            place: the facility, with the settings that the user gives.
            template: path of its job script, relative to the StreamFlow file.

        Raises:
            CrossFLError: settings are missing, unknown or malformed, all of them in one message.
        """
        facility = None if place.name == VM else place.name
        built_in = {"name": place.name, "facility": facility, "template": template}
        needs_no_data = {"data": None, "folder": None} if facility is None else {}
        values = {**self.defaults, **needs_no_data, **place.settings, **built_in}
        used = [name for name in self.placeholders() if name not in built_in]
        chosen = [way for way in WAYS if values.get(way) is not None]
        values |= {way: None for way in WAYS if chosen and way not in chosen}
        values.setdefault("container", None)
        problems = [
            f"{place.name}.{name} is unknown; {self.name} has {', '.join(used)}"
            for name in sorted(set(place.settings) - set(used))
        ]
        for name in used:
            means, form = SETTINGS[name]
            if name not in values:
                problems.append(f"{place.name}.{name} is missing: {means}")
            elif (value := values[name]) is not None and not form.fullmatch(value):
                problems.append(
                    f"{place.name}.{name} is {value!r}: {means}, of the form {form.pattern}"
                )
        if len(chosen) > 1:
            problems.append(f"{place.name} has {' and '.join(chosen)}: give one of them")
        if values["container"] is not None and values.get("nodes", "1") != "1":
            problems.append(
                f"{place.name}.nodes is {values['nodes']}: jobs in a container have one node; "
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
    """The job script of a place; lines without a value are left out.

    A line with `<directives>` is there once for each of them.
    """
    way = next(way for way in WAYS if values[way] is not None)
    lines = []
    for line in (environment.script + environment.endings[way]).splitlines(keepends=True):
        names = PLACEHOLDER.findall(line)
        if all(values[name] is not None for name in names):
            words = str(values[DIRECTIVES]).split() if DIRECTIVES in names else [None]
            lines += [_filled(line, {**values, DIRECTIVES: word}) for word in words]
    heading = f"#!/bin/bash -l\n# The jobs of {place.name}, {MARK} from {environment.name}.\n"
    return heading + "".join(lines)


def _filled(line: str, values: Mapping[str, str | None]) -> str:
    return PLACEHOLDER.sub(lambda match: str(values[match[1]]), line)
