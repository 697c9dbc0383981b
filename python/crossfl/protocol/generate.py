"""Write all that follows from the records: CWL types, reference pages and JSON Schemas.

`python -m crossfl.protocol.generate` writes them below the current directory; with `--check` it
writes nothing and exits with status 1 where a file is not what it would write.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import inspect

from crossfl.protocol import reference
from crossfl.protocol.events import Event
from crossfl.protocol.exits import Exit
from crossfl.protocol.fields import LARGEST_INT, Field, Record, fields_of, label_of
from crossfl.protocol.flags import flag
from crossfl.protocol.history import RoundEntry
from crossfl.protocol.manifest import kind_of
from crossfl.protocol.records import Allowance, Facility
from crossfl.protocol.state import ServerState

TYPES, SCHEMAS = Path("steps/types"), reference.FOLDER / "schemas"
MAKE = "made by make types"
WORDED = (Facility, Allowance)
"""Records that stand on the command line as words, `name=leonardo`; a command takes several."""
DOCUMENTS: Mapping[str, type[Record]] = {
    **{f"{kind_of(record)}-manifest": record for record in reference.MANIFESTS},
    "server-state": ServerState,
    "history-line": RoundEntry,
    "event": Event,
}
CWL_TYPES = {
    inspect.IntType: "int",
    inspect.FloatType: "double",
    inspect.StrType: "string",
    inspect.BoolType: "boolean",
}
LONGEST_LINE = 100
PLAIN = re.compile(r"[A-Za-z](?!.*(?:: |:$| #)).*")
"""Texts that YAML takes without quotation marks."""


def documents() -> dict[Path, str]:
    """Every generated file, by its path in the repository."""
    types = {TYPES / f"{label_of(record)}.yml": cwl_type(record) for record in reference.RECORDS}
    schemas = {SCHEMAS / f"{name}.json": schema(kind) for name, kind in DOCUMENTS.items()}
    return types | schemas | reference.pages(MAKE)


def cwl_type(record: type[Record]) -> str:
    """The CWL record of a record, in YAML."""
    lines = [
        f"# {MAKE}: do not edit",
        "type: record",
        f"name: {label_of(record)}",
        f"doc: {_yaml(reference.summary(record))}",
        "fields:",
    ]
    for field in fields_of(record):
        lines += [
            f"  {field.name}:",
            *_type_lines(field),
            f"    doc: {_yaml(field.described)}",
            f"    inputBinding: {{{_binding(field, worded=record in WORDED)}}}",
        ]
    return "\n".join(lines) + "\n"


def schema(kind: type[Record]) -> str:
    """The JSON Schema of a document."""
    found = msgspec.json.schema(kind)
    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": MAKE}
    return json.dumps(document | found, indent=1, ensure_ascii=False) + "\n"


def _type_lines(field: Field) -> list[str]:
    if not field.choices:
        name = field.extra.get("cwl") or CWL_TYPES[type(field.item)]
        if isinstance(field.item, inspect.IntType) and (field.item.le or 0) > LARGEST_INT:
            name = "long"
        many, optional = "[]" if field.many else "", "" if field.required else "?"
        return [f"    type: {name}{many}{optional}"]
    symbols = f"[{', '.join(field.choices)}]"
    enum = f"{{type: enum, name: {field.name}, symbols: {symbols}}}"
    number = ", int" if field.counts else ""
    line = f"    type: {enum}" if field.required else f'    type: ["null", {enum}{number}]'
    if len(line) <= LONGEST_LINE:
        return [line]
    head = "      - " if not field.required else "      "
    rest = " " * len(head)
    lines = [f"{head}type: enum", f"{rest}name: {field.name}", f"{rest}symbols: {symbols}"]
    return ["    type:", *([] if field.required else ['      - "null"']), *lines]


def _binding(field: Field, worded: bool) -> str:
    prefix = f"prefix: {field.name}=, separate: false" if worded else f"prefix: {flag(field.name)}"
    return prefix + (', itemSeparator: ","' if field.many else "")


def _yaml(text: str) -> str:
    return text if PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check every file."""
    parser = argparse.ArgumentParser(
        prog="python -m crossfl.protocol.generate", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing; name what differs")
    parser.add_argument(
        "--root", type=Path, default=Path(), help="repository; default: this folder"
    )
    args = parser.parse_args(argv)
    differing = [
        (args.root / path, text)
        for path, text in documents().items()
        if not (args.root / path).is_file() or (args.root / path).read_text("utf-8") != text
    ]
    for path, text in differing:
        if args.check:
            print(f"{path} is not what crossfl.protocol says: run 'make types'", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
    return Exit.FAILED if args.check and differing else Exit.DONE


if __name__ == "__main__":
    sys.exit(main())
