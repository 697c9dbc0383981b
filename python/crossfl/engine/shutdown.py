"""A failure in one message, and the end of a run that the engine would leave hanging.

After a step has failed, StreamFlow 0.2.0rc3 may wait for ever for steps that can no longer run.
It logs what cannot be recovered from its modules `step` and `executor`; what it will try to recover
it logs from `recovery`.
"""

import asyncio
import contextlib
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from streamflow.log_handler import logger

from crossfl.engine.compatibility import source_of
from crossfl.engine.interruption import INTERRUPTION, LIMIT, silence

GRACE = 2.0
"""Seconds that the engine has to end by itself."""
MAIN = {"streamflow.main": "_async_run", "streamflow.cwl.runner": "_async_main"}
"""The engine's outermost coroutines, of `streamflow run` and of `cwl-runner`, by their module."""
FINAL = ("streamflow.workflow.step", "streamflow.workflow.executor", "streamflow.main")
"""The modules of the engine that log what nothing can recover."""
OUTERMOST = "main"
"""The one of them whose message is the last."""
OURS = Path(__file__).parents[1]
FINAL_MODULES = {name.rpartition(".")[2] for name in FINAL}


class Ending(logging.Filter):
    """Lets one message through for each failure, and ends the run after one that is final."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[str] = set()
        self._ending = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Decide on a record of the engine's log; its tracebacks are for `--debug`."""
        debugging: bool = logger.isEnabledFor(logging.DEBUG)
        if INTERRUPTION.number is not None:
            if record.levelno >= logging.ERROR and record.module == OUTERMOST:
                INTERRUPTION.exit()  # in place of what the engine makes of it
            return debugging
        if self._ending and Path(record.pathname).is_relative_to(OURS):
            return True  # jobs that are being cancelled, or could not be
        if record.levelno < logging.ERROR:
            return not self._ending
        final = record.module in FINAL_MODULES and not self._ending
        if final:
            self._end_soon()
        if debugging:
            return True
        message = record.getMessage()
        if not message or message in self._shown or (self._ending and not final):
            return False
        self._shown.add(message)
        record.exc_info = record.exc_text = None
        return True

    def _end_soon(self) -> None:
        self._ending = True
        if not logger.isEnabledFor(logging.DEBUG):
            # The message is being said: no tracebacks of the tasks that are now given up.
            sys.excepthook = _quiet_cancellation
        silence()
        with contextlib.suppress(RuntimeError):  # no loop any more: the engine has ended by itself
            asyncio.get_running_loop().call_later(GRACE, self._end)

    def _end(self) -> None:
        timer = threading.Timer(LIMIT, os._exit, args=(1,))
        timer.daemon = True
        timer.start()
        INTERRUPTION.end_run()


def missing_names() -> Iterator[str]:
    """What this module relies on and the installed engine does not have."""
    for module, coroutine in MAIN.items():
        if f"async def {coroutine}(" not in source_of(module):
            yield f"the coroutine {module}.{coroutine}"
    for module in FINAL:
        if not re.search(r"logger\.(error|exception)\(", source_of(module)):
            yield f"the error messages of {module}"


def is_run() -> bool:
    """Whether the engine runs workflows, and is not asked about those it ran before."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop
        return False
    return task is not None and getattr(task.get_coro(), "__name__", "") in MAIN.values()


def watch() -> None:
    """Install the filter on the engine's log, once."""
    if not any(isinstance(f, Ending) for f in logger.filters):
        logger.addFilter(Ending())


def _quiet_cancellation(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if not issubclass(kind, asyncio.CancelledError):
        sys.__excepthook__(kind, error, trace)
