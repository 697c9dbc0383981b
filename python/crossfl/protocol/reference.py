"""The pages of `docs/reference/`, rendered from the records and tables of this package."""

import inspect as python
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import inspect

from crossfl.protocol.events import Event
from crossfl.protocol.exits import MEANINGS
from crossfl.protocol.fields import LARGEST_INT, NAME, Field, Record, bare, fields_of, label_of
from crossfl.protocol.history import FacilityEntry, RoundEntry
from crossfl.protocol.manifest import (
    Completion,
    EvaluationManifest,
    FileEntry,
    ModelManifest,
    StateManifest,
    UpdateManifest,
    kind_of,
)
from crossfl.protocol.measurements import (
    Metrics,
    PhaseSeconds,
    TaskMetrics,
    TrainingMetrics,
    UpdateMetrics,
)
from crossfl.protocol.records import (
    Aggregation,
    Allowance,
    Facility,
    Lora,
    Retention,
    Task,
    Training,
)
from crossfl.protocol.state import FacilityLedger, OpenTask, PastNorm, ServerState, Timing
from crossfl.protocol.variables import VARIABLES

FOLDER = Path("docs/reference")
RECORDS = (Facility, Training, Lora, Aggregation, Retention, Task, Allowance)
MANIFESTS = (ModelManifest, StateManifest, UpdateManifest, EvaluationManifest)
PARTS = (
    FileEntry,
    Completion,
    PhaseSeconds,
    UpdateMetrics,
    Metrics,
    TaskMetrics,
    TrainingMetrics,
)
HISTORY = (
    RoundEntry,
    FacilityEntry,
    ServerState,
    FacilityLedger,
    OpenTask,
    PastNorm,
    Timing,
    Event,
)
LARGE = 1e15
"""Limits from here on only keep numbers exact or finite, and are not told."""


def pages(comment: str) -> dict[Path, str]:
    """Every page by its path; each begins with a comment that says where it comes from."""
    texts = {
        "records.md": _page(
            "Records",
            "Job files, CWL and command-line flags have the same fields. In a job file, a field "
            "that is left out has its default.",
            [_section(label_of(record), record) for record in RECORDS],
        ),
        "manifests.md": _page(
            "Manifests",
            "Each folder that travels has a `manifest.json`. A reader refuses one that has "
            "unknown fields, or values out of the limits below. JSON Schemas are in "
            "[schemas/](schemas/).",
            [
                *(_section(f'kind "{kind_of(record)}"', record) for record in MANIFESTS),
                *(_section(record.__name__, record) for record in PARTS),
            ],
        ),
        "history.md": _page(
            "History, server state and events",
            "The history has one `RoundEntry` a line, without fields that are at their default. "
            "`state.json` is a `ServerState`. A step writes one `Event` a line. Types not listed "
            "here are those of [manifests](manifests.md) and [records](records.md).",
            [_section(record.__name__, record) for record in HISTORY],
        ),
        "variables.md": _page(
            "Environment variables",
            "What the package reads or sets.",
            [
                _table(
                    ("Variable", "Meaning", "Set by"),
                    [(f"`{v.name}`", v.doc, v.setter) for v in VARIABLES],
                )
            ],
        ),
        "exit-codes.md": _page(
            "Exit statuses",
            "Of every verb of `crossfl`.",
            [
                _table(
                    ("Status", "Meaning"),
                    [(str(int(status)), meaning) for status, meaning in MEANINGS.items()],
                )
            ],
        ),
    }
    return {FOLDER / name: f"<!-- {comment} -->\n{text}" for name, text in texts.items()}


def summary(record: type[Record]) -> str:
    """The first sentence of what a record is."""
    return (python.getdoc(record) or "").partition("\n")[0]


def type_of(kind: inspect.Type, choices: Sequence[str] = ()) -> str:
    """A type with its limits, for people."""
    if choices:
        return " \\| ".join(f"`{choice}`" for choice in choices)
    match kind:
        case inspect.IntType() | inspect.FloatType():
            return ("int" if isinstance(kind, inspect.IntType) else "number") + _range(kind)
        case inspect.BoolType():
            return "boolean"
        case inspect.StrType(pattern=str() as pattern):
            return "name" if pattern == NAME else "sha256"
        case inspect.StrType(max_length=int() as most):
            return f"text, at most {most:,} characters"
        case inspect.LiteralType(values=values):
            return " \\| ".join(f"`{value}`" for value in values)
        case inspect.VarTupleType(item_type=item):
            return f"list of {_inner(item)}{_most(kind.max_length)}"
        case inspect.TupleType(item_types=items):
            return f"({', '.join(_inner(item) for item in items)})"
        case inspect.DictType(key_type=key, value_type=value):
            return f"map of {_inner(key)} to {_inner(value)}{_most(kind.max_length)}"
        case inspect.StructType(cls=record):
            return record.__name__
    return "text"


def _page(title: str, introduction: str, sections: Sequence[str]) -> str:
    return "\n\n".join([f"# {title}", introduction, *sections]) + "\n"


def _section(title: str, record: type[Record]) -> str:
    rows = [(f"`{f.name}`", _type(f), _default(f), f.doc) for f in fields_of(record)]
    table = _table(("Field", "Type", "Default", "Meaning"), rows)
    return f"## {title}\n\n{summary(record)}\n\n{table}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _default(field: Field) -> str:
    if field.required:
        return "required"
    default: Any = field.default
    if default is None:
        return "unset"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default}`" if isinstance(default, int | float | str) and default != "" else "empty"


def _type(field: Field) -> str:
    return type_of(field.kind, field.choices) + (" \\| int ≥ 1" if field.counts else "")


def _inner(kind: inspect.Type) -> str:
    return type_of(bare(kind)[0])


def _most(length: int | None) -> str:
    return "" if length is None else f", at most {length:,}" if length else ", always empty"


def _range(kind: inspect.IntType | inspect.FloatType) -> str:
    limits = [
        f"{sign} {limit:g}"
        for sign, limit in (("≥", kind.ge), ("≤", kind.le), ("<", kind.lt))
        if limit is not None and abs(limit) < LARGE and abs(limit) not in _OF_CWL
    ]
    return f" {', '.join(limits)}" if limits else ""


_OF_CWL = (LARGEST_INT, LARGEST_INT + 1)
