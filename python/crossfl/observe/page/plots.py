"""The plots of the report: SVG elements that take their colours from the page around them."""

import html
import io
import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from crossfl.observe.page import overview as summed
from crossfl.observe.page.evaluations import Evaluations
from crossfl.observe.page.overview import Overview
from crossfl.protocol.measurements import PhaseSeconds
from crossfl.protocol.state import ServerState
from crossfl.protocol.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASES = dict(zip(summed.PHASES, (0.0, 0.25, 0.45, 1.0, 0.7), strict=True))
"""Phases of an update in the order they happen, and how opaque each is drawn; 0 is an outline."""
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "*": "★", "P": "✚"}
"""What tells facilities apart in grey: a marker of matplotlib, and the character like it."""
COLOURS = 8
"""Facility colours, `--c0` and on, that the page defines for light and for dark."""
MOST_DRAWN = 64
"""Facilities that are drawn."""
MOST_MARKERS = 40
"""Markers on one line, about."""
MOST_MARKED = 16
"""Facilities up to which lines have markers; more are drawn thinner, with a marker at their end."""
LONGEST_NAME = 24
"""Characters of a facility's name on an axis."""
DECIMALS = 4
"""Of a loss: what facilities give is no finer."""
WIDTH, HEIGHT, LINE = 9.6, 3.4, 0.19
"""Of a figure, and of a line of it, in inches."""
UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))

