"""Jobs that end early: partial updates with true counts, and jobs that go on where they were."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from crossfl import cli
from crossfl.errors import CrossFLError
from crossfl.facility.time_budget import Budget, StopSignal
from crossfl.protocol import variables
from crossfl.protocol.manifest import UpdateManifest
from crossfl.protocol.records import Task, Training
from crossfl.server.planning.fixed import plan
from crossfl.server.rounds import Averaged, aggregate
from crossfl.steps.train import train
from crossfl.storage import manifest
from crossfl.storage.job import Job
from tests.support.paths import DATA, ROUND
from tests.support.processes import flags

MODEL = ROUND / "global_model"
TORCHRUN = {variables.LAUNCHER: f"{Path(sys.executable).with_name('torchrun')} --nproc-per-node=2"}
PATIENCE = 300
"""Seconds: on a busy machine, importing torch takes a minute."""
TRAINING = Training(batch_size=4, sequence_length=48, learning_rate=0.01, threads=1)


def _start(
    task: Task, training: Training, out: Path, *words: str, **more: str
) -> "subprocess.Popen[str]":
    """Begin to train in a process of its own, which reports to `out/progress`."""
    out.mkdir(exist_ok=True)
    here = {variables.FACILITY: "leonardo", variables.DATA: str(DATA / "leonardo")}
    command = [sys.executable, "-m", "crossfl", "train", "--global-model", str(MODEL)]
    return subprocess.Popen(
        [*command, *flags(task, training), *words, "--outdir", str(out)],
        cwd=out,
        env={**os.environ, **here, "CROSSFL_PROGRESS": str(out / "progress"), **more},
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for_step(out: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if (out / "progress").exists() and '"train"' in (out / "progress").read_text():
            return
        time.sleep(0.02)
    process.terminate()  # a launcher then ends its ranks, too
    raise AssertionError(f"it trained no step: {process.communicate()[1]}")


def _delta(update: Path) -> bytes:
    return (update / "delta.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "launcher"), [(signal.SIGTERM, TORCHRUN), (signal.SIGUSR1, {})], ids=["two", "one"]
)
def test_a_signal_ends_the_round_with_what_was_done(
    task: Task, tmp_path: Path, round_: Path, number: signal.Signals, launcher: Mapping[str, str]
) -> None:
    long = task.replace(local_steps=10**6, schedule_steps=2 * 10**6)
    process = _start(long, TRAINING, tmp_path / "out", **launcher)
    _wait_for_step(tmp_path / "out", process)
    process.send_signal(number)
    assert process.wait(PATIENCE) == 0, process.communicate()[1]
    update = tmp_path / "out" / "update"
    delivered = manifest.verify(update, UpdateManifest)
    steps = delivered.steps
    assert delivered.status == "partial"
    why = (delivered.reason or "").removeprefix(f"{steps} of 1000000 steps: ")
    assert why.startswith("SIG") or (launcher and why == "another rank was told to stop")
    assert 1 <= steps < 10**6
    assert delivered.samples == 4 * steps

    exactly = long.replace(local_steps=steps)
    if not launcher:  # ranks sum in another order
        train(MODEL, exactly, TRAINING, tmp_path / "exactly")
        assert _delta(update) == _delta(tmp_path / "exactly" / "update")

    state, others = round_ / "state", round_ / "karolina" / "update"
    outcome = aggregate(MODEL, state, [update, others], tmp_path / "next", time.time())
    assert isinstance(outcome, Averaged)
    entry = outcome.entry.facilities
    counts = {name: values.samples for name, values in entry.items()}
    assert entry["leonardo"].status == "partial"
    assert entry["leonardo"].share == counts["leonardo"] / sum(counts.values())
    facilities = Job.load(ROUND.parent / "federation.yml").facilities
    after = {t.facility: t for t in plan(outcome.state, facilities, 2, TRAINING, "train").tasks}
    assert after["leonardo"].samples_seen == 4 * steps


@pytest.mark.slow
def test_no_time_for_a_step_is_an_absence(task: Task, tmp_path: Path) -> None:
    hasty = TRAINING.replace(max_seconds=0.0)
    with pytest.raises(CrossFLError, match=r"no time for a step in round 1: max_seconds 0 were"):
        train(MODEL, task, hasty, tmp_path)
    assert list(tmp_path.iterdir()) == []
    process = _start(task, hasty, tmp_path / "two", "--on-failure", "absent", **TORCHRUN)
    assert process.wait(PATIENCE) == 0, process.communicate()[1]
    delivered = manifest.verify(tmp_path / "two" / "update", UpdateManifest)
    assert (delivered.status, delivered.steps) == ("absent", 0)
    assert "no time for a step" in (delivered.reason or "")


def test_the_end_of_the_job_is_kept_clear_of(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    assert Budget(TRAINING.replace(reserve_seconds=60), StopSignal()).spent() is None
    reason = Budget(TRAINING, StopSignal()).spent()
    assert reason is not None
    assert reason.startswith("the job ends in ")
    with pytest.raises(CrossFLError, match="no time for a step in round 1: the job ends in"):
        train(MODEL, task, TRAINING, tmp_path)


@pytest.mark.slow
def test_a_job_that_is_killed_goes_on_to_the_same_bits(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed outright again and again, at moments drawn at random, until it comes through."""
    task = task.replace(local_steps=120, schedule_steps=240, round=2, samples_seen=5)
    state = tmp_path / "state"
    monkeypatch.setenv(variables.STATE, str(state))
    whole = TRAINING.replace(schedule="cosine", encoding="int8")
    saving = whole.replace(checkpoint_steps=7)
    train(MODEL, task, whole, tmp_path / "whole")
    kills, out = 0, tmp_path / "killed"
    while True:
        out = tmp_path / f"killed-{kills}"
        process = _start(task, saving, out)
        if kills == 2:
            assert process.wait(PATIENCE) == 0, process.communicate()[1]
            break
        _wait_for_step(out, process)
        while not list(state.glob("leonardo/savepoint-*/2/[0-9]*/counts.json")):
            assert process.poll() is None, process.communicate()[1]
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        process.wait()
        assert not (out / "update").exists()
        kills += 1
    events = [json.loads(line) for line in (out / "progress").read_text().splitlines()]
    assert min(e["step"] for e in events if e["phase"] == "train") > saving.checkpoint_steps
    one, two = (manifest.verify(o / "update", UpdateManifest) for o in (tmp_path / "whole", out))
    assert one.digest == two.digest
    assert (one.steps, one.samples, one.tokens) == (two.steps, two.samples, two.tokens)
    assert not list(state.glob("leonardo/savepoint-*/2"))


