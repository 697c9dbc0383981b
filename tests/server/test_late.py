"""Late updates: they count when they come, once, for the task they are of, on the newest model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from crossfl.errors import CrossFLError
from crossfl.protocol.fields import LARGEST_INT
from crossfl.protocol.records import Aggregation, Facility, Retention, Training
from crossfl.protocol.state import FacilityLedger, ServerState
from crossfl.server.merging import MOST_STALE
from crossfl.server.planning.fixed import plan
from crossfl.server.quorum import BelowQuorumError
from crossfl.server.resume import resume
from crossfl.server.rounds import Outcome, PassedThrough, Waiting, aggregate
from tests.support.federation import (
    STARTED,
    Federation,
    Values,
    entry,
    facilities,
    master,
    weights,
)

ZEROS: Values = {"w": torch.zeros(6)}
WORD = "job 7 is PENDING (Priority)"
EARLY: dict[str, Any] = {"closes": "first", "weighting": "equal"}


class Turns:
    """A federation of three, turn by turn; what facilities deliver is named by its task's round."""

    def __init__(
        self, folder: Path, names: str = "abc", adapted: bool = False, **rules: Any
    ) -> None:
        self.federation = Federation(folder, ZEROS, adapted, **rules)
        self.names = names
        self.bases = {1: self.federation.server.model}
        self.out = folder
        self._turns = self._deliveries = 0

    @property
    def state(self) -> ServerState:
        """The state after the last turn."""
        return self.federation.server

    def delivery(self, facility: str, what: int | str, **fields: Any) -> Path:
        """An update of the task of a round, of one in all coordinates; or why there is none."""
        self._deliveries += 1
        name = f"{self._deliveries}-{facility}"
        if isinstance(what, str):
            number = self.state.round + 1
            stated = {"status": what, "reason": WORD, "round": number}
            return self.federation.update(facility, None, name=name, **stated, **fields)
        stated = {"round": what, "base": self.bases[what]}
        values = {"w": torch.ones(6)}
        return self.federation.update(facility, values, name=name, **(stated | fields))

    def turn(self, _paths: Mapping[str, Path] | None = None, **what: int | str) -> Outcome:
        """Aggregate what each facility brings; `a=1` is an update of the task of round 1."""
        self._turns += 1
        paths = {n: self.delivery(n, w) for n, w in what.items()} | dict(_paths or {})
        updates = [paths[name] for name in self.names if name not in self.state.held]
        self.out = self.federation.folder / f"turn{self._turns}"
        outcome = aggregate(
            self.federation.model,
            self.federation.state,
            updates,
            self.out,
            STARTED + 60 * self._turns,
            allowances=self.federation.allowances(dict.fromkeys(self.names, 5)),
        )
        self.federation.go_on(self.out)
        self.bases[self.state.round + 1] = self.state.model
        return outcome


@pytest.fixture
def turns(tmp_path: Path) -> Turns:
    """Rounds that wait for everybody, and go on with one."""
    return Turns(tmp_path, quorum=1, weighting="equal")


def test_a_late_update_counts_on_the_newest_model(turns: Turns) -> None:
    turns.turn(a=1, b=1, c="late")
    assert facilities(turns.out)["c"].status == "late"
    assert facilities(turns.out)["c"].reason == WORD
    (task,) = turns.state.ledger_of("c").open
    assert (task.round, task.base) == (1, turns.bases[1])
    turns.turn(a=2, b=2, c="late")
    assert [t.round for t in turns.state.ledger_of("c").open] == [1, 2]

    turns.turn(a="late", b="late", c=1)
    counted = facilities(turns.out)["c"]
    assert (counted.status, counted.staleness, counted.share) == ("complete", 2, 1.0)
    # two rounds of ones, and one more: the delta is added to the newest model
    assert torch.equal(master(turns.out)["w"], torch.full((6,), 3.0))
    ledger = turns.state.ledger_of("c")
    assert ledger.counted == 1  # what the facility kept is of its task, not of the round
    assert (ledger.samples, ledger.steps) == (10, 5)
    assert [t.round for t in ledger.open] == [2, 3]


