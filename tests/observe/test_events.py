"""Progress: what a step reports, what is shown of it, and lines that are no events."""

import contextlib
import io
import math
import os
import pty
import threading
import time
from pathlib import Path

import pytest

from crossfl.observe.display import Display, describe
from crossfl.observe.events import Progress
from crossfl.observe.follow import Follower, Lines
from crossfl.protocol import variables
from crossfl.protocol.events import LARGEST_EVENT, Event
from tests.support.events import read


def follow(path: Path, content: bytes) -> str:
    """What a follower shows of a file that gets this content while it is followed."""
    stream = io.StringIO()
    follower = Follower(path, stream)
    follower.start()
    with path.open("ab", buffering=0) as file:
        file.write(content)
    follower.stop()
    assert not follower.is_alive()
    return stream.getvalue()


def plan(message: str) -> bytes:
    return f'{{"time":1,"phase":"plan","message":"{message}"}}\n'.encode()


def test_a_report_becomes_an_event(events: Path) -> None:
    with Progress(facility="leonardo", round=2, rounds=5) as progress:
        progress("train", step=4, steps=4, loss=1.5, tokens_per_second=10.0, message="è")
    (event,) = read(events)
    assert abs(event.time - time.time()) < 60
    assert event == Event(
        time=event.time,
        phase="train",
        facility="leonardo",
        round=2,
        rounds=5,
        step=4,
        steps=4,
        loss=1.5,
        tokens_per_second=10.0,
        message="è",
    )


def test_reports_that_follow_too_fast_are_left_out_but_not_the_last(events: Path) -> None:
    with Progress() as progress:
        for step in range(1, 101):
            progress("train", step=step, steps=100)
        progress("save")
    assert [(e.phase, e.step) for e in read(events)] == [
        ("train", 1),
        ("train", 100),
        ("save", None),
    ]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_left_out(loss: float, events: Path) -> None:
    with Progress() as progress:
        progress("train", step=1, steps=1, loss=loss)
    assert read(events)[0].loss is None


def test_a_message_is_printable_and_fits_into_an_event(events: Path) -> None:
    with Progress() as progress:
        progress("completion", message="\x1b[2J\ud800" + "€" * 100_000)
    (event,) = read(events)
    assert event.message is not None
    assert event.message.startswith("\\x1b[2J\\ud800€")
    assert len(event.message) == 2000
    assert len(events.read_bytes()) < LARGEST_EVENT


def test_a_full_disk_does_not_end_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variables.PROGRESS, "/dev/full")
    with Progress() as progress:
        progress("train", step=1, steps=1)


def test_lines_of_several_writers_do_not_mix(events: Path) -> None:
    def report(facility: str) -> None:
        with Progress(facility=facility) as progress:
            for i in range(50):
                progress(f"phase{i}", message="x" * 1000)

    writers = [threading.Thread(target=report, args=(f"f{i}",)) for i in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read(events)) == 8 * 50


def test_without_a_file_events_are_shown_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(variables.PROGRESS, raising=False)
    with Progress(round=1, rounds=2) as progress:
        progress("plan", message="train at leonardo")
    assert capsys.readouterr().err == "round 1/2  plan  train at leonardo\n"


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Event(time=0.0, phase="load"), "load"),
        (Event(time=0.0, phase="load", round=3), "round 3  load"),
        (
            Event(
                time=0.0,
                phase="trained",
                facility="karolina",
                round=1,
                rounds=2,
                step=3,
                steps=4,
                loss=1.23456,
                tokens_per_second=12345.6,
                seconds=9.99,
                message="done",
            ),
            "round 1/2  karolina  trained  3/4  loss 1.2346  12,346 tokens/s  10.0 s  done",
        ),
        (Event(time=0.0, phase="load", message="a\x1b[2J\nb\u202e"), "load  a\\x1b[2J\\nb\\u202e"),
        (Event(time=0.0, phase="train", loss=1e300), "train  loss 1.00e+300"),
    ],
)
def test_an_event_is_one_printable_line(event: Event, line: str) -> None:
    assert describe(event) == line


def test_a_log_has_no_line_for_every_step() -> None:
    stream = io.StringIO()
    display = Display(stream)
    for step in range(100):
        display.show(Event(time=0.0, phase="train", facility="a", step=step, steps=100))
    display.show(Event(time=0.0, phase="trained", facility="a"))
    assert stream.getvalue() == "a  trained\n"


def test_a_stream_that_lacks_a_character_gets_it_escaped() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Display(stream).show(Event(time=0.0, phase="plan", message="it 3= → tre"))
    stream.flush()
    assert raw.getvalue() == b"plan  it 3= \\u2192 tre\n"


def test_a_closed_stream_shows_nothing() -> None:
    stream = io.StringIO()
    stream.close()
    Display(stream).show(Event(time=0.0, phase="plan"))


def _everything(terminal: int) -> str:
    """What was written to a terminal that is closed at its other end; it comes in parts."""
    parts = []
    with contextlib.suppress(OSError):  # the end
        while part := os.read(terminal, 4096):
            parts.append(part)
    os.close(terminal)
    return b"".join(parts).decode()


def test_a_terminal_has_a_bar_for_each_facility_that_trains() -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        display = Display(terminal)
        display.show(Event(time=0.0, phase="plan", message="[bold]at[/bold] \x1b[31mleonardo"))
        display.show(Event(time=0.0, phase="train", facility="leonardo", step=1, steps=4, loss=2.0))
        display.show(Event(time=0.0, phase="train", facility="karolina"))
        display.close()
    shown = _everything(ours)
    assert "plan  [bold]at[/bold] \\x1b[31mleonardo" in shown
    assert "train  1/4  loss 2.0000" in shown
    assert "karolina" in shown


@pytest.mark.parametrize(
    "bad",
    [
        b'{"time":1,"phase":"train","facil' + plan("glued"),
        b"\n\n",
        b"[]\n",
        b"null\n",
        b"\xff\xfe\x00\n",
        b"[" * 10_000 + b"\n",
        b'{"time":1,"phase":"train","step":1e999}\n',
        b'{"time":1,"phase":"<b>"}\n',
        b'{"time":1,"phase":"plan","facility":"a\\u001b"}\n',
        b'{"format":2,"time":1,"phase":"plan"}\n',
        b'{"time":1,"phase":"plan","message":"' + b"x" * 1_000_000 + b'"}\n',
        b"x" * 1_000_000 + b"\n",
    ],
)
def test_a_line_that_is_no_event_is_skipped(bad: bytes, events: Path) -> None:
    assert follow(events, plan("one") + bad + plan("two")) == "plan  one\nplan  two\n"


def test_a_line_may_come_in_parts(events: Path) -> None:
    stream = io.StringIO()
    follower = Follower(events, stream)
    follower.start()
    with events.open("ab", buffering=0) as file:
        for part in (b'{"time":1,"ph', b'ase":"plan","message":"\xc3', b'\xa8"}\n'):
            file.write(part)
            time.sleep(0.3)
    follower.stop()
    assert stream.getvalue() == "plan  è\n"


def test_what_is_kept_of_an_endless_line_is_bounded() -> None:
    lines = Lines(longest=10)
    for _ in range(1000):
        assert list(lines.feed(b"x" * 8)) == []
        assert len(lines._pending) <= 10
    assert list(lines.feed(b"\nshort\nlong" + b"g" * 10)) == [b"short"]
    assert list(lines.feed(b"\nagain\n")) == [b"again"]
