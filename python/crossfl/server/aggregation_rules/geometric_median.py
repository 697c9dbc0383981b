"""RFA: the point whose weighted sum of distances to the updates is smallest.

Pillutla et al. 2022, https://arxiv.org/abs/1912.13445, by the smoothed Weiszfeld algorithm. The
point is always a mean of the updates, so distances follow from their inner products alone: the
updates are read once for the products, and once more for the mean, whatever the iterations.
"""

import torch

from crossfl.server.aggregation_rules.statistics import UpdateStatistics

ITERATIONS = 1000
SMOOTHING = 1e-6
"""Least distance that counts, as a part of the median distance between updates."""
TOLERANCE = 1e-12
"""Largest change of a coefficient at which it has converged."""


def geometric_median(statistics: UpdateStatistics) -> list[float]:
    """Coefficients of the geometric median; they sum to 1."""
    shares = torch.tensor(statistics.shares, dtype=torch.float64)
    between = statistics.squared_distances()
    floor = max(SMOOTHING * float(between.sqrt().median()), 1e-300)
    coefficients = shares
    for _ in range(ITERATIONS):
        # ‖Σcⱼxⱼ − xᵢ‖² from the distances between updates: no large squares to cancel.
        towards = between @ coefficients
        squared = towards - coefficients @ towards / 2
        pull = shares / squared.clamp(min=0).sqrt().clamp(min=floor)
        before, coefficients = coefficients, pull / pull.sum()
        if float((coefficients - before).abs().max()) <= TOLERANCE:
            break
    return [float(c) for c in coefficients]
