"""Server optimizers: each turns the combined delta of a round into a step of the global model.

A server optimizer is three names, after fedjax's `init` and `apply`
(Ro et al. 2021, https://arxiv.org/abs/2108.02117):

* `LEARNING_RATE`: the server learning rate where the job file sets none;
* `init(parameter, aggregation)`: the slots it keeps for one fp32 parameter, by name;
* `apply(parameter, delta, slots, aggregation)`: the next parameter and the next slots.

They are pure, elementwise functions on fp32 tensors of one shape, so that any model can be walked
in pieces of any size.
"""

from typing import Protocol, cast

from torch import Tensor

from crossfl.protocol.records import Aggregation
from crossfl.server.optimizers import diloco, fedavg, fedavgm
from crossfl.server.optimizers.adaptive import FedAdagrad, FedAdam, FedYogi
from crossfl.server.optimizers.served_mean import ServedMean

Slots = dict[str, Tensor]


class ServerOptimizer(Protocol):
    """The three names of a server optimizer."""

    LEARNING_RATE: float

    def init(self, parameter: Tensor, aggregation: Aggregation) -> Slots:
        """The slots before the first round."""
        ...

    def apply(
        self, parameter: Tensor, delta: Tensor, slots: Slots, aggregation: Aggregation
    ) -> tuple[Tensor, Slots]:
        """The parameter and the slots after this round's delta."""
        ...


OPTIMIZERS = {
    "fedavg": cast(ServerOptimizer, fedavg),
    "fedavgm": cast(ServerOptimizer, fedavgm),
    "fedadam": FedAdam(),
    "fedyogi": FedYogi(),
    "fedadagrad": FedAdagrad(),
    "diloco": cast(ServerOptimizer, diloco),
}


def of(aggregation: Aggregation) -> ServerOptimizer:
    """The server optimizer the record names, with the served mean if there is to be one."""
    optimizer = OPTIMIZERS[aggregation.server_optimizer]
    return ServedMean(optimizer) if aggregation.mean_rate else optimizer
