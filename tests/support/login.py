"""A login node that is a folder of this machine: its schedulers are scripts in `bin`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any

from cachebox import TTLCache
from streamflow.core.deployment import ExecutionLocation

from crossfl.engine.connectors.pbs import PBSConnector
from crossfl.engine.connectors.queue import QueueConnector
from crossfl.engine.connectors.slurm import SlurmConnector


class Login:
    """Runs commands in a shell, as the connector of a login node does.

    Args:
        home: the home folder of the site's user.
    """

    deployment_name = "login"

    def __init__(self, home: Path) -> None:
        self.home = home
        (home / "bin").mkdir()

    def script(self, name: str, text: str) -> None:
        """Make a command; each call of it is noted in `calls` of the home folder."""
        path = self.home / "bin" / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {self.home}/calls\n{text}\n')
        path.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        """The arguments of each call of a command so far."""
        path = self.home / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]

    async def run(
        self, location: ExecutionLocation, command: MutableSequence[str], *_: Any, **__: Any
    ) -> tuple[str, int]:
        """What a command prints, errors too, and its status."""
        process = await asyncio.create_subprocess_shell(
            " ".join(command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=self.home,
            env={"PATH": f"{self.home}/bin:{os.environ['PATH']}", "HOME": str(self.home)},
        )
        output = (await process.communicate())[0]
        return output.decode(errors="replace").strip(), process.returncode or 0

    def queue(self, scheduler: str, **settings: Any) -> tuple[QueueConnector, ExecutionLocation]:
        """A connector of its scheduler that asks every few milliseconds, and where it runs jobs."""
        kind = {"pbs": PBSConnector, "slurm": SlurmConnector}[scheduler]
        connector = kind("site", str(self.home), self, None, maxConcurrentJobs=2, **settings)
        connector.pollingInterval = 0.01
        connector._jobs_cache = TTLCache(maxsize=1, global_ttl=0.001)
        inner = ExecutionLocation(name="login", deployment="login", local=False)
        return connector, ExecutionLocation(name="queue", deployment="site", wraps=inner)

    async def job(self, connector: QueueConnector, location: ExecutionLocation, **more: Any) -> Any:
        """Run a job; what it printed, and its exit code."""
        settings = {"workdir": str(self.home), "job_name": "/train/0", "capture_output": True}
        return await connector.run(location, ["true"], **settings | more)
