"""FedAvgM: FedAvg with momentum at the server.

Hsu et al. 2019, https://arxiv.org/abs/1909.06335. With Δ = Σ pᵢ(xᵢ − x), momentum β and server
learning rate η: v ← βv + Δ; x ← x + ηv.
"""

from torch import Tensor, zeros_like

from crossfl.protocol.records import Aggregation

LEARNING_RATE = 1.0


def init(parameter: Tensor, aggregation: Aggregation) -> dict[str, Tensor]:
    """The momentum v, at rest."""
    return {"momentum": zeros_like(parameter)}


def apply(
    parameter: Tensor, delta: Tensor, slots: dict[str, Tensor], aggregation: Aggregation
) -> tuple[Tensor, dict[str, Tensor]]:
    """The next x + ηv and v."""
    velocity = aggregation.server_momentum * slots["momentum"] + delta
    return parameter + aggregation.learning_rate(LEARNING_RATE) * velocity, {"momentum": velocity}
