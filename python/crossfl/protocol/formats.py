"""How numbers are written for people."""


def size(count: float) -> str:
    """Bytes in decimal units."""
    value, units = count, ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.{0 if units[0] == 'B' else 3 - len(str(int(value)))}f} {units[0]}"
