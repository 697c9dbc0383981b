"""Say how a run stands: its rounds, and for each facility its phase, its job and what it waits for.

It reads the journal and nothing else. It asks no facility, and the run does not notice it.
"""

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from crossfl.console.run import Found, add_run, find
from crossfl.observe.display import clock
from crossfl.observe.live import FacilityState, Live, Recorded, fold
from crossfl.protocol import events
from crossfl.protocol.formats import duration, number, size
from crossfl.protocol.text import printable
from crossfl.server.planning.waits import Wait, quantile

LEAST_WIDTH, LEAST_LINES = 60, 10
"""Of a terminal; on a smaller one lines are cut or wrap."""
QUANTILES = (0.5, 0.9)
"""Of our own estimate of a wait."""
WATCH_SECONDS = 2.0
WALLTIME = 1.0
"""Every job asks for as much, as far as events tell."""
CLEAR = "\x1b[H\x1b[J"
"""Makes a terminal empty, the cursor at its top."""


def snapshot(found: Found, live: Live, now: float) -> dict[str, Any]:
    """What is known of a run, as a document."""
    end = live.expected_end() if found.going_on else None
    return {
        "run": found.path.name,
        "journal": str(found.path.parent),
        "state": _state(found, live),
        "round": live.round,
        "rounds": live.rounds,
        "loss": live.loss,
        "began": live.begun,
        "heard": live.last,
        "expected_end": end,
        "node_hours": round(live.node_hours(now), 4),
        "facilities": {
            name: _facts(facility, now) for name, facility in sorted(live.facilities.items())
        },
    }


def _state(found: Found, live: Live) -> str:
    if found.run.description.finished:
        return "finished"
    if found.going_on:
        return "goes on"
    return live.stopped or "not going on"


def _facts(facility: FacilityState, now: float) -> dict[str, Any]:
    waiting = facility.phase == events.QUEUED
    return {
        "phase": facility.phase,
        "round": facility.round,
        "since": facility.since,
        "job": facility.job,
        "nodes": facility.nodes,
        "reason": facility.message,
        "expected_start": facility.expected,
        "own_estimate": _estimate(facility, now) if waiting else None,
        "step": facility.step,
        "steps": facility.steps,
        "loss": facility.loss,
        "tokens_per_second": facility.tokens_per_second,
        "bytes": facility.bytes,
        "size": facility.size,
        "node_hours": round(facility.used(now) / 3600, 4),
    }


def _estimate(facility: FacilityState, now: float) -> dict[str, float] | None:
    """When the job starts with these probabilities, by the waits of the facility's jobs."""
    waits = [Wait(begun, started, WALLTIME) for begun, started in facility.waits]
    if not any(wait.started is not None for wait in waits):
        return None
    found = {}
    for q in QUANTILES:
        seconds = quantile(waits, q, WALLTIME, 1, now)
        if seconds is not None:
            found[str(q)] = facility.since + seconds
    return found


def table(found: Found, live: Live, now: float, width: int, lines: int) -> list[str]:
    """The run on a terminal: at most so many lines, none of them wider.

    Args:
        found: the run.
        live: what its events tell.
        now: seconds since 1970.
        width: columns of the terminal.
        lines: its lines, one of which is left to the shell.
    """
    facts = snapshot(found, live, now)
    of = "" if facts["rounds"] is None else f" of {facts['rounds']}"
    loss = "" if live.loss is None else f"   loss {number(live.loss, '.4f')}"
    head = [f"run {facts['run']}   {facts['state']}"]
    head.append(f"round {facts['round']}{of}{loss}   {number(facts['node_hours'], ',.2f')} node-h")
    when = [] if live.begun is None else [f"began {clock(live.begun, now)}"]
    if live.last is not None:
        when.append(f"last event {duration(max(0.0, now - live.last))} ago")
    if facts["expected_end"] is not None:
        when.append(f"end expected {clock(facts['expected_end'], now)}")
    if when:
        head.append("   ".join(when))
    rows = [("FACILITY", "PHASE", "JOB", "FOR", "WHAT")]
    room = max(1, lines - len(head) - 4)
    states = sorted(live.facilities.items())
    rows += [_row(name, state, now) for name, state in states[:room]]
    limits = (16, 11, 14, 11, width)
    sizes = [min(limit, max(len(row[i]) for row in rows)) for i, limit in enumerate(limits)]
    listing = [
        "  ".join(_cell(row[i], sizes[i]) for i in range(len(sizes))).rstrip() for row in rows
    ]
    if len(states) > room:
        listing.append(f"and {len(states) - room} more: --format json has all")
    if not states:
        listing = ["no facility has been asked yet" if found.events.exists() else NO_EVENTS]
    return [printable(line, longest=width) for line in [*head, "", *listing]]


