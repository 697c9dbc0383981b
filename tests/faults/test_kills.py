"""The engine killed at random moments: by the same command, the weights of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from crossfl.simulation.simulate import simulate
from crossfl.storage.job import Job
from tests.support.engine import streamflow
from tests.support.faults import FULL
from tests.support.paths import CWL, ROOT

ROUNDS = 6
KILLS = int(os.environ.get("FAULTS_KILLS", "60" if FULL else "10"))
STEP_SECONDS = 180
"""In which a run must get from one report of a step to the next."""
WEIGHTS = Path("global_model", "model.safetensors")


class Local:
    """The federation of the tests, of two facilities on this machine, with a journal."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(shutil.copytree(CWL, folder / "tests" / "cwl"))
        for name in ("workflows", "steps"):
            (folder / name).symlink_to(ROOT / name)
        for name, change in (("federation.yml", self.change_job), ("streamflow.yml", self.journal)):
            document = yaml.safe_load((self.folder / name).read_text())
            change(document)
            (self.folder / name).write_text(yaml.safe_dump(document))
        self.progress = self.folder / "progress"
        self.progress.touch()

    @staticmethod
    def change_job(document: dict[str, object]) -> None:
        document["rounds"] = ROUNDS
        document["prompts"] = []
        document["training"] |= {"validation_samples": 1, "max_new_tokens": 1}  # type: ignore[operator]

    @staticmethod
    def journal(document: dict[str, dict[str, dict[str, object]]]) -> None:
        document["deployments"]["vm"]["config"] = {"journal": "journal"}

    def start(self) -> subprocess.Popen[bytes]:
        return streamflow(
            self.folder / "streamflow.yml",
            self.folder / "out",
            self.folder / "log",
            os.environ | {"CROSSFL_PROGRESS": str(self.progress)},
        )

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.progress.read_text().splitlines()]

    def published(self) -> int:
        """Rounds that were finished."""
        return max((int(e["round"]) for e in self.events() if e["phase"] == "aggregate"), default=0)

    def wait_for_events(self, count: int, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + STEP_SECONDS
        while len(self.events()) < count and process.poll() is None:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")


@pytest.mark.timeout(60 * KILLS)
def test_killed_again_and_again(tmp_path: Path) -> None:
    """No finished round is lost, and none but an interrupted one is trained again."""
    local, chance = Local(tmp_path), random.Random(6)
    kills = 0
    while kills < KILLS:
        # A round is eleven reports. Some runs get through one, most do not; together, through all.
        behind = local.published() < kills * ROUNDS / KILLS
        more = chance.randint(11, 13) if behind else chance.randint(0, 9)
        process = local.start()
        local.wait_for_events(len(local.events()) + more, process)
        time.sleep(chance.uniform(0, 1))
        if process.poll() is not None:
            break  # it was faster: the federation is finished
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        time.sleep(1.5)  # in which its steps end: what they would still do is no matter of the next
    ended = local.start().wait(ROUNDS * STEP_SECONDS) if kills == KILLS else process.returncode
    assert ended == 0, local.log()

    simulate(Job.load(local.folder / "federation.yml"), local.folder / "data", tmp_path / "whole")
    weights = (local.folder / "out" / WEIGHTS).read_bytes()
    assert weights == (tmp_path / "whole" / WEIGHTS).read_bytes()
    lines = (local.folder / "out" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == list(range(1, ROUNDS + 1))

    events = local.events()
    published = 0
    for event in events:  # what was finished is never trained again
        if event["phase"] == "trained":
            assert event["round"] == published + 1
        if event["phase"] == "aggregate" and event["round"] == published + 1:
            published += 1
    begun = Counter(e["round"] for e in events if e["phase"] == "plan" and e["round"])
    print(f"{kills} kills; times each round was begun: {dict(begun)}")
    assert kills == KILLS or pytest.fail(f"finished after {kills} kills")


def test_a_second_run_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    local = Local(tmp_path)
    first = local.start()
    try:
        local.wait_for_events(1, first)
        begun = time.monotonic()
        second = local.start()
        assert second.wait(60) != 0
        assert time.monotonic() - begun < 60
        assert f"another run of this federation is going on (process {first.pid}" in local.log()
        assert first.poll() is None
        local.wait_for_events(3, first)
    finally:
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) != 0
    assert len(list((local.folder / "journal").glob("*/run.json"))) == 1
