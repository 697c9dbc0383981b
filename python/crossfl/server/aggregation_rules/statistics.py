"""The updates of one round, as the aggregation rules see them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class UpdateStatistics:
    """Facilities in sorted order; every list is in that order."""

    shares: list[float]
    """Shares by the record's weighting; they sum to 1."""
    steps: list[float]
    """Local optimizer steps that FedNova divides by."""
    num_byzantine: int
    """How many of the facilities are to be withstood."""
    products: Tensor
    """Inner products of the updates, fp64 [facilities, facilities]; zeros if none were needed."""

    def squared_distances(self) -> Tensor:
        """‖Δᵢ − Δⱼ‖², fp64 [facilities, facilities]."""
        squares = self.products.diagonal()
        return (squares[:, None] + squares[None, :] - 2 * self.products).clamp(min=0)
