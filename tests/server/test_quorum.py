"""A round without everybody: who is missing costs its own part, and no more."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from crossfl.errors import CrossFLError
from crossfl.protocol.layout import MANIFEST
from crossfl.protocol.manifest import StateManifest, UpdateManifest
from crossfl.protocol.records import Aggregation, Allowance, Task
from crossfl.protocol.state import FacilityLedger, ServerState
from crossfl.server import rounds
from crossfl.server import state as server_state
from crossfl.server.admission import Update
from crossfl.server.deliveries import Exclusion
from crossfl.server.planning.fixed import plan
from crossfl.server.quorum import share_present
from crossfl.server.rounds import Outcome, Skipped, Waiting
from crossfl.steps.train import absent
from crossfl.storage import manifest
from crossfl.storage.delta import Delta
from crossfl.storage.job import Job
from tests.support.federation import write_document
from tests.support.paths import ROUND

WEIGHTS = Path("global_model", "model.safetensors")
REASON = "Slurm job 7 ended in TIMEOUT"


@pytest.fixture
def missing(tmp_path: Path, job: Job) -> Path:
    """An update of karolina's that says why it is none."""
    task = _task(server_state.load(ROUND / "state"), job, "karolina")
    absent(task, REASON, tmp_path / "missing")
    return tmp_path / "missing" / "update"


def _task(state: ServerState, job: Job, facility: str) -> Task:
    tasks = plan(state, job.facilities, job.local_steps, job.training, "train").tasks
    return next(task for task in tasks if task.facility == facility)


def aggregate(
    model: Path,
    state: Path,
    updates: Sequence[Path],
    out: Path,
    allowances: Sequence[Allowance] | None = None,
) -> Outcome:
    """The end of the round, an hour after the federation began."""
    now = server_state.load(ROUND / "state").started + 3600
    return rounds.aggregate(model, state, updates, out, now, allowances=allowances)


def _state(folder: Path, **rules: Any) -> Path:
    """The state of `tests/cwl/round` under other rules."""
    server = server_state.load(ROUND / "state")
    folder.mkdir()
    for path in (ROUND / "state").glob("*.safetensors"):
        (folder / path.name).write_bytes(path.read_bytes())
    rules = server.aggregation.asdict() | rules
    server_state.save(server.replace(aggregation=Aggregation.parse(rules)), folder)
    return folder


def _updates(*paths: Path) -> list[Path]:
    return [ROUND / "leonardo" / "update", *paths]


