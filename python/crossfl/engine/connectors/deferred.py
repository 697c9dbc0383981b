"""Folders for a job at a site, made when the job begins and not when the engine asks for them.

The engine places one job after another. For each it asks the login node for hardware, makes
folders and looks for links. A login node that is dead, or slow, would hold up the jobs of all
facilities. Here the engine is answered at once, and what it asked for is noted. The job does it in
the end, and the jobs of all facilities do so at the same time.
"""

from __future__ import annotations

import asyncio
import shlex
from abc import ABC
from collections.abc import Collection, Iterable, MutableMapping, MutableSequence
from pathlib import PurePosixPath
from typing import Any

from streamflow.core.deployment import ExecutionLocation
from streamflow.core.exception import UnrecoverableWorkflowException, WorkflowExecutionException
from streamflow.core.scheduling import AvailableLocation

from crossfl.engine.connectors.presence import WITHOUT_HARDWARE, probe
from crossfl.engine.connectors.queue import QueueConnector
from crossfl.engine.recovery.housekeeping import RANDOM_NAME
from crossfl.engine.recovery.policy import HopelessError
from crossfl.engine.recovery.registry import REGISTRY

NO = "", 1
"""The engine's question about a path is answered: it is not so."""
YES = "", 0


class AwayError(WorkflowExecutionException, HopelessError):
    """A login node that was down still does not answer: no attempt of a job is spent on it."""


class DeferredFolders(QueueConnector, ABC):
    """A queue manager whose engine waits for no login node before a job begins."""

    asks_itself = True
    """Each job asks first whether a site that was down is back, and so the router need not."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unmade: dict[str, None] = {}
        """Folders that the engine has asked for, in that order."""
        self._making = asyncio.Lock()

    async def get_available_locations(
        self, service: str | None = None
    ) -> MutableMapping[str, AvailableLocation]:
        """The scheduler, of which the login node's own hardware says nothing."""
        token = WITHOUT_HARDWARE.set(True)
        try:
            locations: MutableMapping[str, AvailableLocation]
            locations = await super().get_available_locations(service)
        finally:
            WITHOUT_HARDWARE.reset(token)
        for location in locations.values():
            location.location.mounts = {}  # or the engine asks the login node past this connector
        return locations

    async def run(
        self,
        location: ExecutionLocation,
        command: MutableSequence[str],
        environment: MutableMapping[str, str] | None = None,
        workdir: str | None = None,
        *args: Any,
        job_name: str | None = None,
        **kwargs: Any,
    ) -> tuple[str, int] | None:
        if job_name is not None:
            if workdir:
                await self.begin(location, job_name, PurePosixPath(workdir).parent)
        elif (foreseen := self._foresee(command)) is not None:
            return foreseen
        elif self._named(" ".join(command)):
            await self._make(location, None)
        answer: tuple[str, int] | None = await super().run(
            location, command, environment, workdir, *args, job_name=job_name, **kwargs
        )
        return answer

    async def copy_local_to_remote(
        self,
        src: str,
        dst: str,
        locations: MutableSequence[ExecutionLocation],
        read_only: bool = False,
    ) -> None:
        await self._make(locations[0], None)
        await super().copy_local_to_remote(src, dst, locations, read_only)

    async def begin(
        self,
        location: ExecutionLocation,
        job_name: str,
        root: PurePosixPath,
        folders: Collection[str] | None = None,
    ) -> None:
        """Do at a site what the engine has asked for before a job.

        Args:
            location: where the job runs.
            job_name: the engine's name of the job.
            root: the work folder there.
            folders: those of this job; None for all that were asked for.

        Raises:
            AwayError: the site was down, and still is.
            WorkflowExecutionException: a folder could not be made.
        """
        if (policy := REGISTRY.policy) and policy.is_suspect(job_name):
            try:
                await probe(self.connector)
            except UnrecoverableWorkflowException:
                raise
            except Exception as error:
                raise AwayError(str(error)) from error
        await self._make(location, folders)

    def forget(self, folders: Iterable[str]) -> None:
        """Do not make these folders, or what is in them: nobody needs them any more."""
        for path in within(self._unmade, list(folders)):
            self._unmade.pop(path, None)

    async def _make(self, location: ExecutionLocation, folders: Collection[str] | None) -> None:
        async with self._making:
            wanted = within(self._unmade, folders)
            if not wanted:
                return
            answer, status = await self._ask(location, "mkdir", "-p", "--", *wanted)
            if status:
                raise WorkflowExecutionException(
                    f"Deployment {self.deployment_name}: the folders of a job cannot be made "
                    f"(status {status}): {answer.strip()}"
                )
            for path in wanted:
                self._unmade.pop(path, None)

    def _named(self, text: str) -> bool:
        return any(folder in text for folder in self._unmade)

    def _foresee(self, command: MutableSequence[str]) -> tuple[str, int] | None:
        """The answer to what the engine asks about a folder that is not made yet, else None."""
        match list(command):
            case ["mkdir", "-m", _, "-p", path] if RANDOM_NAME.search(path):
                self._unmade[path] = None
                return YES
            case ["test", "-e", word, "&&", "readlink", "-f", _] if self._named(word):
                path = _unquoted(word)
                return (path, 0) if self._is_unmade(path) else NO
            case ["test", kind, word] if self._named(word):
                return YES if kind in ("-d", "-e") and self._is_unmade(_unquoted(word)) else NO
        return None

    def _is_unmade(self, path: str) -> bool:
        return any(PurePosixPath(path) in (p, *p.parents) for p in map(PurePosixPath, self._unmade))


def within(paths: Iterable[str], folders: Collection[str] | None) -> list[str]:
    """Those paths that are among some folders, or below them; None for all, in their order."""
    if folders is None:
        return list(paths)
    roots = {PurePosixPath(folder) for folder in folders}
    return [
        path
        for path in paths
        if not roots.isdisjoint((PurePosixPath(path), *PurePosixPath(path).parents))
    ]


def _unquoted(word: str) -> str:
    return shlex.split(word)[0]