def test_an_update_counts_once(turns: Turns) -> None:
    turns.turn(a=1, b=1, c="late")
    turns.turn(a=2, b=2, c=1)
    turns.turn(a=3, b=3, c=1)
    assert facilities(turns.out)["c"].status == "refused"
    assert facilities(turns.out)["c"].reason == "it is for round 1, this is 3"
    assert turns.state.ledger_of("c").steps == 5


@pytest.mark.parametrize(
    ("what", "fields", "reason"),
    [
        (1, {"base": "f" * 64}, "another model"),
        (1, {"steps": 6}, "claims 6 steps"),
        (1, {"tokens": 5001}, "the task allows 5000"),
        (2, {}, "it is for round 2, this is 3"),  # c was absent then: its job was over
        (1, {"facility": "a"}, "made in the name of a"),
    ],
)
def test_what_was_not_issued_does_not_count(
    turns: Turns, what: int, fields: dict[str, Any], reason: str
) -> None:
    turns.turn(a=1, b=1, c="late")
    turns.turn(a=2, b=2, c="absent")
    path = turns.delivery("c", what)
    stated = {"facility": "c", "round": what, "base": turns.bases[what]} | fields
    turns.federation.seal(path, stated.pop("facility"), **stated)
    turns.turn({"c": path}, a=3, b=3)
    refused = facilities(turns.out)["c"]
    assert (refused.status, refused.share) == ("refused", 0.0)
    assert reason in (refused.reason or "")
    assert torch.equal(master(turns.out)["w"], torch.full((6,), 3.0))


def test_a_late_update_may_claim_what_its_own_task_allows(turns: Turns) -> None:
    """The task of a later round may have asked for fewer steps."""
    turns.turn(a=1, b=1, c="late")
    federation = turns.federation
    updates = [turns.delivery("a", 2), turns.delivery("b", 2), turns.delivery("c", 1)]
    allowances = federation.allowances({"a": 5, "b": 5, "c": 2})
    aggregate(
        federation.model, federation.state, updates, federation.folder / "out", STARTED + 99,
        allowances=allowances,
    )  # fmt: skip
    assert facilities(federation.folder / "out")["c"].status == "complete"


def test_a_round_without_delay_leaves_no_trace(turns: Turns) -> None:
    turns.turn(a=1, b=1, c="absent")
    line = next((turns.out / "state" / "history").glob("*.jsonl")).read_text()
    assert "staleness" not in line
    assert all(not known.open for known in turns.state.ledger.values())
    assert all(known.credit is None for known in turns.state.ledger.values())


def test_tasks_that_are_too_old_are_given_up(tmp_path: Path) -> None:
    turns = Turns(tmp_path, "ab", **EARLY)
    turns.turn(a=1, b="late")
    for number in range(2, 2 * MOST_STALE + 2):
        turns.turn(a=number, b="late")
    assert turns.state.ledger_of("b").open[0].round == 2
    credit = turns.state.ledger_of("b").credit
    turns.turn(a=2 * MOST_STALE + 2, b=1)
    assert facilities(turns.out)["b"].status == "refused"
    assert (turns.state.ledger_of("b").credit or 0) >= (credit or 0)  # it keeps its credit


def test_a_late_update_in_a_round_that_waits_is_held_and_not_trained_again(tmp_path: Path) -> None:
    turns = Turns(tmp_path, quorum=2, weighting="equal", below_quorum="wait")
    turns.turn(a=1, b=1, c="late")
    waiting = turns.turn(a="absent", b="absent", c=1)
    assert isinstance(waiting, Waiting)
    assert waiting.seconds == 300
    assert turns.state.held == ("c",)
    assert [t.round for t in turns.state.ledger_of("c").open] == [1]  # it has not counted yet
    turns.turn(a=2, b="absent")
    assert facilities(turns.out)["c"].staleness == 1
    assert torch.equal(master(turns.out)["w"], torch.full((6,), 2.0))


def test_a_late_update_of_a_skipped_round_is_not_used(tmp_path: Path) -> None:
    turns = Turns(tmp_path, quorum=2, weighting="equal", below_quorum="skip")
    turns.turn(a=1, b=1, c="late")
    turns.turn(a="absent", b="absent", c=1)
    assert entry(turns.out).skipped
    assert facilities(turns.out)["c"].status == "unused"
    assert turns.state.ledger_of("c").counted == 0


