"""What a facility claims of its training is held against the task, and against what it sent."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crossfl.protocol.fields import LARGEST_COUNT
from crossfl.protocol.history import FacilityEntry
from crossfl.protocol.records import Allowance
from crossfl.server import state as server_state
from crossfl.steps.report import report
from tests.support.federation import Federation, Values, entry, facilities, snapshot, weights
from tests.support.page import Page

MODEL: Values = {"a": torch.zeros(4, 3)}
NOTHING: Values = {"a": torch.zeros(4, 3)}
ONES: Values = {"a": torch.ones(4, 3)}
STEPS = 40


def allowances(*facilities: str) -> list[Allowance]:
    """Each was asked for forty steps of two samples, of which each has ten tokens at most."""
    return [
        Allowance(facility=name, steps=STEPS, samples=2 * STEPS, tokens=20 * STEPS)
        for name in facilities
    ]


def late(federation: Federation, facility: str, values: Values, **claims: Any) -> Path:
    """An update that was cut off, of one step unless it claims otherwise."""
    said = {"status": "partial", "reason": "wall time", "steps": 1, "samples": 2, "tokens": 20}
    return federation.update(facility, values, **said | claims)


def whole(federation: Federation, facility: str, values: Values, **claims: Any) -> Path:
    """An update after all steps."""
    said = {"steps": STEPS, "samples": 2 * STEPS, "tokens": 20 * STEPS}
    return federation.update(facility, values, **said | claims)


@pytest.mark.parametrize(
    "claim",
    [
        {"bytes": 10**15},
        {"seconds": {"train": {"x": 1.0}}},
        {"seconds": {"sleep": 1.0}},
        {"seconds": {"train": 2**53}},
        {"metrics": {"training": 5}},
        {"metrics": {"training": {"tokens_per_second": None}}},
        {"metrics": {"training": {"joules": {"\u202egpu": 1.0}}}},
        {"metrics": {"validation": {"loss": 1.0, "tokens": 1, "perplexity": {"x": 1}}}},
    ],
    ids=repr,
)
@pytest.mark.parametrize("status", ["complete", "absent"])
def test_no_claim_keeps_the_others_from_their_report(
    tmp_path: Path, claim: dict[str, Any], status: str
) -> None:
    federation = Federation(tmp_path, MODEL, quorum=1)
    good = federation.update("good", federation.deltas(0))
    reason = {"reason": "gone"} if status == "absent" else {}
    evil = federation.update("evil", ONES, status=status, **reason, **claim)
    out = federation.run([good, evil])
    assert facilities(out)["good"].share == 1.0
    assert [e.status for e in facilities(out).values() if e.share == 0] == ["refused"]
    report(out / "state", [], out)
    Page((out / "report.html").read_text("utf-8"))


def test_bytes_are_those_of_the_files_and_an_absent_update_has_none(tmp_path: Path) -> None:
    federation = Federation(tmp_path, MODEL, quorum=1)
    good = federation.update("good", ONES)
    absent = federation.update(
        "absent", ONES, status="absent", reason="gone", tokens=2**53, samples=2**53, steps=2**53
    )
    asked = federation.allowances({"absent": 5, "good": 5})
    entries = facilities(federation.run([absent, good], allowances=asked))
    assert entries["absent"] == FacilityEntry(status="absent", reason="gone")
    assert entries["good"].bytes == (good / "delta.safetensors").stat().st_size


def test_fednova_multiplies_no_delta_by_more_than_four(tmp_path: Path) -> None:
    """Of a facility that claims one step of forty, and so would weigh forty times as much."""
    rules = {"aggregation_rule": "fednova", "max_norm_ratio": 1e300, "weighting": "equal"}
    federation = Federation(tmp_path, MODEL, **rules)
    updates = [whole(federation, f"honest{i}", NOTHING) for i in range(2)]
    updates.append(late(federation, "liar", ONES))
    names = ("honest0", "honest1", "liar")
    out = federation.run(updates, allowances=allowances(*names))
    assert facilities(out)["liar"].share <= 4 / 3
    assert weights(out)["a"].max() <= 4 / 3


def test_fednova_bounds_an_update_that_was_held_while_the_round_waited(tmp_path: Path) -> None:
    rules = {"aggregation_rule": "fednova", "max_norm_ratio": 1e300, "weighting": "equal"}
    federation = Federation(tmp_path, MODEL, quorum=3, below_quorum="wait", **rules)
    given = allowances("honest0", "honest1", "liar")
    updates = [
        whole(federation, "honest0", NOTHING),
        federation.update("honest1", status="absent", reason="queue"),
        late(federation, "liar", ONES),
    ]
    out = federation.run(updates, allowances=given)
    federation.go_on(out)
    assert federation.server.held == ("honest0", "liar")
    update = whole(federation, "honest1", NOTHING, name="again")
    out = federation.run([update], "next", allowances=given)
    assert facilities(out)["liar"].share <= 4 / 3


def test_complete_means_the_steps_that_were_asked(tmp_path: Path) -> None:
    federation = Federation(tmp_path, MODEL, quorum=1)
    updates = [
        whole(federation, "honest", ONES),
        late(federation, "less", ONES, status="complete", steps=STEPS - 1),
        late(federation, "more", ONES, steps=STEPS + 1),
        late(federation, "none", ONES, steps=0),
    ]
    out = federation.run(updates, allowances=allowances("honest", "less", "more", "none"))
    assert {name: e.reason for name, e in facilities(out).items()} == {
        "honest": None,
        "less": "it is complete and claims 39 steps, and was asked for 40",
        "more": "it claims 41 steps, the task allows 40",
        "none": "it claims 0 steps: a facility that takes none is absent",
    }


@pytest.mark.parametrize("weighting", ["tokens", "samples", "steps", "equal"])
def test_nobody_weighs_more_than_its_task_allows(tmp_path: Path, weighting: str) -> None:
    federation = Federation(tmp_path, MODEL, quorum=2, weighting=weighting)
    honest = [whole(federation, f"honest{i}", ONES) for i in range(2)]
    liars = [
        late(federation, "samples", ONES, samples=2 * STEPS + 1),
        late(federation, "steps", ONES, steps=2**53),
        late(federation, "tokens", ONES, tokens=2**53),
    ]
    names = ("honest0", "honest1", "samples", "steps", "tokens")
    out = federation.run([*honest, *liars], allowances=allowances(*names))
    entries = facilities(out)
    assert [entries[name].share for name in names] == [0.5, 0.5, 0.0, 0.0, 0.0]
    assert entries["tokens"].reason == f"it claims {2**53} tokens, the task allows {20 * STEPS}"


def test_a_claim_that_is_refused_decides_no_later_quorum(tmp_path: Path) -> None:
    """The share of the weight that a round needs is held against claims that were admitted."""
    federation = Federation(tmp_path, MODEL, quorum=1)
    names = ("a", "b", "liar")
    updates = [whole(federation, name, ONES) for name in names[:2]]
    updates.append(late(federation, "liar", ONES, tokens=2**53))
    federation.go_on(federation.run(updates, allowances=allowances(*names)))
    ledger = federation.server.ledger
    assert {name: known.last_tokens for name, known in ledger.items()} == {"a": 800, "b": 800}


def test_samples_are_added_up_without_an_end(tmp_path: Path) -> None:
    """Also where no allowance bounds them: a claim must not end the run two rounds later."""
    federation = Federation(tmp_path, MODEL, quorum=1)
    for number in range(3):
        update = federation.update("a", ONES, name=f"{number}", samples=LARGEST_COUNT)
        federation.go_on(federation.run([update], f"out{number}"))
    assert federation.server.ledger["a"].samples == LARGEST_COUNT


def test_who_speaks_in_anothers_name_is_refused_and_the_other_counts(tmp_path: Path) -> None:
    federation = Federation(tmp_path, MODEL, quorum=2)
    updates = [
        whole(federation, "alpha", federation.deltas(0)),
        whole(federation, "alpha", federation.deltas(1), name="beta"),
        whole(federation, "gamma", federation.deltas(2)),
    ]
    out = federation.run(updates, allowances=allowances("alpha", "beta", "gamma"))
    alone = federation.run(updates[::2], "alone", allowances=allowances("alpha", "gamma"))
    assert snapshot(out / "global_model") == snapshot(alone / "global_model")
    assert {name: (e.status, e.reason) for name, e in facilities(out).items()} == {
        "alpha": ("complete", None),
        "beta": ("refused", "it is made in the name of alpha, and beta was asked for it"),
        "gamma": ("complete", None),
    }


def test_many_long_reasons_do_not_end_a_round_that_is_skipped(tmp_path: Path) -> None:
    federation = Federation(tmp_path, MODEL, quorum=9, below_quorum="skip")
    updates = [
        federation.update(f"facility{i}", status="absent", reason="\x1bx" * 900) for i in range(9)
    ]
    out = federation.run(updates)
    assert str(entry(out).skipped).startswith("0 of 9 updates can be averaged")
    assert str(entry(out).skipped).isprintable()
    report(out / "state", [], out)
    json.loads((out / "history.jsonl").read_text())
    assert server_state.load(out / "state").round == 1
