"""Steps by measured speed: the same time everywhere, whatever anybody states."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossfl.errors import CrossFLError
from crossfl.protocol.fields import LARGEST_INT
from crossfl.protocol.records import Aggregation, Facility, Training
from crossfl.protocol.state import FacilityLedger, ServerState, Timing
from crossfl.server.planning import equal_time
from crossfl.server.planning.fixed import plan
from tests.support.federation import STARTED


def _known(seconds_per_step: float, load: float = 60.0) -> FacilityLedger:
    timing = Timing(steps=10, train=10 * seconds_per_step, load=load)
    return FacilityLedger(timings=(timing,) * 3, counted=3, steps=30)


def _asked(**ledger: FacilityLedger) -> dict[str, int]:
    state = ServerState(
        rounds=9, aggregation=Aggregation(planner="equal_time"), started=STARTED, model="0" * 64,
        round=3, ledger=ledger,
    )  # fmt: skip
    members = [Facility(name=name, dataset="words") for name in "abc"]
    planned = plan(state, members, 25, Training(batch_size=4), "train")
    assert {a.facility: a.steps for a in planned.allowances} == {
        task.facility: task.local_steps for task in planned.tasks
    }
    return {task.facility: task.local_steps for task in planned.tasks}


def test_the_fast_take_more_steps_and_a_first_job_those_of_the_job_file() -> None:
    assert _asked(a=_known(24.0), b=_known(96.0)) == {"a": 25, "b": 6, "c": 25}


def test_what_is_slow_to_load_trains_for_longer() -> None:
    assert _asked(a=_known(24.0, load=240.0)) == {"a": 100, "b": 25, "c": 25}


@given(st.floats(0, 1e9), st.floats(0, 1e9), st.integers(0, 1000), st.integers(1, 10_000))
def test_no_statement_asks_for_more_than_a_factor(
    train: float, load: float, steps: int, usual: int
) -> None:
    timings = [Timing(steps=steps, train=train, load=load)]
    number = equal_time.steps(timings, 600.0, usual)
    assert usual / equal_time.LARGEST_FACTOR <= number <= usual * equal_time.LARGEST_FACTOR
    expected = load + number * equal_time.seconds_per_step(timings)
    asked = equal_time.walltime(timings, number)
    assert asked >= expected + equal_time.SPARE_SECONDS or asked == LARGEST_INT


def test_the_task_asks_for_the_walltime_of_its_steps_where_a_job_is_known() -> None:
    rules = Aggregation(planner="equal_time")
    for aggregation, known in (
        (rules, math.ceil(1.25 * (60 + 25 * 24) + 300)),
        (Aggregation(), None),
    ):
        state = ServerState(
            rounds=9, aggregation=aggregation, started=STARTED,
            model="0" * 64, round=3, ledger={"a": _known(24.0)},
        )  # fmt: skip
        members = [Facility(name=name, dataset="d") for name in "ab"]
        tasks = plan(state, members, 25, Training(), "train").tasks
        assert [task.walltime_seconds for task in tasks] == [known, None]
        tasks = plan(state, members, 25, Training(), "evaluate").tasks
        assert [task.walltime_seconds for task in tasks] == [None, None]


def test_the_schedule_goes_on_from_the_steps_that_counted() -> None:
    state = ServerState(
        rounds=9, aggregation=Aggregation(planner="equal_time", job_seconds=240.0),
        started=STARTED, model="0" * 64, round=3, ledger={"a": _known(24.0)},
    )  # fmt: skip
    (task,) = plan(state, [Facility(name="a", dataset="d")], 25, Training(), "train").tasks
    assert (task.local_steps, task.schedule_step, task.schedule_steps) == (10, 30, 30 + 6 * 10)


def test_seconds_that_nobody_would_look_at_are_refused() -> None:
    with pytest.raises(CrossFLError, match="job_seconds is of planner: equal_time"):
        Aggregation(job_seconds=600.0)
