"""`crossfl status`: what it says of a run, at 80 × 24, whatever is in the record."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crossfl import cli
from crossfl.console.run import Found, find
from crossfl.console.status import table
from crossfl.observe.live import fold
from crossfl.protocol.events import Event, encode_line
from crossfl.protocol.exits import Exit
from crossfl.protocol.layout import EVENTS, JOURNAL_LOCK, RUN
from crossfl.server.journal.journal import Description, Run
from tests.protocol.strategies import records

NOW = 1_800_000_000.0


def event(phase: str, ago: float, facility: str | None = None, **facts: Any) -> Event:
    return Event(time=NOW - ago, phase=phase, facility=facility, **facts)


STORY = (
    event("engine", 4000, message="streamflow run federation.yml"),
    event("plan", 3990, round=1, rounds=20),
    event("queued", 3000, "leonardo", round=1, job="11", message="Priority"),
    event("running", 2400, "leonardo", round=1, job="11", nodes=4, since=NOW - 2400),
    event("ended", 2000, "leonardo", round=1, job="11", nodes=4, seconds=400.0),
    event("aggregate", 1900, round=1, rounds=20, loss=2.34567),
    event("queued", 720, "leonardo", round=2, job="1234567", message="PartitionDown",
          expected=NOW + 600),
    event("running", 200, "karolina", round=2, job="998.pbs", nodes=2, since=NOW - 200),
    event("train", 5, "karolina", round=2, job="998.pbs", step=320, steps=1000, loss=2.1234,
          tokens_per_second=12345.0),
    event("sending", 3, "vega", round=2, bytes=3_000_000, size=12_000_000),
)  # fmt: skip


def journal(folder: Path, *events: Event, **facts: Any) -> Path:
    run = folder / "journal" / "2026-11-28T01-00-00-abcd"
    run.mkdir(parents=True)
    Run(run, Description(configuration={}, **facts)).save()
    (run / EVENTS).write_bytes(b"".join(map(encode_line, events)))
    return run.parent


def status(place: Path, *words: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "crossfl", "status", str(place), *words],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown(place: Path, width: int = 80, lines: int = 24) -> list[str]:
    return table(find(place), fold(STORY), NOW, width, lines)


def test_the_table_says_who_waits_for_what_and_who_works(tmp_path: Path) -> None:
    lines = shown(journal(tmp_path, *STORY))
    text = "\n".join(lines)
    assert "round 1 of 20   loss 2.3457   0.56 node-h" in text
    leonardo = next(line for line in lines if line.startswith("leonardo"))
    assert leonardo.split()[1:4] == ["queued", "1234567", "12"]
    assert "PartitionDown" in leonardo
    karolina = next(line for line in lines if line.startswith("karolina"))
    assert "998.pbs" in karolina
    assert "320/1000  loss 2.1234  12,345 tokens/s" in karolina
    assert "3.00 MB of 12.0 MB" in next(line for line in lines if line.startswith("vega"))


def test_it_fits_into_80_columns_and_24_lines(tmp_path: Path) -> None:
    crowd = [event("queued", 5, f"facility-with-a-long-name-{i:03}", job="j" * 200,
                   message="x" * 2000) for i in range(60)]  # fmt: skip
    place = journal(tmp_path)
    lines = table(find(place), fold(crowd), NOW, 80, 24)
    assert len(lines) < 24
    assert all(len(line) <= 80 for line in lines)
    assert any(line.startswith("and 42 more") or "more: --format json" in line for line in lines)


def test_as_json_it_has_estimates_and_everything_else(tmp_path: Path) -> None:
    document = json.loads(status(journal(tmp_path, *STORY), "--format", "json"))
    assert document["state"] == "not going on"
    assert document["node_hours"] > 0.4
    leonardo = document["facilities"]["leonardo"]
    assert (leonardo["job"], leonardo["reason"]) == ("1234567", "PartitionDown")
    assert leonardo["expected_start"] == NOW + 600
    assert leonardo["own_estimate"]["0.5"] >= NOW - 720 + 600


def test_a_run_goes_on_while_its_journal_is_locked_and_looking_takes_no_lock(
    tmp_path: Path,
) -> None:
    place = journal(tmp_path)
    with (place / JOURNAL_LOCK).open("w") as lock:
        assert not find(place).going_on
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert find(place).going_on
    assert not find(place).going_on


def test_watching_ends_with_the_run(tmp_path: Path) -> None:
    place = journal(tmp_path, *STORY, finished=True)
    assert "finished" in status(place, "--watch", "0.2", COLUMNS="80", LINES="24")


def test_what_comes_while_it_watches_is_shown(tmp_path: Path) -> None:
    place = journal(tmp_path, *STORY[:1])
    with (place / JOURNAL_LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        watching = subprocess.Popen(
            [sys.executable, "-m", "crossfl", "status", str(place), "--watch", "0.1"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert watching.stdout
        assert "goes on" in watching.stdout.readline()
        with next(place.glob(f"*/{EVENTS}")).open("ab", buffering=0) as file:
            line = encode_line(event("queued", 1, "leonardo", job="77", message="JobHeldUser"))
            file.write(line[:20])
            time.sleep(0.3)
            file.write(line[20:])
        while "JobHeldUser" not in watching.stdout.readline():
            assert watching.poll() is None
    assert watching.wait(20) == 0


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["nowhere"], "there is no journal nowhere"),
        (["journal", "--run", "2025"], "no run '2025'"),
        (["empty"], "no run in empty"),
    ],
)
def test_what_is_not_there_is_said(
    words: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    journal(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["status", *words]) == Exit.BAD_INPUT
    assert problem in capsys.readouterr().err


def test_a_folder_of_a_run_is_a_place_too_and_a_damaged_run_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = [path for path in journal(tmp_path).iterdir() if path.is_dir()]
    assert find(run).path == run.resolve()
    (run / RUN).write_text("{")
    assert cli.main(["status", str(run)]) == Exit.BAD_INPUT
    assert "cannot be read" in capsys.readouterr().err


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(records(Event), max_size=6), st.integers(60, 200), st.integers(10, 50))
def test_any_record_is_shown_without_harm(
    given_events: list[Event], width: int, lines: int
) -> None:
    run = Run(Path("/nowhere/2026"), Description(configuration={}))
    text = table(Found(run, going_on=True), fold(given_events), NOW, width, lines)
    assert all(len(line) <= width and line.isprintable() for line in text)
    assert len(text) <= lines
