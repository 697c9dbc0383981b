"""A run of the engine that a person interrupts: the same command ends as if nobody had."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

from crossfl.protocol import variables
from crossfl.simulation.simulate import simulate
from crossfl.storage.job import Job
from crossfl.storage.weight_files import weights_digest
from tests.support.copies import copy_federation
from tests.support.engine import streamflow
from tests.support.paths import DATA, ROUND

SECONDS = 250


def test_a_job_with_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = copy_federation(tmp_path)
    models = federation / "models"
    shutil.copytree(ROUND / "global_model", models / "tiny")
    job = yaml.safe_load((federation / "federation.yml").read_text())
    job["lora"] = {"base_model": "tiny", "base_digest": weights_digest(models / "tiny"), "rank": 2}
    job["aggregation"] = {"server_optimizer": "fedavg"}
    job["training"]["max_new_tokens"] = 1
    job["prompts"], job["facilities"] = [], job["facilities"][:1]
    (federation / "federation.yml").write_text(yaml.safe_dump(job))
    document = yaml.safe_load((federation / "streamflow.yml").read_text())
    document["deployments"]["vm"]["config"]["journal"] = "journal"
    document["deployments"]["leonardo"]["config"]["models"] = "models"
    (federation / "streamflow.yml").write_text(yaml.safe_dump(document))

    progress, log, out = federation / "progress", federation / "log", tmp_path / "out"
    progress.touch()
    environment = os.environ | {variables.PROGRESS: str(progress)}
    command = (federation / "streamflow.yml", out, log, environment)

    def phases() -> list[tuple[str, int | None]]:
        events = map(json.loads, progress.read_text().splitlines())
        return [(event["phase"], event.get("round")) for event in events]

    process = streamflow(*command)
    try:
        deadline = time.monotonic() + SECONDS
        while ("plan", 2) not in phases() and process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) != 0
    assert not (out / "global_model").exists()

    assert streamflow(*command).wait(SECONDS) == 0, log.read_text()
    assert phases().count(("trained", 1)) == 1, "what was finished is not trained again"
    monkeypatch.setenv(variables.MODELS, str(models))
    simulate(Job.load(federation / "federation.yml"), DATA, tmp_path / "whole")
    adapter = Path("global_model", "adapter_model.safetensors")
    assert (out / adapter).read_bytes() == (tmp_path / "whole" / adapter).read_bytes()
