"""What the engine asks of a site before a job, and when the site is asked in truth."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from streamflow.core.deployment import ExecutionLocation

from crossfl.engine.connectors.deferred import AwayError
from crossfl.engine.connectors.turns import Turns
from crossfl.engine.recovery.closing import LateError, Turn
from crossfl.engine.recovery.policy import FacilityJob, HopelessError, RecoveryPolicy
from crossfl.protocol.manifest import ModelManifest
from crossfl.storage import manifest
from tests.support.login import Login

SLURM = {
    "sbatch": "sed -n '/^exec/,$p' > /dev/null; sh ~/turns/*/job > ~/said 2>&1; echo 7",
    "squeue": "true",
    "scontrol": "echo 'JobId=7 JobState=COMPLETED ExitCode=0:0'",
}
"""Commands of a cluster that starts a job at once, and ends it."""


class Site(Login):
    """A login node that counts what is sent to it, and that may be away."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.commands: list[str] = []
        self.sent: list[str] = []
        self.line = asyncio.Event()
        self.line.set()
        self.is_away = False

    async def run(
        self, location: ExecutionLocation, command: MutableSequence[str], *args: Any, **more: Any
    ) -> tuple[str, int]:
        self.commands.append(" ".join(command))
        return await super().run(location, command, *args, **more)

    async def copy_local_to_remote(
        self,
        src: str,
        dst: str,
        locations: MutableSequence[ExecutionLocation],
        read_only: bool = False,
    ) -> None:
        self.sent.append(dst)
        await self.line.wait()
        shutil.copytree(src, dst)

    async def probe(self) -> None:
        if self.is_away:
            raise OSError("connection refused")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "home").mkdir()
    return Site(tmp_path / "home")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    manifest.write(folder, ModelManifest(round=0))
    return folder


def queue(site: Site) -> tuple[Turns, ExecutionLocation]:
    connector, location = site.queue("slurm")
    assert isinstance(connector, Turns)
    return connector, location


async def ask(connector: Turns, location: ExecutionLocation, *words: str) -> tuple[str, int]:
    answer = await connector.run(location, list(words), capture_output=True)
    assert answer is not None
    return answer


async def test_the_engine_is_answered_without_the_site(site: Site) -> None:
    connector, location = queue(site)
    folder = f"{site.home}/{uuid4()}"
    assert await ask(connector, location, "mkdir", "-m", "777", "-p", folder) == ("", 0)
    words = ["test", "-e", folder, "&&", "readlink", "-f", folder]
    assert await ask(connector, location, *words) == (folder, 0)
    assert await ask(connector, location, "test", "-d", folder) == ("", 0)
    assert await ask(connector, location, "test", "-d", f"{folder}/model") == ("", 1)
    assert await ask(connector, location, "test", "-L", folder) == ("", 1)
    assert site.commands == []
    assert not Path(folder).exists()
    await connector.begin(location, "/train/0", Path(folder).parent)  # type: ignore[arg-type]
    assert Path(folder).is_dir()
    assert (await ask(connector, location, "test", "-d", folder))[1] == 0
    assert site.commands[-1].endswith(f"test -d {folder}"), "now the site is asked"


async def test_a_command_about_a_folder_finds_it(site: Site) -> None:
    connector, location = queue(site)
    folder = f"{site.home}/{uuid4()}"
    await ask(connector, location, "mkdir", "-m", "777", "-p", folder)
    assert (await ask(connector, location, "echo", "1", ">", f"{folder}/file"))[1] == 0
    assert Path(folder, "file").read_text() == "1\n"


async def test_a_folder_that_nobody_needs_any_more_is_not_made(site: Site) -> None:
    connector, location = queue(site)
    kept, dropped = (f"{site.home}/{uuid4()}" for _ in range(2))
    for folder in (kept, dropped, f"{dropped}/{uuid4()}"):
        await ask(connector, location, "mkdir", "-m", "777", "-p", folder)
    connector.forget([dropped])
    await connector.begin(location, "/train/0", site.home)  # type: ignore[arg-type]
    assert Path(kept).is_dir()
    assert not Path(dropped).exists()


