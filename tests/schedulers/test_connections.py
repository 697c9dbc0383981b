"""What is wrong with a login or a submission is said at once, with the deployment's name."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from streamflow.core.exception import WorkflowExecutionException

from crossfl.engine.connectors.ssh import SSHConnector
from tests.support.engine import Engine
from tests.support.testbed import Site

SECONDS = 30


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A key that nobody knows."""
    key = tmp_path / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    return key


def faults(alpha: Site, tmp_path: Path, stranger: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """For each fault, what makes it in the login's deployment, and words of its message."""
    hostname = alpha.facts["hostname"]
    wrong = tmp_path / "wrong_hosts"
    public = " ".join(stranger.with_suffix(".pub").read_text().split()[:2])
    host, _, port = hostname.partition(":")
    wrong.write_text(f"[{host}]:{port} {public}\n")
    empty = tmp_path / "no_hosts"
    empty.write_text("")
    garbage = tmp_path / "garbage"
    garbage.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nnonsense\n")
    locked = tmp_path / "locked"
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(locked)], check=True
    )
    return {
        "wrong host key": ({"knownHosts": str(wrong)}, "WRONG HOST KEY"),
        "unknown host": ({"knownHosts": str(empty)}, "unknown host, no key of it in"),
        "no known hosts": ({"knownHosts": "absent"}, "unknown host, no key of it in"),
        "no such name": ({"nodes": ["nowhere.invalid:22"]}, "its name is not found"),
        "missing key": ({"sshKey": str(tmp_path / "absent")}, "cannot be read"),
        "garbled key": ({"sshKey": str(garbage)}, "cannot be read"),
        "locked key": ({"sshKey": str(locked)}, "cannot be read"),
        "refused key": ({"sshKey": str(stranger)}, "login refused for user"),
        "refused connection": ({"nodes": ["127.0.0.1:1"]}, "connection refused"),
    }


FAULTS = (
    "wrong host key",
    "unknown host",
    "no known hosts",
    "no such name",
    "missing key",
    "garbled key",
    "locked key",
    "refused key",
    "refused connection",
)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("workflow", ["one", "loop"])
def test_login(
    alpha: Site, engine: Engine, tmp_path: Path, stranger: Path, fault: str, workflow: str
) -> None:
    changes, words = faults(alpha, tmp_path, stranger)[fault]
    if workflow == "one":
        done = engine.run_at(alpha, "true", login=changes, seconds=SECONDS)
    else:
        done = engine.run_in_rounds(alpha, ["true", "true"], login=changes, seconds=SECONDS)
    assert done.code != 0
    assert words in done.log
    assert "Deployment alpha-login, host " in done.log


def test_a_login_through_another_host(sites: dict[str, Site], engine: Engine) -> None:
    gate, beta = sites["alpha"].facts, sites["beta"]
    jump = {"proxyJump": f"{gate['username']}@{gate['hostname']}"}
    done = engine.run_at(beta, "echo done", beta.walltime(60), login=jump)
    assert done.code == 0, done.log
    assert Path(done.outputs["said"]["path"]).read_text() == "done\n"
    nowhere = {"proxyJump": f"{gate['username']}@127.0.0.1:1"}
    done = engine.run_at(beta, "true", login=nowhere, seconds=SECONDS)
    assert done.code != 0
    assert "host 127.0.0.1:1: connection refused" in done.log


SUBMISSIONS = {
    "partition": ("Invalid partition name", "Unknown queue"),
    "account": ("Invalid account", "account bogus is not one of yours"),
}


@pytest.mark.parametrize("what", SUBMISSIONS)
@pytest.mark.parametrize("workflow", ["one", "loop"])
def test_submission(site: Site, engine: Engine, what: str, workflow: str) -> None:
    if site.scheduler == "slurm":
        service, words = {what: "bogus"}, SUBMISSIONS[what][0]
    elif what == "account" and not site.emulated:
        pytest.skip("a real server takes any account that no hook of its site refuses")
    else:
        service = {"destination" if what == "partition" else what: "bogus"}
        words = SUBMISSIONS[what][1]
    if workflow == "one":
        done = engine.run_at(site, "true", service, seconds=SECONDS)
    else:
        done = engine.run_in_rounds(site, ["true", "true"], service, seconds=SECONDS)
    assert done.code != 0
    assert f"Deployment {site.name}: " in done.log and words in done.log


