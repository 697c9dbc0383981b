"""The testbed, its sites, and the engine to run against them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import Engine
from tests.support.paths import ROOT
from tests.support.testbed import Partition, Site, real_pbs

TESTBED = ROOT / "environments" / "testbed" / "testbed.py"
SETUP_SECONDS = 900


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
    locks = [ROOT / "requirements.lock", ROOT / "torch.lock"]
    pins = b"".join(lock.read_bytes() for lock in locks)
    ready = folder / f"ready-{hashlib.sha256(pins).hexdigest()[:16]}"
    if not ready.exists():
        subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", folder], check=True)
        install = [sys.executable, "-m", "pip", "--quiet", "--python", folder / "bin" / "python"]
        install += ["install", "--disable-pip-version-check"]
        for lock, more in zip(locks, (["--no-deps"], []), strict=True):
            subprocess.run([*install, *more, "-r", lock], check=True, timeout=SETUP_SECONDS)
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
    changed: dict[Path, str] = {}

    def place(site: Site, name: str, script: str) -> None:
        if "home" not in site.facts:
            pytest.skip("faults are injected only where the home of the site's user is here")
        home = Path(site.facts["home"])
        (home / "bin").mkdir(exist_ok=True)
        start = home / ".bashrc"
        if not site.emulated and site.scheduler == "pbs" and start not in changed:
            # The testbed's sshd puts `bin` first; at a real site the shell has to.
            changed[start] = start.read_text() if start.exists() else ""
            start.write_text(f'PATH="$HOME/bin:$PATH"\n{changed[start]}')
        path = home / "bin" / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
        placed.append(path)

    yield place
    for path in placed:
        path.unlink(missing_ok=True)
    for path, text in changed.items():
        path.write_text(text)


@pytest.fixture
def partition(alpha: Site) -> Iterator[Partition]:
    """The partition of alpha, which is open again at the end."""
    partition = Partition(alpha)
    yield partition
    partition.set("UP")
