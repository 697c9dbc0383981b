"""What a run is known by: a configuration, compared by what decides the outcome."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from crossfl.protocol.fields import Record, fields_of
from crossfl.protocol.records import Aggregation, Facility, Lora, Training

TRAINING = "training"
"""What a configuration gains when the first round is planned."""
RECORDS: Mapping[str, type[Record]] = {
    "aggregation": Aggregation,
    "lora": Lora,
    TRAINING: Training,
}
"""The parts of a configuration that are one record each."""
FREE: Mapping[type[Record], frozenset[str]] = {
    Aggregation: frozenset({"wait_seconds"}),
    Facility: frozenset({"attempts", "queue_timeout"}),
    Training: frozenset(
        {"threads", "max_seconds", "reserve_seconds", "checkpoint_steps", "max_new_tokens"}
    ),
}
"""Fields that may change while a run goes on: machines and patience, and not what is learnt."""
FIXED = (
    "model",
    "config",
    "tokenizer",
    "seed",
    "lora",
    "aggregation.server_optimizer",
    "aggregation.model_dtype",
    "aggregation.served_mean",
)
"""What the rounds in a journal were made from, which cannot change even in an unlocked run."""


def differences(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, str]:
    """What decides the outcome and differs: `old → new` by the name of the value.

    A field that one side does not mention has its default there: an earlier version did not know
    it.
    """
    return dict(_differences(_decisive(known), _decisive(wanted)))


def is_fixed(name: str) -> bool:
    """Whether a value, by its name in `differences`, cannot change in a run that goes on."""
    return any(name == fixed or name.startswith(f"{fixed}.") for fixed in FIXED)


def _decisive(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with every default, and without what does not decide the outcome."""
    complete = dict(configuration)
    for key, record in RECORDS.items():
        if isinstance(values := configuration.get(key), Mapping):
            complete[key] = _complete(record, values)
    if isinstance(facilities := configuration.get("facilities"), Mapping):
        complete["facilities"] = {
            name: _complete(Facility, values) for name, values in facilities.items()
        }
    as_saved: dict[str, Any] = json.loads(json.dumps(complete))  # where a tuple is a list
    return as_saved


def _complete(record: type[Record], values: Mapping[str, Any]) -> dict[str, Any]:
    fields = fields_of(record)
    defaults = {f.name: f.default for f in fields if not f.required}
    free = FREE.get(record, frozenset())
    return {key: value for key, value in {**defaults, **values}.items() if key not in free}


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            where = f"{name}.{key}" if name else key
            yield from _differences(old.get(key), new.get(key), where)
    elif old != new:
        yield name, f"{json.dumps(old)} → {json.dumps(new)}"
