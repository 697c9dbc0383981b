"""Krum and Multi-Krum: only updates that lie close to most others count.

Blanchard et al. 2017, https://arxiv.org/abs/1703.02757. An update's score is the sum of its squared
distances to its n − f − 2 nearest; with f Byzantine facilities, n ≥ 2f + 3 is needed.
"""

from crossfl.server.aggregation_rules.statistics import UpdateStatistics


def least(num_byzantine: int) -> int:
    """Fewest updates with which the guarantee holds."""
    return 2 * num_byzantine + 3


def krum(statistics: UpdateStatistics) -> list[float]:
    """1 for the update with the smallest score, the first by name where scores tie."""
    return _chosen(statistics, 1)


def multi_krum(statistics: UpdateStatistics) -> list[float]:
    """The plain mean of the n − f − 2 updates with the smallest scores."""
    return _chosen(statistics, len(statistics.shares) - statistics.num_byzantine - 2)


def scores(statistics: UpdateStatistics) -> list[float]:
    """The score of each update, in squared units of the weights."""
    nearest = len(statistics.shares) - statistics.num_byzantine - 2
    distances = statistics.squared_distances().tolist()
    others = [row[:i] + row[i + 1 :] for i, row in enumerate(distances)]
    return [sum(sorted(row)[:nearest]) for row in others]


def _chosen(statistics: UpdateStatistics, count: int) -> list[float]:
    by_score = sorted((score, i) for i, score in enumerate(scores(statistics)))
    chosen = {i for _, i in by_score[:count]}
    return [1 / count if i in chosen else 0.0 for i in range(len(statistics.shares))]