NO_EVENTS = "this run has no events: they are recorded where the VM is of type crossfl.local"


def _cell(text: str, width: int) -> str:
    return printable(text, longest=width).ljust(width) if width > 1 else text[:width]


def _short(seconds: float) -> str:
    """A duration in few characters."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.0f} {name}" if seconds < 1e9 else "long"
    return f"{max(0.0, seconds):.0f} s"


def _row(name: str, state: FacilityState, now: float) -> tuple[str, str, str, str, str]:
    job = state.job if state.job and state.phase not in ("", events.STAGED) else "-"
    return name, state.phase, job, _short(now - state.since), _what(state, now)


def _what(state: FacilityState, now: float) -> str:
    """What there is to say about a facility in its phase."""
    parts = []
    if state.phase == events.QUEUED:
        parts.append(state.message or "no reason given")
        if state.expected is not None:
            parts.append(f"start {clock(state.expected, now)}")
        if estimate := _estimate(state, now):
            shown = "-".join(clock(moment, now) for moment in estimate.values())
            parts.append(f"own {shown}")
    elif state.phase in (events.RUNNING, events.TRAIN, "load"):
        if state.message and state.phase == events.RUNNING:
            parts.append(state.message)
        if state.steps:
            parts.append(f"{state.step or 0}/{state.steps}")
        if state.loss is not None:
            parts.append(f"loss {number(state.loss, '.4f')}")
        if state.tokens_per_second is not None:
            parts.append(f"{number(state.tokens_per_second, ',.0f')} tokens/s")
        if state.job and state.nodes:
            parts.append(f"{state.nodes} node{'' if state.nodes == 1 else 's'}")
    elif state.bytes is not None and state.phase != events.MERGED:
        parts.append(f"{size(state.bytes)}{f' of {size(state.size)}' if state.size else ''}")
    elif state.message:
        parts.append(state.message)
    if state.round is not None and len(parts) < 2:
        parts.insert(0, f"round {state.round}")
    return "  ".join(parts)


class Watched:
    """A run whose events are read as they come, those of before once."""

    def __init__(self, place: Path | None, name: str | None) -> None:
        self._place, self._name = place, name
        self._events: Recorded | None = None
        self._live = Live()

    def look(self) -> tuple[Found, Live]:
        """The run as it stands now."""
        found = find(self._place, self._name)
        if self._events is None or found.events != self._events.path:
            self._events, self._live = Recorded(found.events), Live()
        fold(self._events.new(), self._live)
        return found, self._live


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl status`."""
    add_run(parser)
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument(
        "--watch",
        type=_seconds,
        nargs="?",
        const=WATCH_SECONDS,
        metavar="SECONDS",
        help=f"show it anew every so many seconds ({WATCH_SECONDS:g}), until the run has ended",
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.1 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r}: give seconds, from 0.1 to 86400")
    return value


def main(args: argparse.Namespace) -> None:
    """Show how the run stands, once or until it has ended."""
    watched = Watched(args.journal, args.run)
    while True:
        found, live = watched.look()
        now = time.time()
        if args.format == "json":
            text = json.dumps(snapshot(found, live, now), ensure_ascii=True)
        else:
            width, lines = shutil.get_terminal_size()
            shown = table(found, live, now, max(width, LEAST_WIDTH), max(lines, LEAST_LINES))
            text = "\n".join(shown)
        clears = args.watch and args.format == "text" and sys.stdout.isatty()
        print(f"{CLEAR if clears else ''}{text}", flush=True)
        if args.watch is None or not found.going_on:
            return
        time.sleep(args.watch)
