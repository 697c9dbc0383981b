"""Job files: the inputs of `workflows/federated.cwl`, read without an engine."""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import yaml

from crossfl.errors import CrossFLError
from crossfl.protocol.fields import LARGEST_INT, Record
from crossfl.protocol.participation import check_rounds
from crossfl.protocol.records import BYTES, Aggregation, Facility, Lora, Retention, Training
from crossfl.protocol.text import quoted

R = TypeVar("R", bound=Record)

REQUIRED = ("facilities", "rounds", "local_steps")
"""Inputs that every federation has."""
CWL_KEYS = ("$", "cwl:", "cwltool:")
"""How keys of a job file begin that are for a CWL engine, and no inputs."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One federation, as the job file describes it; fields are the workflow's inputs."""

    facilities: tuple[Facility, ...]
    rounds: int
    local_steps: int
    model: Path | None = None
    config: Path | None = None
    tokenizer: str | None = None
    seed: int = 0
    lora: Lora | None = None
    training: Training = field(default_factory=Training)
    aggregation: Aggregation = field(default_factory=Aggregation)
    retention: Retention = field(default_factory=Retention)
    prompts: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: Path, inputs: Collection[str] = ()) -> "Job":
        """Read a job file; whether a federation can come of it, `check` tells.

        Args:
            path: the file.
            inputs: what it may have besides, where a workflow has more inputs.

        Raises:
            CrossFLError: the file cannot be read, or a field is unknown, missing or not as it
                should be.
        """
        try:
            values = yaml.load(path.read_text("utf-8"), Loader=_Loader)  # noqa: S506 (a safe one)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise CrossFLError(f"{path} cannot be read as a job file: {error}") from None
        if not isinstance(values, dict):
            raise CrossFLError(f"{path} is not a job file: it holds no fields")
        try:
            return cls._parse(values, path.parent, inputs)
        except CrossFLError as error:
            raise CrossFLError(f"{path}: {error}") from None

    @classmethod
    def _parse(cls, values: Mapping[str, Any], folder: Path, inputs: Collection[str]) -> "Job":
        known = cls.__dataclass_fields__
        fields = {k: v for k, v in values.items() if not str(k).startswith(CWL_KEYS)}
        if unknown := sorted(map(str, set(fields) - {*known, *inputs})):
            raise CrossFLError(f"no field {quoted(unknown[0])}; a job has {', '.join(known)}")
        if missing := [name for name in REQUIRED if values.get(name) is None]:
            raise CrossFLError(f"field {missing[0]!r} is missing")
        prompts = values.get("prompts") or []
        if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
            raise CrossFLError(f"prompts is {quoted(prompts)}: give a list of strings")
        lora, seed = values.get("lora"), values.get("seed")
        return cls(
            facilities=_facilities(values["facilities"]),
            rounds=_whole("rounds", values["rounds"], 1),
            local_steps=_whole("local_steps", values["local_steps"], 1),
            model=_path("model", values.get("model"), "Directory", folder),
            config=_path("config", values.get("config"), "File", folder),
            tokenizer=_tokenizer(values.get("tokenizer"), folder),
            seed=0 if seed is None else _whole("seed", seed, -LARGEST_INT - 1),
            lora=None if lora is None else Lora.parse(lora),
            training=_record(Training, values.get("training")),
            aggregation=_record(Aggregation, _with_signers(values.get("aggregation"), folder)),
            retention=_record(Retention, values.get("retention")),
            prompts=tuple(prompts),
        )

    def check(self, path: Path) -> None:
        """Check that a federation can come of the job: its files on this machine, its rounds.

        Args:
            path: the job file.

        Raises:
            CrossFLError: none can.
        """
        try:
            if (self.model is None) == (self.config is None):
                raise CrossFLError("give either model, a directory, or config, a config.json")
            if self.model is not None:
                _check_folder("model", self.model, "config.json")
            if self.config is not None:
                _check_config(self.config)
            if self.tokenizer not in (None, BYTES):
                _check_folder("tokenizer", Path(self.tokenizer), "tokenizer_config.json")
            if self.aggregation.signers:
                _content("aggregation.signers", Path(self.aggregation.signers))
            check_rounds(self.facilities, range(1, self.rounds + 1), self.aggregation.quorum or 1)
        except CrossFLError as error:
            raise CrossFLError(f"{path}: {error}") from None


class _Loader(yaml.SafeLoader):
    """Reads plain values as the engines do, and refuses a key that is given twice.

    Theirs is YAML 1.2 without dates, where `no` is a word, for example a language.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for key, count in Counter(own).items() if count > 1 and key != "<<"]
        if twice:
            raise yaml.YAMLError(f"{quoted(twice[0])} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _form, _first in (
    ("bool", r"(true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)$", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("float", r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$", "-+."),
    ("null", r"(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("merge", r"<<$", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_form), list(_first))


def _facilities(values: Any) -> tuple[Facility, ...]:
    if not isinstance(values, list) or not values:
        raise CrossFLError(f"facilities is {quoted(values)}: give a list of records")
    facilities = tuple(Facility.parse(facility) for facility in values)
    counts = Counter(facility.name for facility in facilities)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise CrossFLError(f"facility {twice[0]!r} is named twice: give each facility once")
    return facilities


def _record(record: type[R], values: Any) -> R:
    return record.parse({} if values is None else values)


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise CrossFLError(f"{name} is {quoted(value)}: give a whole number")
    if not least <= value <= LARGEST_INT:
        raise CrossFLError(f"{name} is {value}: it must be from {least} to {LARGEST_INT}")
    return value


def _with_signers(values: Any, folder: Path) -> Any:
    """The fields of the aggregation record, its file of signers as a path."""
    if isinstance(values, dict) and values.get("signers") is not None:
        path = _path("aggregation.signers", values["signers"], "File", folder)
        return {**values, "signers": str(path)}
    return values


def _tokenizer(value: Any, folder: Path) -> str | None:
    if value is None or value == BYTES:
        return None if value is None else BYTES
    if not isinstance(value, dict):
        raise CrossFLError(
            f"tokenizer is {quoted(value)}: give {BYTES}, or {{class: Directory, path: …}}"
        )
    return str(_path("tokenizer", value, "Directory", folder))


def _path(name: str, value: Any, kind: str, folder: Path) -> Path | None:
    if value is None:
        return None
    location = value.get("path") or value.get("location") if isinstance(value, dict) else None
    if not isinstance(location, str) or value.get("class") != kind:
        raise CrossFLError(f"{name} is {quoted(value)}: give {{class: {kind}, path: …}}")
    if not value.get("path"):
        location = unquote(location.removeprefix("file://"))
    if "://" in location:
        raise CrossFLError(f"{name} is {quoted(location)}: give a path on this machine")
    return (folder / location).resolve()


def _check_config(path: Path) -> None:
    try:
        described = json.loads(_content("config", path))
    except ValueError as error:
        raise CrossFLError(f"config is {path}, which is not JSON: {error}") from None
    if not isinstance(described, dict):
        raise CrossFLError(f"config is {path}, which holds no fields")


def _content(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CrossFLError(f"{name} is {path}, which cannot be read: {error.strerror}") from None


def _check_folder(name: str, path: Path, needed: str) -> None:
    if not path.is_dir():
        raise CrossFLError(f"{name} is {path}, which is no folder on this machine")
    if not (path / needed).is_file():
        raise CrossFLError(f"{name} is {path}, which has no {needed}")