async def test_no_attempt_is_spent_on_a_site_that_is_still_away(
    site: Site, policy: RecoveryPolicy
) -> None:
    connector, location = queue(site)
    policy.note_task(FacilityJob(name="/train/1", facility="site", attempts=3))
    site.is_away = True
    await connector.begin(location, "/train/1", site.home)  # type: ignore[arg-type]
    policy.fail(FacilityJob(name="/train/0", facility="site"), OSError("connection lost"))
    with pytest.raises(AwayError, match="connection refused") as caught:
        await connector.begin(location, "/train/1", site.home)  # type: ignore[arg-type]
    assert isinstance(caught.value, HopelessError)


async def promise(
    connector: Turns, location: ExecutionLocation, site: Site, model: Path, workdir: str
) -> str:
    """Ask for a model as the engine does for a job; where the job looks for it."""
    inputs = f"{site.home}/{uuid4()}"
    for folder in (workdir, inputs):
        await ask(connector, location, "mkdir", "-m", "777", "-p", folder)
    await connector.copy_local_to_remote(str(model), f"{inputs}/model", [location], read_only=True)
    return f"{inputs}/model"


async def test_a_second_attempt_sends_no_model(site: Site, model: Path) -> None:
    connector, location = queue(site)
    first = await promise(connector, location, site, model, f"{site.home}/{uuid4()}")
    assert site.sent == []
    await connector.begin(location, "/train/0", site.home)  # type: ignore[arg-type]
    second = f"{site.home}/{uuid4()}/model"
    # The engine knows of the first copy, and would link to it.
    await connector.copy_remote_to_remote(first, second, [location], location, read_only=True)
    await connector.begin(location, "/train/0", site.home)  # type: ignore[arg-type]
    assert len(site.sent) == 1
    for path in (first, second):
        manifest.verify(Path(path), ModelManifest)


async def train(
    connector: Turns,
    location: ExecutionLocation,
    site: Site,
    policy: RecoveryPolicy,
    model: Path,
    round_: int,
) -> tuple[Path, asyncio.Task[Any]]:
    """Begin a round whose other facility has delivered already; the outputs of this one."""
    turns = {
        name: Turn(federation="f", facility=name, round=round_, closes="first")
        for name in ("site", "other")
    }
    for name, turn in turns.items():
        policy.note_task(FacilityJob(name=f"/{name}/0.{round_}", facility=name, turn=turn))
    workdir = f"{site.home}/{uuid4()}"
    path = await promise(connector, location, site, model, workdir)
    command = ["cp", f"{path}/manifest.json", "made"]
    more = {"job_name": f"/site/0.{round_}", "workdir": workdir, "capture_output": True}
    return Path(workdir), asyncio.create_task(connector.run(location, command, **more))


async def test_an_upload_outlives_its_round_and_is_sent_once(
    site: Site, model: Path, policy: RecoveryPolicy
) -> None:
    for name, script in SLURM.items():
        site.script(name, script)
    connector, location = queue(site)
    site.line.clear()
    _, job = await train(connector, location, site, policy, model, 1)
    while not site.sent:
        await asyncio.sleep(0.01)
    policy.rounds.deliver(Turn(federation="f", facility="other", round=1, closes="first"))
    with pytest.raises(LateError, match="still being sent"):
        await job
    outputs, job = await train(connector, location, site, policy, model, 2)
    await asyncio.sleep(0.1)
    assert not job.done()
    site.line.set()
    assert await job == ("", 0)
    assert len(site.sent) == 1
    assert (outputs / "made").read_text() == (model / "manifest.json").read_text()
    assert len(site.calls("sbatch")) == 1
