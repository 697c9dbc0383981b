"""A federation across three facilities on real jobs: a local one's weights, and no data moved."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from crossfl.protocol.history import decode_line
from crossfl.simulation.simulate import simulate
from crossfl.storage.job import Job
from tests.support.engine import Engine, Outcome, streamflow, unset
from tests.support.paths import DATA
from tests.support.testbed import CANARY, Site, bind, job_of, place_data

RUN_SECONDS = 420


def federate(path: Path, engine: Engine) -> Outcome:
    """Run it, with nothing set by hand."""
    begun = time.monotonic()
    log = path.parent / "log"
    log.unlink(missing_ok=True)
    process = streamflow(path, engine.outdir, log, unset())
    return engine.wait(process, begun, RUN_SECONDS)


def weights(folder: Path) -> Path:
    return folder / "global_model" / "model.safetensors"


def test_three_facilities(
    sites: dict[str, Site], python: Path, engine: Engine, tmp_path: Path
) -> None:
    if "home" not in sites["gamma"].facts:
        pytest.skip("the data is placed only where the home of the site's user is here")
    data = tmp_path / "data"
    data.mkdir()
    for site, words in zip(sites.values(), ("leonardo", "karolina", "leonardo"), strict=True):
        (data / site.name).symlink_to(place_data(site, DATA / words / "words"))
    path = bind(list(sites.values()), python, data, job_of(list(sites.values())))
    document = yaml.safe_load(path.read_text())
    document["deployments"]["vm"]["workdir"] = str(tmp_path / "vm")
    (tmp_path / "vm").mkdir()
    path.write_text(yaml.safe_dump(document))
    outcome = federate(path, engine)
    assert outcome.code == 0, outcome.log

    rounds = (engine.outdir / "history.jsonl").read_bytes().splitlines()
    history = [decode_line(line, "history.jsonl") for line in rounds]
    assert [sorted(entry.facilities) for entry in history] == [sorted(sites)] * 3
    for entry in history:
        assert all(each.seconds.train > 0 for each in entry.facilities.values() if each.seconds)
        assert {each.status for each in entry.facilities.values()} == {"complete"}

    simulate(Job.load(tmp_path / "job.json"), data, tmp_path / "local")
    assert weights(engine.outdir).read_bytes() == weights(tmp_path / "local").read_bytes()

    crossed = [p for p in [*(tmp_path / "vm").rglob("*"), *engine.outdir.rglob("*")] if p.is_file()]
    assert len(crossed) > 30
    for each in [*crossed, tmp_path / "log"]:
        assert CANARY.encode() not in each.read_bytes(), each


def test_two_ranks_of_one_job(alpha: Site, python: Path, engine: Engine, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "alpha").symlink_to(place_data(alpha, DATA / "leonardo" / "words"))
    job = job_of([alpha], rounds=1, aggregation={"server_optimizer": "fedavg"})
    node = Path(alpha.facts["home"]) / "node"  # as if it were storage of its own
    node.mkdir(exist_ok=True)
    shutil.chown(node, alpha.facts["username"])
    os.utime(node, (0, 0))
    floors = {"min_samples": "1", "min_tokens": "1"}  # or no metric would leave
    path = bind([alpha], python, data, job, ranks="2", staging=str(node), **floors)
    outcome = federate(path, engine)
    assert outcome.code == 0, outcome.log
    assert node.stat().st_mtime > 0 and list(node.iterdir()) == [], "used, and left empty"
    simulate(Job.load(tmp_path / "job.json"), data, tmp_path / "local")
    ranks, one = (load_file(weights(folder)) for folder in (engine.outdir, tmp_path / "local"))
    for name, tensor in one.items():
        torch.testing.assert_close(ranks[name], tensor, rtol=1e-3, atol=1e-5)
    there, here = (
        json.loads((folder / "evaluation.json").read_text())["facilities"]["alpha"]["metrics"]
        for folder in (engine.outdir, tmp_path / "local")
    )
    assert there.keys() == here.keys() and "exact_match" in there
    for name in ("tokens", "samples", "exact_match"):
        assert there[name] == here[name]
    assert there["loss"] == pytest.approx(here["loss"], abs=2e-3)


APPTAINER = """\
# An EMULATION of `apptainer exec`, for want of one that is installed: the command runs here, with
# the programs of a folder in place of an image.
echo "$*" >> ~/apptainer.calls
[ "$1" = exec ] || exit 64
while shift && [[ $1 == --* ]]; do [ "$1" != --bind ] || shift; done
PATH=$1/bin:/usr/bin:/bin
shift
exec "$@"
"""


def test_two_ranks_in_a_container(
    alpha: Site,
    python: Path,
    engine: Engine,
    tmp_path: Path,
    shim: Callable[[Site, str, str], None],
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    folder = place_data(alpha, DATA / "leonardo" / "words")
    (data / "alpha").symlink_to(folder)
    shim(alpha, "apptainer", APPTAINER)
    home = Path(alpha.facts["home"])
    profile, calls = home / ".bash_profile", home / "apptainer.calls"
    calls.unlink(missing_ok=True)
    profile.write_text("PATH=$HOME/bin:$PATH\n")
    job = job_of([alpha], rounds=1, aggregation={"server_optimizer": "fedavg"})
    path = bind([alpha], python, data, job, ranks="2", container=str(python))
    command = [sys.executable, "-m", "crossfl", "check", path.name, "--submit", "--room", "0.1"]
    try:
        checked = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
        outcome = federate(path, engine)
    finally:
        profile.unlink()
    assert checked.returncode == 0, checked.stdout
    assert outcome.code == 0, outcome.log
    bound = f"exec --bind {alpha.facts['workdir']},{folder}:{folder}:ro {python} bash -c "
    asked = [line for line in calls.read_text().splitlines() if line.startswith("exec ")]
    assert len(asked) == 4  # the check on the login node, its job, training and evaluation
    assert all(line.startswith(bound) for line in asked)
    simulate(Job.load(tmp_path / "job.json"), data, tmp_path / "local")
    ranks, one = (load_file(weights(folder)) for folder in (engine.outdir, tmp_path / "local"))
    for name, tensor in one.items():
        torch.testing.assert_close(ranks[name], tensor, rtol=1e-3, atol=1e-5)