def test_a_savepoint_of_other_options_is_left_alone(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stops at its second step leaves one behind; only the very same task takes it."""
    from crossfl.facility.savepoint import Savepoint
    from crossfl.learning.training import TrainingResult

    saving = TRAINING.replace(checkpoint_steps=1)
    savepoint = Savepoint(task, saving, {"ranks": 1})
    savepoint.write({}, TrainingResult(steps=1))
    found = savepoint.read()
    assert found is not None
    assert found[1]["steps"] == 1
    later = saving.replace(max_seconds=9.0)
    assert Savepoint(task, later, {"ranks": 1}).read() is not None
    for changed in (
        Savepoint(task.replace(seed=task.seed + 1), saving, {"ranks": 1}),
        Savepoint(task, saving.replace(learning_rate=0.1), {"ranks": 1}),
        Savepoint(task, saving, {"ranks": 2}),
    ):
        assert changed.read() is None
    (path,) = savepoint._folder.glob("1/counts.json")
    path.write_text("{")
    assert savepoint.read() is None


@pytest.mark.slow
def test_a_job_that_is_run_again_goes_on(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`qrerun` tells a job to end, which delivers a part, and runs it again in the same folder."""
    monkeypatch.setenv(variables.FACILITY, "leonardo")
    monkeypatch.setenv(variables.DATA, str(DATA / "leonardo"))
    monkeypatch.setenv(variables.STATE, str(tmp_path / "state"))
    task = task.replace(local_steps=9, schedule_steps=18)
    train(MODEL, task, TRAINING, tmp_path / "whole")
    saving, out = TRAINING.replace(checkpoint_steps=2), tmp_path / "out"
    out.mkdir()
    model = ["--global-model", str(MODEL), "--outdir", str(out)]
    words = ["train", *model, *flags(task, saving)]
    steps = iter([None] * 5 + ["SIGTERM was received"])
    with monkeypatch.context() as early:
        early.setattr(Budget, "spent", lambda _: next(steps))
        assert cli.main(words) == 0
    assert manifest.verify(out / "update", UpdateManifest).steps == 5
    (out / "cwl.output.json").unlink()
    progress = tmp_path / "progress"
    monkeypatch.setenv(variables.PROGRESS, str(progress))
    assert cli.main(words) == 0
    events = [json.loads(line) for line in progress.read_text().splitlines()]
    assert min(e["step"] for e in events if e["phase"] == "train") == 5, "from the savepoint on"
    again = manifest.verify(out / "update", UpdateManifest)
    assert again.digest == manifest.verify(tmp_path / "whole" / "update", UpdateManifest).digest
    assert (again.status, again.steps) == ("complete", 9)
    assert not list((tmp_path / "state").glob("leonardo/savepoint-*/1"))

    (out / "cwl.output.json").unlink()
    progress.unlink()
    assert cli.main(words) == 0, "all was delivered before it was run again"
    assert not progress.exists() and (out / "cwl.output.json").exists()
    (out / "cwl.output.json").unlink()
    capsys.readouterr()
    another = ["train", *model, *flags(task.replace(round=2), saving)]
    assert cli.main(another) == cli.BAD_INPUT
    assert "exists already: remove it" in capsys.readouterr().err
    assert manifest.verify(out / "update", UpdateManifest) == again
    assert not (out / "cwl.output.json").exists()
