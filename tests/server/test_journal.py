"""The journal: a federation that is cut off anywhere goes on, to the bit as if it never was."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from crossfl import cli
from crossfl.errors import CrossFLError
from crossfl.protocol.layout import MANIFEST, RUN
from crossfl.protocol.manifest import ModelManifest
from crossfl.protocol.records import Aggregation, Facility, Retention, Training
from crossfl.protocol.state import ServerState
from crossfl.protocol.variables import JOURNAL
from crossfl.server import state as server_state
from crossfl.server.journal import journal
from crossfl.server.planning.fixed import Plan, plan
from crossfl.server.rounds import PassedThrough, aggregate
from crossfl.storage import locks, manifest
from tests.support.loop import ROUNDS, WEIGHTS, Cut, Federation
from tests.support.paths import DATA


@contextmanager
def journal_at(path: Path | None) -> Iterator[None]:
    if path is not None:
        os.environ[JOURNAL] = str(path)
    try:
        yield
    finally:
        os.environ.pop(JOURNAL, None)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    with journal_at(tmp_path / "journal"):
        yield tmp_path / "journal"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    from crossfl.simulation.simulate import playing_every_facility

    with playing_every_facility(DATA):
        return (Federation(tmp_path_factory.mktemp("whole") / "run").run() / WEIGHTS).read_bytes()


# 1: initialise; then plan, two times train, aggregate; 14: report.
CUTS = ["after 1", "before 5", "after 9", "before 12", "after 13"]


@pytest.mark.slow
def test_cut_off_anywhere_it_goes_on(tmp_path: Path, place: Path, undisturbed: bytes) -> None:
    """Cut off again and again, always by the same command; only what was cut off is done anew."""
    for cut in CUTS:
        federation = Federation(tmp_path / "run")
        shutil.rmtree(place, ignore_errors=True)
        with pytest.raises(Cut):
            federation.run(cut)
        interrupted = federation.trained[-2:]
        assert (federation.run() / WEIGHTS).read_bytes() == undisturbed, cut
        twice = {each for each in federation.trained if federation.trained.count(each) > 1}
        assert twice <= set(interrupted) and len({round_ for _, round_ in twice}) <= 1, cut
        assert {round_ for _, round_ in federation.trained} == {1, 2, 3}
        (run,) = journal.runs(place)
        assert run.description.finished


def test_a_finished_federation_begins_anew(tmp_path: Path, place: Path, undisturbed: bytes) -> None:
    for _ in range(2):
        federation = Federation(tmp_path / "run")
        assert (federation.run() / WEIGHTS).read_bytes() == undisturbed
        assert len(federation.trained) == 2 * ROUNDS
    assert len(journal.runs(place)) == 2


def test_a_changed_configuration_is_refused_with_the_difference(
    tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Cut):
        Federation(tmp_path / "run").run("after 5")
    changed = Federation(tmp_path / "run", rounds=2)
    with pytest.raises(CrossFLError):
        changed.run()
    assert "rounds: 3 → 2" in capsys.readouterr().err
    otherwise = Federation(tmp_path / "run", words=["--learning-rate", "0.5"])
    with pytest.raises(CrossFLError):
        otherwise.run()
    assert "training.learning_rate: 0.0003 → 0.5" in capsys.readouterr().err
    assert changed.trained == otherwise.trained == []

    (run,) = journal.runs(place)
    assert cli.main(["runs", "unlock", run.path.name]) == 0
    changed.words = otherwise.words
    changed.run()
    assert [round_ for _, round_ in changed.trained] == [2, 2]
    (run,) = journal.runs(place)
    assert run.description.finished and not run.description.unlocked
    assert run.description.configuration["rounds"] == 2
    assert run.description.configuration["training"]["learning_rate"] == 0.5


@pytest.mark.parametrize("damage", ["truncated history", "flipped bit", "half a round"])
def test_a_damaged_round_is_set_aside(
    tmp_path: Path,
    place: Path,
    undisturbed: bytes,
    damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    federation = Federation(tmp_path / "run")
    with pytest.raises(Cut):
        federation.run("after 9")
    shutil.rmtree(tmp_path / "run")  # whose files are those of the journal
    (run,) = journal.runs(place)
    last = run.rounds()[-1]
    assert last.name == "000002"
    if damage == "truncated history":
        path = last / "state" / "history" / "000001.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "flipped bit":
        path = last / WEIGHTS
        content = bytearray(path.read_bytes())
        content[-7] ^= 4
        path.write_bytes(content)
    else:
        path = last / "state"
        shutil.rmtree(path)
    assert (federation.run() / WEIGHTS).read_bytes() == undisturbed
    assert str(path) in capsys.readouterr().err  # named
    assert len(list(run.path.glob("000002.damaged-*"))) == 1
    assert federation.trained.count(("leonardo", 1)) == 1
    assert federation.trained.count(("leonardo", 2)) == 2


def test_a_journal_of_a_newer_version(tmp_path: Path, place: Path) -> None:
    with pytest.raises(Cut):
        Federation(tmp_path / "run").run("after 5")
    (run,) = journal.runs(place)
    file = run.path / RUN
    file.write_text(file.read_text().replace('"format": 2', '"format": 3'))
    before = sorted(place.rglob("*"))
    with pytest.raises(CrossFLError, match=r"has format 3, this crossfl .* reads format 2"):
        journal.find(place, {})
    assert sorted(place.rglob("*")) == before


def test_low_disk_is_noticed_before_the_round(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = Federation(tmp_path / "run")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CrossFLError):
        federation.run()
    assert "low disk" in capsys.readouterr().err
    assert federation.trained == []


def test_two_runs_at_once(place: Path) -> None:
    words = f"going on .process {os.getpid()}, since"
    with locks.acquire(place), pytest.raises(CrossFLError, match=words):
        locks.acquire(place)
    locks.acquire(place).close()


def test_another_run_that_publishes_the_same_round(tmp_path: Path, place: Path) -> None:
    """Where no engine holds the lock (cwltool), the rename still lets one of two through."""
    with pytest.raises(Cut):
        Federation(tmp_path / "run").run("after 5")
    (run,) = journal.runs(place)
    model, state = (run.rounds()[-1] / part for part in ("global_model", "state"))
    run.publish(model, state, Retention())  # the same: by a step that outlived its engine
    other = tmp_path / "other"
    shutil.copytree(state, other)
    (other / MANIFEST).unlink()
    server_state.save(server_state.load(state).replace(model="0" * 64), other)
    with pytest.raises(CrossFLError, match="is there already: another run"):
        run.publish(model, other, Retention())


def _published(folder: Path, losses: list[float], retention: Retention) -> set[int]:
    """Publish rounds of which each says the loss of the one before; the rounds that are kept."""
    server = ServerState(rounds=9, aggregation=Aggregation(), started=0.0, model="0" * 64)
    for number in range(len(losses) + 1):
        model, state = (folder.parent / f"{folder.name}-{number}-{x}" for x in ("model", "state"))
        for path in (model, state):
            path.mkdir()
        (model / "weights").write_text(str(number))
        digest = manifest.write(model, ModelManifest(round=number)).digest
        best = sorted((loss, before) for before, loss in enumerate(losses[:number]))
        server = server.replace(
            round=number, model=digest, best=tuple((before, loss) for loss, before in best)
        )
        server_state.save(server, state)
        if number == 0:
            journal.begin(folder, "run", {}, model, state)
        (run,) = journal.runs(folder)
        run.publish(model, state, retention)
    return {int(path.name) for path in run.rounds()}


def test_retention(tmp_path: Path) -> None:
    """The loss in round r is of the model of round r - 1."""
    losses = [5.0, 4.0, 1.0, 3.0, 2.0, 6.0]
    kept = _published(tmp_path / "a", losses, Retention(keep_last=1, keep_best=1))
    assert kept == {6, 2}
    kept = _published(tmp_path / "b", losses, Retention(keep_last=2, keep_best=0))
    assert kept == {5, 6}
    kept = _published(tmp_path / "c", losses, Retention(keep_last=1, keep_best=0, keep_every=3))
    assert kept == {0, 3, 6}


def test_rounds_share_files_with_what_they_were_made_from(tmp_path: Path, place: Path) -> None:
    with pytest.raises(Cut):
        Federation(tmp_path / "run").run("after 9")
    (run,) = journal.runs(place)
    here = max((tmp_path / "run").glob("*-aggregate"))
    assert (run.rounds()[-1] / WEIGHTS).samefile(here / WEIGHTS)


def test_the_model_that_a_run_leaves_is_its_own(tmp_path: Path, place: Path) -> None:
    """Whatever is done to it, the journal keeps what it has."""
    here = Federation(tmp_path / "run").run()
    for path in (here / "global_model").iterdir():
        path.write_bytes(b"x")
    (run,) = journal.runs(place)
    last = run.last()
    assert last is not None and last.name == "000003"


def test_waits_take_no_place_of_rounds(tmp_path: Path, place: Path) -> None:
    with pytest.raises(Cut):
        Federation(tmp_path / "run").run("after 9")
    (run,) = journal.runs(place)
    last = run.rounds()[-1]
    server = server_state.load(last / "state")
    for waits in (1, 2, 3):
        state = tmp_path / f"wait-{waits}"
        shutil.copytree(last / "state", state)
        server_state.save(server.replace(waits=waits), state)
        run.publish(last / "global_model", state, Retention(keep_last=2, keep_best=0))
    assert [path.name for path in run.rounds()] == ["000001", "000002", "000002-000003"]


def test_runs_lists_and_removes(
    tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Cut):
        Federation(tmp_path / "run").run("after 5")
    (run,) = journal.runs(place)
    capsys.readouterr()
    assert cli.main(["runs"]) == 0
    said = capsys.readouterr().out
    assert run.path.name in said and "round 1 of 3" in said and "kB" in said
    with locks.acquire(place):
        assert cli.main(["runs", "rm", run.path.name]) == 4
    assert cli.main(["runs", "rm", "nothing"]) == 4
    assert cli.main(["runs", "rm", run.path.name]) == 0
    assert journal.runs(place) == []


def test_without_a_journal_there_is_none(tmp_path: Path, undisturbed: bytes) -> None:
    federation = Federation(tmp_path / "run")
    assert (federation.run() / WEIGHTS).read_bytes() == undisturbed
    assert not (tmp_path / "journal").exists()


def test_what_the_loop_is_given_after_the_last_round(tmp_path: Path, place: Path) -> None:
    """A loop turns once at least: there is nothing to train in that turn, and nothing changes."""
    with pytest.raises(Cut):
        Federation(tmp_path / "run").run("after 13")
    (run,) = journal.runs(place)
    folder = run.rounds()[-1]
    state, now = server_state.load(folder / "state"), time.time()
    facilities = [Facility(name="leonardo", dataset="words")]
    planned = plan(state, facilities, 1, Training(), "train", more=state.more(now))
    assert planned == Plan(ROUNDS, [], [])
    outcome = aggregate(folder / "global_model", folder / "state", [], tmp_path / "out", now)
    assert isinstance(outcome, PassedThrough) and not outcome.state.more(now)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
