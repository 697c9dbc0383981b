"""The bound on norms: what is far too large is refused, and no honest update ever is."""

from pathlib import Path
from typing import Any

import pytest
import torch

from crossfl.protocol.records import Allowance, Schedule
from tests.support.federation import Federation, Values, facilities, weights
from tests.support.honest import HonestFederation

MODEL: Values = {"a": torch.zeros(64, 64)}
STEPS = 40


def of_norm(norm: float, seed: int = 0) -> Values:
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
    return {"a": values * (norm / values.norm())}


def allowances(*names: str, **schedule: Any) -> list[Allowance]:
    return [
        Allowance(facility=name, steps=STEPS, samples=10**6, tokens=10**6, **schedule)
        for name in names
    ]


def test_one_of_two_cannot_send_a_norm_without_bounds(tmp_path: Path) -> None:
    federation = Federation(tmp_path, MODEL, quorum=1)
    updates = [
        federation.update("evil", of_norm(5e14), steps=STEPS),
        federation.update("good", of_norm(1.0), steps=STEPS),
    ]
    out = federation.run(updates, allowances=allowances("evil", "good"))
    assert facilities(out)["evil"].reason == "its norm is 5e+14, above 1e+06"
    assert weights(out)["a"].norm().item() == pytest.approx(1.0, rel=1e-3)


def test_one_of_two_cannot_grow_beyond_its_own_last_rounds(tmp_path: Path) -> None:
    federation = Federation(tmp_path, MODEL, quorum=1)
    given = allowances("evil", "good")
    for number, norm in enumerate((1.0, 1.2, 0.9, 100.0)):
        updates = [
            federation.update(name, of_norm(size), name=f"{name}-{number}", steps=STEPS)
            for name, size in (("evil", norm), ("good", 1.0))
        ]
        out = federation.run(updates, f"out{number}", allowances=given)
        federation.go_on(out)
        statuses = {name: e.status for name, e in facilities(out).items()}
        assert statuses["good"] == "complete"
        assert statuses["evil"] == ("complete" if norm < 2 else "refused")
    reason = str(facilities(out)["evil"].reason)
    assert reason.startswith("its norm is 100, more than 10 times its own last rounds' median")


def test_who_claims_no_steps_does_not_escape_the_bound(tmp_path: Path) -> None:
    federation = Federation(tmp_path, MODEL, quorum=3)
    names = [f"good{i}" for i in range(3)]
    updates = [federation.update(name, of_norm(1.0), steps=STEPS) for name in names]
    cut = {"status": "partial", "reason": "wall time"}
    updates.append(federation.update("none", of_norm(1e5), steps=0, **cut))
    updates.append(federation.update("one", of_norm(1e5), steps=1, **cut))
    out = federation.run(updates, allowances=allowances(*names, "none", "one"))
    assert [e.status for e in facilities(out).values()] == ["complete"] * 3 + ["refused"] * 2


@pytest.mark.parametrize("warmup", [0, 20, 100])
@pytest.mark.parametrize("rule", ["mean", "median", "fednova"])
def test_who_did_all_its_work_counts_beside_two_that_were_cut_off(
    tmp_path: Path, warmup: int, rule: str
) -> None:
    """Norms as AdamW has them: 0.19 after a step, 6.5 after forty."""
    federation = Federation(tmp_path, MODEL, aggregation_rule=rule)
    cut = {"status": "partial", "reason": "1 of 40 steps", "steps": 1}
    updates = [
        federation.update("late1", of_norm(0.19, 1), **cut),
        federation.update("late2", of_norm(0.19, 2), **cut),
        federation.update("whole", of_norm(6.5, 3), steps=STEPS),
    ]
    given = allowances("late1", "late2", "whole", schedule_steps=1200, warmup_steps=warmup)
    out = federation.run(updates, allowances=given)
    assert [e.reason for e in facilities(out).values()] == [*["1 of 40 steps"] * 2, None]


HONEST: list[tuple[str, Schedule, int, float | None]] = [
    ("perceptron", "constant", 0, None),
    ("perceptron", "constant", 100, 0.05),
    ("adapter", "constant", 100, None),
    ("adapter", "cosine", 20, 0.05),
    ("embeddings", "cosine", 20, None),
    ("embeddings", "constant", 0, 0.05),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "schedule", "warmup", "topk"), HONEST)
def test_no_honest_update_is_refused_in_thirty_rounds(
    kind: str, schedule: Schedule, warmup: int, topk: float | None
) -> None:
    """With updates that were cut off, a facility that joins late, and what topk left out."""
    federation = HonestFederation(
        kind=kind, schedule=schedule, warmup_steps=warmup, topk=topk, joins=10, steps=20
    )
    federation.run()
    assert federation.refused == []


@pytest.mark.slow
def test_near_an_optimum_one_step_may_be_larger_than_forty() -> None:
    """Of the whole data at once: what AdamW does there is to go to and fro."""
    federation = HonestFederation(kind="adapter", facilities=1, batch_size=400, seed=2)
    federation.run()
    assert federation.refused == []
