"""Charts as small SVG elements: lines over numeric axes, and spans in rows.

They take colours and sizes of text from the page around them, so that one drawing fits a telephone,
a wide screen, the dark and paper. A plotting library writes ten times the bytes, and takes longer
than a report may.
"""

import html
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

WIDTH = 720.0
"""Of a drawing, in its own units; the page scales it."""
HEIGHT = 250.0
LEFT, RIGHT, TOP, BOTTOM = 66.0, 18.0, 14.0, 46.0
"""Room around a plot, for labels that are large on small screens."""
ROW, BAR = 30.0, 10.0
"""Height of a row with its name above, and of the bar in it."""
THINNEST = 0.35
"""Widest gap between two spans of a kind that are drawn as one, and the least width of one."""
GLYPHS = ("●", "■", "▲", "◆", "▼", "★", "✚")
COLOURS = 8
"""Colours, `--c0` and on, that the page defines for light and for dark."""
LARGEST = 1e300
MOST_MARKS = 14
"""Marks on one line, about."""


@dataclass(frozen=True)
class Line:
    """One line of a chart: points in order; a NaN or an infinity is a gap."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int
    """Number of its colour and its mark."""
    large_end: bool = False
    thin: bool = False


@dataclass(frozen=True)
class Span:
    """A stretch of a row, of a kind."""

    kind: str
    start: float
    end: float

    def since(self, moment: float, unit: float = 1.0) -> "Span":
        """The same, counted from a moment, in another unit."""
        return Span(self.kind, (self.start - moment) / unit, (self.end - moment) / unit)


def ticks(low: float, high: float, most: int = 6, *, whole: bool = False) -> list[float]:
    """Round numbers between two bounds, both included where they are round."""
    if not (math.isfinite(low) and math.isfinite(high)) or high - low > LARGEST:
        return []
    if high <= low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 0.0
    if power <= 0 or not math.isfinite(1 / power):
        return [low]
    step = next((m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999), 10 * power)
    if whole:
        step = max(1.0, math.ceil(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if last - first > 4 * most:
        return [low]
    return [n * step for n in range(first, last + 1)]


def _shown(value: float) -> str:
    """A number on an axis."""
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.4g}"


def _at(value: float) -> str:
    """A coordinate in few characters."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


