"""Who counted when, and with which task, decides the weights: a replay has the same, to the bit."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from crossfl import cli
from crossfl.errors import CrossFLError
from crossfl.protocol.history import encode_line
from crossfl.protocol.layout import GLOBAL_MODEL, HISTORY_LINES, STATE, UPDATE
from crossfl.protocol.manifest import ModelManifest, UpdateManifest
from crossfl.protocol.records import Task
from crossfl.server import state as server_state
from crossfl.server.planning.fixed import plan
from crossfl.server.rounds import Averaged, aggregate
from crossfl.simulation import replay
from crossfl.simulation.simulate import playing_every_facility, simulate
from crossfl.steps.initialise import initialise
from crossfl.steps.train import train
from crossfl.storage import manifest
from crossfl.storage.job import Job
from tests.support.paths import CWL, DATA

SCHEDULE: list[dict[str, int | str]] = [
    {"leonardo": 1, "karolina": "late"},
    {"leonardo": "absent", "karolina": 1},
    {"leonardo": 3, "karolina": "late"},
    {"leonardo": 4, "karolina": "late"},
    {"leonardo": "late", "karolina": 3},
]
"""For each round, whose update of which task counts: karolina's queue is long."""


def _job(**changes: Any) -> Job:
    job = Job.load(CWL / "federation.yml")
    rules = changes.pop("rules", {})
    training = job.training.replace(**changes)
    aggregation = job.aggregation.replace(server_momentum=0.5, **rules)
    return dataclasses.replace(job, rounds=3, training=training, aggregation=aggregation)


def _stand_in(task: Task, status: Any, place: Path) -> None:
    (place / UPDATE).mkdir(parents=True)
    heading = {"facility": task.facility, "federation": task.federation, "round": task.round}
    stated = UpdateManifest(**heading, base=task.base, status=status, reason="the queue is long")
    manifest.write(place / UPDATE, stated)


def _play(job: Job, folder: Path) -> tuple[Path, list[Task]]:
    """Run `SCHEDULE` as facilities would: each job trains when its turn comes, and delivers later.

    Returns:
        The history, and the tasks that were trained.
    """
    before = folder / "0"
    before.mkdir(parents=True)
    first = (job.model, job.config, job.tokenizer, job.seed, job.rounds, job.aggregation)
    initialise(*first, before)
    lines, trained = b"", []
    wanted = {(f, n) for turn in SCHEDULE for f, n in turn.items() if isinstance(n, int)}
    for number, turn in enumerate(SCHEDULE, 1):
        state = server_state.load(before / STATE)
        planned = plan(state, job.facilities, job.local_steps, job.training, "train")
        updates = []
        for task in planned.tasks:
            if (task.facility, number) in wanted:
                place = folder / task.facility / str(number)
                place.mkdir(parents=True)
                train(before / GLOBAL_MODEL, task, job.training, place)
                trained.append(task)
            what = turn[task.facility]
            place = folder / task.facility / str(what)
            if isinstance(what, str):
                place = folder / task.facility / f"{what}-{number}"
                _stand_in(task, what, place)
            updates.append(place / UPDATE)
        out = folder / str(number)
        outcome = aggregate(
            before / GLOBAL_MODEL, before / STATE, updates, out, state.started + 100 * number,
            allowances=planned.allowances,
        )  # fmt: skip
        assert isinstance(outcome, Averaged)
        lines += encode_line(outcome.entry)
        before = out
    (folder / HISTORY_LINES).write_bytes(lines)
    return folder / HISTORY_LINES, trained


@pytest.fixture
def data(tmp_path: Path) -> Path:
    shutil.copytree(DATA, tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.slow
def test_a_schedule_with_late_updates_gives_the_same_models(tmp_path: Path, data: Path) -> None:
    """With all that is kept from task to task: residual, optimizer, schedule, data."""
    job = _job(
        encoding="int4", local_optimizer="keep", schedule="cosine", rules={"closes": "first"}
    )
    with playing_every_facility(data):
        history, trained = _play(job, tmp_path / "run")
    digest = manifest.read(tmp_path / "run" / "5" / GLOBAL_MODEL, ModelManifest).digest

    simulate(job, data, tmp_path / "out", history)
    assert manifest.read(tmp_path / "out" / GLOBAL_MODEL, ModelManifest).digest == digest
    again = replay.read(tmp_path / "out" / HISTORY_LINES)
    once = replay.read(history)
    schedule = [
        {name: (said.status, said.staleness, said.share) for name, said in e.facilities.items()}
        for e in once
    ]
    assert [
        {n: (s.status, s.staleness, s.share) for n, s in e.facilities.items()} for e in again
    ] == schedule
    assert schedule[1]["karolina"][:2] == ("complete", 1)

    # karolina goes on from its task of round 1, not from the round in which that counted
    second = next(t for t in trained if t.facility == "karolina" and t.round == 3)
    assert (second.counted, second.schedule_step, second.samples_seen) == (1, 3, 12)

    moved = once[-1].replace(model="0" * 64)
    history.write_bytes(b"".join(encode_line(entry) for entry in [*once[:-1], moved]))
    with pytest.raises(CrossFLError, match="round 5 ends with another model"):
        simulate(job, data, tmp_path / "other", history)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "cannot be read"),
        ("", "has no round"),
        ("{}\n", "line 1"),
        ('{"round": 2, "finished": "x", "seconds": 1, "model": "' + "0" * 64 + '"}\n', "round 2"),
    ],
)
def test_a_history_that_cannot_be_replayed(
    tmp_path: Path, lines: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if lines is not None:
        (tmp_path / "history.jsonl").write_text(lines)
    words = ["simulate", str(CWL / "federation.yml"), "--data", str(DATA)]
    words += ["--replay", str(tmp_path / "history.jsonl"), "--outdir", str(tmp_path / "out")]
    assert cli.main(words) == cli.BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rounds_that_close_early_need_queues_or_a_history(tmp_path: Path) -> None:
    with pytest.raises(CrossFLError, match=r"closes is running.*closes: all, or give a history"):
        simulate(_job(rules={"closes": "running"}), DATA, tmp_path / "out")
