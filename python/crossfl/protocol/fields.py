"""Records and their fields: each type, limit, default and description is declared once.

A field is declared as `name: Annotated[type, doc("What it is.")] = default`. The types of this
module carry the limits. Flags, CWL records, documentation and JSON Schemas follow from the fields.
"""

import functools
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, Union, cast, get_args, get_origin

import msgspec
from msgspec import Meta, inspect

from crossfl.errors import CrossFLError
from crossfl.protocol.text import printable, quoted

LARGEST_INT = 2**31 - 1
"""The largest `int` of CWL."""
LARGEST_COUNT = 2**53
"""Counts beyond this are not exact in fp64."""
END = r"(?![\s\S])"
"""The very end of a text, in Python's and in JSON Schema's expressions; `$` allows a newline."""
NAME = rf"^[A-Za-z0-9][A-Za-z0-9._-]{{0,99}}{END}"
DIGEST = rf"^[0-9a-f]{{64}}{END}"
SEALED = rf"^([0-9a-f]{{64}})?{END}"
DEMANDS = {
    NAME: "use letters, digits, '.', '_' and '-', a letter or digit first, 100 characters at most",
    DIGEST: "expected a sha256, 64 hexadecimal digits",
    SEALED: "expected a sha256, 64 hexadecimal digits",
}
"""What the expressions ask for, in words."""

Name = Annotated[str, Meta(pattern=NAME)]
"""A plain word in a path, a table or a shell."""
Digest = Annotated[str, Meta(pattern=DIGEST)]
"""A sha256 in hexadecimal digits."""
Int = Annotated[int, Meta(ge=-LARGEST_INT - 1, le=LARGEST_INT)]
"""An `int` of CWL."""
Natural = Annotated[int, Meta(ge=0, le=LARGEST_INT)]
"""An `int` of CWL from 0 on."""
Positive = Annotated[int, Meta(ge=1, le=LARGEST_INT)]
"""An `int` of CWL from 1 on."""
Count = Annotated[int, Meta(ge=0, le=LARGEST_COUNT)]
"""Bytes, tokens, samples or steps."""
Number = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
"""A finite number."""
Amount = Annotated[float, Meta(ge=0, le=sys.float_info.max)]
"""A finite number from 0 on."""
Share = Annotated[float, Meta(ge=0, le=1)]
"""A number from 0 to 1."""
Decay = Annotated[float, Meta(ge=0, lt=1)]
"""A number from 0 to below 1."""
Loss = Annotated[float, Meta(ge=0, le=LARGEST_COUNT)]
"""A loss in nats per token."""
LONGEST_SECONDS = 1e9
Seconds = Annotated[float, Meta(ge=0, le=LONGEST_SECONDS)]
"""A duration of at most 30 years."""
Time = Annotated[float, Meta(ge=0, le=1e12)]
"""A moment, in seconds since 1970."""
Label = Annotated[str, Meta(max_length=1000)]
"""A name that others chose freely, such as that of a dataset."""
LONGEST_REASON = 2000
Reason = Annotated[str, Meta(max_length=LONGEST_REASON)]
"""A sentence for people."""
File = Annotated[str, Meta(min_length=1, max_length=4096, extra={"cwl": "File"})]
"""The path of a file that the engine brings; in CWL a File."""


def doc(text: str) -> Meta:
    """The description of a field, in sentences; the default is added where it is shown."""
    return Meta(description=text)


