"""What the tests share: a tiny model, two facilities with data, and a round in progress."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from crossfl.protocol.records import Task
from crossfl.server.state import ServerState
from crossfl.simulation.simulate import playing_every_facility
from crossfl.steps.plan import plan
from crossfl.storage.job import Job
from tests.support.paths import CWL, DATA, ROUND
from tests.support.processes import NO_GPU, Run

# What the tests say to the bit, they say of the CPU.
os.environ.update(NO_GPU)


@pytest.fixture
def job() -> Job:
    """The federation of the tests: two facilities, two rounds, DiLoCo."""
    return Job.load(CWL / "federation.yml")


@pytest.fixture
def task() -> Task:
    """The task of leonardo in round 1, on the model in `tests/cwl/round`."""
    tasks = plan(
        ServerState.load(ROUND / "state"),
        Job.load(CWL / "federation.yml").facilities,
        local_steps=2,
        purpose="train",
    )[1]
    return next(task for task in tasks if task.facility == "leonardo")


@pytest.fixture(autouse=True)
def every_facility(request: pytest.FixtureRequest) -> object:
    """This machine plays every facility."""
    with playing_every_facility(DATA):
        yield


@pytest.fixture
def round_(tmp_path: Path) -> Path:
    """A copy of `tests/cwl/round` that a test may damage."""
    return Path(shutil.copytree(ROUND, tmp_path / "round"))


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment with every command of this machine, and of this Python, but no Node.js."""
    tools = tmp_path_factory.mktemp("bin")
    for folder in (Path(sys.executable).parent, Path("/usr/bin"), Path("/bin")):
        for tool in folder.iterdir():
            if "node" not in tool.name and not (tools / tool.name).exists():
                (tools / tool.name).symlink_to(tool)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CROSSFL_", "PYTEST_"))}
    return kept | {"PATH": str(tools)}


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
