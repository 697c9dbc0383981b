"""Job files: the inputs of `workflows/federated.cwl`, read without an engine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml

from crossfl.errors import CrossFLError
from crossfl.protocol.records import BYTES, Aggregation, Facility, Lora, Retention, Training


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
    def load(cls, path: Path) -> "Job":
        """Read a job file.

        Raises:
            CrossFLError: the file cannot be read, or a field is missing or not as it should be.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise CrossFLError(f"{path} cannot be read as a job file: {error}") from None
        if not isinstance(values, dict):
            raise CrossFLError(f"{path} is not a job file: it holds no fields")
        known = cls.__dataclass_fields__
        if unknown := sorted(set(values) - set(known)):
            raise CrossFLError(f"{path}: no field {unknown[0]!r}; a job has {', '.join(known)}")
        if missing := sorted({"facilities", "rounds", "local_steps"} - set(values)):
            raise CrossFLError(f"{path}: field {missing[0]!r} is missing")
        facilities = values["facilities"]
        if not isinstance(facilities, list) or not facilities:
            raise CrossFLError(f"{path}: facilities is {facilities!r}: give a list of records")
        tokenizer, prompts = values.get("tokenizer"), values.get("prompts") or []
        if isinstance(tokenizer, dict):
            tokenizer = str(_path(tokenizer, path))
        elif tokenizer not in (None, BYTES):
            raise CrossFLError(
                f"{path}: tokenizer is {tokenizer!r}: give {BYTES}, or {{class: Directory, …}}"
            )
        if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
            raise CrossFLError(f"{path}: prompts is {prompts!r}: give a list of strings")
        return cls(
            facilities=tuple(Facility.parse(f) for f in facilities),
            rounds=_whole(values["rounds"], "rounds", path),
            local_steps=_whole(values["local_steps"], "local_steps", path),
            model=_path(values.get("model"), path),
            config=_path(values.get("config"), path),
            tokenizer=tokenizer,
            seed=_whole(values.get("seed", 0), "seed", path),
            lora=Lora.parse(values["lora"]) if values.get("lora") else None,
            training=Training.parse(values.get("training") or {}),
            aggregation=_aggregation(values.get("aggregation") or {}, path),
            retention=Retention.parse(values.get("retention") or {}),
            prompts=tuple(prompts),
        )


def _aggregation(values: Any, job: Path) -> Aggregation:
    """The aggregation record, its file of signers as a path."""
    if isinstance(values, dict) and isinstance(values.get("signers"), dict):
        values = {**values, "signers": str(_path(values["signers"], job))}
    return Aggregation.parse(values)


def _whole(value: Any, name: str, job: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise CrossFLError(f"{job}: {name} is {value!r}: give a whole number")
    return value


def _path(value: Any, job: Path) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not (value.get("path") or value.get("location")):
        raise CrossFLError(f"{job}: {value!r} is no path: give {{class: Directory, path: …}}")
    location = str(value.get("path") or unquote(str(value["location"])).removeprefix("file://"))
    return (job.parent / location).resolve()
