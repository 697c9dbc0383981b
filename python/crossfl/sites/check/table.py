"""Print results, as a table or as JSON; what a facility wrote is made printable first."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from crossfl.protocol.text import printable
from crossfl.sites.check.findings import Result, Status

STYLES: dict[Status, str] = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}
LONGEST = 1000
"""Characters of a result, and of its remedy, that are shown."""


def has_failed(results: Iterable[Result]) -> bool:
    """Whether something fails."""
    return any(result.status == "fail" for result in results)


def show(results: Sequence[Result]) -> None:
    """Print the table, grouped by facility, and the number of results of each status."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    table = Table("facility", "check", "", "result", "how to fix", show_lines=False)
    facility = results[0].facility if results else ""
    for result in map(_printable, results):
        if result.facility != facility:
            table.add_section()
            facility = result.facility
        status = Text(result.status, style=STYLES[result.status])
        table.add_row(*map(Text, (result.facility, result.check)), status,
                      *map(Text, (result.result, result.fix)))  # fmt: skip
    console.print(table)
    counts = {status: sum(r.status == status for r in results) for status in get_args(Status)}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items() if count))


def show_json(file: Path, results: Sequence[Result]) -> None:
    """Print one JSON document: the file, whether it passed, and a list of the results."""
    rows = [asdict(_printable(result)) for result in results]
    document = {"file": str(file), "passed": not has_failed(results), "results": rows}
    print(json.dumps(document, indent=1))


def _printable(result: Result) -> Result:
    """The result without what a terminal obeys: any text in it may come from the other side."""
    return replace(
        result,
        facility=printable(result.facility),
        check=printable(result.check),
        result=printable(result.result, keep="\n", longest=LONGEST),
        fix=printable(result.fix, keep="\n", longest=LONGEST),
    )
