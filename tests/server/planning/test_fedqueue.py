"""FedQueue's plan: steps that fill a round, by predicted wait and cost."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossfl.errors import CrossFLError
from crossfl.protocol.records import Aggregation, Facility, Training
from crossfl.protocol.state import FacilityLedger, ServerState, Timing
from crossfl.server.planning import equal_time, fedqueue
from crossfl.server.planning.fedqueue import Rules
from crossfl.server.planning.fixed import plan as plan_round


def test_a_plan_by_hand() -> None:
    plan = fedqueue.init()
    assert (fedqueue.apply(plan, "a"), plan.latest_wait("a")) == (10, 2 + 0.2 * 3600)
    plan = fedqueue.observe(plan, "a", wait=102.0, cost=24.0)
    assert (plan.wait("a"), plan.costs["a"]) == (52.0, 24.0)
    assert fedqueue.apply(plan, "a") == int((3600 - 52 - 60) / 24)
    plan = fedqueue.observe(plan, "a", wait=102.0, cost=48.0)
    assert (plan.wait("a"), plan.costs["a"]) == (77.0, 36.0)
    plan = fedqueue.observe(plan, "b", wait=9_000.0, cost=96.0)  # more than a round
    assert fedqueue.apply(plan, "b") == 10
    assert fedqueue.rate(plan, "b") == 1.0
    assert fedqueue.rate(plan, "a") == 10 / int((3600 - 77 - 60) / 36)
    assert fedqueue.weight(30, 2, plan.rules) == 15.0


def test_a_plan_is_a_value() -> None:
    before = fedqueue.init()
    fedqueue.observe(before, "a", 100.0, 1.0)
    assert before == fedqueue.init()


@given(
    st.lists(st.tuples(st.floats(0, 1e5), st.floats(0.01, 1e3)), min_size=1, max_size=20),
    st.integers(1, 50),
)
def test_predictions_stay_within_what_was_seen_and_steps_above_the_warm_up(
    jobs: list[tuple[float, float]], warm_up: int
) -> None:
    plan = fedqueue.init(Rules(warm_up=warm_up))
    for wait, cost in jobs:
        plan = fedqueue.observe(plan, "a", wait, cost)
    waits, costs = [2.0, *(w for w, _ in jobs)], [c for _, c in jobs]
    assert min(waits) <= plan.wait("a") <= max(waits)
    assert min(costs) * (1 - 1e-9) <= plan.costs["a"] <= max(costs) * (1 + 1e-9)
    steps = fedqueue.apply(plan, "a")
    assert steps >= warm_up
    if steps > warm_up:
        left = max(0.5, 3600 - plan.wait("a") - 60)  # half a second at least, as the code has it
        assert steps * plan.costs["a"] <= left * (1 + 1e-9)
    assert fedqueue.rate(plan, "a") == pytest.approx(1.0)


def test_a_long_wait_leaves_time_for_fewer_steps() -> None:
    job = Timing(steps=25, train=600.0, load=0.0)
    ledger = {
        "calm": FacilityLedger(timings=(job.replace(queue=100.0),), counted=1),
        "busy": FacilityLedger(timings=(job.replace(queue=4000.0),), counted=1),
    }
    rules = Aggregation(planner="fedqueue", closes=4140)  # T 3600
    state = ServerState(rounds=9, aggregation=rules, started=0, model="0" * 64, ledger=ledger)
    members = [Facility(name=name, dataset="d") for name in ("busy", "calm", "new")]
    tasks = plan_round(state, members, 25, Training(), "train").tasks
    assert [task.local_steps for task in tasks] == [int((3600 - 2001 - 60) / 24), 145, 25]
    wanted = equal_time.walltime(ledger["calm"].timings, 145)
    assert [task.walltime_seconds for task in tasks[1:]] == [wanted, None]


@given(st.floats(0, 1e9), st.floats(0, 1e9), st.integers(0, 1000), st.integers(1, 10_000))
def test_no_statement_asks_for_more_than_a_factor(
    train: float, queue: float, steps: int, usual: int
) -> None:
    timings = [Timing(steps=steps, train=train, load=0.0, queue=queue)]
    number = fedqueue.steps(timings, 3600, usual)
    assert usual / equal_time.LARGEST_FACTOR <= number <= usual * equal_time.LARGEST_FACTOR


@pytest.mark.parametrize("closes", ["all", "first", "running"])
def test_rounds_have_a_length(closes: Any) -> None:
    with pytest.raises(CrossFLError, match="give closes a number of seconds"):
        Aggregation(planner="fedqueue", closes=closes)
