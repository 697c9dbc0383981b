"""The plan of a round: who takes part, where each goes on, and what cannot be planned."""

from pathlib import Path
from typing import Any

import pytest
import torch

from crossfl.errors import CrossFLError
from crossfl.protocol.layout import STATE
from crossfl.protocol.participation import Purpose
from crossfl.protocol.records import Aggregation, Facility, Task, Training
from crossfl.protocol.state import FacilityLedger, ServerState
from crossfl.server import state as server_state
from crossfl.server.planning.fixed import plan
from tests.support.federation import Federation, Values
from tests.support.paths import ROUND

A = Facility(name="a", dataset="d")
B = Facility(name="b", dataset="d", joins=2, leaves=3)
C = Facility(name="c", dataset="d", skips=(2,), local_steps=5)
TRAINING = Training(batch_size=4, sequence_length=48)
MODEL: Values = {"w": torch.zeros(3)}
ONES: Values = {"w": torch.ones(3)}


def _state(finished: int) -> ServerState:
    """A state after so many rounds of 4, in each of which `a` trained on 8 samples."""
    ledger = {"a": FacilityLedger(samples=8 * finished, counted=finished)} if finished else {}
    return server_state.load(ROUND / "state").replace(rounds=4, round=finished, ledger=ledger)


def _tasks(state: ServerState, facilities: list[Facility], purpose: Purpose) -> list[Task]:
    return plan(state, facilities, 3, TRAINING, purpose).tasks


@pytest.mark.parametrize(
    ("finished", "names"), [(0, ["a", "c"]), (1, ["a", "b"]), (2, ["a", "b", "c"]), (3, ["a", "c"])]
)
def test_facilities_join_leave_and_sit_out(finished: int, names: list[str]) -> None:
    planned = plan(_state(finished), [C, A, B], 3, TRAINING, "train")
    assert planned.round == finished + 1
    assert [task.facility for task in planned.tasks] == names


def test_every_member_has_an_allowance_and_who_is_not_asked_one_of_no_steps() -> None:
    first, second = (plan(_state(n), [C, A, B], 3, TRAINING, "train").allowances for n in (0, 1))
    assert [(a.facility, a.steps) for a in first] == [("a", 3), ("c", 5)]
    assert [(a.facility, a.steps) for a in second] == [("a", 3), ("b", 3), ("c", 0)]
    assert [(a.samples, a.tokens) for a in second] == [(12, 576), (12, 576), (0, 0)]
    evaluation = plan(_state(2), [C, A, B], 3, TRAINING, "evaluate")
    assert [(a.facility, a.steps) for a in evaluation.allowances] == [("a", 0), ("b", 0), ("c", 0)]


def test_whose_update_is_held_is_not_asked_again() -> None:
    planned = plan(_state(2).replace(held=("a",)), [C, A, B], 3, TRAINING, "train")
    assert [task.facility for task in planned.tasks] == ["b", "c"]
    assert [(a.facility, a.steps) for a in planned.allowances] == [("a", 3), ("b", 3), ("c", 5)]


def test_a_facility_goes_on_where_it_stopped() -> None:
    first, third = (_tasks(_state(n), [A, C], "train") for n in (0, 2))
    assert [(t.schedule_step, t.schedule_steps) for t in first] == [(0, 12), (0, 20)]
    assert [(t.schedule_step, t.schedule_steps) for t in third] == [(6, 12), (10, 20)]
    assert [t.samples_seen for t in third] == [16, 0]
    assert first[0].data_seed == third[0].data_seed != third[1].data_seed
    assert len({t.seed for t in [*first, *third]}) == 4


@pytest.mark.parametrize(
    ("status", "rules", "fields"),
    [
        ("refused", {"quorum": 1}, {"base": "0" * 64}),
        ("unused", {"quorum": 2, "below_quorum": "skip"}, {}),
        ("absent", {"quorum": 1}, {"status": "absent", "reason": "no node"}),
    ],
)
def test_what_did_not_count_is_not_gone_on_from(
    tmp_path: Path, status: str, rules: dict[str, Any], fields: dict[str, Any]
) -> None:
    """In the first round, `a` and `b` count; in the second, `a` does not."""
    federation = Federation(tmp_path, MODEL, **rules)
    first = federation.run([federation.update(name, ONES) for name in "ab"], "1")
    federation.go_on(first)
    updates = [federation.update("a", ONES, name="second", **fields)]
    if status != "unused":
        updates.append(federation.update("b", ONES, name="other"))
    second = federation.run(updates, "2") / STATE
    last = list(server_state.history(second))[-1]
    assert (last.round, last.facilities["a"].status) == (2, status)
    a, c = _tasks(server_state.load(second), [A, C], "train")
    assert (a.round, a.samples_seen, a.counted) == (3, 10, 1)
    assert (c.samples_seen, c.counted) == (0, 0)


def test_no_claim_of_samples_is_too_large_to_go_on() -> None:
    state = _state(2).replace(ledger={"a": FacilityLedger(samples=2**53, counted=2)})
    assert _tasks(state, [A], "train")[0].samples_seen == 2**53


def test_rounds_that_are_over_need_nobody() -> None:
    new = Facility(name="new", dataset="d", joins=4)
    assert [t.facility for t in _tasks(_state(3), [new], "train")] == ["new"]


def test_an_evaluation_asks_all_who_have_not_left() -> None:
    planned = plan(_state(2), [A, B, C], 3, TRAINING, "evaluate")
    assert planned.round == 2
    tasks = [(t.facility, t.local_steps) for t in planned.tasks]
    assert tasks == [("a", 0), ("b", 0), ("c", 0)]
    assert [t.facility for t in _tasks(_state(4), [A, B], "evaluate")] == ["a"]


def test_what_cannot_be_planned() -> None:
    with pytest.raises(CrossFLError, match="'a' is named twice"):
        plan(_state(0), [A, A], 3, TRAINING, "train")
    with pytest.raises(CrossFLError, match="local_steps is 0"):
        plan(_state(0), [A], 0, TRAINING, "train")
    with pytest.raises(CrossFLError, match="no facility takes part in round 1"):
        plan(_state(0), [B], 3, TRAINING, "train")
    three = _state(0).replace(aggregation=Aggregation(quorum=3))
    with pytest.raises(CrossFLError, match="2 facilities take part in round 1 of 4"):
        plan(three, [A, B, C], 3, TRAINING, "train")
