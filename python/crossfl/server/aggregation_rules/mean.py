"""Means: by share (McMahan et al. 2017, https://arxiv.org/abs/1602.05629), and equal."""

from crossfl.server.aggregation_rules.statistics import UpdateStatistics


def weighted(statistics: UpdateStatistics) -> list[float]:
    """The shares themselves."""
    return statistics.shares


def equal(statistics: UpdateStatistics) -> list[float]:
    """The same for each facility."""
    return [1 / len(statistics.shares)] * len(statistics.shares)
