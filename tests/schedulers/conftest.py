"""The testbed, and runs of the real engine against it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTBED = ROOT / "environments" / "testbed" / "testbed.py"
CWL = Path(__file__).parent / "cwl"
STREAMFLOW = str(Path(sys.executable).with_name("streamflow"))
RUN_SECONDS = 90
SETUP_SECONDS = 900


@dataclass(frozen=True)
class Site:
    """A login node of the testbed, or (of kind PBS) the real one of $CROSSFL_TEST_PBS."""

    name: str
    facts: dict[str, Any]
    home: Path  # of the VM's user, with its .ssh

    @property
    def scheduler(self) -> str:
        return str(self.facts["scheduler"])

    @property
    def emulated(self) -> bool:
        return bool(self.facts["emulated"])

    def shell(self, script: str, seconds: int = 30) -> str:
        """Run a script on the login node, over the system's ssh."""
        host, _, port = self.facts["hostname"].partition(":")
        options = ["-p", port or "22", "-o", "BatchMode=yes"]
        if key := self.facts.get("ssh_key"):
            options += ["-i", key, "-o", f"UserKnownHostsFile={self.facts['known_hosts']}"]
        done = subprocess.run(
            ["ssh", *options, f"{self.facts['username']}@{host}", script],
            capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip
        return done.stdout

    def jobs(self) -> list[str]:
        """The ids of this user's jobs that are not over."""
        if self.scheduler == "slurm":
            return self.shell("squeue -h --me -o %i").split()
        lines = self.shell("qstat -u $USER").splitlines()
        return [line.split()[0] for line in lines if line[:1].isdigit()]

    def wait_for_jobs(self, count: int, seconds: float = 30) -> list[str]:
        deadline = time.monotonic() + seconds
        while len(jobs := self.jobs()) != count:
            assert time.monotonic() < deadline, f"{self.name} has jobs {jobs}, not {count} of them"
            time.sleep(0.5)
        return jobs

    def cancel(self, job: str) -> None:
        self.shell(f"{'scancel' if self.scheduler == 'slurm' else 'qdel'} {job}")

    def login(self, **changes: Any) -> dict[str, Any]:
        """The deployment of its login node."""
        config = {
            "nodes": [self.facts["hostname"]],
            "username": self.facts["username"],
            "retries": 2,
            "retryDelay": 1,
        }
        if key := self.facts.get("ssh_key"):
            config |= {"sshKey": key, "knownHosts": self.facts["known_hosts"]}
        return {
            "type": "crossfl.ssh",
            "workdir": self.facts["workdir"],
            "config": config | changes,
        }

    def queue(self, service: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        """The deployment of its scheduler, with one service called `train`."""
        config: dict[str, Any] = {"maxConcurrentJobs": 8, "pollingInterval": 1}
        if service is not None:
            config["services"] = {"train": service}
        return {
            "type": f"crossfl.{self.scheduler}",
            "wraps": f"{self.name}-login",
            "workdir": self.facts["workdir"],
            "config": config | changes,
        }

    def settings(self, python: Path, data: Path) -> dict[str, str]:
        """What `crossfl bind` is told of the site, for a Python and data that its user can read."""
        settings = {
            "host": self.facts["hostname"],
            "user": self.facts["username"],
            "key": self.facts["ssh_key"],
            "known_hosts": self.facts["known_hosts"],
            "account": "crossfl",
            "workdir": self.facts["workdir"],
            "venv": str(python),
            "data": str(data),
            "time": "00:05:00",
        }
        if self.scheduler == "slurm":
            return settings | {"partition": "boost"}
        return settings | {"queue": "boost", "chunk": "ncpus=1"}

    def walltime(self, seconds: int) -> dict[str, Any]:
        """A service that grants so many seconds."""
        clock = f"00:{seconds // 60:02}:{seconds % 60:02}"
        if self.scheduler == "slurm":
            return {"time": clock}
        return {"resources": {"walltime": clock}}


@dataclass
class Outcome:
    """How a run of the engine ended."""

    code: int
    log: str
    seconds: float
    outdir: Path
    outputs: dict[str, Any] = field(default_factory=dict)


def heed_signals() -> None:
    """Let a run heed the signals that whoever started the tests may have had ignored (nohup)."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def streamflow(
    path: Path, outdir: Path, log: Path, environment: Mapping[str, str] = os.environ
) -> subprocess.Popen[bytes]:
    """Start `streamflow run` on a StreamFlow file, in a session of its own."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            [STREAMFLOW, "run", str(path), "--outdir", str(outdir)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            cwd=path.parent,
            env=environment,
            start_new_session=True,
            preexec_fn=heed_signals,
        )


def unset() -> dict[str, str]:
    """The environment of a person who has set nothing of ours by hand."""
    return {k: v for k, v in os.environ.items() if not k.startswith("CROSSFL_")}


class Engine:
    """`streamflow run` on a workflow of ours, as a person would start it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outdir = folder / "out"

    def write(
        self,
        workflow: str,
        inputs: dict[str, Any],
        deployments: dict[str, Any],
        target: dict[str, Any],
        step: str = "/job",
        **more: Any,
    ) -> Path:
        (self.folder / "job.json").write_text(json.dumps(inputs))
        path = self.folder / "streamflow.yml"
        path.write_text(
            json.dumps(
                {
                    "version": "v1.0",
                    "workflows": {
                        "test": {
                            "type": "cwl",
                            "config": {
                                "file": str(CWL / workflow),
                                "settings": str(self.folder / "job.json"),
                            },
                            "bindings": [{"step": step, "target": target}],
                        }
                    },
                    "deployments": deployments,
                    "database": {"type": "default", "config": {"connection": ":memory:"}},
                    **more,
                },
                indent=2,
            )
        )
        return path

    def start(self, *args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        path = self.write(*args, **kwargs)
        (self.folder / "log").unlink(missing_ok=True)
        return streamflow(path, self.outdir, self.folder / "log")

    def wait(
        self, process: subprocess.Popen[bytes], since: float, seconds: float = RUN_SECONDS
    ) -> Outcome:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            pytest.fail(f"the run did not end within {seconds} s:\n{self.log()}")
        text = self.log()
        outcome = Outcome(code, text, time.monotonic() - since, self.outdir)
        if code == 0:
            outcome.outputs = json.JSONDecoder().raw_decode(text[text.rindex("\n{\n") + 1 :])[0]
        return outcome

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def run(self, *args: Any, seconds: float = RUN_SECONDS, **kwargs: Any) -> Outcome:
        since = time.monotonic()
        return self.wait(self.start(*args, **kwargs), since, seconds)

    def run_at(
        self,
        site: Site,
        script: str | list[str],
        service: dict[str, Any] | None = None,
        *,
        seconds: float = RUN_SECONDS,
        login: dict[str, Any] | None = None,
        **queue: Any,
    ) -> Outcome:
        """Run one script, or several at once, as jobs of a site."""
        since = time.monotonic()
        return self.wait(self.start_at(site, script, service, login=login, **queue), since, seconds)

    def start_at(
        self,
        site: Site,
        script: str | list[str],
        service: dict[str, Any] | None = None,
        *,
        login: dict[str, Any] | None = None,
        **queue: Any,
    ) -> subprocess.Popen[bytes]:
        more = deployed(site, service, login, **queue)
        if isinstance(script, str):
            return self.start("one.cwl", {"script": script}, **more)
        return self.start("many.cwl", {"scripts": script}, **more)

    def run_in_rounds(
        self,
        site: Site,
        scripts: list[str],
        *args: Any,
        seconds: float = RUN_SECONDS,
        **kwargs: Any,
    ) -> Outcome:
        """Run scripts as jobs of a loop, where the engine is known to hang on a failure."""
        since = time.monotonic()
        return self.wait(self.start_in_rounds(site, scripts, *args, **kwargs), since, seconds)

    def start_in_rounds(
        self,
        site: Site,
        scripts: list[str],
        service: dict[str, Any] | None = None,
        *,
        login: dict[str, Any] | None = None,
        **queue: Any,
    ) -> subprocess.Popen[bytes]:
        more = deployed(site, service, login, **queue)
        return self.start(
            "loop.cwl", {"scripts": scripts, "more": True}, **more, step="/rounds/job"
        )


def deployed(
    site: Site, service: dict[str, Any] | None, login: dict[str, Any] | None, **queue: Any
) -> dict[str, Any]:
    """The deployments of a site, and the target of the step that runs there."""
    return {
        "deployments": {
            f"{site.name}-login": site.login(**login or {}),
            site.name: site.queue(service, **queue),
        },
        "target": {"deployment": site.name} | ({} if service is None else {"service": "train"}),
    }


def closed(site: Site) -> dict[str, Any]:
    """A service whose jobs wait for ever."""
    if site.scheduler == "slurm":
        return {"partition": "closed"}
    if not site.emulated:
        pytest.skip("a real server has no closed queue")
    return {"destination": "closed"}


@pytest.fixture(scope="session")
def testbed() -> Iterator[dict[str, Any]]:
    """The testbed's facts; it is started, and stopped again, unless it was up."""
    if os.geteuid() != 0:
        pytest.skip("the testbed needs root, to run jobs as other users")
    path = f"{os.environ['PATH']}:/usr/sbin"
    daemons = ("sshd", "munged", "slurmctld", "slurmd")
    if missing := [name for name in daemons if not shutil.which(name, path=path)]:
        pytest.skip(f"not installed: {', '.join(missing)}; run environments/testbed/install.sh")

    def verb(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(TESTBED), *words], capture_output=True, text=True, timeout=180
        )

    was_up = verb("status").returncode == 0
    started = verb("start")
    assert started.returncode == 0, started.stderr
    yield json.loads(verb("status", "--format", "json").stdout)
    if not was_up:
        verb("stop")


