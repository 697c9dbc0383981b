"""No text of another machine acts on the terminal that shows it.

Errors of a site's login, a scheduler's reasons, the names in an archive and what a job printed all
end in the engine's log.
"""

import logging

from streamflow.log_handler import logger

from crossfl.protocol.text import printable

KEPT = "\n\t"
"""Characters that lay out a message, and do nothing else."""


class Printable(logging.Filter):
    """Escapes what cannot be printed in a record: its message, its traceback and its stack."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record; it is always let through."""
        record.msg, record.args = printable(record.getMessage(), keep=KEPT), None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = printable(record.exc_text, keep=KEPT)
        if record.stack_info:
            record.stack_info = printable(record.stack_info, keep=KEPT)
        return True


def guard() -> None:
    """Install the filter, once, on the engine's log and on what prints the logs of libraries."""
    # First in line: the engine's own filter adds colours, which are to stay.
    if not any(isinstance(f, Printable) for f in logger.filters):
        logger.filters.insert(0, Printable())
    last = logging.lastResort
    if last is not None and not any(isinstance(f, Printable) for f in last.filters):
        last.addFilter(Printable())
