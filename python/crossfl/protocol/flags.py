"""Records as command-line flags, `--batch-size 8`, and as words, `name=leonardo`."""

import argparse
from collections.abc import Iterable
from typing import TypeVar

from msgspec import inspect

from crossfl.errors import CrossFLError
from crossfl.protocol.fields import Field, Record, fields_of, label_of
from crossfl.protocol.text import quoted

R = TypeVar("R", bound=Record)
WORDS = {
    inspect.IntType: "INT",
    inspect.FloatType: "FLOAT",
    inspect.StrType: "STR",
    inspect.BoolType: "BOOL",
}
"""What help shows in place of a value."""


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


def add_flags(
    parser: argparse.ArgumentParser, record: type[Record], optional: bool = False
) -> None:
    """Declare one flag for each field of a record, which as a whole may be optional.

    A boolean flag stands alone for true, as CWL writes it, or has `true` or `false` behind it.
    """
    group = parser.add_argument_group(label_of(record))
    for field in fields_of(record):
        switch = isinstance(field.kind, inspect.BoolType)
        group.add_argument(
            flag(field.name),
            dest=_destination(record, field),
            required=field.required and not optional,
            choices=None if field.counts else field.choices or None,
            metavar=_metavar(field),
            nargs="?" if switch else None,
            const="true" if switch else None,
            help=field.described.replace("%", "%%"),
        )


def from_flags(args: argparse.Namespace, record: type[R]) -> R:
    """Build a record from the flags that `add_flags` declared.

    Raises:
        CrossFLError: a value is not as its field demands.
    """
    return record.parse(
        {field.name: getattr(args, _destination(record, field)) for field in fields_of(record)}
    )


def from_flags_if_any(args: argparse.Namespace, record: type[R]) -> R | None:
    """Build an optional record; None where not one of its flags was given.

    Raises:
        CrossFLError: a value is not as its field demands.
    """
    names = [_destination(record, field) for field in fields_of(record)]
    given = any(getattr(args, name) is not None for name in names)
    return from_flags(args, record) if given else None


def from_words(words: Iterable[str], record: type[R]) -> R:
    """Build a record from words like `name=leonardo dataset=it`.

    Raises:
        CrossFLError: a word has no `=`, or a value is not as its field demands.
    """
    values: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise CrossFLError(f"{label_of(record)}: {quoted(word)} is not of the form field=value")
        if name in values:
            raise CrossFLError(f"{label_of(record)}: {quoted(name)} is given twice")
        values[name] = value
    return record.parse(values)


def _metavar(field: Field) -> str | None:
    if field.counts:
        return "{" + ",".join((*field.choices, WORDS[inspect.IntType])) + "}"
    return None if field.choices else WORDS[type(field.item)]


def _destination(record: type[Record], field: Field) -> str:
    return f"{record.__name__}.{field.name}"
