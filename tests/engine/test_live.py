"""Live state of batch jobs: what the scheduler says becomes events, and nothing of it does harm."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crossfl.engine import live
from crossfl.engine.connectors.live_jobs import LiveJobs, parts_of, tails
from crossfl.engine.connectors.reports import JobReport
from crossfl.engine.live import Transfer, report
from crossfl.protocol import variables
from crossfl.protocol.schedulers import pbs, slurm
from tests.support.events import read


def test_each_change_is_told_once_with_the_reason_and_the_estimate(events: Path) -> None:
    jobs = LiveJobs("leonardo")
    pending = JobReport(state="PENDING", reason="Priority", nodes=4, expected_wait=3600.0)
    for word in (
        pending,
        pending,
        JobReport(state="PENDING", reason="PartitionDown", nodes=4),
        JobReport(state="PENDING", reason="JobHeldUser", nodes=4),
        JobReport(state="RUNNING", nodes=4, elapsed=7.0),
        JobReport(state="RUNNING", nodes=4, elapsed=8.0),
        JobReport(state="SUSPENDED", nodes=4, elapsed=9.0),
        JobReport(state="TIMEOUT", log="/scratch/out"),
    ):
        jobs.see("7", "/train/0", word, waited=60.0)
    reported = read(events)
    assert [(e.phase, e.message) for e in reported] == [
        ("queued", "Priority"),
        ("queued", "PartitionDown"),
        ("queued", "JobHeldUser"),
        ("running", None),
        ("running", "suspended"),
        ("ended", "TIMEOUT"),
    ]
    first, last = reported[0], reported[-1]
    assert first.since is not None
    assert first.expected is not None
    assert 59 <= first.time - first.since <= 70
    assert round(first.expected - first.since) == 3600
    assert all(e.since == first.since for e in reported[:3])
    assert (last.nodes, last.log, last.job) == (4, "/scratch/out", "7")
    assert last.seconds is not None
    assert 7 <= last.seconds < 30


@pytest.mark.parametrize(
    "reason", ["\x1b[2J\x1b]0;gone\x07", "x" * (60 << 20), "a\nb\x00\u202e", "\ud800"]
)
def test_a_hostile_reason_is_cut_and_printable(reason: str, events: Path) -> None:
    LiveJobs("leonardo").see("7", None, JobReport(state="PENDING", reason=reason))
    (event,) = read(events)
    assert event.message is not None
    assert event.message.isprintable()
    assert len(event.message) <= 300
    assert events.stat().st_size < 2000


def test_of_a_jobs_own_events_numbers_are_taken_and_no_words(events: Path) -> None:
    jobs = LiveJobs("leonardo")
    own = {"time": 1, "phase": "train", "facility": "karolina", "round": 9, "step": 3, "steps": 4,
           "loss": 1.5, "message": "a secret", "run": "another", "log": "/etc/passwd"}  # fmt: skip
    torn = json.dumps(own)[:40].encode()
    for _ in range(3):
        jobs.say("7", None, torn + b"\n" + json.dumps(own).encode() + b"\n" + torn)
    (event,) = read(events)
    assert (event.facility, event.round, event.phase, event.step) == ("leonardo", None, "train", 3)
    assert (event.loss, event.job) == (1.5, "7")
    assert (event.message, event.run, event.log) == (None, None, None)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 5000, b"[" * 5000, b'{"time":1,"phase":"absent"}\n', b"x\n" * 9000]
)
def test_odd_content_of_a_jobs_file_says_nothing(content: bytes, events: Path) -> None:
    LiveJobs("leonardo").say("7", None, content)
    assert read(events) == []


def test_the_ends_of_several_files_are_told_apart(tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "a b").write_text("x" * 5000 + "\nlast\n")
    files = {"7": str(tmp_path / "a b"), "8.pbs": str(tmp_path / "missing")}
    answer = subprocess.run(
        ["/bin/sh", "-c", tails(files, "mark-1")], capture_output=True, text=True, check=False
    ).stdout
    found = parts_of(answer, "mark-1")
    assert set(found) == {"7", "8.pbs"}
    assert found["7"].endswith(b"\nlast\n\n")
    assert len(found["7"]) < 2100
    assert found["8.pbs"].strip() == b""
    assert parts_of("no mark at all" * 10**6, "mark-1") == {}


def test_a_transfer_is_counted(events: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: clock.now))
    transfer = Transfer("leonardo", "sending", 300)
    for now in (0.5, 1.5, 1.6):
        clock.now = now
        transfer(100)
    transfer.end("sent")
    assert [(e.phase, e.bytes, e.size) for e in read(events)] == [
        ("sending", 0, 300),
        ("sending", 200, 300),
        ("sent", 300, 300),
    ]


def test_nothing_is_reported_or_raised_where_nothing_can_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(variables.PROGRESS, raising=False)
    assert not report("leonardo", "absent")
    for path in ("/no/such/folder/file", "/dev/full"):
        monkeypatch.setenv(variables.PROGRESS, path)
        report("leonardo", "absent", message="x")
        report("../..", "absent")
        LiveJobs("leonardo").see("7", None, JobReport(state="PENDING"))


SQUEUE = """\
7|PENDING|Resources|2026-01-01T10:00:00|2026-01-01T11:30:00|4|0:00
8|RUNNING|None|2026-01-01T10:00:00|2026-01-01T10:00:30|2|1-02:03:04
9|PENDING|Priority|2026-01-01T10:00:00|N/A|1|0:00
10|PENDING|JobHeldUser
11|PENDING|odd|reason|of a site
"""


def test_estimates_nodes_and_times_of_slurm() -> None:
    queue = slurm.queue_of(SQUEUE)
    assert (queue["7"].nodes, queue["7"].expected_wait, queue["7"].elapsed) == (4, 5400.0, None)
    assert (queue["8"].nodes, queue["8"].elapsed) == (2, 93784.0)
    assert queue["9"].expected_wait is None
    assert (queue["10"].reason, queue["10"].nodes) == ("JobHeldUser", 0)
    assert queue["11"].reason == "odd|reason|of a site"


def test_estimates_nodes_and_times_of_pbs() -> None:
    job: dict[str, Any] = {
        "job_state": "Q",
        "ctime": "Thu Jan  1 10:00:00 2026",
        "estimated": {"exec_vnode": "(x)", "start_time": "Thu Jan  1 10:20:00 2026"},
        "Resource_List": {"nodect": 3},
    }
    found = pbs.jobs_of(json.dumps({"Jobs": {"7.pbs": job}}, indent=1))["7.pbs"]
    assert (found.expected_wait, found.nodes, found.elapsed) == (1200.0, 3, None)
    text = "Job Id: 7.pbs\n    job_state = R\n    resources_used.walltime = 00:01:05\n"
    assert pbs.jobs_of(text)["7.pbs"].elapsed == 65.0
