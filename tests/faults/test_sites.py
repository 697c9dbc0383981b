"""What goes wrong at a site costs its update of that round, and the site is there in the next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import Federation, Login

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
        (e["facilities"]["alpha"]["status"], e["facilities"]["alpha"]["reason"]) for e in history
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