@pytest.fixture(scope="session")
def python(testbed: dict[str, Any]) -> Path:
    """An environment that an ordinary user of a site can enter: the system's Python, our lock."""
    folder = Path(testbed["home"]).parent / "python"
    ready = folder / "crossfl-ready"
    if not ready.exists():
        subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", folder], check=True)
        install = [sys.executable, "-m", "pip", "--quiet", "--python", folder / "bin" / "python"]
        install += ["install", "--disable-pip-version-check"]
        lock = ["-r", ROOT / "requirements.lock"]
        subprocess.run([*install, *lock], check=True, timeout=SETUP_SECONDS)
        ready.touch()
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "python"):
        path = ROOT / name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, source / name)
    install = [sys.executable, "-m", "pip", "--quiet", "--python", folder / "bin" / "python"]
    subprocess.run(
        [*install, "install", "--no-deps", "--force-reinstall", source],
        check=True,
        timeout=SETUP_SECONDS,
    )
    return folder


def real_pbs() -> dict[str, Any] | None:
    """The real OpenPBS of `CROSSFL_TEST_PBS=user@host[:port]`, if there is one."""
    if not (login := os.environ.get("CROSSFL_TEST_PBS")):
        return None
    username, _, hostname = login.rpartition("@")
    return {
        "scheduler": "pbs",
        "emulated": False,
        "hostname": hostname,
        "username": username,
        "workdir": os.environ.get("CROSSFL_TEST_PBS_WORKDIR", f"/home/{username}/crossfl-test"),
        "partition": os.environ.get("CROSSFL_TEST_PBS_QUEUE", "workq"),
    }


