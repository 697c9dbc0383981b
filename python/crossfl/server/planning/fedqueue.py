"""FedQueue's plan: so many steps that predicted wait and training fill a round of T seconds.

arXiv 2605.02125, and the code that came with it (`QueueScheduler` in APPFL). For each facility the
wait q and the seconds c of a step are exponential averages; steps are max(⌊(T − q − θ) / c⌋,
warm-up), the learning rate is scaled by the fewest steps of anyone over the facility's own, and a
job is on time that waited no longer than the predicted wait and α T. Those that are late count in
the next round. An update weighs steps · 1 / (1 + β τ) where it is τ rounds old.

`init`, `observe` and `apply` are pure: the plan is a value, and there is no clock in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from crossfl.protocol.state import Timing
from crossfl.server.planning.equal_time import LARGEST_FACTOR

SHORTEST_STEP = 1e-6
"""Seconds of a step; facilities may state none."""


@dataclass(frozen=True)
class Rules:
    """The constants; the defaults are those of the code, the fewest steps those of its examples."""

    round_seconds: float = 3600.0
    """T."""
    spare_seconds: float = 60.0
    """θ."""
    smoothing: float = 0.5
    """Weight of the newest wait, and of the newest cost of a step."""
    tolerance: float = 0.2
    """α: part of T by which a wait may exceed what was predicted."""
    overtime: float = 0.15
    """Part of T that a round lasts longer than T before it ends without the others."""
    warm_up: int = 10
    """Steps of a first job, and fewest of any."""
    first_wait: float = 2.0
    """Seconds of wait that are predicted of a facility that has not had a job."""
    staleness: float = 0.5
    """β of the harmonic discount."""


@dataclass(frozen=True)
class Plan:
    """What is known of each facility."""

    rules: Rules
    waits: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """q, the predicted wait in seconds."""
    costs: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """c, the predicted seconds of a step."""

    def wait(self, facility: str) -> float:
        """The wait that is predicted, in seconds."""
        return self.waits.get(facility, self.rules.first_wait)

    def latest_wait(self, facility: str) -> float:
        """The longest wait, in seconds, with which a job is on time."""
        return self.wait(facility) + self.rules.tolerance * self.rules.round_seconds


def init(rules: Rules | None = None) -> Plan:
    """The plan before the first job."""
    return Plan(rules or Rules())


def observe(plan: Plan, facility: str, wait: float, cost: float) -> Plan:
    """The plan after a job.

    Args:
        plan: the plan before.
        facility: whose job it was.
        wait: seconds in the queue.
        cost: seconds of a step.
    """
    new, old = plan.rules.smoothing, 1 - plan.rules.smoothing
    waits = {**plan.waits, facility: new * wait + old * plan.wait(facility)}
    costs = {**plan.costs, facility: new * cost + old * plan.costs.get(facility, cost)}
    return replace(plan, waits=waits, costs=costs)


def apply(plan: Plan, facility: str) -> int:
    """Steps of the facility's next job; of its first one, the warm-up."""
    rules, cost = plan.rules, plan.costs.get(facility)
    if cost is None:
        return rules.warm_up
    left = max(0.5, rules.round_seconds - plan.wait(facility) - rules.spare_seconds)
    return max(int(left / cost), rules.warm_up)


def steps(timings: Sequence[Timing], closes: float, usual: int) -> int:
    """Steps of a facility's next job, by its last ones, which the server state has.

    A facility states its own durations, so the bounds of `equal_time` hold.

    Args:
        timings: the last jobs of the facility.
        closes: seconds after which a round closes, T and its overtime.
        usual: steps of the job file, and of a first job.
    """
    least = -(-usual // LARGEST_FACTOR)
    rules = Rules(warm_up=least)
    plan = init(replace(rules, round_seconds=closes / (1 + rules.overtime)))
    for timing in timings:
        cost = max((timing.train + timing.load) / max(timing.steps, 1), SHORTEST_STEP)
        plan = observe(plan, "", timing.queue, cost)
    return min(apply(plan, ""), usual * LARGEST_FACTOR) if timings else usual


def rate(plan: Plan, facility: str) -> float:
    """The learning rate of the next job over the usual one."""
    return min(apply(plan, name) for name in plan.costs) / apply(plan, facility)


def weight(steps: int, age: int, rules: Rules) -> float:
    """What an update weighs, before weights are made to sum to 1."""
    return steps / (1 + rules.staleness * age)
