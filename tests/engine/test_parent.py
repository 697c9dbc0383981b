"""A step ends soon after its engine, whatever it is doing at the time, and does not outlive it."""

import os
import subprocess
import sys
import time

import pytest

from crossfl.protocol.variables import ENGINE
from tests.support.paths import ROUND

pytestmark = pytest.mark.slow
PLAN = ["plan", "--state", str(ROUND / "state"), "--local-steps", "2"]
SLOW = f"""
import sys, time, types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

class Slow(MetaPathFinder, Loader):
    def find_spec(self, name, path, target=None):
        return ModuleSpec(name, self) if name == "crossfl.steps.plan" else None
    def exec_module(self, module):
        print("importing", flush=True)
        time.sleep(60)

sys.meta_path.insert(0, Slow())
from crossfl.cli import main
main({PLAN})
"""


@pytest.fixture
def engine() -> object:
    process = subprocess.Popen(["sleep", "100"])
    yield process
    process.kill()
    process.wait()


def step(code: str, engine: int) -> "subprocess.Popen[str]":
    environment = {**os.environ, ENGINE: str(engine)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_ends_while_it_imports(engine: "subprocess.Popen[bytes]") -> None:
    running = step(SLOW, engine.pid)
    assert running.stdout is not None
    assert running.stdout.readline() == "importing\n"
    engine.kill()
    engine.wait()
    begun = time.monotonic()
    assert running.wait(10) == 1
    assert time.monotonic() - begun < 5


def test_it_does_not_begin_without_it(engine: "subprocess.Popen[bytes]") -> None:
    engine.kill()
    engine.wait()
    _, message = (ended := step(SLOW, engine.pid)).communicate(timeout=10)
    assert ended.returncode == 1
    assert message == f"crossfl: process {engine.pid}, the engine of this step, has ended\n"


def test_a_job_on_another_machine_does(
    engine: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.kill()
    engine.wait()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    running = step(SLOW, engine.pid)
    assert running.stdout is not None
    assert running.stdout.readline() == "importing\n"
    running.kill()
    running.wait()