def test_a_failure_among_others_in_a_loop_ends_the_run(alpha: Site, engine: Engine) -> None:
    done = engine.run_in_rounds(alpha, ["sleep 1; exit 3", "sleep 300"], seconds=SECONDS)
    assert done.code != 0
    assert "ended in FAILED (exit code 3)" in done.log
    alpha.wait_for_jobs(0)


def test_interrupted_in_a_loop(alpha: Site, engine: Engine) -> None:
    process = engine.start_in_rounds(alpha, ["sleep 300", "sleep 301"])
    alpha.wait_for_jobs(2)
    process.send_signal(signal.SIGTERM)
    assert engine.wait(process, time.monotonic(), seconds=SECONDS).code != 0
    alpha.wait_for_jobs(0)


def test_a_connection_lost_during_a_submission(
    site: Site, engine: Engine, shim: Callable[[Site, str, str], None]
) -> None:
    """The engine gives the command anew; the job is submitted once."""
    command = "sbatch" if site.scheduler == "slurm" else "qsub"
    real = f"$(type -ap {command} | sed -n 2p)"
    shim(site, command, f'echo "$$" >> ~/submissions; sleep 5; exec {real} "$@"')
    home = Path(site.facts["home"])
    submissions = home / "submissions"
    submissions.unlink(missing_ok=True)
    before = set(home.glob(".crossfl-submission-*"))
    process = engine.start_at(site, "echo done")
    deadline = time.monotonic() + SECONDS
    while not submissions.exists():
        assert time.monotonic() < deadline, engine.log()
        time.sleep(0.1)
    for each in psutil.process_iter(["name", "username"]):
        if each.info == {"name": "sshd", "username": site.facts["username"]}:
            each.kill()
    outcome = engine.wait(process, time.monotonic())
    assert outcome.code == 0, outcome.log
    assert len(submissions.read_text().split()) == 1
    assert set(home.glob(".crossfl-submission-*")) <= before


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_a_host_that_comes_back(alpha: Site, testbed: dict[str, Any], tmp_path: Path) -> None:
    """It is down for longer than the engine would try, and used again in the same run."""
    port = free_port()
    state = Path(testbed["state"]) / "alpha"
    config = (state / "sshd_config").read_text()
    (tmp_path / "sshd_config").write_text(
        re.sub(r"^Port .*$", f"Port {port}", config, flags=re.MULTILINE)
    )
    public = " ".join((state / "ssh_host_ed25519_key.pub").read_text().split()[:2])
    (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {public}\n")

    def start() -> subprocess.Popen[bytes]:
        daemon = subprocess.Popen(
            ["/usr/sbin/sshd", "-D", "-f", str(tmp_path / "sshd_config")], start_new_session=True
        )
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        return daemon

    def stop(daemon: subprocess.Popen[bytes]) -> None:
        for child in psutil.Process(daemon.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        daemon.kill()
        daemon.wait()

    connector = SSHConnector(
        deployment_name="alpha-login",
        config_dir=str(tmp_path),
        nodes=[f"127.0.0.1:{port}"],
        username=alpha.facts["username"],
        sshKey=alpha.facts["ssh_key"],
        knownHosts="known",
        retries=2,
        retryDelay=0,
    )
    daemon = start()
    try:
        location = next(iter((await connector.get_available_locations()).values())).location
        said = await connector.run(location, ["echo", "one"], capture_output=True)
        assert said == ("one", 0)
        stop(daemon)
        for _ in range(3):
            with pytest.raises(WorkflowExecutionException, match="Deployment alpha-login, host"):
                await connector.run(location, ["echo", "two"], capture_output=True)
        daemon = start()
        said = await connector.run(location, ["echo", "three"], capture_output=True)
        assert said == ("three", 0)
    finally:
        await connector.undeploy(external=False)
        stop(daemon)
