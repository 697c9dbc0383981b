"""The CWL documents: their form, their bindings, and their cwltest entries under both engines."""

import os
import re
from pathlib import Path

import pytest
import yaml

from crossfl.sites.streamflow_file import steps_of
from tests.support.paths import CWL, DATA, ROOT
from tests.support.processes import PRESERVE, Run

DOCUMENTS = sorted([*ROOT.glob("steps/*.cwl"), *ROOT.glob("workflows/**/*.cwl")])
STREAMFLOW_FILES = sorted(
    [*ROOT.glob("[!.]*.yml"), *ROOT.glob("workflows/**/streamflow.yml"), CWL / "streamflow.yml"]
)
RUNNERS = {
    "cwltool": ["cwltool", "--", "--enable-ext", *PRESERVE],
    "streamflow": ["./streamflow-runner"],
}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_form(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env cwl-runner"
    assert lines[1] == "cwlVersion: v1.2"
    assert lines[2].startswith("class: ")
    assert os.access(path, os.X_OK)
    assert not re.search(r"InlineJavascript|\$\{|\$\([^)]*[-+<>?=&|!]", path.read_text())
    assert "DockerRequirement" not in path.read_text(), "containers are the deployment's matter"
    document = yaml.safe_load(path.read_text())
    order = ["label", "doc", "requirements", "hints", "baseCommand", "inputs", "outputs", "steps"]
    keys = [key for key in document if key in order]
    assert keys == [key for key in order if key in document]
    assert {"label", "doc"} <= set(document)
    for port in [*document["inputs"].values(), *document["outputs"].values()]:
        assert port["doc"].endswith(".")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_step_has_a_module_a_job_and_an_entry(path: Path) -> None:
    entries = yaml.safe_load((CWL / "tests.yml").read_text())
    tested = {(CWL / entry["tool"]).resolve() for entry in entries if "should_fail" not in entry}
    if path.parent.name == "steps":
        assert (ROOT / "python" / "crossfl" / "steps" / f"{path.stem}.py").is_file()
        assert path in tested
    elif path.name == "federated.cwl":
        assert path in tested


@pytest.mark.parametrize("path", STREAMFLOW_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_binding_matches_a_step(path: Path) -> None:
    document = yaml.safe_load(path.read_text())
    for workflow in document["workflows"].values():
        main = path.parent / workflow["config"]["file"]
        assert (path.parent / workflow["config"]["settings"]).is_file()
        for binding in workflow["bindings"]:
            assert binding["step"] == "/" or binding["step"] in steps_of(main)
            targets = binding["target"]
            for target in targets if isinstance(targets, list) else [targets]:
                assert target["deployment"] in document["deployments"]
            assert set(binding.get("filters", [])) <= set(document.get("bindingFilters", {}))


@pytest.mark.parametrize("runner", RUNNERS)
def test_cwltest(runner: str, run: Run) -> None:
    tool, *words = RUNNERS[runner]
    result = run(
        *("cwltest", "--test", "tests.yml", "-j", "2", "--tool", tool, *words),
        cwd=CWL,
        timeout=400,
        CROSSFL_FACILITY="*",
        CROSSFL_DATA=str(DATA),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "All tests passed" in result.stderr
