"""Write the page of a run in a journal, its plots as SVG files, and its numbers as CSV tables.

While the run goes on, the page is that of its last finished round, and says so.
"""

import argparse
import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crossfl.console.run import Found, add_run, find
from crossfl.errors import CrossFLError
from crossfl.observe.live import read
from crossfl.observe.page import plots
from crossfl.observe.page.about import about_run
from crossfl.observe.page.overview import Overview
from crossfl.observe.page.render import render
from crossfl.observe.page.timeline import Timeline
from crossfl.protocol.history import RoundEntry
from crossfl.protocol.layout import REPORT, STATE
from crossfl.protocol.measurements import PhaseSeconds, TrainingMetrics
from crossfl.protocol.state import ServerState
from crossfl.server import state as server_state
from crossfl.storage.files import write_bytes

ROUNDS, EVENTS = "rounds.csv", "events.csv"
PLAIN_STYLE = """\
<style>
svg { --c0: #2563b0; --c1: #c04d06; --c2: #12805c; --c3: #a03a94; --c4: #8a6d00; --c5: #0b7a90;
  --c6: #c2283e; --c7: #5b5f66; --rule: #dfe3e7; --ink: #1c2024; --p-queue: var(--c7);
  --p-send: var(--c5); --p-load: var(--c4); --p-evaluate: var(--c3); --p-train: var(--c0);
  --p-save: var(--c2); --p-fetch: var(--c1); --p-merge: var(--c6); background: #ffffff; }
"""
"""Colours of a plot that stands alone; the rules of the page follow."""
FACTS = ("share", "status", "reason", "staleness", "tokens", "samples", "steps", "bytes", "norm")
MEASURED = ("tokens_per_second", "peak_memory", "flops_utilisation", "ranks", "last_loss")


def last_state(found: Found) -> Path:
    """The state (folder) of the last round of a run.

    Raises:
        CrossFLError: no round of it is there.
    """
    for path in reversed(found.run.rounds()):
        if (path / STATE).is_dir():
            return path / STATE
    raise CrossFLError(f"{found.path} has no round: nothing has been finished yet")


def page_of(found: Found) -> str:
    """The page of a run as its journal has it, without evaluations of the final model."""
    folder = last_state(found)
    state = server_state.load(folder)
    about = about_run(found.path, found.run.description.configuration, folder)
    if found.going_on:
        about = replace(about, written=datetime.now(UTC).isoformat(timespec="seconds"))
    return render(state, server_state.history(folder), {}, about=about)


def write_page(found: Found) -> Path:
    """Write the page of a run into its folder in the journal; a finished run keeps the one it has.

    The page of a finished run has the evaluations of the final model, which the journal has not.
    """
    path = found.path / REPORT
    if not (found.run.description.finished and path.exists()):
        write_bytes(path, page_of(found).encode("utf-8", "replace"))
    return path


def plots_of(
    state: ServerState, history: Iterable[RoundEntry], timeline: Timeline
) -> Iterator[tuple[str, str]]:
    """The name and the SVG document of each plot."""
    overview = Overview(history, state.round)
    names = sorted(overview.facilities)
    style = PLAIN_STYLE + "\n".join(_rules()) + "\n</style>"
    for name, svg in plots.draw(overview, state, {}, names, timeline):
        head, _, body = svg.partition(">")
        root = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="960" ', 1)
        yield name, f"{root}>{style}{body}\n"


def _rules() -> Iterator[str]:
    """The rules of the page's style sheet that are about plots, for a document of its own."""
    from crossfl.observe.page.render import style_sheet

    for rule in re.findall(r"figure (svg [^{}]*\{[^{}]*\})", style_sheet()):
        if "width: 100%" not in rule:
            yield rule.replace("figure svg ", "svg ")


def rounds_table(history: Iterable[RoundEntry]) -> Iterator[Sequence[Any]]:
    """A row for each facility in each round, the names of the columns first."""
    phases = PhaseSeconds.__struct_fields__
    yield (
        *("round", "finished", "seconds", "round_loss", "skipped", "facility"),
        *FACTS,
        *(f"{phase}_seconds" for phase in phases),
        *("validation_loss", "local_loss"),
        *MEASURED,
        *("gpu_joules", "cpu_joules", "device"),
    )
    for entry in history:
        for name, update in sorted(entry.facilities.items()):
            metrics = update.metrics
            training = metrics.training or TrainingMetrics()
            yield (
                *(entry.round, entry.finished, entry.seconds, entry.loss, entry.skipped, name),
                *(getattr(update, fact) for fact in FACTS),
                *(getattr(update.seconds, phase) for phase in phases),
                metrics.validation.loss if metrics.validation else None,
                metrics.local.loss if metrics.local else None,
                *(getattr(training, name) for name in MEASURED),
                *(training.joules.get("gpu"), training.joules.get("cpu"), training.device),
            )


def events_table(found: Found) -> Iterator[Sequence[Any]]:
    """A row for each event, the names of the columns first; where a job's log lies is left out."""
    names: tuple[str, ...] | None = None
    for event in read(found.events):
        if names is None:
            names = tuple(n for n in event.__struct_fields__ if n not in ("format", "log"))
            yield names
        yield [getattr(event, name) for name in names]


def as_csv(rows: Iterable[Sequence[Any]]) -> bytes:
    """A table as CSV (RFC 4180); a text that a spreadsheet would take for a formula is quoted."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    for row in rows:
        writer.writerow([_cell(value) for value in row])
    return stream.getvalue().encode("utf-8", "replace")


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl export`."""
    add_run(parser)
    parser.add_argument(
        "--page", action="store_true", help="write the page into the run's folder, nothing else"
    )


def main(args: argparse.Namespace) -> None:
    """Write the page, the plots and the tables into the output folder."""
    found = find(args.journal, args.run)
    if args.page:
        print(write_page(found))
        return
    folder = last_state(found)
    state = server_state.load(folder)
    out: Path = args.outdir
    out.mkdir(parents=True, exist_ok=True)
    files = {
        f"{name}.svg": svg.encode("utf-8", "replace")
        for name, svg in plots_of(state, server_state.history(folder), Timeline(read(found.events)))
    }
    files[ROUNDS] = as_csv(rounds_table(server_state.history(folder)))
    files[EVENTS] = as_csv(events_table(found))
    kept = found.path / REPORT
    finished = found.run.description.finished and kept.exists()
    files[REPORT] = kept.read_bytes() if finished else page_of(found).encode("utf-8", "replace")
    for name, content in files.items():
        write_bytes(out / name, content)
        print(out / name)
