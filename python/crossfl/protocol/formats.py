"""Numbers, sizes and durations as people read them.

Each function takes any JSON number, however large, and never raises: what one facility claims must
not keep the others from their report.
"""

import math

from crossfl.protocol.text import printable

MISSING = "–"
"""Stands where nothing is known."""
LARGEST_WHOLE = 1e15
"""Numbers from here on are written with an exponent."""
UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB")
LONGEST_TEXT = 500
"""Characters of a reason or a name that are shown."""
LONGEST_PASSAGE = 1000
"""Characters of a prompt or a completion that are shown."""


def number(value: object, form: str = ",") -> str:
    """A number in a format of Python; a dash where there is none or it is not a number."""
    real = _real(value)
    if real is None:
        return MISSING
    if abs(real) >= LARGEST_WHOLE:
        return _exponential(real)
    # An int as it is: as a float, it would be written with a decimal point.
    return format(value if isinstance(value, int) else real, form)


def count(value: object) -> str:
    """A count of things, in billions where there are so many."""
    real = _real(value)
    if real is None or not 1e9 <= real < LARGEST_WHOLE:
        return number(value)
    return f"{real / 1e9:,.1f} billion"


def size(amount: object) -> str:
    """Bytes in decimal units, three digits."""
    real = _real(amount)
    if real is None:
        return MISSING
    power = 0
    while abs(real) >= 999.5 and power < len(UNITS) - 1:
        real, power = real / 1000, power + 1
    if abs(real) >= LARGEST_WHOLE:
        return f"{_exponential(real)} {UNITS[power]}"
    decimals = 0 if power == 0 or abs(real) >= 99.95 else 1 if abs(real) >= 9.995 else 2
    return f"{real:,.{decimals}f} {UNITS[power]}"


def energy(joules: object) -> str:
    """Joules in watt-hours or kilowatt-hours."""
    real = _real(joules)
    if real is None:
        return MISSING
    hours = real / 3600
    return f"{number(hours, ',.1f')} Wh" if hours < 1000 else f"{number(hours / 1000, ',.1f')} kWh"


def duration(seconds: object) -> str:
    """Seconds as seconds, minutes, hours or days."""
    real = _real(seconds)
    if real is None:
        return MISSING
    if abs(real) >= LARGEST_WHOLE:
        return f"{_exponential(real)} s"
    if real < 99.95:
        return f"{real:.1f} s"
    minutes, rest = divmod(round(real), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 100:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24:,} d {hours % 24} h"


def text(value: object) -> str:
    """A name or a reason on one line, printable and short; a dash where there is none."""
    return MISSING if value is None else printable(str(value), longest=LONGEST_TEXT)


def passage(value: str) -> str:
    """A prompt or a completion, printable and short, its lines kept."""
    return printable(value, keep="\n", longest=LONGEST_PASSAGE)


def moment(iso: str) -> str:
    """A time in ISO 8601 with blanks between date, time and UTC."""
    return text(iso.replace("T", " ").replace("+00:00", " UTC"))


def _real(value: object) -> float | None:
    """A number as a float, an int beyond all floats as infinity; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _exponential(real: float) -> str:
    return f"{real:.2e}" if math.isfinite(real) else "∞" if real > 0 else "-∞"
