"""What the tests share: a tiny model, two facilities with data, and a round in progress."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from crossfl.protocol.records import Task
from crossfl.protocol.variables import MIN_VALIDATION_SAMPLES, MIN_VALIDATION_TOKENS, PROGRESS
from crossfl.server import state as server_state
from crossfl.server.planning.fixed import plan
from crossfl.simulation.simulate import playing_every_facility
from crossfl.storage.job import Job
from tests.support.paths import CWL, DATA, ROUND
from tests.support.processes import NO_GPU, Run

# What the tests say to the bit, they say of the CPU.
os.environ.update(NO_GPU)

MARKS = {"schedulers": "site", "faults": "site", "workflows": "engine", "acceptance": "engine"}
"""What the tests of a folder are marked as, without a word in their modules."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of those folders, and as `fast` what bears no mark that says otherwise."""
    for item in items:
        if mark := MARKS.get(item.path.parent.name):
            item.add_marker(mark)
        if not any(item.get_closest_marker(mark) for mark in ("engine", "site", "slow")):
            item.add_marker("fast")


# The data of the tests is small, and metrics of it are to be seen.
FLOORS = {MIN_VALIDATION_SAMPLES: "1", MIN_VALIDATION_TOKENS: "1"}
os.environ.update(FLOORS)


@pytest.fixture
def job() -> Job:
    """The federation of the tests: two facilities, two rounds, DiLoCo."""
    return Job.load(CWL / "federation.yml")


@pytest.fixture
def task() -> Task:
    """The task of leonardo in round 1, on the model in `tests/cwl/round`."""
    job = Job.load(CWL / "federation.yml")
    state = server_state.load(ROUND / "state")
    planned = plan(state, job.facilities, 2, job.training, "train")
    return next(task for task in planned.tasks if task.facility == "leonardo")


@pytest.fixture(autouse=True)
def every_facility(request: pytest.FixtureRequest) -> object:
    """This machine plays every facility."""
    with playing_every_facility(DATA):
        yield


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that steps append their events to."""
    path = tmp_path / "events"
    path.touch()
    monkeypatch.setenv(PROGRESS, str(path))
    return path


@pytest.fixture
def round_(tmp_path: Path) -> Path:
    """A copy of `tests/cwl/round` that a test may damage."""
    return Path(shutil.copytree(ROUND, tmp_path / "round"))


@pytest.fixture(scope="session", autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what is left of a process that was killed among what pytest removes."""
    os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("tmp"))
    tempfile.tempdir = None
    # Compiled code is worth keeping.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(sys.prefix) / ".inductor"))


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment with every command of this machine, and of this Python, but no Node.js."""
    tools = tmp_path_factory.mktemp("bin")
    for folder in (Path(sys.executable).parent, Path("/usr/bin"), Path("/bin")):
        for tool in folder.iterdir():
            if "node" not in tool.name and not (tools / tool.name).exists():
                (tools / tool.name).symlink_to(tool)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CROSSFL_", "PYTEST_"))}
    return kept | FLOORS | {"PATH": str(tools)}


@pytest.fixture(scope="session")
def run(environment: Mapping[str, str]) -> Run:
    """Run a command in that environment, for at most `timeout` seconds."""

    def command(
        *words: str | Path, cwd: Path, timeout: float = 300, **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [str(word) for word in words],
            cwd=cwd,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return command