class Axis:
    """Maps values to a length, on a linear or a logarithmic scale."""

    def __init__(self, low: float, high: float, begin: float, end: float, *, log: bool = False):
        self.log = log
        self._low, self._high = (math.log(low), math.log(high)) if log else (low, high)
        self._begin, self._end = begin, end
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        """Where a value lies."""
        value = math.log(value) if self.log else value
        width = self._high - self._low
        share = (value - self._low) / width if width > 0 else 0.5
        return self._begin + share * (self._end - self._begin)

    def ticks(self, *, whole: bool = False, most: int = 6) -> list[float]:
        """Where to put labels."""
        if not self.log:
            return ticks(self.low, self.high, most, whole=whole)
        bottom, top = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        digits = (1, 2, 5) if top - bottom <= 3 else (1,)
        powers = range(bottom, top + 1, max(1, (top - bottom) // 6))
        candidates = (m * 10.0**p for p in powers for m in digits)
        return [v for v in candidates if self.low * 0.999 <= v <= self.high * 1.001]


def chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    description: str,
    *,
    whole_x: bool = False,
    may_be_log: bool = False,
) -> str:
    """A chart of lines, as one SVG element; without a point, its axes alone.

    Args:
        lines: what to draw.
        x_label: unit of the first coordinate.
        y_label: unit of the second.
        description: what it shows, for those who do not see it.
        whole_x: whether only whole numbers are worth a label.
        may_be_log: whether values over more than a factor of ten make the scale logarithmic.
    """
    finite = [p for line in lines for p in line.points if _is_finite(p)]
    xs, ys = [x for x, _ in finite] or [0.0, 1.0], [y for _, y in finite] or [0.0, 1.0]
    log = may_be_log and min(ys) > 0 and max(ys) > 10 * min(ys) and max(ys) < LARGEST
    low, high = min(ys), max(ys)
    if not log:
        room = (high - low) * 0.06 or abs(high) * 0.05 or 0.5
        low, high = low - room if low < 0 or low > room else min(low, 0.0), high + room
    x_axis = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_axis = Axis(low, high, HEIGHT - BOTTOM, TOP, log=log)
    parts = [
        _grid(x_axis, y_axis, HEIGHT, x_ticks=x_axis.ticks(whole=whole_x), y_ticks=y_axis.ticks()),
        _labels(x_label, y_label, HEIGHT),
        *(_line(line, x_axis, y_axis) for line in lines),
    ]
    return _element("".join(parts), HEIGHT, description)


def rows(
    names: Sequence[str],
    spans: Sequence[Iterable[Span]],
    kinds: Sequence[str],
    x_label: str,
    description: str,
    end: float,
) -> str:
    """Spans in rows, one row for each name, as one SVG element.

    Args:
        names: those of the rows, short enough for one.
        spans: of each row.
        kinds: all kinds there are; the first is drawn as an outline.
        x_label: unit of the axis.
        description: what it shows, for those who do not see it.
        end: of the axis, which begins at 0.
    """
    height = TOP + ROW * max(1, len(names)) + BOTTOM
    x_axis = Axis(0.0, end if 0 < end < LARGEST else 1.0, 8.0, WIDTH - RIGHT)
    parts = [_grid(x_axis, None, height, x_ticks=x_axis.ticks(), y_ticks=[])]
    for i, (name, row) in enumerate(zip(names, spans, strict=True)):
        top = TOP + i * ROW
        text = html.escape(name)
        parts.append(f'<text class="name" x="8" y="{_at(top + 13)}">{text}</text>')
        by_kind: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for span in row:
            if math.isfinite(span.start) and math.isfinite(span.end) and span.end > span.start:
                first = max(x_axis(0.0), min(x_axis(span.start), x_axis(x_axis.high)))
                last = max(first, min(x_axis(span.end), x_axis(x_axis.high)))
                by_kind[span.kind].append((first, last))
        parts += [
            f'<path class="p-{kind}" transform="translate(0 {_at(top + 17)})" d="{_boxes(found)}"/>'
            for kind, found in by_kind.items()
            if found
        ]
    parts.append(_labels(x_label, "", height))
    return _element("".join(parts), height, description)


def _boxes(found: Sequence[tuple[float, float]]) -> str:
    """Rectangles of one height as one path; those that touch become one."""
    merged: list[list[float]] = []
    for first, last in sorted(found):
        if merged and first - merged[-1][1] <= THINNEST / 2:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    parts = []
    for first, last in merged:
        width = _at(max(last - first, THINNEST))
        parts.append(f"M{_at(first)} 0h{width}v{_at(BAR)}h-{width}z")
    return "".join(parts)


def _line(line: Line, x_axis: Axis, y_axis: Axis) -> str:
    runs: list[list[str]] = [[]]
    drawn: list[tuple[float, float]] = []
    for point in line.points:
        if not _is_finite(point) or (y_axis.log and point[1] <= 0):
            runs.append([])
            continue
        x, y = x_axis(point[0]), y_axis(point[1])
        drawn.append((x, y))
        runs[-1].append(f"{_at(x)} {_at(y)}")
    path = "".join("M" + "L".join(run) for run in runs if run)
    if not path:
        return ""
    colour = f"l{line.style % COLOURS}"
    stride = max(1, math.ceil(len(drawn) / MOST_MARKS))
    marks = [] if line.thin else drawn[:-1:stride]
    glyph = GLYPHS[line.style % len(GLYPHS)]
    parts = [f'<path class="{colour}{" thin" if line.thin else ""}" d="{path}"/>']
    parts += [_mark(x, y, glyph, f"{colour} m") for x, y in marks]
    parts.append(_mark(*drawn[-1], glyph, f"{colour} {'end' if line.large_end else 'm'}"))
    return "".join(parts)


def _mark(x: float, y: float, glyph: str, kind: str) -> str:
    return f'<text class="{kind}" x="{_at(x)}" y="{_at(y)}">{glyph}</text>'


def _grid(
    x_axis: Axis,
    y_axis: Axis | None,
    height: float,
    *,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
) -> str:
    parts = []
    bottom = height - BOTTOM
    for value in y_ticks if y_axis else ():
        y = _at(y_axis(value)) if y_axis else "0"
        parts.append(f'<path class="rule" d="M{_at(LEFT)} {y}H{_at(WIDTH - RIGHT)}"/>')
        parts.append(f'<text class="y" x="{_at(LEFT - 8)}" y="{y}">{_shown(value)}</text>')
    for value in x_ticks:
        x = _at(x_axis(value))
        if y_axis is None:
            parts.append(f'<path class="rule" d="M{x} {_at(TOP)}V{_at(bottom)}"/>')
        parts.append(f'<text class="x" x="{x}" y="{_at(bottom + 16)}">{_shown(value)}</text>')
    return "".join(parts)


def _labels(x_label: str, y_label: str, height: float) -> str:
    middle = _at((LEFT + WIDTH - RIGHT) / 2)
    parts = [f'<text class="x" x="{middle}" y="{_at(height - 8)}">{html.escape(x_label)}</text>']
    if y_label:
        place = f"translate(14 {_at((TOP + height - BOTTOM) / 2)}) rotate(-90)"
        parts.append(f'<text class="x side" transform="{place}">{html.escape(y_label)}</text>')
    return "".join(parts)


def _element(body: str, height: float, description: str) -> str:
    label = html.escape(description)
    box = f"0 0 {_at(WIDTH)} {_at(height)}"
    return f'<svg viewBox="{box}" role="img" aria-label="{label}">{body}</svg>'


def _is_finite(point: tuple[float, float]) -> bool:
    return all(math.isfinite(v) and abs(v) < LARGEST for v in point)


def spans_of(start: float, lengths: Iterable[tuple[str, float]]) -> Iterator[Span]:
    """Spans one after the other."""
    for kind, length in lengths:
        if length > 0:
            yield Span(kind, start, start + length)
        start += length
