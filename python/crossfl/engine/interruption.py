"""A run that is interrupted ends cleanly, and one line says what became of it.

The engine heeds SIGINT alone, and not where a shell started it in the background. It then prints
tracebacks, and a second Ctrl-C stops it from cancelling what waits in a queue.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

from crossfl.protocol.text import printable

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LIMIT = 45.0
"""Seconds that a run may take to end: a submission under way and the cancelling take 20 s each."""


def silence() -> None:
    """Print no tracebacks of the tasks that are given up, unless `--debug` asks for them."""
    if not logging.getLogger("streamflow").isEnabledFor(logging.DEBUG):
        sys.unraisablehook = lambda _: None
        logging.getLogger("asyncio").disabled = True


async def finish(work: Coroutine[Any, Any, None]) -> None:
    """Do something to its end, and only then be cancelled."""
    task, interrupt = asyncio.create_task(work), None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            interrupt = error
    if interrupt:
        raise interrupt


@dataclass
class Cancellation:
    """Jobs that an interrupted run takes out of a queue."""

    deployment: str
    scheduler: str
    jobs: tuple[str, ...]
    problem: str | None = "the scheduler did not answer in time"
    """Why they may still be there; none once the scheduler has removed them."""


@dataclass
class Interruption:
    """What the run in this process does when a signal ends it, and says about it."""

    number: signal.Signals | None = None
    """The signal that ended the run."""
    journals: list[Path] = field(default_factory=list)
    _is_run: bool = True
    _running: Counter[str] = field(default_factory=Counter)
    _ended: list[str] = field(default_factory=list)
    _cancellations: list[Cancellation] = field(default_factory=list)
    _task: asyncio.Task[Any] | None = None
    _ending: bool = False

    @property
    def status(self) -> int:
        """The exit status of the process, as a shell counts a signal; 0 where none came."""
        return 128 + self.number if self.number else 0

    def heed(self, *, is_run: bool) -> None:
        """Let signals end the current task, which is that of the whole process.

        A signal that whoever started the process had ignored (``nohup``, ``&``) stays so.

        Args:
            is_run: whether it is a run of a workflow, of which a journal may keep rounds.
        """
        self._is_run, self._task = is_run, asyncio.current_task()
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, self._receive)

    @contextlib.contextmanager
    def running(self, deployment: str) -> Iterator[None]:
        """Count a job of a deployment for as long as it goes on."""
        self._running[deployment] += 1
        try:
            yield
        finally:
            self._running[deployment] -= 1

    def cancel(self, deployment: str, scheduler: str, jobs: list[str]) -> Cancellation:
        """Note that jobs are being cancelled, which `summary` tells where it was a signal."""
        cancellation = Cancellation(deployment, scheduler, tuple(jobs))
        if self.number:
            self._cancellations.append(cancellation)
        return cancellation

    def summary(self, *, late: bool = False) -> str:
        """One line: what was ended, what is kept, and how to go on.

        Args:
            late: whether the run was given up before it had ended by itself.
        """
        assert self.number is not None
        left = [cancellation for cancellation in self._cancellations if cancellation.problem]
        queued = {c.deployment: f" ({c.scheduler} {' '.join(c.jobs)})" for c in self._cancellations}
        names = sorted({*self._ended, *queued} - {cancellation.deployment for cancellation in left})
        jobs = ", ".join(f"{name}{queued.get(name, '')}" for name in names)
        parts = [f"ended the jobs at {jobs}"] if names else []
        parts += [
            f"{c.scheduler} jobs {' '.join(c.jobs)} at {c.deployment} could not be cancelled, "
            f"cancel them there: {c.problem}"
            for c in left
        ]
        if not parts:
            parts.append("no job was going on")
        if late:
            parts.append(f"it did not end within {LIMIT:.0f} s: look for jobs that are left")
        if kept := ", ".join(map(str, self.journals)):
            parts.append(f"finished rounds are kept in {kept}; the same command goes on from there")
        elif self._is_run:
            parts.append("there is no journal here; the same command begins anew")
        return printable(f"interrupted ({self.number.name}): {'; '.join(parts)}")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: the first one ends the run, another one is only answered."""
        if self.number is not None:
            with contextlib.suppress(OSError):
                os.write(2, f"still ending the jobs, for {LIMIT:.0f} s at most\n".encode())
            return
        if self._task is None or self._task.done():
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)
            signal.raise_signal(number)
            return
        self.number = signal.Signals(number)
        timer = threading.Timer(LIMIT, self._give_up)
        timer.daemon = True
        timer.start()
        self._task.get_loop().call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self._ended = sorted(name for name, count in self._running.items() if count)
        silence()
        sys.excepthook = self._conclude
        self.end_run()

    def end_run(self) -> None:
        """Cancel the task of the run, once: it then undeploys, and so cancels its jobs."""
        if self._task is not None and not self._ending:
            self._ending = True
            self._task.cancel()

    def _conclude(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if not issubclass(kind, asyncio.CancelledError):
            sys.__excepthook__(kind, error, trace)
        self.exit()

    def exit(self) -> NoReturn:
        """Say the line, and end the process with the status of the signal.

        Raises:
            SystemExit: always.
        """
        for number in SIGNALS:  # one more would change the status
            signal.signal(number, signal.SIG_IGN)
        self._say(late=False)
        raise SystemExit(self.status)

    def _give_up(self) -> None:
        self._say(late=True)
        os._exit(self.status)

    def _say(self, *, late: bool) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody listens any more
            print(self.summary(late=late), file=sys.stderr, flush=True)


INTERRUPTION = Interruption()
"""That of this process, which has one run at a time."""
