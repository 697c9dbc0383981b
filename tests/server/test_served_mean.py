"""The served mean: facilities train from the newest model, the federation ends with the mean."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossfl.errors import CrossFLError
from crossfl.protocol.layout import GLOBAL_MODEL, MEAN, STATE
from crossfl.protocol.manifest import ModelManifest, StateManifest
from crossfl.protocol.records import Aggregation, Retention
from crossfl.server import state as server_state
from crossfl.server.merging import mean_rate
from crossfl.server.optimizers import of
from crossfl.server.resume import resume
from crossfl.server.rounds import Averaged, PassedThrough, Skipped, aggregate
from crossfl.storage import manifest
from crossfl.storage.checkpoint import slots
from tests.server.test_late import EARLY, Turns
from tests.support.federation import STARTED, master, weights


def _mean(folder: Path) -> torch.Tensor:
    return slots(folder / STATE)[MEAN]["w"]


def _check(folder: Path) -> None:
    """Model and state are whole, and belong together."""
    described = manifest.verify(folder / GLOBAL_MODEL, ModelManifest)
    manifest.verify(folder / STATE, StateManifest)
    assert server_state.load(folder / STATE).model == described.digest


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm", "diloco"])
def test_facilities_train_from_the_newest_model_and_the_mean_is_delivered(
    tmp_path: Path, optimizer: Any, adapted: bool
) -> None:
    rules = EARLY | {"server_optimizer": optimizer, "server_momentum": 0.5}
    served = Turns(tmp_path / "served", adapted=adapted, rounds=2, **rules)
    newest = Turns(tmp_path / "newest", adapted=adapted, rounds=2, served_mean=0.0, **rules)
    expected = torch.zeros(6)
    rates = iter([1, 9 / 10, 9 / 11, 9 / 12, 9 / 13, 9 / 14])  # of the updates, one after the other
    schedule = [{"a": 1}, {"a": 2, "b": 1}, {"c": 2}, {"a": 4, "b": 3}]  # two participations
    for number, turn in enumerate(schedule, 1):
        what = {name: turn.get(name, "late") for name in "abc"}
        served.turn(**what)
        newest.turn(**what)
        left = math.prod(1 - next(rates) for _ in turn)
        expected = torch.lerp(expected, master(newest.out)["w"], 1 - left)
        assert torch.allclose(_mean(served.out), expected, rtol=1e-6)
        assert MEAN not in slots(newest.out / STATE)
        _check(served.out)
        if number < len(schedule):
            assert served.state.model == newest.state.model
    assert torch.equal(master(served.out)["w"], _mean(served.out))
    assert torch.equal(weights(served.out)["w"], _mean(served.out))
    history = list(server_state.history(served.out / STATE))
    assert history[-1].model == served.state.model != newest.state.model


def test_a_run_that_goes_on_starts_from_what_was_delivered(tmp_path: Path) -> None:
    turns = Turns(tmp_path, rounds=1, **EARLY)
    turns.turn(a=1, b=1, c="late")
    turns.turn(a=2, b="late", c="late")
    delivered = _mean(turns.out).clone()
    resume(turns.out, 2, turns.federation.aggregation, Retention(), tmp_path / "again")
    turns.federation.go_on(tmp_path / "again")
    turns.turn(a=3, b="late", c="late")
    assert (master(turns.out)["w"] > delivered).all()
    assert torch.equal(_mean(turns.out), torch.lerp(delivered, master(turns.out)["w"], 9 / 12))
    _check(turns.out)


def test_a_budget_that_ends_between_two_turns_delivers_the_mean(tmp_path: Path) -> None:
    turns = Turns(tmp_path, budget_seconds=600, **EARLY)
    turns.turn(a=1, b="late", c="late")
    turns.turn(a=2, b="late", c="late")
    before = turns.out
    arguments = (turns.federation.model, turns.federation.state, [], tmp_path / "end")
    outcome = aggregate(*arguments, STARTED + 601)
    assert isinstance(outcome, PassedThrough)
    assert torch.equal(weights(tmp_path / "end")["w"], _mean(before))
    assert not torch.equal(weights(before)["w"], _mean(before))  # the journal's own files
    _check(before)
    _check(tmp_path / "end")
    again = (tmp_path / "end" / GLOBAL_MODEL, tmp_path / "end" / STATE, [], tmp_path / "twice")
    assert aggregate(*again, STARTED + 700).state == outcome.state


def test_a_skipped_round_that_is_the_last_delivers_the_mean(tmp_path: Path) -> None:
    turns = Turns(tmp_path, budget_seconds=170, below_quorum="skip", **EARLY)
    turns.turn(a=1, b="late", c="late")
    assert isinstance(turns.turn(a=2, b="late", c="late"), Averaged)
    mean = _mean(turns.out).clone()
    assert isinstance(turns.turn(a="absent", b="absent", c="absent"), Skipped)
    assert torch.equal(weights(turns.out)["w"], mean)
    assert list(server_state.history(turns.out / STATE))[-1].model == turns.state.model
    _check(turns.out)


def test_rounds_that_wait_for_all_have_no_mean(tmp_path: Path) -> None:
    turns = Turns(tmp_path, quorum=1)
    turns.turn(a=1, b=1, c=1)
    assert MEAN not in slots(turns.out / STATE)
    with pytest.raises(CrossFLError, match="served_mean is for rounds that close early"):
        Aggregation(served_mean=0.2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=6), st.floats(0.01, 1))
def test_the_mean_stays_between_the_models_it_is_of(deltas: list[float], rate: float) -> None:
    rules = Aggregation(closes="first", served_mean=rate)
    model = torch.zeros(1)
    kept, seen = of(rules).init(model, rules), [model]
    for delta in deltas:
        model, kept = of(rules).apply(model, torch.tensor([delta]), kept, rules)
        seen.append(model)
    slack = 1e-5 * max(float(x.abs()) for x in seen)
    assert float(min(seen)) - slack <= float(kept[MEAN]) <= float(max(seen)) + slack


@settings(deadline=None)
@given(st.floats(0.001, 1), st.integers(1, 64), st.integers(0, 10_000), st.integers(1, 64))
def test_several_updates_in_one_merge_move_the_mean_as_one_after_the_other(
    rate: float, members: int, before: int, arrived: int
) -> None:
    at_once = 1 - mean_rate(rate, members, before, arrived)
    steps = [mean_rate(rate, members, before + n, 1) for n in range(arrived)]
    assert at_once == pytest.approx(math.prod(1 - step for step in steps), abs=1e-12)
    assert all(rate / members - 1e-12 <= step <= 1 for step in steps)
    assert mean_rate(rate, members, 0, 1) == 1  # nothing is left of the first model
