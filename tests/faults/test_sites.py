"""What goes wrong at a site costs its update of that round, and the site is there in the next."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crossfl.engine.recovery.housekeeping import RANDOM_NAME
from tests.support.faults import Federation, Login

END_SECONDS = 30
"""In which a run ends, once it has said what it cannot survive."""

CUT = """\
for word; do [ "$word" = chf ] && cut=yes; done
if [ -n "$cut" ]; then exec /usr/bin/tar "$@" | head -c 3000; fi
exec /usr/bin/tar "$@"
"""
FLIP = """\
for word; do [ "$word" = chf ] && flip=yes; done
if [ -z "$flip" ]; then exec /usr/bin/tar "$@"; fi
/usr/bin/tar "$@" | python3 -c '
import sys
b = bytearray(sys.stdin.buffer.read())
b[len(b) // 2] ^= 1
sys.stdout.buffer.write(b)'
"""


def test_a_bad_week(
    federation: Callable[..., Federation],
    login: Login,
    alpha: Any,
    shim: Callable[[Any, str, str], None],
) -> None:
    """Down, back, cancelled, stuck in the queue, cut, garbled, back: one round each.

    Nothing that leonardo trained is lost, no round is lost, and alpha counts whenever it is there.
    """
    facilities = [
        {"name": "alpha", "dataset": "words", "attempts": 1, "queue_timeout": 20},
        {"name": "leonardo", "dataset": "words"},
    ]
    week = federation(rounds=7, facilities=facilities)
    tar = Path(alpha.facts["home"]) / "bin" / "tar"
    login.stop()
    run = week.start()
    week.wait_for_round(1, run)
    login.start()
    week.wait_for_round(2, run)
    (job,) = week.wait_for(alpha.jobs, run)
    alpha.cancel(job)
    week.wait_for_round(3, run)
    login.slurm("scontrol", "update", "PartitionName=boost", "State=DOWN")
    try:
        week.wait_for_round(4, run)
    finally:
        login.slurm("scontrol", "update", "PartitionName=boost", "State=UP")
    shim(alpha, "tar", CUT)
    week.wait_for_round(5, run)
    shim(alpha, "tar", FLIP)
    week.wait_for_round(6, run)
    tar.unlink()
    assert week.end(run) == 0, week.log()

    history = week.history()
    assert [entry["round"] for entry in history] == list(range(1, 8))
    assert all(e["facilities"]["leonardo"]["status"] == "complete" for e in history)
    found = [
        (e["facilities"]["alpha"]["status"], e["facilities"]["alpha"].get("reason"))
        for e in history
    ]
    words = {
        1: "connection refused",
        3: "CANCELLED",
        4: "QUEUE_TIMEOUT",
        5: "cut short",
        6: "",
    }
    for number, (status, reason) in enumerate(found, start=1):
        if number in words:
            assert status in ("absent", "refused"), (number, reason)
            assert words[number] in reason, (number, reason)
        else:
            assert (status, reason) == ("complete", None), (number, reason)
    assert not alpha.jobs()


SLOW = """\
for word; do [ "$word" = {mode} ] && slow=yes; done
if [ -n "$slow" ]; then touch ~/{mode}; sleep 8; fi
exec /usr/bin/tar "$@"
"""


def test_another_bad_week(
    federation: Callable[..., Federation],
    login: Login,
    alpha: Any,
    shim: Callable[[Any, str, str], None],
) -> None:
    """The login node goes down in the job, the download, the upload and between rounds, and comes
    back each time; the scheduler restarts.

    A job that outlives its controller's restart counts, unless Slurm, which has no accounting here,
    has forgotten it, or that it began, and starts it twice; everything else costs alpha its round.
    """
    facilities = [
        {"name": "alpha", "dataset": "words", "attempts": 1, "queue_timeout": 20},
        {"name": "leonardo", "dataset": "words"},
    ]
    week = federation(rounds=7, facilities=facilities)
    home = Path(alpha.facts["home"])
    for mode in ("chf", "xpf"):
        (home / mode).unlink(missing_ok=True)

    run = week.start()
    week.wait_for(alpha.jobs, run)
    login.stop()  # during the job
    week.wait_for_round(1, run)
    login.start()

    week.wait_for(alpha.jobs, run)
    login.restart_controller()
    week.wait_for_round(2, run)

    shim(alpha, "tar", SLOW.format(mode="chf"))
    week.wait_for((home / "chf").exists, run)
    login.stop()  # during the download
    week.wait_for_round(3, run)

    (home / "bin" / "tar").unlink()
    login.start()
    week.wait_for_round(4, run)
    login.stop()  # between rounds
    week.wait_for_round(5, run)

    shim(alpha, "tar", SLOW.format(mode="xpf"))
    login.start()
    week.wait_for((home / "xpf").exists, run)
    login.stop()  # during the upload
    week.wait_for_round(6, run)

    (home / "bin" / "tar").unlink()
    login.start()
    assert week.end(run) == 0, week.log()

    history = week.history()
    assert [entry["round"] for entry in history] == list(range(1, 8))
    assert all(e["facilities"]["leonardo"]["status"] == "complete" for e in history)
    parts = [e["facilities"]["alpha"] for e in history]
    if parts[1]["status"] != "complete":
        assert re.search("ended in (UNKNOWN|LAUNCH_FAILED)", parts[1]["reason"]), parts[1]
    for number in (4, 7):
        assert parts[number - 1]["status"] == "complete", parts[number - 1]["reason"]
    for number in (1, 3, 5, 6):
        assert parts[number - 1]["status"] == "absent", number
        assert "Deployment alpha" in parts[number - 1]["reason"]
    # The update of the job that nobody could cancel was never taken for another's. The job itself
    # may stay until its time limit: its `srun` waits for a controller that has restarted since.
    for job in alpha.jobs():
        alpha.cancel(job)
    alpha.wait_for_jobs(0, seconds=60)


HOG = 'python3 -c "import time; b = bytearray(1500 << 20); time.sleep(60)"'
"""More memory than the site grants a job."""
LONG = "scontrol update JobId=$SLURM_JOB_ID TimeLimit=1; sleep 300"
ONCE = "scontrol update JobId=$SLURM_JOB_ID Requeue=0; touch {mark}; sleep 60"
"""A job that Slurm is not to put back into the queue, once the mark is there."""


def test_a_week_of_bad_jobs(
    federation: Callable[..., Federation], login: Login, alpha: Any
) -> None:
    """Out of memory, out of time, no node, a node lost, a scheduler's memory lost: one round each.

    The reason is the scheduler's own word for it.
    """
    facilities = [
        {"name": "alpha", "dataset": "words", "attempts": 1, "queue_timeout": 15},
        {"name": "leonardo", "dataset": "words"},
    ]
    week = federation(rounds=6, facilities=facilities)
    fault, mark = (Path(alpha.facts["home"], name) for name in ("fault", "mark"))
    mark.unlink(missing_ok=True)
    script = week.folder / "federation.d" / "alpha.sh"
    text = script.read_text()
    script.write_text(text.replace("trap :", f"[ ! -e {fault} ] || . {fault}\ntrap :"))

    work = Path(alpha.facts["workdir"])
    before = set(work.iterdir())
    fault.write_text(HOG)
    run = week.start()
    try:
        week.wait_for_round(1, run)
        fault.write_text(LONG)
        week.wait_for_round(2, run)
        fault.unlink()
        login.nodes("DRAIN")
        week.wait_for_round(3, run)
        login.nodes("RESUME")
        fault.write_text(ONCE.format(mark=mark))
        week.wait_for(mark.exists, run)
        login.nodes("DOWN")
        week.wait_for_round(4, run)
        login.nodes("RESUME")
        week.wait_for(lambda: running(alpha), run)
        login.forget_jobs()
        week.wait_for_round(5, run)
    finally:
        fault.unlink(missing_ok=True)
        login.nodes("RESUME")
    assert week.end(run) == 0, week.log()

    history = week.history()
    assert [entry["round"] for entry in history] == list(range(1, 7))
    assert all(e["facilities"]["leonardo"]["status"] == "complete" for e in history)
    parts = [e["facilities"]["alpha"] for e in history]
    words = ["OUT_OF_MEMORY", "TIMEOUT", "QUEUE_TIMEOUT", "NODE_FAIL", "UNKNOWN"]
    for word, part in zip(words, parts, strict=False):
        assert part["status"] == "absent"
        assert f"ended in {word}" in part["reason"], part["reason"]
    assert "DRAINED" in parts[2]["reason"]
    assert parts[5]["status"] == "complete", parts[5]["reason"]
    # What the last three of the five left there is kept, three directories each, and no more.
    left = [path for path in set(work.iterdir()) - before if RANDOM_NAME.fullmatch(path.name)]
    assert 0 < len(left) <= 9, left
    assert any(path.name.startswith("slurm-") for each in left for path in each.iterdir())


def running(site: Any) -> list[str]:
    """The jobs of a site that have begun."""
    return str(site.shell("squeue -h --me -t running -o %i")).split()


def test_a_wrong_host_key_is_no_absence(federation: Callable[..., Federation]) -> None:
    """The quorum would do without alpha; but somebody may be posing as it."""
    found = federation()
    path = found.folder / "federation.yml"
    text = path.read_text()
    key = found.folder / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    public = " ".join(key.with_suffix(".pub").read_text().split()[:2])
    host, _, port = re.findall(r"- (127\.0\.0\.1):?()(\d+)", text)[0]
    (found.folder / "known").write_text(f"[{host}]:{port} {public}\n")
    path.write_text(re.sub(r"knownHosts: .*", "knownHosts: known", text))
    run = found.start()
    found.wait_for(lambda: "WRONG HOST KEY" in found.log(), run)
    assert found.end(run, seconds=END_SECONDS) != 0
    assert not (found.folder / "out" / "global_model").exists()


@pytest.mark.parametrize("below", ["stop", "skip", "wait"])
def test_below_quorum(federation: Callable[..., Federation], login: Login, below: str) -> None:
    """The quorum is both, and alpha is down; then it comes back."""
    rules = {"quorum": 2, "below_quorum": below, "wait_seconds": 5}
    found = federation(aggregation=rules)
    login.stop()
    run = found.start()
    said = "1 of 2 updates can be averaged, and the quorum is 2: alpha is absent: "
    if below == "stop":
        found.wait_for(lambda: said in found.log(), run)
        assert found.end(run, seconds=END_SECONDS) != 0
        assert not (found.folder / "out" / "global_model").exists()
        login.start()
        run = found.start()  # the same command goes on
    else:
        phase = "aggregate" if below == "skip" else "wait"
        found.wait_for(lambda: any(e["phase"] == phase for e in found.events()), run)
        login.start()
    assert found.end(run) == 0, found.log()
    first, second = found.history()
    assert (first["round"], second["round"]) == (1, 2)
    assert all(part["status"] == "complete" for part in second["facilities"].values())
    if below == "skip":
        assert said in first["skipped"]
    else:
        assert all(part["status"] == "complete" for part in first["facilities"].values())
    assert bool(first.get("waits")) == (below == "wait")
    trained = [e["facility"] for e in found.events() if e["phase"] == "trained" and e["round"] == 1]
    assert trained.count("leonardo") == (2 if below == "stop" else 1)