@dataclass(frozen=True)
class Field:
    """One field of a record, as all that is generated from it needs it."""

    name: str
    hint: Any
    doc: str
    default: Any
    kind: inspect.Type
    """Its type without `None` and without metadata."""
    extra: Mapping[str, Any]
    choices: tuple[str, ...]
    """The values of a field that names one of several, as declared; empty for any other."""

    @property
    def required(self) -> bool:
        """Whether the field has no default."""
        return self.default is msgspec.NODEFAULT

    @property
    def many(self) -> bool:
        """Whether it is a list."""
        return isinstance(self.kind, inspect.VarTupleType)

    @property
    def counts(self) -> bool:
        """Whether a whole number may stand in place of one of the choices."""
        return isinstance(self.kind, inspect.UnionType)

    @property
    def item(self) -> inspect.Type:
        """The type of one value of a list; otherwise that of the value."""
        kind = self.kind
        return bare(kind.item_type)[0] if isinstance(kind, inspect.VarTupleType) else kind

    @property
    def described(self) -> str:
        """The description, with the default where there is one to tell."""
        if self.required or self.default is None or self.default == ():
            return self.doc
        default = str(self.default).lower() if isinstance(self.default, bool) else self.default
        return f"{self.doc} Default {default}."

    def convert(self, value: object, record: str, strict: bool = True) -> Any:
        """A value of the field's type and limits.

        Raises:
            CrossFLError: it is none; the message names the record, the field and the demand.
        """
        if self.many and not strict and isinstance(value, str):
            value = [word for word in value.split(",") if word]
        try:
            return msgspec.convert(value, self.hint, strict=strict)
        except UnicodeEncodeError:  # half a character, as Python has it of bytes that are no text
            raise CrossFLError(
                f"{record}.{self.name} is {quoted(value)}, which is not Unicode text"
            ) from None
        except msgspec.ValidationError as error:
            if self.choices:
                number = ", or give a whole number from 1 on" if self.counts else ""
                shown, demand = quoted(value), f"choose one of {', '.join(self.choices)}{number}"
            else:
                shown, demand = _complaint(self.kind, value, strict, str(error))
            raise CrossFLError(f"{record}.{self.name} is {shown}: {demand}") from None


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all records: checked however it is made, with errors that name the field."""

    def __post_init__(self) -> None:
        try:
            checked = msgspec.convert(self, _twin(type(self)), from_attributes=True)
        except (msgspec.ValidationError, UnicodeEncodeError):
            for field in fields_of(type(self)):  # for a message that names the field
                field.convert(getattr(self, field.name), label_of(type(self)))
            raise
        for name in self.__struct_fields__:
            value = getattr(checked, name)
            if value is not getattr(self, name):  # an int for a float, a list for a tuple
                msgspec.structs.force_setattr(self, name, value)

    @classmethod
    def parse(cls, values: object) -> Self:
        """Build the record from a mapping (a job file, command-line flags), checking every value.

        Numbers and booleans may be words. A value of None counts as not given.

        Raises:
            CrossFLError: a field is unknown, missing, of the wrong type or out of its limits.
        """
        label, fields = label_of(cls), fields_of(cls)
        if not isinstance(values, Mapping):
            raise CrossFLError(f"{label} is {quoted(values)}: expected a record of named fields")
        names = [field.name for field in fields]
        if unknown := sorted(set(values) - set(names), key=str):
            raise CrossFLError(f"{label}: no field {quoted(unknown[0])}; it has {', '.join(names)}")
        arguments: dict[str, Any] = {}
        for field in fields:
            value = values.get(field.name)
            if value is not None:
                arguments[field.name] = field.convert(value, label, strict=False)
            elif field.required:
                raise CrossFLError(f"{label}.{field.name} is missing")
        return cls(**arguments)

    def replace(self, **changes: Any) -> Self:
        """A copy with other values of some fields.

        Raises:
            CrossFLError: a value is not as its field demands.
        """
        return msgspec.structs.replace(self, **changes)

    def asdict(self) -> dict[str, Any]:
        """The record as JSON-ready values: without fields that are None, mappings by key."""
        return cast("dict[str, Any]", _builtins(self))


@functools.cache
def fields_of(record: type[msgspec.Struct]) -> tuple[Field, ...]:
    """The fields of a record, in the order of their declaration."""
    described = cast("inspect.StructType", inspect.type_info(record)).fields
    return tuple(
        Field(
            name=field.name,
            hint=field.type,
            doc=extra.pop("description", ""),
            default=default_of(field),
            kind=kind,
            extra=extra,
            choices=_choices(field.type),
        )
        for field, info in zip(msgspec.structs.fields(record), described, strict=True)
        for kind, extra in (bare(info.type),)
    )


@functools.cache
def _twin(record: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """The same fields in a type without checks of its own: msgspec checks them in one call."""
    fields = msgspec.structs.fields(record)
    return msgspec.defstruct(record.__name__, [(field.name, field.type) for field in fields])


def default_of(field: msgspec.structs.FieldInfo) -> Any:
    """The default value of a field; `msgspec.NODEFAULT` where it is required."""
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default


def label_of(record: type) -> str:
    """The name of a record in messages, in CWL and in flags."""
    return record.__name__.lower()


def is_name(word: str) -> bool:
    """Whether a word is a plain one in a path, a table or a shell."""
    return re.search(NAME, word) is not None


def bare(kind: inspect.Type) -> tuple[inspect.Type, dict[str, Any]]:
    """A type without None and metadata, and the metadata: `description` and what is extra."""
    extra: dict[str, Any] = {}
    while isinstance(kind, inspect.Metadata | inspect.UnionType):
        if isinstance(kind, inspect.Metadata):
            extra = {**(kind.extra or {}), **(kind.extra_json_schema or {}), **extra}
            kind = kind.type
        else:
            members = [m for m in kind.types if not isinstance(m, inspect.NoneType)]
            if len(members) > 1:
                break
            kind = members[0]
    return kind, extra


def _choices(hint: Any) -> tuple[str, ...]:
    """The values of a `Literal`, in the order declared, which msgspec does not keep."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) is Union:
        return tuple(choice for member in get_args(hint) for choice in _choices(member))
    values = get_args(hint) if get_origin(hint) is Literal else ()
    return tuple(value for value in values if isinstance(value, str))


