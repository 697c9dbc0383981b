"""Combinations: each makes one delta of the deltas of a round.

Most are linear: given shares, steps and inner products of the updates they name one coefficient for
each facility, and the combined delta is Σ cᵢΔᵢ. The coordinatewise ones look at every number apart.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from crossfl.protocol.records import Aggregation
from crossfl.server.aggregation_rules import coordinatewise, krum, mean
from crossfl.server.aggregation_rules.cohort import Cohort
from crossfl.server.aggregation_rules.geometric_median import geometric_median

__all__ = ["COMBINATIONS", "Cohort", "Combination", "of"]


@dataclass(frozen=True)
class Combination:
    """One way to combine: its coefficients, and what it does to the numbers at one coordinate."""

    coefficients: Callable[[Cohort], list[float]]
    """The coefficient of each facility, in the order of the cohort."""
    least: Callable[[int], int] = lambda dishonest: 1
    """Fewest updates it can combine, given how many of them may be dishonest."""
    pairwise: bool = False
    """Whether the coefficients need the inner products, hence a walk of their own."""
    coordinatewise: Callable[[list[Tensor], int], Tensor] | None = None
    """Of [n] tensors, one for each facility, and the number of dishonest ones, one [n] tensor."""


COMBINATIONS = {
    "mean": Combination(mean.weighted),
    "fednova": Combination(mean.normalised),
    "median": Combination(mean.equal, coordinatewise=coordinatewise.median),
    "trimmed_mean": Combination(
        mean.equal,
        least=lambda dishonest: 2 * dishonest + 1,
        coordinatewise=coordinatewise.trimmed_mean,
    ),
    "krum": Combination(krum.krum, least=krum.least, pairwise=True),
    "multi_krum": Combination(krum.multi_krum, least=krum.least, pairwise=True),
    "geometric_median": Combination(geometric_median, pairwise=True),
}


def of(aggregation: Aggregation) -> Combination:
    """The combination the record names."""
    return COMBINATIONS[aggregation.combination]
