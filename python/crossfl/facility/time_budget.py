"""Time is a budget: when it is spent, training stops after a step and delivers what it has done.

It is spent when the round has used its `max_seconds`, when the job is about to reach the end that
its scheduler has set, or when somebody says so: Slurm's `--signal=USR1@…`, a preemption or a cancel
(SIGTERM). The last is heard from the moment on that `StopSignal.listen` was called.
"""

import signal
import time
from collections.abc import Callable
from types import FrameType

from crossfl.facility import scheduler
from crossfl.protocol.records import Training

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """The order to stop, as a signal; a second one of its kind ends the process as ever."""

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the signal, once there was one."""
        self.passed_on: Callable[[], None] | None = None
        """What else is to be done then: a process that waits for its ranks has them told."""

    def listen(self) -> "StopSignal":
        """Take the signals from now on; to be called in the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
        if self.passed_on is not None:
            self.passed_on()


class Budget:
    """The time that a round of training may take.

    Args:
        training: `max_seconds`, and the `reserve_seconds` that saving is given before the job ends.
        stop: the order to stop.
        used: seconds of the round that earlier attempts have spent.
        after: seconds that what follows the training takes, beside saving.
        scheduled: whether to ask the scheduler for the job's end; one rank is enough.
    """

    def __init__(
        self,
        training: Training,
        stop: StopSignal,
        used: float = 0.0,
        after: float = 0.0,
        scheduled: bool = True,
    ) -> None:
        self._stop, self._used, self._begun = stop, used, time.monotonic()
        self._last, self._longest = self._begun, 0.0
        self._most = training.max_seconds
        self._reserve = training.reserve_seconds + after
        end = scheduler.job_end() if scheduled else None
        self._end = None if end is None else self._begun + end - time.time()

    @property
    def used(self) -> float:
        """Seconds of training in this round, over all attempts."""
        return self._used + time.monotonic() - self._begun

    def spent(self) -> str | None:
        """Why no step is to begin any more; None while there is time. To be asked before each."""
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now
        if self._stop.received is not None:
            return f"{self._stop.received} was received"
        if self._most is not None and self.used >= self._most:
            return f"max_seconds {self._most:g} were used"
        if self._end is not None and now + self._longest + self._reserve >= self._end:
            return f"the job ends in {max(self._end - now, 0):.0f} s"
        return None
