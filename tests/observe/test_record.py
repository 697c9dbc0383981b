"""The record of a run, the hook, and the fold: nothing hostile harms them."""

import errno
import io
import json
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crossfl.observe import record
from crossfl.observe.display import Display
from crossfl.observe.follow import Follower, Hook
from crossfl.observe.live import Live, fold, read
from crossfl.observe.record import Record
from crossfl.protocol import events
from crossfl.protocol.events import LARGEST_EVENT, Event, encode_line
from crossfl.protocol.layout import EVENTS, RUN
from tests.protocol.strategies import records


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "journal" / "2026"
    folder.mkdir(parents=True)
    (folder / RUN).write_text("{}")
    return folder


def begin(name: str = "2026") -> Event:
    return Event(time=1.0, phase="journal", run=name)


def train(step: int, at: float, number: int = 1) -> Event:
    return Event(time=at, phase="train", facility="a", round=number, step=step, steps=100)


def test_events_of_before_the_run_has_a_name_are_recorded_too(run: Path) -> None:
    recorder = Record(run.parent)
    for event in (Event(time=0.0, phase="engine"), begin(), Event(time=2.0, phase="plan")):
        recorder.add(event)
    recorder.close()
    assert [e.phase for e in read(run / EVENTS)] == ["engine", "journal", "plan"]
    assert recorder.run == run


@pytest.mark.parametrize("name", ["elsewhere", "2026.d"])
def test_nothing_is_written_where_there_is_no_run(name: str, run: Path) -> None:
    recorder = Record(run.parent)
    recorder.add(begin(name))
    assert [p.name for p in run.parent.iterdir()] == ["2026"]
    assert recorder.run is None


def test_step_counts_are_thinned_but_for_the_first_and_the_last(run: Path) -> None:
    recorder = Record(run.parent)
    recorder.add(begin())
    for step in range(1, 101):
        recorder.add(train(step, 10 + step / 10))
    recorder.add(train(1, 20.1, number=2))
    recorder.close()
    assert [(e.round, e.step) for e in read(run / EVENTS) if e.phase == "train"] == [
        (1, 1), (1, 51), (1, 100), (2, 1),
    ]  # fmt: skip


def test_a_full_disk_costs_events_and_nothing_else(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        full = True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            if self.full:
                super().write(data[:5])
                raise OSError(errno.ENOSPC, "full")
            return super().write(data)

    recorder = Record(run.parent)
    recorder.add(begin())
    disk = Full()
    recorder._file = disk
    recorder.add(Event(time=2.0, phase="lost"))
    disk.full = False
    recorder.add(Event(time=3.0, phase="kept"))
    (run / EVENTS).write_bytes(disk.getvalue())
    assert [e.phase for e in read(run / EVENTS)] == ["kept"]


def test_the_file_has_an_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MOST_BYTES", 2000)
    recorder = Record(run.parent)
    recorder.add(begin())
    for step in range(1000):
        recorder.add(train(step, 10.0 * step))
        recorder.add(Event(time=10.0 * step, phase="plan"))
    assert (run / EVENTS).stat().st_size < 4000 + 500


@pytest.mark.parametrize(
    "bad",
    [
        b"x" * (60 << 20) + b"\n",
        b'{"time":1,"phase":"queued","facility":"a","message":"' + b"\x1b[2J" * 9 + b'"}\n',
        b'{"time":1,"phase":"queued","facility":"a","job":"' + b"j" * 201 + b'"}\n',
        b'{"time":1,"phase":"queued","facility":"../a"}\n',
        b'{"time":1,"phase":"journal","run":"../../etc"}\n',
        b'{"time":1,"phase":"train","step":-1}\n',
        b"\xff\n\x00\n",
    ],
)
def test_what_is_hostile_reaches_neither_the_terminal_nor_the_file(
    bad: bytes, run: Path, tmp_path: Path
) -> None:
    path, stream = tmp_path / "events", io.StringIO()
    path.touch()
    follower = Follower(path, stream, run.parent)
    follower.start()
    with path.open("ab", buffering=0) as file:
        file.write(encode_line(begin()) + bad + encode_line(Event(time=2.0, phase="plan")))
    follower.stop()
    assert not follower.is_alive()
    assert stream.getvalue() == "journal\nplan\n"
    assert [e.phase for e in read(run / EVENTS)] == ["journal", "plan"]
    assert (run / EVENTS).stat().st_size < LARGEST_EVENT


def test_a_record_that_cannot_be_written_stops_nothing(run: Path, tmp_path: Path) -> None:
    (run / EVENTS).mkdir()
    path, stream = tmp_path / "events", io.StringIO()
    path.write_bytes(encode_line(begin()) + encode_line(Event(time=2.0, phase="plan")))
    follower = Follower(path, stream, run.parent)
    follower.start()
    follower.stop()
    assert stream.getvalue() == "journal\nplan\n"


def test_the_hook_gets_absences_and_the_end_once_each(tmp_path: Path) -> None:
    target = tmp_path / "told"
    hook = Hook(f"cat >> {target}; exit 3")
    away = Event(time=1.0, phase="absent", facility="a", round=2, message="no $(touch x) `y`")
    for event in (away, away, Event(time=2.0, phase="plan"), Event(time=3.0, phase="stopped")):
        hook.call(event)
        for process in hook._running:
            process.wait(10)
    told = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(e["phase"], e.get("message")) for e in told] == [
        ("absent", "no $(touch x) `y`"),
        ("stopped", None),
    ]


