"""Rounds that close without a facility whose queue stalls, and its job, which outlives them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from crossfl.protocol.history import RoundEntry, decode_line
from tests.support.engine import Engine, streamflow, unset
from tests.support.faults import FULL
from tests.support.paths import DATA
from tests.support.testbed import Site, bind, job_of, place_data

RUN_SECONDS = 420


class Partition:
    """The partition of a Slurm site, as its administrator opens and closes it."""

    def __init__(self, site: Site) -> None:
        self._environment = os.environ | {"SLURM_CONF": site.shell("echo $SLURM_CONF").strip()}

    def set(self, state: str) -> None:
        words = ["scontrol", "update", "partitionname=boost", f"state={state}"]
        subprocess.run(words, env=self._environment, check=True)


@pytest.fixture
def partition(alpha: Site) -> Iterator[Partition]:
    partition = Partition(alpha)
    yield partition
    partition.set("UP")


class Federation:
    """A federation of testbed sites with a journal, and what can be seen of it while it runs."""

    def __init__(
        self, sites: list[Site], python: Path, folder: Path, engine: Engine, rounds: int
    ) -> None:
        self.data, self.folder, self.engine = folder / "data", folder, engine
        self.data.mkdir()
        for site in sites:
            (self.data / site.name).symlink_to(place_data(site, DATA / "leonardo" / "words"))
        rules = {"server_optimizer": "diloco", "closes": "first", "grace_seconds": 1}
        job = job_of(sites, rounds=rounds, aggregation=rules, prompts=[])
        self.path = bind(sites, python, self.data, job)
        for script in self.path.with_suffix(".d").glob("*.sh"):
            lines = script.read_text().splitlines(keepends=True)
            script.write_text("".join(x for x in lines if "mpiexec" not in x))  # no MPI here
        document = yaml.safe_load(self.path.read_text())
        document["deployments"]["vm"]["config"]["journal"] = "journal"
        for deployment in document["deployments"].values():
            if "pollingInterval" in deployment.get("config", {}):
                deployment["config"]["pollingInterval"] = 1
        self.path.write_text(yaml.safe_dump(document))
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


def test_no_facility_waits_for_the_queue_of_another(
    sites: dict[str, Site],
    alpha: Site,
    python: Path,
    engine: Engine,
    partition: Partition,
    tmp_path: Path,
) -> None:
    federation = Federation([alpha, sites["beta"]], python, tmp_path, engine, rounds=4)
    turns = f"mkdir -p {alpha.facts['workdir']}/turns && ls {alpha.facts['workdir']}/turns"
    before = alpha.shell(turns)
    partition.set("DOWN")
    process = federation.start()
    federation.wait_for(lambda: federation.round() >= 3, process)
    (job,) = alpha.jobs()
    partition.set("UP")
    assert process.wait(RUN_SECONDS) == 0, federation.log.read_text()

    history = federation.history()
    said = [entry.facilities["alpha"] for entry in history]
    assert [each.status for each in said[:3]] == ["late"] * 3
    assert all("waits in the queue" in (each.reason or "") for each in said[:3])
    assert all(e.facilities["beta"].status == "complete" for e in history[:3])
    first = next(n for n, each in enumerate(said, 1) if each.status == "complete")
    assert first - said[first - 1].staleness > 1, "it trained the newest model, not the first"
    counted = sum(each.status == "complete" for e in history for each in e.facilities.values())
    assert counted in (8, 9), (
        "four times as many as there are members; the last round may bring two"
    )
    federation.check_replay()
    assert alpha.jobs() == []
    assert alpha.shell(turns) == before, "the turns are gone with the federation"
    assert alpha.shell(f"scontrol show job {job}").count("JobState=COMPLETED") == 1


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
    federation = Federation([alpha, sites["beta"]], python, tmp_path, engine, rounds=2)
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
