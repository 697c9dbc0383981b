"""One federation three ways, bit for bit; and the ends of the runs that cannot succeed.

Every command here runs with no Node.js on its PATH.
"""

import hashlib
import json
import time
from pathlib import Path

import pytest
import yaml

from crossfl.simulation.simulate import simulate
from crossfl.storage.job import Job
from tests.support.copies import copy_federation
from tests.support.paths import CWL, DATA, ROOT
from tests.support.processes import PRESERVE, Run

CWLTOOL = ("cwltool", "--enable-ext", *PRESERVE)


@pytest.fixture(scope="module")
def by_streamflow(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("streamflow")
    result = run("streamflow", "run", "--outdir", out, CWL / "streamflow.yml", cwd=out)
    assert result.returncode == 0, result.stderr
    (out / "log").write_text(result.stderr)
    return out


@pytest.fixture(scope="module")
def by_cwltool(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cwltool")
    workflow, job = ROOT / "workflows" / "federated.cwl", CWL / "federation.yml"
    result = run(
        *(*CWLTOOL, "--outdir", out, workflow, job),
        cwd=out,
        CROSSFL_FACILITY="*",
        CROSSFL_DATA=str(DATA),
    )
    assert result.returncode == 0, result.stderr
    return out


def _weights(out: Path) -> str:
    return hashlib.sha256((out / "global_model" / "model.safetensors").read_bytes()).hexdigest()


def test_no_node_on_the_path(run: Run) -> None:
    assert run("sh", "-c", "command -v node nodejs", cwd=ROOT).returncode != 0


def test_the_engines_add_orchestration_not_arithmetic(
    by_streamflow: Path, by_cwltool: Path, tmp_path: Path
) -> None:
    simulate(Job.load(CWL / "federation.yml"), DATA, tmp_path)
    assert _weights(by_streamflow) == _weights(by_cwltool) == _weights(tmp_path)


def test_what_a_federation_leaves(by_streamflow: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(by_streamflow / "global_model") is not None
    history = [json.loads(x) for x in (by_streamflow / "history.jsonl").read_text().splitlines()]
    assert [entry["round"] for entry in history] == [1, 2]
    assert history[0]["facilities"]["karolina"]["steps"] == 3  # its own local_steps
    evaluation = json.loads((by_streamflow / "evaluation.json").read_text())
    assert set(evaluation["facilities"]) == {"karolina", "leonardo"}
    assert "<html" in (by_streamflow / "report.html").read_text()


def test_progress_is_shown_and_the_engine_is_quiet(by_streamflow: Path) -> None:
    log = (by_streamflow / "log").read_text()
    for facility in ("leonardo", "karolina"):
        assert f"round 2/2  {facility}  trained" in log
    assert "it 3=" in log
    assert "EXECUTING step" not in log


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rounds: 2", "rounds: 0", "rounds is 0"),
        (
            "karolina, dataset: words",
            "karolina, dataset: nothing",
            "karolina is absent: dataset 'nothing'",
        ),
        ("name: karolina", "name: nowhere", "facilities without a deployment"),
        ("name: karolina", "name: leonardo", "'leonardo' is named twice"),
        ("diloco", "newton", "newton"),
    ],
)
def test_a_run_that_cannot_succeed_ends_with_a_message(
    run: Run, tmp_path: Path, old: str, new: str, message: str
) -> None:
    federation = copy_federation(tmp_path)
    job = federation / "federation.yml"
    assert old in job.read_text()
    job.write_text(job.read_text().replace(old, new))
    out, begun = tmp_path / "out", time.monotonic()
    result = run("streamflow", "run", "--outdir", out, "streamflow.yml", cwd=federation)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - begun < 60
    assert not (out / "global_model").exists()
    if "deployment" in message:
        assert "EXECUTING" not in result.stderr  # before anything ran


def test_a_step_bound_to_the_wrong_place_does_not_train(run: Run, tmp_path: Path) -> None:
    federation = copy_federation(tmp_path)
    bindings = federation / "streamflow.yml"
    bindings.write_text(bindings.read_text().replace("/federate/train", "/federate/trian"))
    command = ("streamflow", "run", "--outdir", "out", "streamflow.yml")
    result = run(*command, cwd=federation, CROSSFL_FACILITY="*", CROSSFL_DATA=str(DATA))
    assert result.returncode == 1
    assert "CROSSFL_FACILITY is not set, so this is not known to be leonardo" in result.stderr


def test_a_facility_out_of_reach_costs_its_own_part_only(run: Run, tmp_path: Path) -> None:
    """Its login node refuses connections, in every round and in the evaluation."""
    federation = copy_federation(tmp_path)
    (federation / "known_hosts").touch()
    bindings = yaml.safe_load((federation / "streamflow.yml").read_text())
    bindings["deployments"]["karolina"] = {
        "type": "crossfl.ssh",
        "workdir": "/tmp",
        "config": {"nodes": ["127.0.0.1:1"], "knownHosts": "known_hosts", "retryDelay": 0},
    }
    (federation / "streamflow.yml").write_text(yaml.safe_dump(bindings))
    job = yaml.safe_load((federation / "federation.yml").read_text())
    job["aggregation"]["quorum"] = 1
    (federation / "federation.yml").write_text(yaml.safe_dump(job))
    result = run("streamflow", "run", "--outdir", "out", "streamflow.yml", cwd=federation)
    assert result.returncode == 0, result.stderr
    lines = (federation / "out" / "history.jsonl").read_text().splitlines()
    evaluation = json.loads((federation / "out" / "evaluation.json").read_text())
    for record in [*map(json.loads, lines), evaluation]:
        karolina, leonardo = (record["facilities"][name] for name in ("karolina", "leonardo"))
        assert leonardo["status"] == "complete"
        assert karolina["status"] == "absent"
        assert "host 127.0.0.1:1: connection refused" in karolina["reason"]
        assert "`nodes`" in karolina["reason"]  # nothing of a reason is run by a shell