def _base(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_stop_says_who_is_missing_and_why(tmp_path: Path, missing: Path) -> None:
    state = _state(tmp_path / "state", quorum=2)
    with pytest.raises(CrossFLError, match=f"karolina is absent: {REASON}"):
        aggregate(ROUND / "global_model", state, _updates(missing), tmp_path / "out")
    assert not (tmp_path / "out" / "global_model").exists()


def test_skip_counts_the_round_and_keeps_the_model(tmp_path: Path, missing: Path, job: Job) -> None:
    state = _state(tmp_path / "state", quorum=2, below_quorum="skip")
    outcome = aggregate(ROUND / "global_model", state, _updates(missing), tmp_path / "out")
    assert isinstance(outcome, Skipped)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == _base(ROUND / "global_model")
    after = server_state.load(tmp_path / "out" / "state")
    manifest.verify(tmp_path / "out" / "state", StateManifest)
    (entry,) = server_state.history(tmp_path / "out" / "state")
    assert entry == outcome.entry
    assert (after.round, entry.round) == (1, 1)
    assert "the quorum is 2" in str(entry.skipped)
    assert entry.facilities["karolina"].reason == REASON
    assert entry.facilities["leonardo"].status == "unused"
    assert _task(after, job, "leonardo").samples_seen == 0  # what it saw counts for nothing
    assert _task(after, job, "leonardo").base == after.model


def test_wait_asks_again_who_was_missing_and_loses_nothing(
    tmp_path: Path, missing: Path, job: Job
) -> None:
    rules = {"quorum": 2, "below_quorum": "wait", "wait_seconds": 0.0}
    state = _state(tmp_path / "state", **rules)
    model = ROUND / "global_model"
    outcome = aggregate(model, state, _updates(missing), tmp_path / "first")
    assert isinstance(outcome, Waiting)
    waiting = tmp_path / "first" / "state"
    server = server_state.load(waiting)
    manifest.verify(waiting, StateManifest)
    assert (server.round, server.held, server.waits) == (0, ("leonardo",), 1)
    planned = plan(server, job.facilities, job.local_steps, job.training, "train")
    assert [task.facility for task in planned.tasks] == ["karolina"]
    assert {a.facility: a.steps for a in planned.allowances} == {"karolina": 3, "leonardo": 2}

    update = ROUND / "karolina" / "update"
    aggregate(tmp_path / "first" / "global_model", waiting, [update], tmp_path / "second")
    aggregate(model, _state(tmp_path / "at once"), _updates(update), tmp_path / "third")
    together = (tmp_path / "third" / WEIGHTS).read_bytes()
    assert (tmp_path / "second" / WEIGHTS).read_bytes() == together
    after = server_state.load(tmp_path / "second" / "state")
    (entry,) = server_state.history(tmp_path / "second" / "state")
    assert (after.round, after.held, entry.waits) == (1, (), 1)
    assert not (tmp_path / "second" / "state" / "updates").exists()


def test_wait_does_not_go_beyond_the_time_that_there_is(tmp_path: Path, missing: Path) -> None:
    rules = {"quorum": 2, "below_quorum": "wait", "budget_seconds": 0.0}
    state = _state(tmp_path / "state", **rules)
    with pytest.raises(CrossFLError, match="the quorum is 2"):
        aggregate(ROUND / "global_model", state, _updates(missing), tmp_path / "out")


def test_what_arrived_damaged_is_asked_for_again(tmp_path: Path, missing: Path) -> None:
    rules = {"quorum": 2, "below_quorum": "wait", "wait_seconds": 0.0}
    damaged = shutil.copytree(ROUND / "leonardo" / "update", tmp_path / "damaged")
    data = bytearray((damaged / "delta.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "delta.safetensors").write_bytes(data)
    model, state = ROUND / "global_model", _state(tmp_path / "state", **rules)
    outcome = aggregate(model, state, [damaged, missing], tmp_path / "out")
    assert isinstance(outcome, Waiting)
    assert server_state.load(tmp_path / "out" / "state").held == ()


def test_the_time_that_runs_out_in_a_wait_ends_the_run(tmp_path: Path, missing: Path) -> None:
    """What is held is not averaged below the quorum because nobody else was asked any more."""
    rules = {"below_quorum": "wait", "budget_seconds": 1e9}
    state = _state(tmp_path / "state", **rules)
    outcome = aggregate(ROUND / "global_model", state, _updates(missing), tmp_path / "first")
    assert isinstance(outcome, Waiting)
    waiting = tmp_path / "first" / "state"
    late = server_state.load(waiting)
    late = late.replace(aggregation=late.aggregation.replace(budget_seconds=60.0))
    model = tmp_path / "first" / "global_model"
    for held in (("leonardo",), ()):
        server_state.save(late.replace(held=held), waiting)
        with pytest.raises(CrossFLError, match=r"budget_seconds ran out while round 1 waited"):
            aggregate(model, waiting, [], tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_the_quorum_is_of_those_who_were_asked(tmp_path: Path) -> None:
    """What came under another name, or not at all, is missing under its own."""
    asked = [
        Allowance(facility=name, steps=2, samples=8, tokens=384)
        for name in ("leonardo", "karolina")
    ]
    model, out, update = ROUND / "global_model", tmp_path / "out", ROUND / "leonardo" / "update"
    with pytest.raises(CrossFLError, match="1 updates were given, and 2 facilities were asked"):
        aggregate(model, _state(tmp_path / "all"), [update], out, asked)
    stranger = Path(shutil.copytree(ROUND / "karolina" / "update", tmp_path / "stranger"))
    document = json.loads((stranger / MANIFEST).read_text())
    write_document(stranger, document | {"facility": "stranger"})
    with pytest.raises(CrossFLError, match="karolina is refused: it is made in the name of strang"):
        aggregate(model, _state(tmp_path / "both"), [update, stranger], out, asked)
    state = _state(tmp_path / "half", quorum_share=0.6)
    with pytest.raises(CrossFLError, match=r"1 of 2 updates .* have 0\.5 of the weight"):
        aggregate(model, state, [update, stranger], out, asked)


@pytest.mark.parametrize(("share", "enough"), [(0.5, True), (0.51, False)])
def test_a_quorum_by_weight(tmp_path: Path, missing: Path, share: float, enough: bool) -> None:
    """Who never delivered is taken to weigh what the others weigh on average: here a half."""
    state = _state(tmp_path / "state", quorum_share=share)
    if enough:
        aggregate(ROUND / "global_model", state, _updates(missing), tmp_path / "out")
        return
    with pytest.raises(CrossFLError, match=r"they have 0\.5 of the weight"):
        aggregate(ROUND / "global_model", state, _updates(missing), tmp_path / "out")


def test_the_weight_that_is_missing_is_what_it_was_last(tmp_path: Path) -> None:
    ledger = {"karolina": FacilityLedger(counted=1, last_samples=24)}
    server = server_state.load(ROUND / "state").replace(ledger=ledger)
    path = ROUND / "leonardo" / "update"
    present = Update(path, manifest.read(path, UpdateManifest), Delta(path), None)
    gone = Exclusion("karolina", "absent", REASON)
    assert present.manifest.samples == 8
    assert share_present([present], [gone], server) == 0.25
