"""The testbed of tests/schedulers, its login nodes to be stopped and started, and its runs."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from crossfl.engine.connectors.ssh import SSHConnector

ROOT = Path(__file__).resolve().parents[2]
SCHEDULERS = ROOT / "tests" / "schedulers"
FULL = os.environ.get("FAULTS") == "full"


def _load(name: str, path: Path) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


_sites = _load("testbed_fixtures", SCHEDULERS / "conftest.py")
Engine, Outcome, Site = _sites.Engine, _sites.Outcome, _sites.Site
streamflow, unset = _sites.streamflow, _sites.unset
testbed, sites, alpha, engine, shim, python = (
    getattr(_sites, name) for name in ("testbed", "sites", "alpha", "engine", "shim", "python")
)
_federation = _load("testbed_federation", SCHEDULERS / "test_federation.py")
place_data = _federation.place_data
_testbed = _load("testbed_daemons", ROOT / "environments" / "testbed" / "testbed.py")


def ssh(site: Any) -> SSHConnector:
    """A connection to the login node of a site, without the engine."""
    return SSHConnector(
        deployment_name=site.name,
        config_dir="/",
        nodes=[site.facts["hostname"]],
        username=site.facts["username"],
        sshKey=site.facts["ssh_key"],
        knownHosts=site.facts["known_hosts"],
    )


@pytest.fixture
def login(testbed: dict[str, Any]) -> Iterator[Login]:
    """The login node of alpha; it runs again afterwards, and the nodes behind it take jobs."""
    found = Login(testbed)
    yield found
    found.start()
    found.nodes("RESUME")


class Login:
    """An sshd of the testbed, with all its sessions."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self._site = next(site for site in _testbed.SITES if site.name == "alpha")
        port = int(facts["sites"]["alpha"]["hostname"].rpartition(":")[2])
        base = port - 10 * self._site.index
        self._testbed = _testbed.Testbed(state=Path(facts["state"]), base_port=base)
        self._name = f"sshd-{self._site.name}"

    def stop(self) -> None:
        if pid := _testbed.running(self._testbed, self._name):
            listener = psutil.Process(pid)
            listener.suspend()  # or it takes on another session while these end
            for session in listener.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if session.name().startswith("sshd"):
                        session.kill()
            listener.kill()
            _testbed.halt(self._testbed, self._name)

    def start(self) -> None:
        _testbed.start_login(self._testbed, self._site)
        port = self._testbed.port(self._site, 0)
        assert _testbed.wait_until(lambda: bool(_testbed.listening(port)), seconds=15)

    def restart_controller(self) -> None:
        """Stop slurmctld as if it had crashed, and start it again."""
        name = f"slurmctld-{self._site.cluster}"
        if pid := _testbed.running(self._testbed, name):
            os.kill(pid, signal.SIGKILL)
            _testbed.halt(self._testbed, name)
        time.sleep(3)
        _testbed.start_cluster(self._testbed, self._site)

    def forget_jobs(self) -> None:
        """Stop slurmctld, and start it without a memory."""
        name = f"slurmctld-{self._site.cluster}"
        _testbed.halt(self._testbed, name)
        shutil.rmtree(self._testbed.cluster("alpha") / "state")
        _testbed.start_cluster(self._testbed, self._site)

    def nodes(self, state: str) -> None:
        """Set the state of all nodes; one that has come back by itself is left alone."""
        with contextlib.suppress(_testbed.TestbedError):
            self.slurm("scontrol", "update", "NodeName=ALL", f"State={state}", "Reason=a test")

    def slurm(self, *words: str) -> str:
        """A command of the cluster's administrator."""
        return str(_testbed.slurm(self._testbed, "alpha", *words))


class Federation:
    """A run of the real workflow: alpha on Slurm behind ssh, and leonardo on this machine."""

    def __init__(self, folder: Path, alpha: Any, python: Path, **job: Any) -> None:
        self.folder = folder
        self.events_file = folder / "progress"
        self.runs: list[subprocess.Popen[bytes]] = []
        words = ROOT / "tests" / "cwl" / "data"
        data = place_data(alpha, words / "leonardo" / "words")
        self.job = {
            "config": {"class": "File", "path": str(ROOT / "tests" / "cwl" / "config.json")},
            "tokenizer": "bytes",
            "facilities": [
                {"name": "alpha", "dataset": "words", "attempts": 1},
                {"name": "leonardo", "dataset": "words"},
            ],
            "rounds": 2,
            "local_steps": 2,
            "training": {
                "batch_size": 2,
                "sequence_length": 48,
                "threads": 1,
                "completion_tokens": 4,
                "validation_samples": 2,
            },
            "aggregation": {"quorum": 1},
        } | job
        (folder / "job.json").write_text(json.dumps(self.job))
        settings = {f"alpha.{k}": v for k, v in alpha.settings(python, data).items()}
        settings["leonardo.folder"] = os.path.relpath(words / "leonardo", folder)
        command = ["bind", "--job", "job.json", "-o", "federation.yml"]
        command += ["--facility", "alpha=slurm", "--facility", "leonardo=local"]
        command += [w for k, v in settings.items() for w in ("--set", f"{k}={v}")]
        subprocess.run([sys.executable, "-m", "crossfl", *command], cwd=folder, check=True)
        # Bound files are for people, whose sites are far: here an answer comes soon or never.
        path = folder / "federation.yml"
        text = path.read_text()
        text = text.replace("      nodes:", "      retries: 2\n      retryDelay: 1\n      nodes:")
        text = text.replace("pollingInterval: 10", "pollingInterval: 1\n      statusTimeout: 10")
        path.write_text(text)

    def start(self) -> subprocess.Popen[bytes]:
        self.events_file.touch()
        environment = unset() | {"CROSSFL_PROGRESS": str(self.events_file)}
        path, out = self.folder / "federation.yml", self.folder / "out"
        self.runs.append(streamflow(path, out, self.folder / "log", environment))
        return self.runs[-1]

    def events(self) -> list[dict[str, Any]]:
        """What the steps on this machine have reported so far."""
        lines = self.events_file.read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def wait_for(
        self, what: Callable[[], Any], process: subprocess.Popen[bytes], seconds: float = 180
    ) -> Any:
        """Wait until something is there, while the run goes on."""
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.2)
        return found

    def wait_for_round(self, number: int, process: subprocess.Popen[bytes]) -> None:
        """Wait until a round is finished."""
        self.wait_for(
            lambda: any(e["phase"] == "aggregate" and e["round"] == number for e in self.events()),
            process,
        )

    def end(self, process: subprocess.Popen[bytes], seconds: float = 300) -> int:
        """The exit status, within a limit."""
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"the run did not end within {seconds} s:\n{self.log()}")

    def history(self) -> list[dict[str, Any]]:
        lines = (self.folder / "out" / "history.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def federation(tmp_path: Path, alpha: Any, python: Path) -> Iterator[Callable[..., Federation]]:
    """Makes a federation of alpha and leonardo; its runs end with the test."""
    made: list[Federation] = []

    def make(**job: Any) -> Federation:
        made.append(Federation(tmp_path, alpha, python, **job))
        return made[-1]

    yield make
    for run in (run for each in made for run in each.runs if run.poll() is None):
        run.kill()
        run.wait()
