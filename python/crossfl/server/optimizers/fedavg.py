"""FedAvg: move to the weighted mean of the local models.

McMahan et al. 2017, https://arxiv.org/abs/1602.05629. With Δ = Σ pᵢ(xᵢ − x) and server learning
rate η: x ← x + ηΔ.
"""

from torch import Tensor, add

from crossfl.protocol.records import Aggregation

LEARNING_RATE = 1.0


def init(parameter: Tensor, aggregation: Aggregation) -> dict[str, Tensor]:
    """FedAvg keeps nothing."""
    return {}


def apply(
    parameter: Tensor, delta: Tensor, slots: dict[str, Tensor], aggregation: Aggregation
) -> tuple[Tensor, dict[str, Tensor]]:
    """The next x + ηΔ."""
    return add(parameter, delta, alpha=aggregation.learning_rate(LEARNING_RATE)), {}
