"""FedNova: a facility that took more steps does not pull the objective towards its own.

Wang et al. 2020, https://arxiv.org/abs/2007.07481. With τᵢ local steps, Δ = τ̄ Σ pᵢΔᵢ/τᵢ, where
τ̄ = Σ pᵢτᵢ. An update of fewer steps than were asked for counts as one of a quarter of them at
least, so that nobody multiplies its delta by claiming few steps.
"""

from crossfl.server.aggregation_rules.statistics import UpdateStatistics


def normalised(statistics: UpdateStatistics) -> list[float]:
    """The coefficients pᵢτ̄/τᵢ, which sum to 1 only where all took as many steps."""
    pairs = list(zip(statistics.shares, statistics.steps, strict=True))
    effective = sum(share * steps for share, steps in pairs)
    return [share * effective / steps for share, steps in pairs]
