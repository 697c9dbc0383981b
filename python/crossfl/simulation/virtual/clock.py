"""Virtual time: what is to happen when, one thing after the other."""

import heapq
import itertools
from collections.abc import Callable
from typing import Any


class Clock:
    """The moment that a simulation has come to, and all that is still to happen.

    Args:
        now: the moment to begin at, in seconds.
    """

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self._coming: list[tuple[float, int, Callable[..., Any], tuple[Any, ...]]] = []
        self._order = itertools.count()

    def after(self, seconds: float, call: Callable[..., Any], *arguments: Any) -> None:
        """Call a function so many seconds from now; what is due at once keeps its order."""
        item = (self.now + max(seconds, 0.0), next(self._order), call, arguments)
        heapq.heappush(self._coming, item)

    def run(self, until: Callable[[], bool], horizon: float) -> bool:
        """Let things happen until a condition holds; False where the horizon came first."""
        while not until():
            if not self._coming or self._coming[0][0] > horizon:
                self.now = horizon
                return False
            self.now, _, call, arguments = heapq.heappop(self._coming)
            call(*arguments)
        return True