def test_a_refused_late_update_costs_its_facility_alone(turns: Turns) -> None:
    turns.turn(a=1, b=1, c="late")
    path = turns.delivery("c", 1)
    content = bytearray((path / "delta.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "delta.safetensors").write_bytes(content)
    turns.turn({"c": path}, a=2, b=2)
    assert facilities(turns.out)["c"].status == "refused"
    assert torch.equal(master(turns.out)["w"], torch.full((6,), 2.0))
    turns.turn(a=3, b=3, c=3)
    assert facilities(turns.out)["c"].status == "complete"


def test_first_goes_on_with_whoever_came(tmp_path: Path) -> None:
    """N updates make one of the rounds to run, whoever they are from."""
    turns = Turns(tmp_path, **EARLY)
    counts = []
    for number in range(1, 7):
        turns.turn(a=number, b="late", c="late")
        counts.append((turns.state.round, turns.state.finished, turns.state.updates))
    assert counts == [(1, 0, 1), (2, 0, 2), (3, 1, 3), (4, 1, 4), (5, 1, 5), (6, 2, 6)]
    assert turns.state.replace(rounds=3).more(STARTED + 60)
    assert not turns.state.replace(rounds=2).more(STARTED + 60)
    # a third for its own updates, and less than that where it comes more often than its share
    shares = facilities(turns.out)["a"].share
    assert shares == pytest.approx(1 / 9)
    turns.turn(a="late", b="late", c=1)
    assert facilities(turns.out)["c"].share == pytest.approx(3 / 7)  # of the cap, 1


@pytest.mark.parametrize("seconds", [1e9, 1e-9, 0.1])
def test_durations_that_a_facility_states_break_nothing(turns: Turns, seconds: float) -> None:
    stated = dict.fromkeys(("queue", "load", "evaluate", "train", "save"), seconds)
    turns.turn({"c": turns.delivery("c", 1, seconds=stated)}, a=1, b=1)
    (timing,) = turns.state.ledger_of("c").timings
    assert timing.train == seconds
    assert timing.load == pytest.approx(min(3 * seconds, 1e9))


@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm", "diloco"])
def test_nobody_in_is_no_failure_where_jobs_go_on(tmp_path: Path, optimizer: str) -> None:
    turns = Turns(tmp_path, **EARLY | {"server_optimizer": optimizer})
    before = dict(weights(_model(turns)))
    outcome = turns.turn(a="late", b="late", c="late")
    assert isinstance(outcome, Waiting)
    assert outcome.seconds == 0
    assert (turns.state.round, turns.state.waits) == (0, 1)
    assert torch.equal(weights(turns.out)["w"], before["w"])
    assert {n: len(k.open) for n, k in turns.state.ledger.items()} == {"a": 1, "b": 1, "c": 1}
    turns.turn(a=1, b="late", c="absent")
    assert facilities(turns.out)["a"].status == "complete"

    outcome = turns.turn(a="absent", b="late", c="absent")
    assert isinstance(outcome, Waiting)
    assert outcome.seconds == 300  # who is absent at once is not asked again at once
    with pytest.raises(BelowQuorumError, match="0 of 3 updates"):
        turns.turn(a="absent", b="absent", c="absent")


def test_time_that_runs_out_while_jobs_go_on_ends_the_federation(tmp_path: Path) -> None:
    turns = Turns(tmp_path, **EARLY, budget_seconds=90.0)
    turns.turn(a=1, b="late", c="late")
    outcome = turns.turn(a="late", b="late", c="late")
    assert isinstance(outcome, PassedThrough)
    assert not outcome.state.more(STARTED + 120)


def test_a_record_that_waits_for_everybody_lets_nobody_stall_it(tmp_path: Path) -> None:
    turns = Turns(tmp_path, weighting="equal")
    with pytest.raises(BelowQuorumError, match="c is late: job 7 is PENDING"):
        turns.turn(a=1, b=1, c="late")


def test_updates_of_many_steps_do_not_outweigh_those_of_few(tmp_path: Path) -> None:
    """Each delta is scaled by the mean of the steps asked over those that its task asked."""
    federation = Federation(tmp_path, ZEROS, **EARLY)
    names = {"a": 30, "b": 10}
    updates = [
        federation.update(name, {"w": torch.ones(6)}, steps=steps, samples=steps)
        for name, steps in names.items()
    ]
    out = federation.run(updates, allowances=federation.allowances(names))
    shares = {name: said.share for name, said in facilities(out).items()}
    assert shares["a"] == pytest.approx(3 / 4 * 20 / 30)
    assert shares["b"] == pytest.approx(20 / 10)


def test_a_partial_update_counts_by_its_steps_and_by_a_quarter_of_its_task_at_least(
    tmp_path: Path,
) -> None:
    shares = []
    for folder, steps in (("half", 10), ("one", 1)):
        federation = Federation(tmp_path / folder, ZEROS, **EARLY)
        fields = {"status": "partial", "reason": "time", "steps": steps, "samples": steps}
        updates = [federation.update("a", {"w": torch.ones(6)}, **fields)]
        out = federation.run(updates, allowances=federation.allowances({"a": 20}))
        shares.append(facilities(out)["a"].share)
    assert shares == pytest.approx([2, 4])


@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm", "diloco"])
def test_merges_of_one_update_each_go_as_far_as_rounds_of_all(
    tmp_path: Path, optimizer: str
) -> None:
    """Under a constant delta, N merges move the model in the end as one round of N does."""
    rules = {"server_optimizer": optimizer, "server_momentum": 0.5, "server_learning_rate": 1.0}
    ends = []
    for closes, names in (("all", "ab"), ("first", "ab")):
        turns = Turns(tmp_path / closes, names, weighting="equal", **rules, closes=closes)
        before = torch.zeros(6)
        for number in range(1, 13):
            if closes == "all":
                turns.turn(a=number, b=number)
            else:
                turns.turn(
                    **({"a": number, "b": "late"} if number % 2 else {"a": "late", "b": number})
                )
            if number == (11 if closes == "all" else 10):
                before = master(turns.out)["w"].clone()
        ends.append(float((master(turns.out)["w"] - before)[0]))
    assert ends[1] == pytest.approx(ends[0], rel=0.02)


def test_a_facility_goes_on_with_what_counted_of_it() -> None:
    """Schedule, data and what is kept are of its own updates that counted, not of the rounds."""
    state = ServerState(
        rounds=10,
        aggregation=Aggregation(**EARLY),
        started=STARTED,
        model="0" * 64,
        round=23,
        updates=23,
        participations=7,
        towards=2,
        ledger={"a": FacilityLedger(steps=75, samples=600, counted=21)},
    )
    members = [Facility(name=name, dataset="words") for name in "ab"]
    first, second = plan(state, members, 5, Training(), "train").tasks
    assert (first.round, first.counted, first.samples_seen) == (24, 21, 600)
    assert (first.schedule_step, first.schedule_steps) == (75, 75 + 3 * 5)
    assert (second.schedule_step, second.schedule_steps) == (0, 15)
    # at the end everybody's schedule is at its end
    done = state.replace(participations=10)
    (last,) = plan(done, members[:1], 5, Training(), "evaluate").tasks
    assert last.schedule_step == last.schedule_steps == 75
    waits_for_all = state.replace(aggregation=Aggregation(), round=7)
    assert plan(waits_for_all, members, 5, Training(), "train").tasks[0].schedule_step == 35


def test_members_come_and_go_by_full_participations() -> None:
    state = ServerState(
        rounds=4, aggregation=Aggregation(**EARLY), started=STARTED, model="0" * 64,
        round=5, updates=5, participations=1, towards=1,
    )  # fmt: skip
    members = [
        Facility(name="a", dataset="words"),
        Facility(name="b", dataset="words", joins=3),
        Facility(name="c", dataset="words", leaves=2),
        Facility(name="d", dataset="words", skips=(2,)),
    ]
    planned = plan(state, members, 5, Training(), "train")
    assert [task.facility for task in planned.tasks] == ["a", "c"]
    assert [task.round for task in planned.tasks] == [6, 6]
    assert {a.facility: a.steps for a in planned.allowances} == {"a": 5, "c": 5, "d": 0}
    # time may run out before there was a full participation; the model is measured all the same
    early = state.replace(participations=0, updates=1, round=1)
    measured = plan(early, members, 5, Training(), "evaluate").tasks
    assert [(task.facility, task.round) for task in measured] == [("a", 1), ("c", 1), ("d", 1)]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"aggregation_rule": "krum"}, "krum compares the updates of all: use mean"),
        ({"server_optimizer": "fedadam"}, "fedadam steps once for the updates of all"),
        ({"max_share": 0.5}, "max_share is a share of the updates of all"),
    ],
)
@pytest.mark.parametrize("closes", ["running", "first", 3600])
def test_what_needs_everybody_at_once_is_refused(
    closes: str | int, rules: dict[str, Any], message: str
) -> None:
    with pytest.raises(CrossFLError, match=f"closes is {closes}, and .*{message}"):
        Aggregation.parse({"closes": closes, **rules})
    Aggregation.parse(rules)


