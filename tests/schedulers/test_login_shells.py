"""A site works the same whatever its users' login shell is, and whatever that prints."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.schedulers.test_check import Checks
from tests.support.engine import Engine
from tests.support.testbed import Site, ssh

GREETING = "Welcome! Maintenance on Monday. crossfl: output begins soon"
START_UP = {
    "bash": (".bashrc", f"echo '{GREETING}'\necho 'a warning' >&2\numask 000\n"),
    "tcsh": (".cshrc", f"echo '{GREETING}'\nsh -c 'echo a warning >&2'\nset echo\numask 000\n"),
    "fish": (".config/fish/config.fish", f"echo '{GREETING}'\necho 'a warning' >&2\numask 000\n"),
}


@pytest.fixture(params=START_UP)
def greeting(request: pytest.FixtureRequest, alpha: Site) -> Iterator[Site]:
    """Alpha, whose user has another login shell, which greets and warns before every command."""
    shell = shutil.which(request.param)
    if shell is None:
        pytest.skip(f"{request.param} is not installed; run environments/testbed/install.sh")
    name, text = START_UP[request.param]
    user, home = alpha.facts["username"], Path(alpha.facts["home"])
    start_up = home / name
    kept = start_up.read_text() if start_up.exists() else None
    start_up.parent.mkdir(parents=True, exist_ok=True)
    start_up.write_text(text + (kept or ""))
    subprocess.run(["chown", "-R", user, home / name.partition("/")[0]], check=True)
    subprocess.run(["usermod", "--shell", shell, user], check=True)
    yield alpha
    subprocess.run(["usermod", "--shell", "/bin/bash", user], check=True)
    if kept is None:
        start_up.unlink()
    else:
        start_up.write_text(kept)


async def test_every_kind_of_command(greeting: Site, tmp_path: Path) -> None:
    assert GREETING in greeting.shell("true")
    wire = ssh(greeting)
    try:
        (place,) = (await wire.get_available_locations()).values()
        assert place.hardware is not None and place.hardware.cores == os.cpu_count()
        location = place.location
        command = ["echo 'one\ntwo!' >&2; exit 3"]
        for _ in range(2):  # a new shell, and one that is there already
            assert await wire.run(location, command, capture_output=True) == ("one\ntwo!", 3)
        answer = await wire.run(location, ["cat"], stdin="/dev/null", capture_output=True)
        assert answer == ("", 0)
        sent = tmp_path / "sent"
        sent.mkdir()
        (sent / "data").write_bytes(os.urandom(300_000))
        far = f"{greeting.facts['workdir']}/shells"
        await wire.run(location, ["rm", "-rf", far])
        await wire.copy_local_to_remote(str(sent), far, [location])
        await wire.copy_remote_to_local(far, str(tmp_path / "back"), location)
        assert (tmp_path / "back" / "data").read_bytes() == (sent / "data").read_bytes()
    finally:
        await wire.undeploy(external=False)


@pytest.mark.parametrize("way", ["login", "queue"])
def test_a_job(greeting: Site, way: str, engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("words\n")
    (tmp_path / "job.sh").write_text(
        "#!/bin/bash -l\nx=(one two)\n[[ ${x[1]} = two ]] || exit 9\n{{streamflow_command}}\n"
    )
    script = str(tmp_path / "job.sh")
    service = script if way == "login" else {"file": script}
    names = {"login": f"{greeting.name}-login", "queue": greeting.name}
    deployments = {names["login"]: greeting.login(), names["queue"]: greeting.queue()}
    deployments[names[way]]["config"]["services"] = {"train": service}
    done = engine.run(
        "private.cwl",
        {"words": {"class": "File", "path": str(tmp_path / "words")}},
        deployments,
        {"deployment": names[way], "service": "train"},
    )
    assert done.code == 0, done.log
    assert (engine.outdir / "box" / "copy").read_text() == "words\n"
    assert int((engine.outdir / "box" / "umask").read_text(), 8) == 0o077


def test_the_check(greeting: Site, python: Path, tmp_path: Path) -> None:
    status, rows = Checks([greeting], python, tmp_path).run()
    assert status == 0, rows


def test_a_login_shell_that_runs_nothing(alpha: Site, engine: Engine) -> None:
    subprocess.run(["usermod", "--shell", "/usr/sbin/nologin", alpha.facts["username"]], check=True)
    try:
        done = engine.run_at(alpha, "true")
    finally:
        subprocess.run(["usermod", "--shell", "/bin/bash", alpha.facts["username"]], check=True)
    assert done.code != 0
    assert "Deployment alpha-login, host " in done.log
    assert "the login shell there ran no command: This account is currently not" in done.log
