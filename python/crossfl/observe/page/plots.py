"""The plots of the report, and what each of them shows in words."""

import math
from collections.abc import Iterator, Sequence

from crossfl.observe.page.evaluations import Evaluations
from crossfl.observe.page.overview import PHASES, Overview
from crossfl.observe.page.svg import COLOURS, GLYPHS, Line, chart, rows, spans_of
from crossfl.observe.page.timeline import KINDS, Gantt, Timeline
from crossfl.protocol.state import ServerState
from crossfl.protocol.text import printable

MOST_DRAWN = 64
"""Facilities that are drawn."""
MOST_MARKED = 16
"""Facilities up to which lines have marks; more are drawn thinner, with a mark at their end."""
LONGEST_NAME = 24
"""Characters of a facility's name in a drawing."""
DECIMALS = 4
"""Of a loss: what facilities give is no finer."""
UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
VM = "aggregation"
"""The row of the aggregation machine."""


def key(i: int) -> dict[str, object]:
    """How facility number i is drawn: the number of its colour, the character of its mark."""
    return {"colour": i % COLOURS, "glyph": GLYPHS[i % len(GLYPHS)]}


def unit(longest: float) -> tuple[float, str]:
    """Seconds in the unit that suits the longest time, and its name."""
    return next(u for u in UNITS if longest > u[0] * 2 or u[0] == 1.0)


def draw(
    overview: Overview,
    state: ServerState,
    evaluations: Evaluations,
    names: Sequence[str],
    timeline: Timeline | None = None,
) -> Iterator[tuple[str, str]]:
    """The name and the SVG element of each plot; without a finished round, none.

    Args:
        overview: of the history.
        state: the state after the last round.
        evaluations: of the final model.
        names: all facilities, in the order of their colours; the first `MOST_DRAWN` are drawn.
        timeline: of the run's events, where there are some.
    """
    if overview.last is None:
        return
    timeline, drawn = timeline or Timeline(), names[:MOST_DRAWN]
    thin = len(drawn) > MOST_MARKED
    losses = {name: _losses(name, overview, evaluations) for name in drawn}
    rounds = [float(n) for n in (*overview.points, state.round)]
    yield (
        "loss",
        chart(
            [
                Line(name, list(zip(rounds, losses[name], strict=True)), i, True, thin)
                for i, name in enumerate(drawn)
            ],
            "model after round",
            "loss, nats per token",
            "Validation loss by facility and round: " + _from_to(losses),
            whole_x=True,
            may_be_log=True,
        ),
    )
    moments = [*overview.clock, overview.last.seconds]
    scale, label = unit(max((m for m in moments if math.isfinite(m)), default=0.0))
    times = [m / scale for m in moments]
    yield (
        "clock",
        chart(
            [
                Line(name, list(zip(times, losses[name], strict=True)), i, True, thin)
                for i, name in enumerate(drawn)
            ],
            f"{label} since the federation began",
            "loss, nats per token",
            "Validation loss by facility and time: " + _from_to(losses),
            may_be_log=True,
        ),
    )
    if steps := [
        Line(name, lane.steps.points, i, thin=True)
        for i, name in enumerate(drawn)
        if (lane := timeline.lanes.get(name)) and lane.steps.points
    ]:
        yield (
            "steps",
            chart(
                steps,
                "optimizer step of the facility",
                "training loss, nats per token",
                "Training loss by facility and step",
                whole_x=True,
                may_be_log=True,
            ),
        )
    yield "gantt", _gantt(overview, state, drawn, timeline)
    yield "time", _summed(overview, drawn)
    yield "share", _shares(overview, drawn, thin)


def _losses(name: str, overview: Overview, evaluations: Evaluations) -> list[float]:
    facility = overview.facilities.get(name)
    received = facility.losses if facility else [math.nan] * len(overview.points)
    metrics = evaluations[name].metrics if name in evaluations else None
    return [round(x, DECIMALS) for x in (*received, metrics.loss if metrics else math.nan)]


def _from_to(losses: dict[str, list[float]]) -> str:
    parts = []
    for name, values in losses.items():
        if known := [loss for loss in values if not math.isnan(loss)]:
            parts.append(f"{name} from {known[0]:.4g} to {known[-1]:.4g}")
    return "; ".join(parts)


def _gantt(overview: Overview, state: ServerState, names: Sequence[str], timeline: Timeline) -> str:
    gantt = Gantt(timeline, state.started)
    found = gantt.spans(overview.window)
    latest = max(
        (span.end for row in found.values() for span in row if span.end < math.inf),
        default=gantt.end,
    )
    end = max(gantt.end, min(latest, gantt.end * 1.25 + 60.0)) - gantt.begin
    scale, label = unit(end)
    listed = [*names, *([""] if "" in found else [])]
    moved = [[s.since(gantt.begin, scale) for s in found.get(name, [])] for name in listed]
    first = overview.window[0][0].round
    return rows(
        [_short(name or VM) for name in listed],
        moved,
        KINDS,
        f"{label} since round {first} began",
        f"What each facility did when, from round {first} on, in {label}",
        end / scale,
    )


def _summed(overview: Overview, names: Sequence[str]) -> str:
    """A bar for each facility, all rounds together."""
    known = {n: overview.facilities[n].seconds for n in names if n in overview.facilities}
    longest = max((sum(seconds.values()) for seconds in known.values()), default=0.0)
    scale, label = unit(longest)
    spans = [
        list(spans_of(0.0, ((p, known[n][p] / scale) for p in PHASES))) if n in known else []
        for n in names
    ]
    return rows(
        [_short(name) for name in names],
        spans,
        KINDS,
        label,
        f"Time by phase and facility, all rounds together, in {label}",
        longest / scale,
    )


def _shares(overview: Overview, names: Sequence[str], thin: bool) -> str:
    lines = []
    for i, name in enumerate(names):
        if (facility := overview.facilities.get(name)) is not None:
            rounds = [float(n + 1) for n in overview.points]
            points = list(zip(rounds, facility.shares, strict=True))
            lines.append(Line(name, points, i, thin=thin))
    return chart(
        lines,
        "round",
        "sum of shares so far",
        "Cumulative weight of each facility by round",
        whole_x=True,
    )


def _short(name: str) -> str:
    return printable(name, longest=LONGEST_NAME)
