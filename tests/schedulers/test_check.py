"""`crossfl check` against real sshd and Slurm: all is well, and each fault with its remedy."""

from __future__ import annotations

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

import pytest
import yaml

from tests.support.paths import DATA, ROOT
from tests.support.testbed import Site, bind, job_of, place_data

SECONDS = 60
"""For a check without a job, whatever is wrong."""
Settings = dict[str, str]
Rows = dict[tuple[str, str], dict[str, str]]


class Checks:
    """`crossfl check` on a federation of the testbed's sites."""

    def __init__(self, sites: list[Site], python: Path, folder: Path) -> None:
        data = folder / "data"
        data.mkdir()
        for site in sites:
            (data / site.name).symlink_to(place_data(site, DATA / "leonardo" / "words"))
        self.path = bind(sites, python, data, job_of(sites))

    def script(self, site: Site) -> Path:
        return self.path.with_suffix(".d") / f"{site.name}.sh"

    def replace(self, site: Site, old: str, new: str) -> None:
        """Put something else into the job script, as a wrong setting would."""
        text = self.script(site).read_text()
        assert old in text
        self.script(site).write_text(text.replace(old, new))

    def deployment(self, name: str, **changes: Any) -> None:
        document = yaml.safe_load(self.path.read_text())
        document["deployments"][name]["config"] |= changes
        self.path.write_text(yaml.safe_dump(document))

    def workdir(self, name: str, folder: str) -> None:
        document = yaml.safe_load(self.path.read_text())
        document["deployments"][name]["workdir"] = folder
        self.path.write_text(yaml.safe_dump(document))

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "crossfl", "check", str(self.path), *words]

    def run(self, *words: str, seconds: float = SECONDS) -> tuple[int, Rows]:
        command = self.command("--format", "json", "--room", "0.01", *words)
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        assert not done.stderr, done.stderr
        results = json.loads(done.stdout)["results"]
        return done.returncode, {(row["facility"], row["check"]): row for row in results}


@pytest.fixture
def at_alpha(alpha: Site, python: Path, tmp_path: Path) -> Checks:
    return Checks([alpha], python, tmp_path)


@pytest.fixture
def at_gamma(gamma: Site, python: Path, tmp_path: Path) -> Checks:
    if "home" not in gamma.facts:
        pytest.skip("the data is placed only where the home of the site's user is here")
    return Checks([gamma], python, tmp_path)


def test_all_is_well(sites: dict[str, Site], python: Path, tmp_path: Path) -> None:
    if "home" not in sites["gamma"].facts:
        pytest.skip("the data is placed only where the home of the site's user is here")
    status, rows = Checks(list(sites.values()), python, tmp_path).run()
    assert status == 0, rows
    assert {row["status"] for row in rows.values()} == {"pass"}
    everywhere = {"settings", "job script", "shellcheck", "host key", "login", "clock"}
    everywhere |= {"work folder", "environment", "dataset words", "bandwidth", "scheduler"}
    everywhere |= {"job history", "submission"}
    for name in sites:
        assert {check for facility, check in rows if facility == name} == everywhere


@pytest.mark.parametrize("name", ["alpha", "gamma"])
def test_a_job_is_run(name: str, request: pytest.FixtureRequest) -> None:
    checks: Checks = request.getfixturevalue(f"at_{name}")
    status, rows = checks.run("--submit", "--facility", name, seconds=120)
    assert status == 0, rows
    assert rows[name, "test job"]["result"].startswith("ran on ")


FAULTS: dict[str, tuple[Callable[[Checks, Site], object], str, str, str]] = {
    "partition": (
        lambda checks, site: checks.replace(site, "--partition=boost", "--partition=bogus"),
        "submission",
        "Invalid partition name",
        "crossfl bind --set alpha.partition=",
    ),
    "account": (
        lambda checks, site: checks.replace(site, "--account=crossfl", "--account=bogus"),
        "submission",
        "Invalid account",
        "crossfl bind --set alpha.account=",
    ),
    "dataset": (
        lambda checks, site: shutil.rmtree(Path(site.facts["home"]) / "data" / "words"),
        "dataset words",
        "/words is not there",
        "crossfl bind --set alpha.data=",
    ),
    "work folder": (
        lambda checks, site: checks.workdir("alpha", "/usr/crossfl"),
        "work folder",
        "Permission denied",
        "crossfl bind --set alpha.workdir=",
    ),
    "venv": (
        lambda checks, site: checks.replace(site, "/bin/activate", "/bin/deactivate"),
        "environment",
        "No such file or directory",
        "see ",
    ),
    "history": (
        lambda checks, site: checks.deployment("alpha", pollingInterval=200),
        "job history",
        "the controller forgets a job after 300 s",
        "lower `pollingInterval`",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str, alpha: Site, at_alpha: Checks) -> None:
    spoil, check, words, fix = FAULTS[fault]
    spoil(at_alpha, alpha)
    status, rows = at_alpha.run()
    assert status == 1
    row = rows["alpha", check]
    assert row["status"] == "fail", row
    assert words in row["result"] and row["fix"].startswith(fix), row
    assert [key for key, row in rows.items() if row["status"] == "fail"] == [("alpha", check)]


def test_another_version(alpha: Site, at_alpha: Checks, tmp_path: Path) -> None:
    venv = Path(alpha.facts["home"]) / "other-version"
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", venv], check=True)
    packages = next(venv.glob("lib/python*/site-packages"))
    for name, version in (("crossfl", "99.0"), ("torch", "2.13.0"), ("transformers", "5.0.0")):
        folder = packages / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    at_alpha.replace(alpha, str(Path(alpha.facts["home"]).parents[1] / "python"), str(venv))
    try:
        status, rows = at_alpha.run()
    finally:
        shutil.rmtree(venv)
    assert status == 1
    row = rows["alpha", "environment"]
    assert row["status"] == "fail" and "crossfl 99.0" in row["result"]
    assert row["fix"] == "install our version of crossfl there"


LOGINS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "wrong host key": ({"knownHosts": "wrong"}, "host key", "WRONG HOST KEY", "ask the site"),
    "unknown host": ({"knownHosts": "absent"}, "host key", "unknown host", "ssh-keyscan"),
    "unreachable": ({"nodes": ["127.0.0.1:1"]}, "login", "connection refused", "check `nodes`"),
    "no such name": ({"nodes": ["nowhere.invalid"]}, "login", "its name is not found", "`nodes`"),
    "no answer": ({"nodes": ["192.0.2.1"]}, "login", "", ""),  # for documents: nobody is there
    "refused key": ({"username": "nobody"}, "login", "login refused", "`username`"),
}


