"""The sites of the testbed, and federations that are bound to them."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from crossfl.engine.connectors.ssh import SSHConnector
from tests.support.paths import CWL

CANARY = "canary-4b1d7e"


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

    def operate(self, command: str, job: str) -> None:
        """Do to a job what a real server lets its operators do: root of its own machine is one."""
        if self.emulated:
            self.shell(f"{command} {job}")
        else:
            path = {"PATH": f"/opt/pbs/bin:{os.environ['PATH']}"}
            subprocess.run([command, job], env=os.environ | path, check=True)

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
            "account": self.facts["account"],
            "workdir": self.facts["workdir"],
            "venv": str(python),
            "data": str(data),
            "time": "00:05:00",
        }
        if self.scheduler == "slurm":
            return settings | {"partition": self.facts["partition"]}
        return settings | {"queue": self.facts["partition"], "chunk": "ncpus=1"}

    def walltime(self, seconds: int) -> dict[str, Any]:
        """A service that grants so many seconds."""
        clock = f"00:{seconds // 60:02}:{seconds % 60:02}"
        if self.scheduler == "slurm":
            return {"time": clock}
        return {"resources": {"walltime": clock}}


def real_pbs() -> dict[str, Any] | None:
    """The real OpenPBS of `CROSSFL_TEST_PBS=user@host[:port]`, if there is one.

    On an address of this machine the tests, which run as root, reach its user's home as well.
    """
    if not (login := os.environ.get("CROSSFL_TEST_PBS")):
        return None
    username, _, hostname = login.rpartition("@")
    ssh = Path.home() / ".ssh"
    facts = {
        "scheduler": "pbs",
        "emulated": False,
        "hostname": hostname,
        "username": username,
        "ssh_key": os.environ.get("CROSSFL_TEST_PBS_KEY", str(ssh / "id_ed25519")),
        "known_hosts": os.environ.get("CROSSFL_TEST_PBS_KNOWN_HOSTS", str(ssh / "known_hosts")),
        "workdir": os.environ.get("CROSSFL_TEST_PBS_WORKDIR", f"/home/{username}/crossfl-test"),
        "partition": os.environ.get("CROSSFL_TEST_PBS_QUEUE", "workq"),
        "account": os.environ.get("CROSSFL_TEST_PBS_ACCOUNT", "crossfl"),
    }
    return facts | ({"home": pwd.getpwnam(username).pw_dir} if is_here(hostname) else {})


def is_here(hostname: str) -> bool:
    """Whether a host is this machine: one can listen on its address then."""
    with socket.socket() as probe:
        try:
            probe.bind((socket.gethostbyname(hostname.partition(":")[0]), 0))
        except OSError:
            return False
        return True


def closed(site: Site) -> dict[str, Any]:
    """A service whose jobs wait for ever; a real server has no closed queue, but it has dates."""
    if site.scheduler == "slurm":
        return {"partition": "closed"}
    return {"destination": "closed"} if site.emulated else {"begin": "203612312359"}


def ssh(site: Site) -> SSHConnector:
    """A connection to the login node of a site, without the engine."""
    return SSHConnector(
        deployment_name=site.name,
        config_dir="/",
        nodes=[site.facts["hostname"]],
        username=site.facts["username"],
        sshKey=site.facts["ssh_key"],
        knownHosts=site.facts["known_hosts"],
    )


def place_data(site: Site, words: Path) -> Path:
    """Put a dataset with a canary in every sample into the home of a site's user."""
    home = Path(site.facts["home"])
    folder = home / "data" / "words"
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    for split in ("train", "valid"):
        rows = [json.loads(x) for x in (words / f"{split}.jsonl").read_text().splitlines()]
        for row in rows:
            row["completion"] += f" {CANARY}"
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    subprocess.run(["chown", "-R", site.facts["username"], folder.parent], check=True)
    return folder.parent


class Partition:
    """The partition of a Slurm site, as its administrator opens and closes it."""

    def __init__(self, site: Site) -> None:
        self._environment = os.environ | {"SLURM_CONF": site.shell("echo $SLURM_CONF").strip()}

    def set(self, state: str) -> None:
        words = ["scontrol", "update", "partitionname=boost", f"state={state}"]
        subprocess.run(words, env=self._environment, check=True)


def bind(sites: Sequence[Site], python: Path, data: Path, job: dict[str, Any], **more: str) -> Path:
    """Compose the StreamFlow file of a federation of the testbed's sites, as a user would.

    There is no MPI in the testbed, and so no line of a job script that starts it.
    """
    folder = data.parent
    (folder / "job.json").write_text(json.dumps(job))
    words = ["bind", "--job", "job.json", "-o", "federation.yml"]
    for site in sites:
        kind = "slurm" if site.scheduler == "slurm" else "pbs"
        words += ["--facility", f"{site.name}={kind}"]
        settings = site.settings(python, (data / site.name).resolve())
        if kind == "slurm":
            settings |= more
            if "container" in more:
                del settings["venv"]
        words += [w for k, v in settings.items() for w in ("--set", f"{site.name}.{k}={v}")]
    subprocess.run([sys.executable, "-m", "crossfl", *words], cwd=folder, check=True)
    for script in (folder / "federation.d").glob("*.sh"):
        lines = script.read_text().splitlines(keepends=True)
        script.write_text("".join(line for line in lines if "mpiexec" not in line))
    return folder / "federation.yml"


def follow(path: Path, seconds: int) -> None:
    """Have a federation keep a journal beside its StreamFlow file, and ask schedulers so often."""
    document = yaml.safe_load(path.read_text())
    document["deployments"]["vm"]["config"]["journal"] = "journal"
    for deployment in document["deployments"].values():
        if "pollingInterval" in deployment.get("config", {}):
            deployment["config"]["pollingInterval"] = seconds
    path.write_text(yaml.safe_dump(document))


def job_of(sites: Sequence[Site], **more: Any) -> dict[str, Any]:
    return {
        "config": {"class": "File", "path": str(CWL / "config.json")},
        "tokenizer": "bytes",
        "facilities": [{"name": site.name, "dataset": "words"} for site in sites],
        "rounds": 3,
        "local_steps": 3,
        "training": {"batch_size": 4, "sequence_length": 48, "threads": 1, "max_new_tokens": 4},
        "aggregation": {"server_optimizer": "diloco"},
        "prompts": ["it 3="],
    } | more
