"""The learning-rate schedule, which spans the federation and not the round."""

import math

from crossfl.protocol.records import Allowance, Schedule

LEAST = 0.01
"""Least effective steps of a step: the last steps of a schedule hardly move the weights."""


def learning_rate(
    position: int, peak: float, schedule: Schedule, schedule_steps: int, warmup_steps: int
) -> float:
    """The learning rate of one optimizer step.

    Args:
        position: steps of the schedule before this one.
        peak: learning rate at the end of the warm-up.
        schedule: what follows the warm-up.
        schedule_steps: steps over the whole federation.
        warmup_steps: steps of linear warm-up.
    """
    if position < warmup_steps:
        return peak * (position + 1) / warmup_steps
    span = max(schedule_steps - warmup_steps, 1)
    fraction = min((position - warmup_steps) / span, 1.0)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - fraction,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * fraction)),
    }[schedule]
    return peak * factor


def rate_factor(position: int, schedule: Schedule, schedule_steps: int, warmup_steps: int) -> float:
    """The learning rate of one optimizer step over its peak, from 0 to 1."""
    return learning_rate(position, 1.0, schedule, schedule_steps, warmup_steps)


def effective_steps(allowance: Allowance, steps: int) -> float:
    """Steps done, each weighted by its learning rate over the peak; at least 1 % of the steps."""
    first = allowance.schedule_step
    factors = (
        rate_factor(
            first + step, allowance.schedule, allowance.schedule_steps, allowance.warmup_steps
        )
        for step in range(steps)
    )
    return max(math.fsum(factors), LEAST * steps)
