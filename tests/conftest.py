"""What the tests share: a tiny model, two facilities with data, and a round in progress."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from crossfl.protocol.records import Record, Task, Training, flag
from crossfl.server.state import ServerState
from crossfl.simulation.simulate import playing_every_facility
from crossfl.steps.plan import plan
from crossfl.storage.job import Job

ROOT = Path(__file__).parent.parent
CWL = ROOT / "tests" / "cwl"
DATA = CWL / "data"
ROUND = CWL / "round"
"""A federation after initialisation: global_model, state and the updates of round 1."""

# What the tests say to the bit, they say of the CPU.
GPUS = {"CUDA_VISIBLE_DEVICES": os.getenv("CUDA_VISIBLE_DEVICES", "0")}
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
os.environ.update(NO_GPU)

PRESERVE = tuple(f"--preserve-environment={name}" for name in ("CROSSFL_FACILITY", "CROSSFL_DATA"))
"""What lets cwltool's steps see which facility this machine is."""


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


Run = Callable[..., "subprocess.CompletedProcess[str]"]


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


def flags(*records: Record) -> list[str]:
    """Records as a step is told them on its command line."""
    return [w for r in records for k, v in r.asdict().items() for w in (flag(k), str(v))]


def train_there(run: Run, task: Task, training: Training, out: Path, **variables: str) -> None:
    """Run `crossfl train` at leonardo, which leaves its update in `out`."""
    out.mkdir(parents=True)
    result = run(
        sys.executable, "-m", "crossfl", "train", "--global-model", ROUND / "global_model",
        "--outdir", out, *flags(task, training), cwd=out, CROSSFL_FACILITY="leonardo",
        CROSSFL_DATA=str(DATA / "leonardo"), **variables,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def losses(
    run: Run, task: Task, training: Training, launcher: Sequence[str | Path] = (), **variables: str
) -> dict[str, Any]:
    """What `losses.py` prints of a task at leonardo, in its own process or under a launcher."""
    script = Path(__file__).with_name("losses.py")
    result = run(
        *(launcher or [sys.executable]), script,
        *(json.dumps(record.asdict()) for record in (task, training)), cwd=ROUND,
        CROSSFL_FACILITY="leonardo", CROSSFL_DATA=str(DATA / "leonardo"),
        CROSSFL_PROGRESS=os.devnull, **variables,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said: dict[str, Any] = json.loads(result.stdout)
    return said
