"""Means: by share (McMahan et al. 2017, https://arxiv.org/abs/1602.05629), equal, and FedNova's.

FedNova (Wang et al. 2020, https://arxiv.org/abs/2007.07481) keeps a facility that took more steps
from pulling the objective towards its own: with τᵢ local steps, Δ = τ̄ Σ pᵢΔᵢ/τᵢ, τ̄ = Σ pᵢτᵢ.
"""

from crossfl.server.aggregation_rules.cohort import Cohort


def weighted(cohort: Cohort) -> list[float]:
    """The shares themselves."""
    return cohort.shares


def equal(cohort: Cohort) -> list[float]:
    """The same for each facility."""
    return [1 / len(cohort.shares)] * len(cohort.shares)


def normalised(cohort: Cohort) -> list[float]:
    """FedNova: pᵢτ̄/τᵢ. The coefficients sum to 1 only where all took as many steps."""
    pairs = list(zip(cohort.shares, cohort.steps, strict=True))
    effective = sum(share * steps for share, steps in pairs)
    return [share * effective / steps for share, steps in pairs]