def test_a_hook_that_hangs_or_is_missing_holds_nobody_up() -> None:
    for command in ("sleep 60", "/no/such/command"):
        hook, begun = Hook(command), time.monotonic()
        for number in range(20):
            hook.call(Event(time=1.0, phase="absent", facility="a", round=number))
        assert len(hook._running) <= 8
        assert time.monotonic() - begun < 20
        for process in hook._running:
            process.kill()
            process.wait()


def at(when: float, phase: str, **facts: object) -> Event:
    return Event(time=when, phase=phase, facility="a", **facts)  # type: ignore[arg-type]


LIFE = (
    Event(time=0.0, phase="engine", message="streamflow run"),
    Event(time=1.0, phase="plan", round=1, rounds=4),
    at(10, "sent", round=1, bytes=500),
    at(20, "queued", round=1, job="7", since=20.0, message="Priority"),
    at(50, "running", round=1, job="7", since=50.0, nodes=4),
    at(60, "train", round=1, job="7", step=1, steps=2, loss=2.0),
    at(150, "ended", round=1, job="7", nodes=4, seconds=100.0, log="/x/out"),
    at(151, "fetched", bytes=100),
    at(152, "merged", round=1),
    Event(time=160.0, phase="aggregate", round=1, rounds=4, loss=2.5),
)


def test_the_fold_tells_where_a_facility_is_and_what_it_used() -> None:
    waiting = fold(LIFE[:4]).facilities["a"]
    assert (waiting.phase, waiting.job, waiting.message) == ("queued", "7", "Priority")
    assert waiting.used(1000) == 0
    running = fold(LIFE[:6])
    assert running.facilities["a"].used(80) == 4 * 30
    assert running.node_hours(80) == 4 * 30 / 3600
    live = fold(LIFE)
    facility = live.facilities["a"]
    assert facility.used(10_000) == 400
    assert (facility.waits, facility.sent, facility.logs) == ([(20, 50)], 500, {1: "/x/out"})
    assert (live.round, live.rounds, live.loss) == (1, 4, 2.5)
    assert live.expected_end() == 160 + 3 * 160


def test_a_job_whose_end_nobody_saw_is_counted_until_the_engine_stopped() -> None:
    live = fold([*LIFE[:6], Event(time=90.0, phase="stopped", message="interrupted (SIGINT)")])
    assert live.facilities["a"].used(10_000) == 4 * 40
    assert live.stopped == "interrupted (SIGINT)"
    assert live.facilities["a"].phase == "stopped"


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(records(Event), max_size=6))
def test_whatever_happened_can_be_folded_and_shown(given_events: list[Event]) -> None:
    live = fold(given_events)
    live.expected_end()
    assert live.node_hours(1e12) >= 0
    stream = io.StringIO()
    display = Display(stream)
    for event in given_events:
        display.show(event)
    assert all(c.isprintable() or c == "\n" for c in stream.getvalue())


def test_the_fold_takes_memory_for_facilities_only() -> None:
    live = Live()
    for number in range(3000):
        live.take(at(number, "queued", job=str(number)))
        live.take(at(number, "running", job=str(number)))
        live.take(Event(time=number, phase="aggregate", round=number))
    assert len(live.facilities["a"].waits) <= 200
    assert len(live.ends) <= 11


def test_an_absence_that_two_report_is_one_line() -> None:
    stream = io.StringIO()
    display = Display(stream)
    for _ in range(2):
        display.show(at(1, "absent", round=2, message="down"))
    display.show(at(1, "absent", round=3, message="down"))
    display.show(at(1, events.SENDING, bytes=1, size=2))
    assert stream.getvalue() == "round 2  a  absent  down\nround 3  a  absent  down\n"
