"""FedCompass's plan: facilities of any speed arrive in groups."""

import heapq

from hypothesis import given, settings
from hypothesis import strategies as st

from crossfl.server.planning import fedcompass
from crossfl.server.planning.fedcompass import Plan, Rules


def _first(plan: Plan, facility: str, now: float) -> tuple[Plan, int | None]:
    plan, arrival = fedcompass.observe(plan, facility, now)
    assert arrival == "alone"
    return fedcompass.apply(plan, facility, now)


def test_a_slow_facility_joins_the_group_of_a_fast_one_with_fewer_steps() -> None:
    plan, opened = _first(fedcompass.init(), "fast", 500.0)  # 10 s a step
    assert (opened, plan.known["fast"].steps) == (0, 50)
    assert (plan.groups[0].expected, plan.groups[0].latest) == (1000.0, 1100.0)
    plan, opened = _first(plan, "slow", 600.0)  # 12 s a step, 400 s are left
    assert (opened, plan.known["slow"].steps) == (None, 33)

    plan, arrival = fedcompass.observe(plan, "slow", 1000.0)
    assert arrival == "early"
    plan, arrival = fedcompass.observe(plan, "fast", 1000.0)
    assert arrival == "complete"
    plan, back = fedcompass.merged(plan, 0)
    assert back == ["fast", "slow"]


def test_who_cannot_reach_a_group_opens_one_that_the_fastest_can_join() -> None:
    plan, _ = _first(fedcompass.init(), "fast", 500.0)
    plan, opened = _first(plan, "slow", 1000.0)  # 20 s a step: 0 steps to 1000, (1100 + 500 - 1000)
    assert (opened, plan.known["slow"].steps) == (1, 30)
    plan, arrival = fedcompass.observe(plan, "fast", 1101.0)
    assert arrival == "late"  # its group's time is over, and it was alone in it
    assert 0 not in plan.groups
    assert plan.known["fast"].speed == 0.1 * 10 + 0.9 * 601 / 50


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(1, 60), min_size=1, max_size=6),
    st.lists(st.floats(0.5, 4), min_size=40, max_size=40),
)
def test_nobody_is_lost_and_steps_stay_within_their_limits(
    speeds: list[float], noise: list[float]
) -> None:
    plan, rules = fedcompass.init(), Rules()
    coming: list[tuple[float, str, int]] = []
    for number, speed in enumerate(speeds):
        heapq.heappush(coming, (speed * rules.most, f"s{number}", -1))
    idle: set[str] = set()
    for factor in noise:
        if not coming:
            break
        now, name, group = heapq.heappop(coming)
        asked: list[str] = []
        if name:
            plan, arrival = fedcompass.observe(plan, name, now)
            if arrival in ("alone", "late"):
                asked = [name]
            else:
                idle.add(name)
                group = plan.known[name].group or 0
        over = not name or arrival == "complete"
        if over and group in plan.groups and plan.groups[group].arrived:
            plan, asked = fedcompass.merged(plan, group)
        for facility in asked:
            idle.discard(facility)
            plan, opened = fedcompass.apply(plan, facility, now)
            steps = plan.known[facility].steps
            assert rules.fewest <= steps <= rules.most
            seconds = factor * steps * speeds[int(facility[1:])]
            heapq.heappush(coming, (now + seconds, facility, -1))
            if opened is not None:
                heapq.heappush(coming, (plan.groups[opened].latest, "", opened))
        plan = fedcompass.without_empty(plan)
        working = {name for _, name, _ in coming if name}
        assert working | idle == {f"s{n}" for n in range(len(speeds))}
        waiting = {n for g in plan.groups.values() for n in g.arrived}
        assert idle == waiting  # whoever is idle is in a group whose timer or members are to come
