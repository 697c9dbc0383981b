"""A crate of a run: whole, by hash, and without what tells a host, a user, a path or a sample."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from crossfl import cli
from crossfl.observe.provenance import METADATA, PROFILES, crate
from crossfl.steps.report import report
from crossfl.storage.files import link_tree
from tests.support.federation import Federation
from tests.support.paths import CWL, ROOT

CANARIES = ("login.canary.example.org", "canaryuser", "/canary/work", "canary-sample", "canary_set")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """The outputs of a run in which a facility said too much, in every text that may hold some."""
    import torch

    host, user, path, sample, _ = CANARIES
    federation = Federation(tmp_path / "federation", {"w": torch.zeros(3)}, quorum=1)
    updates = [
        federation.update("leonardo", federation.deltas(1)),
        federation.update("karolina", status="absent", reason=f"{user}@{host}: no {path}"),
    ]
    out, done = federation.run(updates), tmp_path / "results"
    report(out / "state", [], done)
    scores = json.loads((done / "evaluation.json").read_text())
    scores["facilities"]["leonardo"] = {
        "status": "complete",
        "reason": f"{path} of {user}",
        "metrics": {"loss": 1.5, "tokens": 500, "tasks": {sample: {"loss": 1.0}}},
        "completions": [{"prompt": sample, "completion": sample}],
    }
    (done / "evaluation.json").write_text(json.dumps(scores))
    link_tree(out / "global_model", done / "global_model")
    return done


@pytest.fixture
def job(tmp_path: Path) -> Path:
    values = yaml.safe_load((CWL / "federation.yml").read_text())
    values["config"]["path"] = f"{CANARIES[2]}/config.json"
    values["facilities"][0]["dataset"] = CANARIES[4]
    values["prompts"] = [CANARIES[3]]
    (tmp_path / "job.yml").write_text(yaml.safe_dump(values))
    return tmp_path / "job.yml"


def entities(folder: Path) -> dict[str, dict[str, Any]]:
    return {each["@id"]: each for each in json.loads((folder / METADATA).read_text())["@graph"]}


def test_no_canary_leaves(results: Path, job: Path, tmp_path: Path) -> None:
    crate(results, job, tmp_path / "crate")
    text = "".join(p.read_text() for p in (tmp_path / "crate").rglob("*") if p.is_file())
    assert "leonardo" in text and "absent" in text
    for canary in CANARIES:
        assert canary not in text
    assert str(tmp_path) not in text
    assert not list((tmp_path / "crate").rglob("*.safetensors"))


def test_it_is_whole(results: Path, job: Path, tmp_path: Path) -> None:
    """Every file is described with its sha256, and every reference leads somewhere."""
    crate(results, job, tmp_path / "crate", licence="https://spdx.org/licenses/CC-BY-4.0")
    found = entities(tmp_path / "crate")
    files = {
        p.relative_to(tmp_path / "crate").as_posix()
        for p in (tmp_path / "crate").rglob("*")
        if p.is_file()
    } - {METADATA}
    parts = {part["@id"] for part in found["./"]["hasPart"]}
    assert parts == files
    for name in files:
        content = (tmp_path / "crate" / name).read_bytes()
        assert found[name]["sha256"] == hashlib.sha256(content).hexdigest()
    for entity in found.values():
        for key, value in entity.items():
            if key in ("conformsTo", "identifier", "url", "actionStatus", "about"):
                continue
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, dict):
                    assert each["@id"] in found, (entity["@id"], each)
    run, root = found["#run"], found["./"]
    model = json.loads((results / "global_model" / "manifest.json").read_text())["digest"]
    assert {"@id": f"urn:sha256:{model}"} in run["result"]
    assert [c["@id"] for c in root["conformsTo"]] == list(PROFILES)
    assert run["startTime"] < run["endTime"]
    assert re.match(r"\d{4}-\d\d-\d\dT", root["datePublished"])
    declared = yaml.safe_load((ROOT / "workflows" / "federated.cwl").read_text())
    assert len(found["workflows/federated.cwl"]["input"]) == len(declared["inputs"])


@pytest.mark.parametrize(
    ("remove", "message"),
    [("history.jsonl", "cannot be read"), ("evaluation.json", "cannot be read")],
)
def test_what_is_missing_is_said(
    remove: str,
    message: str,
    results: Path,
    job: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (results / remove).unlink()
    words = ["provenance", str(results), "--job", str(job), "-o", str(tmp_path / "crate")]
    assert cli.main(words) == cli.BAD_INPUT
    assert f"{remove} {message}" in capsys.readouterr().err
    assert not (tmp_path / "crate").exists()