@pytest.mark.parametrize("value", ["never", 0, -1, 1.5, True, LARGEST_INT + 1])
def test_rules_that_there_are_not(value: Any) -> None:
    with pytest.raises(CrossFLError, match=r"aggregation\.closes .*choose one of all, running"):
        Aggregation.parse({"closes": value})


def test_a_number_of_seconds_may_be_a_word() -> None:
    assert Aggregation.parse({"closes": "3600"}).closes == 3600
    assert json.loads(json.dumps(Aggregation(closes=3600).asdict()))["closes"] == 3600


def _model(turns: Turns) -> Path:
    folder = turns.federation.folder / "first"
    folder.mkdir()
    (folder / "global_model").symlink_to(turns.federation.model)
    return folder


def test_a_run_that_goes_on_knows_who_is_late(tmp_path: Path) -> None:
    turns = Turns(tmp_path, **EARLY)
    turns.turn(a=1, b="late", c="late")
    rules = turns.state.aggregation
    resume(turns.out, 9, rules, Retention(), tmp_path / "resumed")
    turns.federation.go_on(tmp_path / "resumed")
    assert (turns.state.updates, turns.state.towards) == (1, 1)
    turns.turn(a="late", b="late", c=1)
    assert facilities(turns.out)["c"].staleness == 1
    with pytest.raises(CrossFLError, match="closes: first cannot go on with closes: all"):
        resume(turns.out, 9, rules.replace(closes="all"), Retention(), tmp_path / "other")