@pytest.fixture(scope="session")
def sites(testbed: dict[str, Any]) -> dict[str, Site]:
    shared = {"ssh_key": testbed["ssh_key"], "known_hosts": testbed["known_hosts"]}
    sites = {
        name: Site(name, facts | shared, Path(testbed["home"]))
        for name, facts in testbed["sites"].items()
    }
    if facts := real_pbs():
        sites["gamma"] = Site("gamma", facts, Path.home())
    return sites


@pytest.fixture(params=["alpha", "gamma"], ids=["slurm", "pbs"])
def site(request: pytest.FixtureRequest, sites: dict[str, Site]) -> Iterator[Site]:
    """A Slurm site, then a PBS site; with no job of ours left on it afterwards."""
    site = sites[request.param]
    yield site
    for job in site.jobs():
        site.cancel(job)


@pytest.fixture
def alpha(sites: dict[str, Site]) -> Iterator[Site]:
    yield sites["alpha"]
    for job in sites["alpha"].jobs():
        sites["alpha"].cancel(job)


@pytest.fixture
def gamma(sites: dict[str, Site]) -> Iterator[Site]:
    yield sites["gamma"]
    for job in sites["gamma"].jobs():
        sites["gamma"].cancel(job)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path)


@pytest.fixture
def shim(sites: dict[str, Site]) -> Iterator[Callable[[Site, str, str], None]]:
    """Puts a script in front of a command of a site's user, and takes it away again."""
    placed: list[Path] = []

    def place(site: Site, name: str, script: str) -> None:
        if "home" not in site.facts:
            pytest.skip("faults are injected only in the testbed")
        path = Path(site.facts["home"]) / "bin" / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
        placed.append(path)

    yield place
    for path in placed:
        path.unlink(missing_ok=True)
