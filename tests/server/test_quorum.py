"""A round without everybody: who is missing costs its own part, and no more."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crossfl.errors import CrossFLError
from crossfl.protocol.records import Aggregation, Task
from crossfl.server.admission import Excluded, Update, share_present
from crossfl.server.state import ServerState
from crossfl.steps.aggregate import aggregate
from crossfl.steps.plan import plan
from crossfl.steps.train import absent
from crossfl.storage import manifest
from crossfl.storage.delta import Delta
from crossfl.storage.job import Job
from tests.support.paths import ROUND

WEIGHTS = Path("global_model", "model.safetensors")
REASON = "Slurm job 7 ended in TIMEOUT"


@pytest.fixture
def missing(tmp_path: Path, job: Job) -> Path:
    """An update of karolina's that says why it is none."""
    absent(_task(ServerState.load(ROUND / "state"), job, "karolina"), REASON, tmp_path / "missing")
    return tmp_path / "missing" / "update"


def _task(state: ServerState, job: Job, facility: str) -> Task:
    tasks = plan(state, job.facilities, job.local_steps, "train")[1]
    return next(task for task in tasks if task.facility == facility)


def _state(folder: Path, **rules: Any) -> Path:
    """The state of `tests/cwl/round` under other rules."""
    server = ServerState.load(ROUND / "state")
    folder.mkdir()
    for path in (ROUND / "state").glob("*.safetensors"):
        (folder / path.name).write_bytes(path.read_bytes())
    rules = server.aggregation.asdict() | rules
    replace(server, aggregation=Aggregation.parse(rules)).save(folder)
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
    assert aggregate(ROUND / "global_model", state, _updates(missing), tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == _base(ROUND / "global_model")
    after = ServerState.load(tmp_path / "out" / "state")
    manifest.verify(tmp_path / "out" / "state", "state")
    entry = after.history[-1]
    assert (after.round, entry["round"]) == (1, 1)
    assert "the quorum is 2" in entry["skipped"]
    assert entry["facilities"]["karolina"]["reason"] == REASON
    assert entry["facilities"]["leonardo"]["status"] == "unused"
    assert _task(after, job, "leonardo").samples_seen == 0  # what it saw counts for nothing
    assert _task(after, job, "leonardo").base == after.model


def test_wait_asks_again_who_was_missing_and_loses_nothing(
    tmp_path: Path, missing: Path, job: Job
) -> None:
    rules = {"quorum": 2, "below_quorum": "wait", "wait_seconds": 0.0}
    state = _state(tmp_path / "state", **rules)
    model = ROUND / "global_model"
    assert aggregate(model, state, _updates(missing), tmp_path / "first")
    waiting = tmp_path / "first" / "state"
    server = ServerState.load(waiting)
    manifest.verify(waiting, "state")
    assert (server.round, server.held, server.waits) == (0, ["leonardo"], 1)
    tasks = plan(server, job.facilities, job.local_steps, "train")[1]
    assert [task.facility for task in tasks] == ["karolina"]

    update = ROUND / "karolina" / "update"
    aggregate(tmp_path / "first" / "global_model", waiting, [update], tmp_path / "second")
    aggregate(model, _state(tmp_path / "at once"), _updates(update), tmp_path / "third")
    together = (tmp_path / "third" / WEIGHTS).read_bytes()
    assert (tmp_path / "second" / WEIGHTS).read_bytes() == together
    after = ServerState.load(tmp_path / "second" / "state")
    assert (after.round, after.held, after.history[-1]["waits"]) == (1, [], 1)
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
    assert aggregate(model, state, [damaged, missing], tmp_path / "out")
    assert ServerState.load(tmp_path / "out" / "state").held == []


def test_the_time_that_runs_out_in_a_wait_ends_the_run(tmp_path: Path, missing: Path) -> None:
    """What is held is not averaged below the quorum because nobody else was asked any more."""
    rules = {"below_quorum": "wait", "budget_seconds": 1e12}
    state = _state(tmp_path / "state", **rules)
    assert aggregate(ROUND / "global_model", state, _updates(missing), tmp_path / "first")
    waiting = tmp_path / "first" / "state"
    late = replace(ServerState.load(waiting), started=-1e13)
    late.save(waiting)
    model = tmp_path / "first" / "global_model"
    for held in (["leonardo"], []):
        replace(late, held=held).save(waiting)
        with pytest.raises(CrossFLError, match=r"budget_seconds ran out while round 1 waited"):
            aggregate(model, waiting, [], tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_the_quorum_is_of_those_who_were_asked(tmp_path: Path) -> None:
    """What came under another name, or not at all, is missing under its own."""
    asked, update = {"leonardo": 2, "karolina": 2}, ROUND / "leonardo" / "update"
    model, out = ROUND / "global_model", tmp_path / "out"
    with pytest.raises(CrossFLError, match="karolina is absent: no update came in its name"):
        aggregate(model, _state(tmp_path / "all"), [update], out, asked=asked)
    stranger = shutil.copytree(ROUND / "karolina" / "update", tmp_path / "stranger")
    said = json.loads((stranger / manifest.FILE).read_text()) | {"facility": "stranger"}
    said.pop("seal")
    (stranger / manifest.FILE).write_text(json.dumps(said | {"seal": manifest.seal(said)}))
    state = _state(tmp_path / "half", quorum_share=0.6)
    with pytest.raises(CrossFLError, match=r"1 of 2 updates .* have 0\.5 of the weight"):
        aggregate(model, state, [update, stranger], out, asked=asked)


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
    server = ServerState.load(ROUND / "state")
    entry = {"status": "complete", "share": 0.75, "samples": 24}
    server.history.append({"round": 1, "facilities": {"karolina": entry}})
    path = ROUND / "leonardo" / "update"
    present = Update("leonardo", path, manifest.read(path, "update"), Delta(path))
    gone = Excluded("karolina", "absent", REASON, {})
    assert present.manifest["samples"] == 8
    assert share_present([present], [gone], server) == 0.25