INK, RULE, PAPER = "#0000e0", "#0000e1", "#0000e2"
# matplotlib cannot write a CSS variable: colours that nothing else uses stand in until the end.
PAINT = {INK: "currentColor", RULE: "var(--rule)", PAPER: "var(--paper)"} | {
    f"#0000f{i}": f"var(--c{i})" for i in range(COLOURS)
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "crossfl",
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": RULE,
    "grid.color": RULE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


def key(i: int) -> dict[str, Any]:
    """How facility number i is drawn: the number of its colour, the character of its marker."""
    return {"colour": i % COLOURS, "glyph": list(MARKERS.values())[i % len(MARKERS)]}


def draw(
    overview: Overview, state: ServerState, evaluations: Evaluations, names: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """The name and the SVG element of each plot; without a finished round, none.

    Args:
        overview: of the history.
        state: the state after the last round.
        evaluations: of the final model.
        names: all facilities, in the order of their colours; the first `MOST_DRAWN` are drawn.
    """
    if overview.last is None:
        return
    import matplotlib
    from matplotlib.figure import Figure

    drawn = names[:MOST_DRAWN]
    with matplotlib.rc_context({"font.size": 10, **STYLE}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained", facecolor="none")
        description = _draw_losses(_axes(figure), overview, state, evaluations, drawn)
        yield "loss", _svg(figure, "loss", description)
        if overview.times is not None:
            figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained", facecolor="none")
            description = _draw_times(_axes(figure), overview.times, state, drawn)
        else:
            height = max(HEIGHT, 1.0 + LINE * len(drawn))
            figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
            description = _draw_summed_times(_axes(figure, "x"), overview, drawn)
        yield "time", _svg(figure, "time", description)


def _axes(figure: "Figure", grid: Literal["x", "y"] = "y") -> "Axes":
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    if grid == "y":
        axes.xaxis.set_major_locator(
            MaxNLocator(16, integer=True, min_n_ticks=1, steps=(1, 2, 5, 10))
        )
    axes.grid(axis=grid, linewidth=0.8)
    axes.tick_params(which="both", length=0)
    return axes


def _draw_losses(
    axes: "Axes",
    overview: Overview,
    state: ServerState,
    evaluations: Evaluations,
    names: Sequence[str],
) -> str:
    from matplotlib.ticker import LogLocator

    parts, all_losses = [], []
    rounds = [*overview.points, state.round]
    if len(names) <= MOST_MARKED:
        width, end, marked = 1.8, 11.0, range(0, len(rounds), 1 + len(rounds) // MOST_MARKERS)
    else:
        width, end, marked = 0.8, 6.0, range(0)
    for i, name in enumerate(names):
        facility = overview.facilities.get(name)
        received = facility.losses if facility else [math.nan] * len(overview.points)
        metrics = evaluations[name].metrics if name in evaluations else None
        losses = [round(x, DECIMALS) for x in (*received, metrics.loss if metrics else math.nan)]
        look: dict[str, Any] = {
            "color": f"#0000f{i % COLOURS}",
            "marker": list(MARKERS)[i % len(MARKERS)],
            "markeredgecolor": PAPER,
            "markeredgewidth": 0.6,
        }
        axes.plot(rounds, losses, lw=width, ms=6, markevery=list(marked), **look)
        axes.plot(rounds[-1:], losses[-1:], ms=end, clip_on=False, zorder=3, **look)
        known = [loss for loss in losses if not math.isnan(loss)]
        all_losses += known
        if known:
            parts.append(f"{name} from {known[0]:.4g} to {known[-1]:.4g}")
    if all_losses and min(all_losses) > 0 and max(all_losses) > 10 * min(all_losses):
        axes.set_yscale("log", subs=[])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("model after round")
    axes.set_ylabel("loss, nats per token")
    return "Validation loss by facility and round: " + "; ".join(parts)


def _draw_times(
    axes: "Axes",
    times: Sequence[tuple[int, str, PhaseSeconds]],
    state: ServerState,
    names: Sequence[str],
) -> str:
    """A bar for each update, beside those of its round."""
    scale, label = _unit(max((seconds.total for _, _, seconds in times), default=0.0))
    width = min(0.8 / max(len(names), 1), 0.3)
    for number, name, seconds in times:
        i = names.index(name)
        x, base = number + (i - (len(names) - 1) / 2) * width, 0.0
        for phase in PHASES:
            height = getattr(seconds, phase) / scale
            if height:
                axes.bar(x, height, width * 0.86, base, **_paint(i, phase))
            base += height
    axes.set_ylabel(label)
    axes.set_xlim(0.4, state.round + 0.6)
    axes.set_xlabel("round")
    return f"Time by phase, facility and round, in {label}; the table of rounds has the numbers"


def _draw_summed_times(axes: "Axes", overview: Overview, names: Sequence[str]) -> str:
    """A bar for each facility, all rounds together."""
    known = {n: overview.facilities[n].seconds for n in names if n in overview.facilities}
    scale, label = _unit(max((sum(seconds.values()) for seconds in known.values()), default=0.0))
    for i, name in enumerate(names):
        base = 0.0
        for phase in PHASES:
            length = known[name][phase] / scale if name in known else 0.0
            if length:
                axes.barh(i, length, 0.66, base, **_paint(i, phase))
            base += length
    axes.set_xlabel(label)
    axes.set_yticks(range(len(names)), [printable(name, longest=LONGEST_NAME) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    return f"Time by phase and facility, all rounds together, in {label}"


def _unit(longest: float) -> tuple[int, str]:
    """Seconds in the unit that suits the longest bar, and its name."""
    return next(unit for unit in UNITS if longest > unit[0] * 2 or unit[0] == 1)


def _paint(i: int, phase: str) -> dict[str, Any]:
    """How a phase of facility number i is filled."""
    colour = f"#0000f{i % COLOURS}"
    if not PHASES[phase]:
        return {"facecolor": "none", "edgecolor": colour, "linewidth": 0.9}
    return {"facecolor": colour, "alpha": PHASES[phase]}


def _svg(figure: "Figure", name: str, description: str) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return _inline(stream.getvalue(), name, description)


def _inline(svg: str, name: str, description: str) -> str:
    """The SVG element alone, for a page that holds several: its own ids, the page's colours."""
    svg = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', svg)
    body = svg[svg.index(">") + 1 :]
    # The style that matplotlib writes would apply to the whole page; the page has it for plots.
    body = re.sub(r"(?s)<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>|<!--.*?-->", "", body)
    body = re.sub(r'( id="|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', body)
    body = re.sub("|".join(PAINT), lambda found: PAINT[found[0]], body)
    return f'<svg {box[0] if box else ""} role="img" aria-label="{html.escape(description)}">{body}'
