"""Steps of `crossfl.local` are forked from a process that has the imports, and end with the engine.

What such a step is to its caller is in tests/engine/test_forkserver.py.
"""

import contextlib
import hashlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from crossfl.simulation.simulate import simulate
from crossfl.storage.job import Job
from tests.support.copies import copy_federation
from tests.support.engine import streamflow
from tests.support.paths import CWL, DATA

SECONDS = 120.0


def server_of(engine: "subprocess.Popen[bytes]") -> psutil.Process | None:
    """The engine's server of warm steps, once there is one."""
    for child in psutil.Process(engine.pid).children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "crossfl.warm" in child.cmdline():
                return child
    return None


def wait_for_step(engine: "subprocess.Popen[bytes]") -> psutil.Process:
    """The server, once it has forked a step."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and engine.poll() is None:
        if (server := server_of(engine)) and server.children():
            return server
        time.sleep(0.01)
    raise AssertionError(f"no step was forked; the engine's status is {engine.poll()}")


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[[Path], "subprocess.Popen[bytes]"]]:
    """Starts the engine on a StreamFlow file, and in the end kills it where it still runs."""
    with contextlib.ExitStack() as stack:

        def start(path: Path) -> "subprocess.Popen[bytes]":
            engine = streamflow(path, tmp_path / "out", tmp_path / "log")
            stack.callback(engine.wait)
            stack.callback(engine.kill)
            return engine

        yield start


def test_warm_steps_have_the_result_of_one_process(
    started: Callable[[Path], "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    engine = started(CWL / "streamflow.yml")
    server = wait_for_step(engine)
    folder = Path(server.cwd())
    assert folder.stat().st_mode & 0o777 == 0o700
    assert engine.wait(SECONDS) == 0, (tmp_path / "log").read_text()
    assert not folder.exists()
    assert not server.is_running()
    simulate(Job.load(CWL / "federation.yml"), DATA, tmp_path / "simulated")
    digests = {
        hashlib.sha256((out / "global_model" / "model.safetensors").read_bytes()).hexdigest()
        for out in (tmp_path / "out", tmp_path / "simulated")
    }
    assert len(digests) == 1


def test_an_engine_killed_takes_its_warm_steps_along(
    started: Callable[[Path], "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    cwl = copy_federation(tmp_path)
    job = yaml.safe_load((cwl / "federation.yml").read_text())
    del job["facilities"][1]["local_steps"]
    (cwl / "federation.yml").write_text(yaml.safe_dump(job | {"local_steps": 100_000}))
    engine = started(cwl / "streamflow.yml")
    server = wait_for_step(engine)
    deadline = time.monotonic() + SECONDS
    while "tokens/s" not in (log := (tmp_path / "log").read_text(errors="replace")):
        assert time.monotonic() < deadline, log
        time.sleep(0.1)
    everything = psutil.Process(engine.pid).children(recursive=True)
    folder = Path(server.cwd())
    assert len(server.children()) == 2
    engine.kill()
    engine.wait()
    _, alive = psutil.wait_procs(everything, timeout=5)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert not folder.exists()