def test_a_late_adapter_counts_as_any_other(tmp_path: Path) -> None:
    turns = Turns(tmp_path, adapted=True, quorum=1, weighting="equal")
    turns.turn(a=1, b=1, c="late")
    turns.turn(a="late", b="late", c=1)
    assert facilities(turns.out)["c"].staleness == 1
    assert torch.equal(master(turns.out)["w"], torch.full((6,), 2.0))


def test_what_a_late_update_lost_in_its_encoding_is_not_lost(tmp_path: Path) -> None:
    turns = Turns(tmp_path, quorum=1, weighting="equal")
    turns.turn(a=1, b=1, c="late")
    values = turns.federation.deltas(7)
    stated = {"round": 1, "base": turns.bases[1]}
    path = turns.federation.update("c", values, "int4", name="coded", **stated)
    before = master(turns.out)["w"].clone()
    turns.turn({"c": path}, a="late", b="late")
    moved = master(turns.out)["w"] - before
    assert torch.allclose(moved, values["w"], atol=float(values["w"].abs().max()) / 7)


def test_a_norm_is_held_against_those_before_it_where_few_come_at_once(tmp_path: Path) -> None:
    turns = Turns(tmp_path, **EARLY)
    for number, name in enumerate("abab", 1):
        turns.turn(**dict.fromkeys("abc", "late") | {name: number})
    path = turns.federation.update("c", {"w": torch.full((6,), 50.0)}, name="large")
    turns.turn({"c": path}, a="late", b=5)
    refused = facilities(turns.out)["c"]
    assert refused.status == "refused"
    assert "more than 10 times the round's median" in (refused.reason or "")
