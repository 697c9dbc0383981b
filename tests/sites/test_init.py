"""Templates of `crossfl init` are whole: they bind, pass the checks, and train as they are."""

import json
import re
from pathlib import Path

import pytest
import yaml

from crossfl import cli
from crossfl.protocol.variables import MODELS
from crossfl.sites import examples
from crossfl.sites.init import SITES, TEMPLATES
from crossfl.storage.job import Job
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A new federation of a template and a kind of sites."""
    template, sites = request.param
    folder = tmp_path_factory.mktemp(f"{template}-{sites}") / "mine"
    assert cli.main(["init", str(folder), "--template", template, "--sites", sites]) == 0
    return folder


def commands(folder: Path) -> list[list[str]]:
    """The three commands of its README."""
    (block,) = re.findall(r"^```\n(.*?)^```$", (folder / "README.md").read_text(), re.M | re.S)
    return [line.split() for line in block.splitlines()]


ALL = [(template, sites) for template in TEMPLATES for sites in SITES]


@pytest.mark.parametrize("federation", ALL, indirect=True, ids="-".join)
def test_it_passes_the_checks_offline(
    federation: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(federation)
    three = commands(federation)
    assert len(three) == 3
    (bind,) = (words for words in three if words[:2] == ["crossfl", "bind"])
    assert cli.main(bind[1:]) == 0
    capsys.readouterr()
    words = ["check", "federation.yml", "--offline", "--format", "json"]
    assert cli.main(words) == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked["passed"] and len(checked["results"]) >= 6
    assert not [r for r in checked["results"] if r["status"] in ("warn", "fail")]


@pytest.mark.parametrize("template", TEMPLATES)
def test_its_facilities_hold_different_data(template: str) -> None:
    job = Job.load(ROOT / "workflows" / "templates" / template / "job.yml")
    north, south = (
        {json.dumps(row) for row in examples.rows(f.dataset, f.name)} for f in job.facilities
    )
    assert len(north) > 10 and len(south) > 10
    assert not north & south


@pytest.mark.slow  # it trains each template, cut short
@pytest.mark.parametrize("federation", [(t, "local") for t in TEMPLATES], indirect=True, ids=str)
def test_it_trains_as_it_is(federation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(federation)
    monkeypatch.setenv(MODELS, str(federation / "models"))
    job = yaml.safe_load(Path("job.yml").read_text()) | {"rounds": 1, "local_steps": 2}
    Path("short.yml").write_text(yaml.safe_dump(job))
    assert cli.main(["simulate", "short.yml", "--data", "data", "--outdir", "results"]) == 0
    evaluation = json.loads(Path("results/evaluation.json").read_text())
    assert {f["status"] for f in evaluation["facilities"].values()} == {"complete"}
    assert all(f["metrics"]["loss"] > 0 for f in evaluation["facilities"].values())


def test_a_folder_that_exists_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    assert cli.main(["init", str(tmp_path / "mine")]) == cli.BAD_INPUT
    assert "exists already" in capsys.readouterr().err
    assert not list((tmp_path / "mine").iterdir())
