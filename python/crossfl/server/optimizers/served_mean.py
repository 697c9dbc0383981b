"""The served mean: a running mean of the global models, which is measured and delivered.

Where rounds close early, the newest model swings with whose update came last. With model x, mean x̄
and rate a: x̄ ← x̄ + a (x − x̄). Facilities train from x; x̄ is what the federation ends with. It is
a slot of the server state beside those of the server optimizer, whichever that is. Means of the
last iterates go back to Polyak and Juditsky 1992, https://doi.org/10.1137/0330046.
"""

from typing import TYPE_CHECKING

from torch import Tensor, lerp

from crossfl.protocol.layout import MEAN
from crossfl.protocol.records import Aggregation

if TYPE_CHECKING:
    from crossfl.server.optimizers import ServerOptimizer


class ServedMean:
    """A server optimizer that keeps the mean of its models, too.

    Args:
        optimizer: the server optimizer; its steps stay as they are.
    """

    def __init__(self, optimizer: "ServerOptimizer") -> None:
        self._optimizer = optimizer
        self.LEARNING_RATE = optimizer.LEARNING_RATE

    def init(self, parameter: Tensor, aggregation: Aggregation) -> dict[str, Tensor]:
        """The slots of the server optimizer, and the first model as the mean."""
        return self._optimizer.init(parameter, aggregation) | {MEAN: parameter.clone()}

    def apply(
        self, parameter: Tensor, delta: Tensor, slots: dict[str, Tensor], aggregation: Aggregation
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The server optimizer's next x and slots, and x̄ + a (x − x̄)."""
        next_, kept = self._optimizer.apply(parameter, delta, slots, aggregation)
        return next_, kept | {MEAN: lerp(slots[MEAN], next_, aggregation.mean_rate)}
