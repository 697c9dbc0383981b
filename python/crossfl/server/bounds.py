"""Bounds: what an update may claim of its training, and how large it may be.

Claims are held against what was asked. Norms are compared per unit of training, which is an
*effective step*: a step weighted by its learning rate over the peak, so that the warm-up and the
end of a schedule count as what they move. Between an update of e steps and one of e', the norm of
AdamW's delta grows by at least √(e/e') (steps in random directions) and at most e/e' (all in one);
the bound allows for the larger of the two.

An update that was cut off may be as large as one after its whole task: AdamW's first step moves
every weight by the learning rate, near an optimum farther than forty steps get; and a lossy
encoding adds what it left out of the rounds before. FedNova divides by the steps that were taken,
so there these alone count.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Protocol

from crossfl.errors import CrossFLError
from crossfl.protocol.manifest import UpdateManifest
from crossfl.protocol.records import Aggregation, Allowance
from crossfl.protocol.state import ServerState

LARGEST_NORM = 1e18
"""Norms whose squares, summed over rounds, fp32 would not hold, and so neither the server state."""
SMALLEST_COHORT = 3
"""Updates from which on the median of a round says something about each of them."""


class Measured(Protocol):
    """An update whose norm is known."""

    @property
    def facility(self) -> str:
        """Who made it."""
        ...

    @property
    def effective_steps(self) -> float:
        """Its steps, each weighted by its learning rate over the peak."""
        ...

    @property
    def effective_steps_of_task(self) -> float:
        """The same of all steps that were asked for."""
        ...


def check_claims(
    stated: UpdateManifest, allowance: Allowance | None, aggregation: Aggregation
) -> None:
    """Check what an update claims of its training; those of one that is not there are ignored.

    Raises:
        CrossFLError: it claims more than was asked, or nothing where it needs a weight.
    """
    if stated.status in ("absent", "late"):
        return
    if allowance is not None:
        if stated.status == "complete" and stated.steps != allowance.steps:
            raise CrossFLError(
                f"it is complete and claims {stated.steps} steps, and was asked for "
                f"{allowance.steps}"
            )
        for unit, claim, most in (
            ("steps", stated.steps, allowance.steps),
            ("samples", stated.samples, allowance.samples),
            ("tokens", stated.tokens, allowance.tokens),
        ):
            if claim > most:
                raise CrossFLError(f"it claims {claim} {unit}, the task allows {most}")
    if stated.steps == 0:
        # Its norm could not be held against that of others, step by step.
        raise CrossFLError("it claims 0 steps: a facility that takes none is absent")
    if aggregation.weighting != "equal":
        claim = weight(stated, aggregation)
        if aggregation.max_weight is not None and claim > aggregation.max_weight:
            raise CrossFLError(
                f"it claims {claim} {aggregation.weighting}, the largest weight allowed is "
                f"{aggregation.max_weight}"
            )
        if claim == 0:
            raise CrossFLError(
                f"the update reports 0 {aggregation.weighting}; with weighting: "
                f"{aggregation.weighting} it cannot be averaged"
            )


def weight(stated: UpdateManifest, aggregation: Aggregation) -> int:
    """What a facility's share is proportional to."""
    return weight_of(aggregation, stated.tokens, stated.samples, stated.steps)


def weight_of(aggregation: Aggregation, tokens: int, samples: int, steps: int) -> int:
    """What of so much training a share is proportional to, by the record's weighting."""
    weights = {"tokens": tokens, "samples": samples, "steps": steps, "equal": 1}
    return weights[aggregation.weighting]


def check_norms(
    squares: Mapping[str, float], updates: Sequence[Measured], state: ServerState
) -> dict[str, str]:
    """Reasons to refuse updates, by facility.

    Args:
        squares: sum of squares of each update, by facility; NaN if it could not be decoded.
        updates: the updates.
        state: server state of the round, with the norms of the last rounds.
    """
    reasons: dict[str, str] = {}
    rules = state.aggregation
    most, ratio = min(rules.max_norm, LARGEST_NORM), rules.max_norm_ratio
    steps = {update.facility: update.effective_steps for update in updates}
    allowed = steps
    if rules.aggregation_rule != "fednova":
        allowed = {update.facility: update.effective_steps_of_task for update in updates}
    norms = {f: math.sqrt(s) for f, s in squares.items() if math.isfinite(s)}
    cohort = [(norm, steps[f]) for f, norm in norms.items() if norm <= most]
    if not rules.waits_for_all:  # few updates come at once: those before them say what is usual
        cohort += [
            (past.norm, past.effective_steps)
            for known in state.ledger.values()
            for past in known.recent
        ]
    for facility in squares:
        norm = norms.get(facility)
        if norm is None:
            reasons[facility] = "it has values that are not finite or could not be decoded"
        elif norm > most:
            reasons[facility] = f"its norm is {norm:.6g}, above {most:g}"
        else:
            past = [(p.norm, p.effective_steps) for p in state.ledger_of(facility).recent]
            peers = cohort if len(cohort) >= SMALLEST_COHORT else []
            for others, whose in ((peers, "the round's"), (past, "its own last rounds'")):
                expected = _expected(allowed[facility], others)
                if expected > 0 and norm > ratio * expected:
                    reasons[facility] = (
                        f"its norm is {norm:.6g}, more than {ratio:g} times {whose} median, which "
                        f"comes to {expected:.6g} for as much training"
                    )
    return reasons


def _expected(effective: float, others: Sequence[tuple[float, float]]) -> float:
    """The median norm of updates after as much training as one of so many effective steps."""
    if not others:
        return 0.0
    return statistics.median(
        norm * max(effective / theirs, math.sqrt(effective / theirs)) if theirs else norm
        for norm, theirs in others
    )
