"""Aggregation rules: each makes one delta of the deltas of a round.

Most are linear: given shares, steps and inner products of the updates they name one coefficient for
each facility, and the combined delta is Σ cᵢΔᵢ. The coordinatewise ones look at every number apart.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from crossfl.protocol.records import Aggregation
from crossfl.server.aggregation_rules import coordinatewise, fednova, krum, mean
from crossfl.server.aggregation_rules.geometric_median import geometric_median
from crossfl.server.aggregation_rules.statistics import UpdateStatistics

__all__ = ["RULES", "AggregationRule", "UpdateStatistics", "of"]


@dataclass(frozen=True)
class AggregationRule:
    """One way to combine: its coefficients, and what it does to the numbers at one coordinate."""

    coefficients: Callable[[UpdateStatistics], list[float]]
    """The coefficient of each facility, in the order of the statistics."""
    least: Callable[[int], int] = lambda num_byzantine: 1
    """Fewest updates it can combine, given how many facilities it is to withstand."""
    pairwise: bool = False
    """Whether the coefficients need the inner products, hence a walk of their own."""
    coordinatewise: Callable[[list[Tensor], int], Tensor] | None = None
    """Of [n] tensors, one for each facility, and the number to withstand, one [n] tensor."""


RULES = {
    "mean": AggregationRule(mean.weighted),
    "fednova": AggregationRule(fednova.normalised),
    "median": AggregationRule(mean.equal, coordinatewise=coordinatewise.median),
    "trimmed_mean": AggregationRule(
        mean.equal,
        least=lambda num_byzantine: 2 * num_byzantine + 1,
        coordinatewise=coordinatewise.trimmed_mean,
    ),
    "krum": AggregationRule(krum.krum, least=krum.least, pairwise=True),
    "multi_krum": AggregationRule(krum.multi_krum, least=krum.least, pairwise=True),
    "geometric_median": AggregationRule(geometric_median, pairwise=True),
}


def of(aggregation: Aggregation) -> AggregationRule:
    """The aggregation rule the record names."""
    return RULES[aggregation.aggregation_rule]
