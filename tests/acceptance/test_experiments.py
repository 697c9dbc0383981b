"""The experiments for real: each through the engine, cut short; and what federation is for."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.paths import ROOT

REAL = ROOT.parent / "shared" / "data"
SCORES = {"bilingual": "bits_per_byte", "chemistry": "exact_match", "vision": "accuracy"}


def make(*words: str) -> None:
    subprocess.run(["make", *words], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", list(SCORES))
def test_a_short_run_through_the_engine(name: str, tmp_path: Path) -> None:
    if name != "vision" and not (REAL / name).is_dir():
        pytest.skip(f"the data of {name} are not in {REAL}")
    make("experiment-data", f"NAME={name}", f"REAL={REAL}")
    shutil.copytree(ROOT / "workflows", tmp_path / "workflows")
    for folder in ("steps", "data"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    path = tmp_path / "workflows" / "experiments" / name / "job.yml"
    job = yaml.safe_load(path.read_text())
    job |= {"rounds": 1, "local_steps": 2}
    job["training"] |= {"validation_samples": 4, "max_new_tokens": 8}
    path.write_text(yaml.safe_dump(job))
    streamflow = ROOT / ".venv" / "bin" / "streamflow"
    command = [streamflow, "run", "--outdir", tmp_path / "out", path.with_name("streamflow.yml")]
    subprocess.run([str(word) for word in command], cwd=tmp_path, check=True)
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert set(evaluation["facilities"]) == {f["name"] for f in job["facilities"]}
    for record in evaluation["facilities"].values():
        assert SCORES[name] in record["metrics"]
        assert bool(record["metrics"].get("tasks")) == (name == "chemistry")
    history = json.loads((tmp_path / "out" / "history.jsonl").read_text())
    assert all(u["metrics"]["local"]["loss"] > 0 for u in history["facilities"].values())


def test_the_federation_beats_every_site_alone(tmp_path: Path) -> None:
    make("experiment", "NAME=vision", f"OUTDIR={tmp_path}")
    out = tmp_path / "experiments" / "vision"
    comparison = json.loads((out / "comparison.json").read_text())
    losses = {
        arm: sum(metrics["loss"] for metrics in outcome["final"].values())
        for arm, outcome in comparison["arms"].items()
    }
    assert losses["federated"] < min(losses["marconi100"], losses["cloud"])
    assert "Federation helped" in (out / "report.html").read_text()
