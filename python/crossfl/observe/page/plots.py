"""The plots of the report: SVG elements that take their colours from the page around them."""

import html
import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from crossfl.server.state import ServerState

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PHASES = {"queue": 0.0, "load": 0.25, "evaluate": 0.45, "train": 1.0, "save": 0.7}
"""Phases of an update in the order they happen, and how opaque each is drawn; 0 is an outline."""
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "*": "★", "P": "✚"}
"""What tells facilities apart in grey: a marker of matplotlib, and the character like it."""
COLOURS = 8
"""Facility colours, `--c0` and on, that the page defines for light and for dark."""
MOST_BARS = 72
"""More facilities times rounds than this, and the plot of times sums over the rounds."""
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
    state: ServerState, evaluation: dict[str, Any], names: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """The name and the SVG element of each plot; without a finished round, none."""
    if not state.history:
        return
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    for name, plot in {"loss": _loss, "time": _time}.items():
        with matplotlib.rc_context({"font.size": 10, **STYLE}):
            figure = Figure(figsize=(9.6, 3.4), layout="constrained", facecolor="none")
            axes = figure.add_subplot()
            axes.xaxis.set_major_locator(
                MaxNLocator(16, integer=True, min_n_ticks=1, steps=(1, 2, 5, 10))
            )
            axes.grid(axis="y", linewidth=0.8)
            axes.tick_params(which="both", length=0)
            description = plot(axes, state, evaluation, names)
            stream = io.StringIO()
            figure.savefig(stream, format="svg", metadata={"Date": None})
        yield name, _inline(stream.getvalue(), name, description)


def _loss(
    axes: "Axes", state: ServerState, evaluation: dict[str, Any], names: Sequence[str]
) -> str:
    from matplotlib.ticker import LogLocator

    said, every = [], []
    for i, name in enumerate(names):
        received = [_measured(h["facilities"].get(name, {})) for h in state.history]
        evaluated = evaluation["facilities"].get(name, {}).get("metrics") or {}
        final = float(evaluated.get("loss", "nan"))
        look: dict[str, Any] = {
            "color": f"#0000f{i % COLOURS}",
            "marker": list(MARKERS)[i % len(MARKERS)],
            "markeredgecolor": PAPER,
            "markeredgewidth": 0.6,
        }
        every_th = 1 + state.round // 40
        axes.plot(
            range(state.round + 1), [*received, final], lw=1.8, ms=6, markevery=every_th, **look
        )
        axes.plot([state.round], [final], ms=11, clip_on=False, zorder=3, **look)
        known = [loss for loss in (*received, final) if loss == loss]
        every += known
        if known:
            said.append(f"{name} from {known[0]:.4g} to {known[-1]:.4g}")
    if every and min(every) > 0 and max(every) > 10 * min(every):
        axes.set_yscale("log", subs=[])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("model after round")
    axes.set_ylabel("loss, nats per token")
    return "Validation loss by facility and round: " + "; ".join(said)


def _measured(update: dict[str, Any]) -> float:
    return float(update.get("metrics", {}).get("validation", {}).get("loss", "nan"))


def _time(
    axes: "Axes", state: ServerState, evaluation: dict[str, Any], names: Sequence[str]
) -> str:
    spent = [[h["facilities"].get(n, {}).get("seconds", {}) for h in state.history] for n in names]
    summed = len(names) * state.round > MOST_BARS
    if summed:
        spent = [[{p: sum(s.get(p, 0.0) for s in each) for p in PHASES}] for each in spent]
    longest = max(sum(s.values()) for each in spent for s in each)
    unit, label = next(u for u in UNITS if longest > u[0] * 2 or u[0] == 1)
    width = 0.66 if summed else min(0.8 / len(names), 0.3)
    for i, each in enumerate(spent):
        for round_, seconds in enumerate(each, 1):
            x = i if summed else round_ + (i - (len(names) - 1) / 2) * width
            base = 0.0
            for phase, opacity in PHASES.items():
                if height := seconds.get(phase, 0.0) / unit:
                    colour = f"#0000f{i % COLOURS}"
                    look: dict[str, Any] = {"facecolor": colour, "alpha": opacity}
                    if not opacity:
                        look = {"facecolor": "none", "edgecolor": colour, "linewidth": 0.9}
                    axes.bar(x, height, width * 0.86, base, **look)
                    base += height
    axes.set_ylabel(label)
    if summed:
        axes.set_xticks(range(len(names)), names)
        return f"Time by phase and facility, all rounds together, in {label}"
    axes.set_xlim(0.4, state.round + 0.6)
    axes.set_xlabel("round")
    return f"Time by phase, facility and round, in {label}; the table of rounds has the numbers"


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
