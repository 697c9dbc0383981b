"""Rounds that close without a facility that waits, and its job, which outlives them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from crossfl.protocol.history import FacilityEntry, RoundEntry, decode_line
from tests.support.engine import Engine, streamflow, unset
from tests.support.faults import FULL
from tests.support.paths import DATA
from tests.support.testbed import Partition, Site, bind, follow, job_of, place_data

RUN_SECONDS = 420
STALLED = """\
# An upload that stalls until somebody lets it go on.
case $1 in x*) while [ -e ~/stalled ]; do sleep 0.2; done ;; esac
exec /bin/tar "$@"
"""


class Federation:
    """A federation of testbed sites with a journal, and what can be seen of it while it runs."""

    def __init__(
        self,
        sites: list[Site],
        python: Path,
        folder: Path,
        engine: Engine,
        rounds: int,
        closes: str = "first",
    ) -> None:
        self.data, self.folder, self.engine = folder / "data", folder, engine
        self.data.mkdir()
        for site in sites:
            (self.data / site.name).symlink_to(place_data(site, DATA / "leonardo" / "words"))
        rules = {"server_optimizer": "diloco", "closes": closes, "grace_seconds": 1}
        training = {"batch_size": 2, "sequence_length": 48, "threads": 1, "validation_samples": 2}
        more: dict[str, Any] = {"local_steps": 2, "training": training, "prompts": []}
        job = job_of(sites, rounds=rounds, aggregation=rules, **more)
        self.path = bind(sites, python, self.data, job)
        follow(self.path, seconds=1)
        self.log = folder / "log"

    def start(self) -> subprocess.Popen[bytes]:
        return streamflow(self.path, self.engine.outdir, self.log, unset())

    def round(self) -> int:
        """Rounds that the journal has."""
        numbers = [
            int(path.name) for path in self.folder.glob("journal/*/*") if path.name.isdecimal()
        ]
        return max(numbers, default=0)

    def wait_for(self, what: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + RUN_SECONDS
        while not what():
            assert process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.5)

    def history(self) -> list[RoundEntry]:
        lines = (self.engine.outdir / "history.jsonl").read_bytes().splitlines()
        return [decode_line(line, "history.jsonl") for line in lines]

    def check_replay(self) -> None:
        """The same weights come of the history alone, in one process."""
        words = ["simulate", "job.json", "--data", "data", "--outdir", "replayed"]
        words += ["--replay", str(self.engine.outdir / "history.jsonl")]
        done = subprocess.run(
            [sys.executable, "-m", "crossfl", *words],
            cwd=self.folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        weights = "global_model/model.safetensors"
        replayed = (self.folder / "replayed" / weights).read_bytes()
        assert replayed == (self.engine.outdir / weights).read_bytes()


@dataclass(frozen=True)
class Story:
    """What happened to a federation of two Slurm sites and a PBS site.

    Attributes:
        history: its rounds.
        stalled: rounds within the time in which no upload to gamma went on.
        queued: rounds while alpha's job waited in its queue.
        left: what is left at the sites: jobs, and folders of turns.
        job: the job of alpha that waited, as Slurm describes it in the end.
    """

    federation: Federation
    history: list[RoundEntry]
    stalled: range
    queued: range
    left: list[str]
    job: str

    def of(self, facility: str, rounds: range) -> list[FacilityEntry]:
        return [self.history[number - 1].facilities[facility] for number in rounds]

    def of_others(self, number: int) -> bool:
        """Whether beta or gamma counts in a round."""
        return any(_counts(self.history[number - 1].facilities[n]) for n in ("beta", "gamma"))


@pytest.fixture(scope="module")
def story(
    sites: dict[str, Site],
    python: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Story]:
    if "home" not in sites["gamma"].facts:
        pytest.skip("the data is placed only where the home of the site's user is here")
    folder = tmp_path_factory.mktemp("story")
    alpha, gamma = sites["alpha"], sites["gamma"]
    partition = Partition(alpha)
    home = Path(gamma.facts["home"])
    tar = home / "bin" / "tar"
    federation = Federation(list(sites.values()), python, folder, Engine(folder), rounds=7)
    tar.write_text(f"#!/bin/sh\n{STALLED}")
    tar.chmod(0o755)
    (home / "stalled").touch()

    def turns() -> set[Path]:
        works = [Path(site.facts["workdir"]) for site in sites.values()]
        return {path for work in works for path in (work / "turns").glob("*")}

    before = turns()
    process = federation.start()

    def three_rounds() -> range:
        """Wait for three rounds that begin from now on, and are over."""
        first = federation.round() + 2
        federation.wait_for(lambda: federation.round() >= first + 2, process)
        return range(first, first + 3)

    try:
        stalled = three_rounds()
        (home / "stalled").unlink()
        partition.set("DOWN")
        pending = "squeue -h --me -t PENDING -o %i"
        federation.wait_for(lambda: bool(alpha.shell(pending).strip()), process)
        job = alpha.shell(pending).strip()
        queued = three_rounds()
        (waiting,) = [path for path in turns() - before if path.name.endswith("-alpha")]
        newest = waiting / "next"  # named by its round: the job is to find it when it starts
        federation.wait_for(
            lambda: int(newest.readlink().name.partition("-")[0]) > queued[-1], process
        )
        partition.set("UP")
        assert process.wait(RUN_SECONDS) == 0, federation.log.read_text()
        left = [str(path) for path in turns() - before]
        left += [job for site in sites.values() for job in site.jobs()]
        record = alpha.shell(f"scontrol show job {job}")
        yield Story(federation, federation.history(), stalled, queued, left, record)
    finally:
        (home / "stalled").unlink(missing_ok=True)
        tar.unlink(missing_ok=True)
        partition.set("UP")
        if process.poll() is None:
            process.kill()
            process.wait()
        for site in sites.values():
            for left_over in site.jobs():
                site.cancel(left_over)


def test_nobody_waits_for_a_slow_upload(story: Story) -> None:
    said = story.of("gamma", story.stalled)
    assert [each.status for each in said] == ["late"] * 3
    assert all("being sent" in (each.reason or "") for each in said), said
    counted = [n for n, e in enumerate(story.history, 1) if _counts(e.facilities["gamma"])]
    assert counted, "the upload was not begun anew in each round"
    first = story.history[counted[0] - 1].facilities["gamma"]
    assert counted[0] - first.staleness <= story.stalled[0], "it is what was sent first"


def test_nobody_waits_for_the_queue_of_another(story: Story) -> None:
    said = story.of("alpha", story.queued)
    assert [each.status for each in said] == ["late"] * 3
    assert all("waits in the queue" in (each.reason or "") for each in said), said
    assert all(story.of_others(number) for number in story.queued)
    assert story.job.count("JobState=COMPLETED") == 1
    later = range(story.queued[-1] + 1, len(story.history) + 1)
    taken = next(n for n in later if _counts(story.history[n - 1].facilities["alpha"]))
    asked = taken - story.history[taken - 1].facilities["alpha"].staleness
    assert asked > story.queued[-1], "it trained the newest model when it started, not its first"


def test_every_facility_counts_and_nothing_is_left(story: Story) -> None:
    counted = [e for entry in story.history for e in entry.facilities.values() if _counts(e)]
    assert 21 <= len(counted) <= 23, "seven times the members; the last round may bring all three"
    assert story.left == []
    story.federation.check_replay()


def _counts(entry: FacilityEntry) -> bool:
    return entry.status in ("complete", "partial")


@pytest.mark.parametrize("moment", ["queued", "running", "ended"] if FULL else ["running"])
def test_a_run_that_was_killed_collects_the_job_of_the_one_before(
    sites: dict[str, Site],
    alpha: Site,
    python: Path,
    engine: Engine,
    partition: Partition,
    tmp_path: Path,
    moment: str,
) -> None:
    federation = Federation(
        [alpha, sites["beta"]], python, tmp_path, engine, rounds=2, closes="running"
    )
    partition.set("DOWN")
    process = federation.start()
    federation.wait_for(lambda: federation.round() >= 1 and len(alpha.jobs()) == 1, process)
    (job,) = alpha.jobs()
    if moment == "running":
        partition.set("UP")
        state = f"squeue -h -j {job} -o %T"
        federation.wait_for(lambda: "PENDING" not in alpha.shell(state), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    partition.set("UP")
    if moment == "ended":
        alpha.wait_for_jobs(0, seconds=120)
    process = federation.start()
    assert process.wait(RUN_SECONDS) == 0, federation.log.read_text()
    said = [entry.facilities["alpha"] for entry in federation.history()]
    assert "complete" in [each.status for each in said]
    rounds = [n - each.staleness for n, each in enumerate(said, 1) if each.status == "complete"]
    assert len(set(rounds)) == len(rounds), "none counts twice"
    submitted = alpha.shell("sacct -c -n -P -X -o JobID,JobName | grep -c train || true")
    assert alpha.jobs() == [], submitted
    assert f"{job}" in json.dumps([each.reason for each in said] + [federation.log.read_text()])
    federation.check_replay()
