"""The workflow in `workflows/examples` gives the same under both engines."""

import json
from pathlib import Path

import pytest
import yaml

from crossfl.protocol.manifest import EvaluationManifest
from crossfl.storage import manifest
from tests.support.federation import snapshot
from tests.support.paths import DATA, ROOT, ROUND
from tests.support.processes import PRESERVE, Run

MERGE = ROOT / "workflows" / "examples" / "merge.cwl"
ENGINES = ("cwltool", "streamflow")


@pytest.fixture(scope="module")
def outputs(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each engine leaves."""
    folder = tmp_path_factory.mktemp("merge")

    def directory(path: Path) -> dict[str, str]:
        return {"class": "Directory", "path": str(path)}

    job = {
        "global_model": directory(ROUND / "global_model"),
        "state": directory(ROUND / "state"),
        "updates": [directory(ROUND / name / "update") for name in ("leonardo", "karolina")],
        "task": {"facility": "leonardo", "dataset": "words"},
        "training": {"batch_size": 4, "sequence_length": 48, "max_new_tokens": 4, "threads": 1},
    }
    (folder / "job.yml").write_text(yaml.safe_dump(job))
    local = {"type": "crossfl.local", "config": {"facility": "leonardo"}}
    document = {
        "version": "v1.0",
        "workflows": {
            "merge": {
                "type": "cwl",
                "config": {"file": str(MERGE), "settings": "job.yml"},
                "bindings": [
                    {"step": "/merge", "target": {"deployment": "vm"}},
                    {"step": "/measure", "target": {"deployment": "leonardo"}},
                ],
            }
        },
        "deployments": {
            "vm": {"type": "crossfl.local", "config": {}},
            "leonardo": local
            | {"config": {"facility": "leonardo", "data": str(DATA / "leonardo")}},
        },
        "database": {"type": "default", "config": {"connection": ":memory:"}},
    }
    (folder / "streamflow.yml").write_text(yaml.safe_dump(document))
    words = {
        "cwltool": ("cwltool", *PRESERVE, "--outdir", "cwltool", MERGE, "job.yml"),
        "streamflow": ("streamflow", "run", "--outdir", "streamflow", "streamflow.yml"),
    }
    for engine in ENGINES:
        variables = {"CROSSFL_FACILITY": "*", "CROSSFL_DATA": str(DATA)}
        variables = variables if engine == "cwltool" else {}
        done = run(*words[engine], cwd=folder, **variables)
        assert done.returncode == 0, done.stderr
    return {engine: folder / engine for engine in ENGINES}


def found(out: Path, name: str) -> Path:
    """An output directory; the engines name them after the step's."""
    (path,) = (p.parent for p in out.glob(f"*/{name}"))
    return path


def test_both_engines_give_the_same_model(outputs: dict[str, Path]) -> None:
    first, second = (snapshot(found(outputs[engine], "config.json")) for engine in ENGINES)
    assert first == second
    assert first["config.json"] and any(name.endswith(".safetensors") for name in first)


def test_an_outsider_measures_a_model_with_two_fields(outputs: dict[str, Path]) -> None:
    for out in outputs.values():
        model = json.loads((found(out, "config.json") / "manifest.json").read_text())
        evaluation = manifest.read(out / "evaluation", EvaluationManifest)
        assert evaluation.status == "complete"
        assert evaluation.model == model["digest"]
        assert evaluation.metrics is not None and evaluation.metrics.loss > 0
