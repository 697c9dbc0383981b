"""DiLoCo: an outer SGD with Nesterov momentum on the pseudo-gradient −Δ.

Douillard et al. 2023, https://arxiv.org/abs/2311.08105. With g = −Δ, momentum μ and server learning
rate η, as `torch.optim.SGD(nesterov=True)`: m ← μm + g; x ← x − η(g + μm).
"""

from torch import Tensor, zeros_like

from crossfl.protocol.records import Aggregation

LEARNING_RATE = 0.7


def init(parameter: Tensor, aggregation: Aggregation) -> dict[str, Tensor]:
    """The outer momentum m, at rest."""
    return {"momentum": zeros_like(parameter)}


def apply(
    parameter: Tensor, delta: Tensor, slots: dict[str, Tensor], aggregation: Aggregation
) -> tuple[Tensor, dict[str, Tensor]]:
    """The next x − η(g + μm), and the next m."""
    rate, momentum = aggregation.learning_rate(LEARNING_RATE), aggregation.server_momentum
    gradient = -delta
    velocity = momentum * slots["momentum"] + gradient
    return parameter - rate * (gradient + momentum * velocity), {"momentum": velocity}