@pytest.mark.parametrize("fault", LOGINS)
def test_logins(fault: str, alpha: Site, at_alpha: Checks, tmp_path: Path) -> None:
    changes, check, words, fix = LOGINS[fault]
    key = tmp_path / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    host, _, port = alpha.facts["hostname"].partition(":")
    public = " ".join(key.with_suffix(".pub").read_text().split()[:2])
    (tmp_path / "wrong").write_text(f"[{host}]:{port} {public}\n")
    at_alpha.deployment("alpha-login", **changes)
    begun = time.monotonic()
    status, rows = at_alpha.run()
    assert time.monotonic() - begun < SECONDS
    assert status == 1
    row = rows["alpha", check]
    assert row["status"] == "fail"
    assert words in row["result"] and fix in row["fix"], row
    assert rows["alpha", "remaining checks"]["status"] == "skip"
    assert rows["vm", "environment"]["status"] == "pass"


def test_no_scheduler(at_alpha: Checks) -> None:
    document = yaml.safe_load(at_alpha.path.read_text())
    document["deployments"]["alpha"]["type"] = "crossfl.pbs"
    at_alpha.path.write_text(yaml.safe_dump(document))
    status, rows = at_alpha.run("--submit")
    assert status == 1
    row = rows["alpha", "scheduler"]
    assert row["status"] == "fail" and "no qsub, qstat, qdel in the PATH" in row["result"]
    assert "~/.bashrc" in row["fix"]
    assert rows["alpha", "remaining checks"]["status"] == "skip"


@pytest.mark.parametrize("fault", ["queue", "account", "history", "launcher"])
def test_pbs(fault: str, gamma: Site, at_gamma: Checks) -> None:
    if fault in ("account", "history") and not gamma.emulated:
        pytest.skip("a real server takes any account that no hook refuses, and keeps its history")
    flag = Path(gamma.facts["home"]) / ".pbs" / "no-history"
    words: tuple[str, ...] = ("--submit", "--facility", "gamma")
    if fault == "queue":
        at_gamma.replace(gamma, f"#PBS -q {gamma.facts['partition']}", "#PBS -q bogus")
        check, message, words = "submission", "Unknown queue", ()
    elif fault == "account":
        at_gamma.replace(gamma, "#PBS -A crossfl", "#PBS -A bogus")
        check, message = "test job", "account bogus is not one of yours"
    elif fault == "launcher":
        at_gamma.replace(gamma, "export OMP", "export CROSSFL_LAUNCHER=mpiexec OMP")
        check, message = "test job", "no mpiexec in the PATH of the job"
    else:
        flag.parent.mkdir(exist_ok=True)
        flag.touch()
        check, message, words = "job history", "keeps no job history", ()
    try:
        status, rows = at_gamma.run(*words, seconds=120)
    finally:
        flag.unlink(missing_ok=True)
    assert status == 1
    row = rows["gamma", check]
    assert row["status"] == "fail" and message in row["result"] and row["fix"], row


def test_the_wait_has_an_end(alpha: Site, at_alpha: Checks) -> None:
    at_alpha.replace(alpha, "--partition=boost", "--partition=closed")
    status, rows = at_alpha.run("--submit", "--wait", "5", "--facility", "alpha")
    assert status == 1
    row = rows["alpha", "test job"]
    assert row["status"] == "fail" and "not over within 5 s, and cancelled" in row["result"]
    alpha.wait_for_jobs(0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_job(number: int, alpha: Site, at_alpha: Checks) -> None:
    at_alpha.replace(alpha, "--partition=boost", "--partition=closed")
    process = subprocess.Popen(
        at_alpha.command("--submit", "--facility", "alpha"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    alpha.wait_for_jobs(1)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number and said.count(b"\n") == 1
    assert b"interrupted" in said and b"ended the jobs at alpha (Slurm " in said
    alpha.wait_for_jobs(0)


def test_shellcheck_is_here() -> None:
    """Offline checks skip it where it is not installed; here they do not."""
    assert shutil.which("shellcheck"), "run environments/testbed/install.sh"
    tests = ROOT / "tests" / "sites" / "test_environments.py"
    command = [sys.executable, "-m", "pytest", "-q", "-k", "passes_the_check", str(tests)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
