"""FedCompass's plan: steps by measured speed, so that facilities arrive in groups.

Li et al. 2023, https://arxiv.org/abs/2309.14675, as in the code of its authors (`CompassScheduler`
in APPFL). A facility's speed, seconds for a step with all that it waits for, is an exponential
average. Who asks for work joins the group that it can reach with the most steps, between fewest and
most; if there is none, it opens a group that arrives when the fastest of another could be back. A
group is merged when all its members are in, or by a factor later than expected with those that are.
Who comes later than that waits for the merge of the next group.

`init`, `observe` and `apply` are pure: the plan is a value, and moments are arguments.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Rules:
    """The constants: the code's, but that steps are half of its examples'."""

    fewest: int = 10
    most: int = 50
    """Steps of a job; the code's examples have 20 and 100."""
    momentum: float = 0.9
    """Weight of the newest speed."""
    lateness: float = 1.2
    """Times the expected duration after which a group is merged without the others."""


@dataclass(frozen=True)
class Known:
    """What is known of one facility."""

    speed: float
    """Seconds for a step."""
    steps: int
    """Of its job."""
    since: float
    """When the job was asked for."""
    group: int | None = None


@dataclass(frozen=True)
class Group:
    """Facilities that are to arrive together."""

    expected: float
    latest: float
    waiting: frozenset[str]
    """Members that are not in."""
    arrived: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Plan:
    """What is known of each facility, and the groups by number, oldest first."""

    rules: Rules
    known: Mapping[str, Known] = field(default_factory=lambda: MappingProxyType({}))
    groups: Mapping[int, Group] = field(default_factory=lambda: MappingProxyType({}))
    opened: int = 0
    """Groups that were ever opened."""

    def _with(self, facility: str, known: Known, groups: Mapping[int, Group]) -> "Plan":
        return replace(self, known={**self.known, facility: known}, groups=groups)


Arrival = Literal["alone", "late", "early", "complete"]
"""Alone, merge it at once; late, with the next group; early, its group is not in; or it is now."""


def init(rules: Rules | None = None) -> Plan:
    """The plan before the first job, for which everybody is asked at moment 0 for `most` steps."""
    return Plan(rules or Rules())


def observe(plan: Plan, facility: str, now: float) -> tuple[Plan, Arrival]:
    """Take note of an update that has arrived.

    Returns:
        The next plan, and what is to become of the update.
    """
    before, rules = plan.known.get(facility), plan.rules
    if before is None:
        first = Known(now / rules.most, rules.most, 0.0)
        return plan._with(facility, first, plan.groups), "alone"
    speed = (1 - rules.momentum) * before.speed
    speed += rules.momentum * (now - before.since) / before.steps
    known, groups = replace(before, speed=speed), dict(plan.groups)
    group = groups.get(known.group) if known.group is not None else None
    if known.group is None:
        return plan._with(facility, known, groups), "alone"
    if group is None:
        return plan._with(facility, known, groups), "late"
    waiting = group.waiting - {facility}
    if now > group.latest:
        groups[known.group] = replace(group, waiting=waiting)
        if not waiting:
            del groups[known.group]
        return plan._with(facility, known, groups), "late"
    groups[known.group] = replace(group, waiting=waiting, arrived=group.arrived | {facility})
    return plan._with(facility, known, groups), "early" if waiting else "complete"


def merged(plan: Plan, number: int) -> tuple[Plan, list[str]]:
    """Take note that a group was merged.

    Returns:
        The next plan, and who is to be asked for more work, the fastest first.
    """
    group, groups = plan.groups[number], dict(plan.groups)
    groups[number] = replace(group, arrived=frozenset(), expected=0.0, latest=0.0)
    back = sorted(group.arrived, key=lambda name: (plan.known[name].speed, name))
    return replace(plan, groups=groups), back


def without_empty(plan: Plan) -> Plan:
    """The plan without groups that nobody is in."""
    kept = {n: group for n, group in plan.groups.items() if group.waiting or group.arrived}
    return replace(plan, groups=kept)


def apply(plan: Plan, facility: str, now: float) -> tuple[Plan, int | None]:
    """Ask a facility for more work.

    Returns:
        The next plan, in which the facility has its steps, and the number of a group that was
        opened for it; `Group.latest` says when that is to be merged.
    """
    rules, known = plan.rules, plan.known[facility]
    best, most = None, -1
    for number, group in plan.groups.items():
        steps = int((group.expected - now) // known.speed)
        if rules.fewest <= steps <= rules.most and steps >= most:
            best, most = number, steps
    groups = dict(plan.groups)
    if best is not None:
        groups[best] = replace(groups[best], waiting=groups[best].waiting | {facility})
        asked = replace(known, steps=most, since=now, group=best)
        return plan._with(facility, asked, groups), None
    steps = _steps_of_new_group(plan, known, now)
    span, number = steps * known.speed, plan.opened
    groups[number] = Group(now + span, now + span * rules.lateness, frozenset({facility}))
    asked = replace(known, steps=steps, since=now, group=number)
    return replace(plan._with(facility, asked, groups), opened=number + 1), number


def _steps_of_new_group(plan: Plan, known: Known, now: float) -> int:
    rules, steps = plan.rules, -1
    for group in plan.groups.values():
        if now < group.latest:
            members = group.waiting | group.arrived
            fastest = min(plan.known[name].speed for name in members)
            number = int((group.latest + fastest * rules.most - now) // known.speed)
            if number <= rules.most:
                steps = max(steps, number)
    return rules.most if steps < 0 else max(steps, rules.fewest)
