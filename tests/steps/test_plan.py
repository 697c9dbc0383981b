"""The plan of a round: who takes part, where each goes on, and what cannot be planned."""

import dataclasses

import pytest

from crossfl.errors import CrossFLError
from crossfl.protocol.records import Aggregation, Facility
from crossfl.server.state import ServerState
from crossfl.steps.plan import plan
from tests.support.paths import ROUND

A = Facility(name="a", dataset="d")
B = Facility(name="b", dataset="d", joins=2, leaves=3)
C = Facility(name="c", dataset="d", skips=(2,), local_steps=5)


def _state(finished: int) -> ServerState:
    state = ServerState.load(ROUND / "state")
    done = {"a": {"samples": 8, "status": "complete"}}
    history = [{"round": n, "facilities": done} for n in range(1, finished + 1)]
    return dataclasses.replace(state, rounds=4, round=finished, history=history)


@pytest.mark.parametrize(
    ("finished", "names"), [(0, ["a", "c"]), (1, ["a", "b"]), (2, ["a", "b", "c"]), (3, ["a", "c"])]
)
def test_facilities_join_leave_and_sit_out(finished: int, names: list[str]) -> None:
    number, tasks = plan(_state(finished), [C, A, B], 3, "train")
    assert number == finished + 1
    assert [task.facility for task in tasks] == names


def test_a_facility_goes_on_where_it_stopped() -> None:
    first, third = (plan(_state(n), [A, C], 3, "train")[1] for n in (0, 2))
    assert [(t.schedule_step, t.schedule_steps) for t in first] == [(0, 12), (0, 20)]
    assert [(t.schedule_step, t.schedule_steps) for t in third] == [(6, 12), (10, 20)]
    assert [t.samples_seen for t in third] == [16, 0]
    assert first[0].data_seed == third[0].data_seed != third[1].data_seed
    assert len({t.seed for t in [*first, *third]}) == 4


def test_what_did_not_count_is_not_gone_on_from() -> None:
    state = _state(3)
    for status in ("refused", "unused", "absent"):
        state.history[2] = {"round": 3, "facilities": {"a": {"samples": 8, "status": status}}}
        a, c = plan(state, [A, C], 3, "train")[1]
        assert (a.samples_seen, a.counted) == (16, 2)
        assert (c.samples_seen, c.counted) == (0, 0)


def test_no_claim_of_samples_is_too_large_to_go_on() -> None:
    state = _state(2)
    state.history[0] = {
        "round": 1,
        "facilities": {"a": {"samples": 2**53, "status": "complete"}},
    }
    assert plan(state, [A], 3, "train")[1][0].samples_seen == 2**31 - 1


def test_rounds_that_are_over_need_nobody() -> None:
    new = Facility(name="new", dataset="d", joins=4)
    assert [t.facility for t in plan(_state(3), [new], 3, "train")[1]] == ["new"]


def test_an_evaluation_asks_all_who_have_not_left() -> None:
    number, tasks = plan(_state(2), [A, B, C], 3, "evaluate")
    assert number == 2
    assert [(t.facility, t.local_steps) for t in tasks] == [("a", 0), ("b", 0), ("c", 0)]
    assert [t.facility for t in plan(_state(4), [A, B], 3, "evaluate")[1]] == ["a"]


def test_what_cannot_be_planned() -> None:
    with pytest.raises(CrossFLError, match="'a' is named twice"):
        plan(_state(0), [A, A], 3, "train")
    with pytest.raises(CrossFLError, match="local_steps is 0"):
        plan(_state(0), [A], 0, "train")
    with pytest.raises(CrossFLError, match="no facility takes part in round 1"):
        plan(_state(0), [B], 3, "train")
    three = dataclasses.replace(_state(0), aggregation=Aggregation(quorum=3))
    with pytest.raises(CrossFLError, match="2 facilities take part in round 1 of 4"):
        plan(three, [A, B, C], 3, "train")
