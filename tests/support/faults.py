"""Faults at a site, and federations that meet them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from environments.testbed import testbed as daemons
from tests.support.engine import streamflow, unset
from tests.support.paths import CWL, DATA
from tests.support.testbed import Site, place_data

FULL = os.environ.get("FAULTS") == "full"


class Login:
    """An sshd of the testbed, with all its sessions."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self._site = next(site for site in daemons.SITES if site.name == "alpha")
        port = int(facts["sites"]["alpha"]["hostname"].rpartition(":")[2])
        base = port - 10 * self._site.index
        self._testbed = daemons.Testbed(state=Path(facts["state"]), base_port=base)
        self._name = f"sshd-{self._site.name}"

    def stop(self) -> None:
        if pid := daemons.running(self._testbed, self._name):
            listener = psutil.Process(pid)
            listener.suspend()  # or it takes on another session while these end
            for session in listener.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if session.name().startswith("sshd"):
                        session.kill()
            listener.kill()
            daemons.halt(self._testbed, self._name)

    def start(self) -> None:
        daemons.start_login(self._testbed, self._site)
        port = self._testbed.port(self._site, 0)
        assert daemons.wait_until(lambda: bool(daemons.listening(port)), seconds=15)

    def restart_controller(self) -> None:
        """Stop slurmctld as if it had crashed, and start it again."""
        name = f"slurmctld-{self._site.cluster}"
        if pid := daemons.running(self._testbed, name):
            os.kill(pid, signal.SIGKILL)
            daemons.halt(self._testbed, name)
        time.sleep(3)
        daemons.start_cluster(self._testbed, self._site)

    def forget_jobs(self) -> None:
        """Stop slurmctld, and start it without a memory."""
        name = f"slurmctld-{self._site.cluster}"
        daemons.halt(self._testbed, name)
        shutil.rmtree(self._testbed.cluster("alpha") / "state")
        daemons.start_cluster(self._testbed, self._site)

    def nodes(self, state: str) -> None:
        """Set the state of all nodes; one that has come back by itself is left alone."""
        with contextlib.suppress(daemons.TestbedError):
            self.slurm("scontrol", "update", "NodeName=ALL", f"State={state}", "Reason=a test")

    def slurm(self, *words: str) -> str:
        """A command of the cluster's administrator."""
        return str(daemons.slurm(self._testbed, "alpha", *words))


class Federation:
    """A run of the real workflow: alpha on Slurm behind ssh, and leonardo on this machine."""

    def __init__(self, folder: Path, alpha: Site, python: Path, **job: Any) -> None:
        self.folder = folder
        self.events_file = folder / "progress"
        self.runs: list[subprocess.Popen[bytes]] = []
        data = place_data(alpha, DATA / "leonardo" / "words")
        self.job = {
            "config": {"class": "File", "path": str(CWL / "config.json")},
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
                "max_new_tokens": 4,
                "validation_samples": 2,
            },
            "aggregation": {"quorum": 1},
        } | job
        (folder / "job.json").write_text(json.dumps(self.job))
        settings = {f"alpha.{k}": v for k, v in alpha.settings(python, data).items()}
        settings["leonardo.folder"] = os.path.relpath(DATA / "leonardo", folder)
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
