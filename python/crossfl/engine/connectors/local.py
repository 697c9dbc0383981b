"""The connector `crossfl.local`: a facility, or the aggregation VM, on the engine's machine."""

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import MutableMapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, ClassVar

import psutil
from streamflow.core.exception import WorkflowDefinitionException
from streamflow.core.scheduling import AvailableLocation
from streamflow.deployment.connector.local import LocalConnector as EngineLocalConnector
from streamflow.log_handler import logger

from crossfl.engine.connectors.stand_in import StandsIn
from crossfl.engine.forkserver.process import ForkServer, search_path
from crossfl.engine.interruption import INTERRUPTION
from crossfl.engine.private import UMASK
from crossfl.engine.transfer import SafeCopies
from crossfl.errors import CrossFLError
from crossfl.observe.events import Progress
from crossfl.observe.follow import Follower
from crossfl.protocol import events, variables
from crossfl.storage.locks import acquire


class LocalConnector(SafeCopies, EngineLocalConnector):
    """The engine's; it follows no link that leads out, and makes folders for its user alone."""

    async def deploy(self, external: bool) -> None:
        """Give the engine, which makes the folders itself, and so its steps, our umask."""
        os.umask(UMASK)
        await super().deploy(external)

    @classmethod
    def get_schema(cls) -> str:
        """The JSON Schema of its configuration."""
        return files("crossfl.engine").joinpath("schemas", "base", "local.json").read_text("utf-8")


class FacilityLocalConnector(StandsIn, LocalConnector):
    """Runs steps here, telling them which facility this is and where its data lies.

    It also shows the progress of the steps of all such deployments, in place of the engine's own
    account of its work; `streamflow run --debug` brings that back.
    """

    _follower: ClassVar[Follower | None] = None
    _progress: ClassVar[int]
    _deployed: ClassVar[int] = 0

    def __init__(
        self,
        deployment_name: str,
        config_dir: str,
        facility: str | None = None,
        data: str | None = None,
        models: str | None = None,
        state: str | None = None,
        journal: str | None = None,
        prompts: bool = True,
        min_validation_samples: int | None = None,
        min_validation_tokens: int | None = None,
        hook: str | None = None,
        **config: Any,
    ) -> None:
        super().__init__(deployment_name, config_dir, **config)
        self._hook = hook
        self._lock: IO[str] | None = None
        # Set even where there is nothing to say: the engine's own environment is no answer.
        self._environment = {
            variables.FACILITY: facility or "",
            variables.DATA: _path(data, config_dir),
            variables.STATE: _path(state, config_dir),
            variables.JOURNAL: "" if facility else _journal(journal, config_dir),
            variables.PROMPTS: "1" if facility and prompts else "",
            variables.ENGINE: str(os.getpid()),
            variables.DEPLOYMENT: deployment_name,
            "PATH": search_path(),
        }
        # Not set where there is nothing to say: a floor of this machine is not to be lowered, and
        # its base models may be named for all facilities at once.
        own = {
            variables.MODELS: _path(models, config_dir),
            variables.MIN_VALIDATION_SAMPLES: min_validation_samples,
            variables.MIN_VALIDATION_TOKENS: min_validation_tokens,
        }
        self._environment |= {name: str(value) for name, value in own.items() if value}

    async def deploy(self, external: bool) -> None:
        """Start to show progress, unless another deployment has."""
        await super().deploy(external)
        if journal := self._environment[variables.JOURNAL]:
            try:
                self._lock = acquire(Path(journal))
            except CrossFLError as error:
                raise WorkflowDefinitionException(str(error)) from None
            INTERRUPTION.journals.append(Path(journal))
        if server := ForkServer.shared():
            self._environment[variables.FORKSERVER] = str(server.folder)
        cls = FacilityLocalConnector
        cls._deployed += 1
        if cls._follower is None and variables.PROGRESS not in os.environ:
            # A file without a name: nothing is left of it, however the engine ends.
            cls._progress = os.memfd_create("crossfl-progress")
            path = f"/proc/{os.getpid()}/fd/{cls._progress}"
            os.environ[variables.PROGRESS] = path
            cls._follower = Follower(Path(path), sys.stderr)
            cls._follower.start()
            _tell(events.ENGINE, f"StreamFlow {version('streamflow')}: {shlex.join(sys.argv)}")
            if logger.level == logging.INFO:
                logger.setLevel(logging.WARNING)
        if journal and cls._follower is not None:
            cls._follower.record.journal = Path(journal)
        if self._hook and cls._follower is not None:
            cls._follower.hook.command = self._hook

    async def undeploy(self, external: bool) -> None:
        """When the last deployment ends, stop what still runs and show the last of the progress."""
        await super().undeploy(external)
        if self._lock is not None:
            self._lock.close()
        cls = FacilityLocalConnector
        cls._deployed -= 1
        if cls._deployed > 0:
            return
        stopped = False
        for process in psutil.Process().children(recursive=True):  # none, unless the run failed
            with contextlib.suppress(psutil.Error):
                if variables.DEPLOYMENT in process.environ():
                    process.terminate()
                    stopped = True
        ForkServer.release(at_once=not stopped)
        if cls._follower is not None:
            number = INTERRUPTION.number
            _tell(events.STOPPED, f"interrupted ({number.name})" if number else None)
            cls._follower.stop()
            cls._follower = None
            del os.environ[variables.PROGRESS]
            os.close(cls._progress)

    async def get_available_locations(
        self, service: str | None = None
    ) -> MutableMapping[str, AvailableLocation]:
        """This machine, with the facility's variables in its environment."""
        locations: MutableMapping[str, AvailableLocation]
        locations = await super().get_available_locations(service)
        for location in locations.values():
            location.location.environment.update(self._environment)
        return locations

    @classmethod
    def get_schema(cls) -> str:
        """The JSON Schema of its configuration."""
        return files("crossfl.engine").joinpath("schemas", "local.json").read_text("utf-8")


def _tell(phase: str, message: str | None) -> None:
    """Report an event of the engine itself."""
    with contextlib.suppress(OSError, CrossFLError), Progress() as progress:
        progress(phase, message=message)


def _journal(path: str | None, config_dir: str) -> str:
    return os.environ.get(variables.JOURNAL) or _path(path, config_dir)


def _path(path: str | None, config_dir: str) -> str:
    return "" if path is None else str(Path(config_dir, Path(path).expanduser()))
