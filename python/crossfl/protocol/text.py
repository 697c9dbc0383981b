"""The one filter for text that reaches a terminal, a log or the report."""

ELLIPSIS = "…"


def printable(text: str, keep: str = "", longest: int | None = None) -> str:
    r"""Escape what cannot be printed, so that it is visible and no terminal obeys it.

    Control characters, ESC, bidirectional marks and lone surrogates become `\x1b`, `\u202e`, ….

    Args:
        text: any text, of whatever origin.
        keep: characters that stay as they are, for example a newline.
        longest: characters of the result; longer text is cut and ends in "…". Unset, no limit.
    """
    head = text if longest is None else text[: longest + 1]
    escaped = "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in head
    )
    if longest is not None and len(escaped) > longest:
        return escaped[: longest - 1] + ELLIPSIS
    return escaped


def quoted(value: object, longest: int = 60) -> str:
    """A value as Python writes it, printable and short, for an error message."""
    try:
        return printable(repr(value), longest=longest)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of too many digits"
