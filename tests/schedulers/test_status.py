"""What a person sees of queues: within 15 s of a change, `crossfl status` and the log say so."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crossfl.observe.display import describe
from crossfl.observe.live import read
from tests.support.engine import Engine, streamflow, unset
from tests.support.paths import DATA
from tests.support.testbed import Partition, Site, bind, follow, job_of, place_data

SEEN_SECONDS = 15
START_SECONDS = 90
POLLING = 1

Facts = dict[str, Any]


def status(journal: Path) -> Facts:
    """What `crossfl status` says of each facility."""
    done = subprocess.run(
        [sys.executable, "-m", "crossfl", "status", str(journal), "--format", "json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return json.loads(done.stdout)["facilities"] if done.returncode == 0 else {}


def test_a_change_in_a_queue_is_seen(
    alpha: Site,
    gamma: Site,
    python: Path,
    engine: Engine,
    partition: Partition,
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for site in (alpha, gamma):
        (data / site.name).symlink_to(place_data(site, DATA / "leonardo" / "words"))
    path = bind([alpha, gamma], python, data, job_of([alpha, gamma], rounds=1, local_steps=200))
    follow(path, POLLING)
    script = path.with_suffix(".d") / "gamma.sh"
    script.write_text(re.sub(r"(?m)^#PBS -q .*$", "#PBS -q closed", script.read_text()))
    journal, log = tmp_path / "journal", tmp_path / "log"

    def seen(what: Callable[[Facts], bool], seconds: float = SEEN_SECONDS) -> Facts:
        deadline = time.monotonic() + seconds
        while True:
            facts = status(journal)
            if facts and what(facts):
                return facts
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, (facts, log.read_text())
            time.sleep(0.5)

    def waits(name: str, reason: str) -> Callable[[Facts], bool]:
        def holds(facts: Facts) -> bool:
            facility = facts.get(name, {})
            return facility.get("phase") == "queued" and reason in (facility["reason"] or "")

        return holds

    partition.set("DOWN")
    process = streamflow(path, engine.outdir, log, unset())
    try:
        seen(waits("alpha", "PartitionDown"), START_SECONDS)
        facts = seen(waits("gamma", ""), START_SECONDS)
        (job,), (other,) = alpha.wait_for_jobs(1), gamma.wait_for_jobs(1)
        assert (facts["alpha"]["job"], facts["gamma"]["job"]) == (job, other)
        assert facts["alpha"]["nodes"] == 1

        alpha.shell(f"scontrol hold {job}")
        gamma.operate("qhold", other)
        seen(waits("alpha", "JobHeldUser"))
        seen(waits("gamma", "held (u)"))
        alpha.shell(f"scontrol release {job}")
        partition.set("UP")
        seen(lambda facts: facts["alpha"]["phase"] in ("running", "load", "train"))
        working = seen(lambda facts: facts["alpha"]["phase"] == "train", START_SECONDS)["alpha"]
        assert working["steps"] == 200
        assert working["tokens_per_second"] > 0
        assert working["job"] == job
        seen(lambda facts: facts["alpha"]["phase"] in ("ended", "fetching", "fetched"), 120)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)

    said = log.read_text()
    for words in (
        f"alpha  queued  job {job}  PartitionDown",
        f"alpha  queued  job {job}  JobHeldUser",
        f"alpha  running  job {job}",
        f"gamma  queued  job {other}  held (u)",
    ):
        assert words in said, said
    (events,) = journal.glob("*/events.jsonl")
    phases = [event.phase for event in read(events) if event.facility == "alpha"]
    told = list(dict.fromkeys(phases))
    assert told[:4] == ["staged", "sending", "sent", "queued"], told
    assert {"running", "train", "ended"} <= set(told)
    assert all(describe(event).isprintable() for event in read(events))
    assert status(journal)["alpha"]["node_hours"] > 0