def _complaint(kind: inspect.Type, value: Any, strict: bool, fallback: str) -> tuple[str, str]:
    """The value as it is shown, and what was expected in its place."""
    shown, demand = quoted(value), next(_demands(kind, value, strict), None)
    if demand is None:
        demand = fallback.replace("`", "")
    if isinstance(value, str) and isinstance(kind, inspect.IntType | inspect.FloatType):
        # It is a number, if written as a word.
        shown = shown if demand.startswith("expected") else printable(value, longest=60)
    return shown, demand


def _demands(kind: inspect.Type, value: Any, strict: bool) -> Iterator[str]:
    """What of its type a value does not meet."""
    if isinstance(kind, inspect.VarTupleType):
        if not isinstance(value, list | tuple):
            yield "expected a list"
        for item in value if isinstance(value, list | tuple) else ():
            yield from _demands(bare(kind.item_type)[0], item, strict)
        if kind.max_length is not None and len(value) > kind.max_length:
            yield f"it must have at most {kind.max_length} items"
    elif isinstance(kind, inspect.IntType | inspect.FloatType):
        yield from _number_demands(kind, value, strict)
    elif isinstance(kind, inspect.BoolType):
        yield "expected bool"
    elif isinstance(kind, inspect.StrType):
        if not isinstance(value, str):
            yield "expected str"
        elif kind.pattern:
            yield DEMANDS[kind.pattern]
        elif kind.max_length is not None and len(value) > kind.max_length:
            yield f"it must have at most {kind.max_length} characters"
        else:
            yield "it must not be empty"


def _number_demands(
    kind: inspect.IntType | inspect.FloatType, value: Any, strict: bool
) -> Iterator[str]:
    """What of a number's type and limits a value does not meet."""
    convert: type[int] | type[float] = int if isinstance(kind, inspect.IntType) else float
    try:
        number = msgspec.convert(value, convert, strict=strict)
    except msgspec.ValidationError:
        number = value  # not a number, not a whole one, or an integer too large for a float
    if isinstance(number, float) and not math.isfinite(number):
        yield "give a finite number"
    elif type(number) is not convert and (convert is int or type(number) is not int):
        yield f"expected {convert.__name__}"
    elif kind.ge is not None and number < kind.ge:
        yield f"it must be at least {kind.ge}"
    elif kind.le is not None and number > kind.le:
        yield f"it must be at most {kind.le}"
    elif kind.lt is not None and number >= kind.lt:
        yield f"it must be below {kind.lt}"


def _builtins(value: object) -> object:
    if isinstance(value, Record):
        config = value.__struct_config__
        head = {} if config.tag_field is None else {config.tag_field: config.tag}
        fields = ((name, getattr(value, name)) for name in value.__struct_fields__)
        return head | {name: _builtins(v) for name, v in fields if v is not None}
    if isinstance(value, dict):
        return {key: _builtins(value[key]) for key in sorted(value)}
    if isinstance(value, tuple | list):
        return [_builtins(item) for item in value]
    return value
