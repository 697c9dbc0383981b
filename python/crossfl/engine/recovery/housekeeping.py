"""Removes the directories that the engine makes for jobs at facilities, and otherwise leaves there.

Those of a job that succeeded go once the VM has used what the job made. Those of failed attempts
stay for whoever looks for the cause, a few at each facility.
"""

import asyncio
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

from streamflow.core.context import StreamFlowContext
from streamflow.core.workflow import Job
from streamflow.data.remotepath import StreamFlowPath
from streamflow.log_handler import logger

from crossfl.engine.recovery.jobs import facility_job, is_stood_in

TIMEOUT_SECONDS = 20
"""For removing the directories of a round's jobs at one facility."""
PATIENCE_SECONDS = 2
"""How long the round waits for that: a facility that is slow holds up nobody for longer."""
RANDOM_NAME = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""How the engine names a directory that it makes for one job; no other directory is removed."""


class Directory(NamedTuple):
    """A directory that the engine made for a job."""

    deployment: str
    path: StreamFlowPath


class Housekeeping:
    """Knows which directories the jobs of a run have left at the facilities.

    Args:
        context: that of the engine.
        keep_failed: the number of failed attempts at each facility whose directories are kept.
    """

    def __init__(self, context: StreamFlowContext, keep_failed: int) -> None:
        self._context = context
        self._keep_failed = keep_failed
        self._placed: dict[str, list[Directory]] = {}
        self._failed: defaultdict[str, list[list[Directory]]] = defaultdict(list)
        self._removals: set[asyncio.Task[None]] = set()

    def note_placement(self, job: Job) -> None:
        """Remember the directories of an attempt, which the job itself may not tell later."""
        self._placed[job.name] = self._directories(job)

    def note_failure(self, job: Job) -> None:
        """Keep the directories of an attempt that failed."""
        directories = self._placed.pop(job.name, None) or self._directories(job)
        failed = self._failed[facility_job(job).facility]
        if directories and directories not in failed:
            failed.append(directories)

    async def tidy(self, finished: Iterable[Job]) -> None:
        """Remove the directories of finished jobs, and the oldest of those of failed attempts.

        A directory that cannot be removed in time is left over, with a warning.
        """
        unneeded = [directory for job in finished for directory in self._directories(job)]
        for failed in self._failed.values():
            while len(failed) > self._keep_failed:
                unneeded += failed.pop(0)
        sites: defaultdict[str, list[StreamFlowPath]] = defaultdict(list)
        for directory in unneeded:
            sites[directory.deployment].append(directory.path)
        removals = {asyncio.create_task(_remove(name, paths)) for name, paths in sites.items()}
        for removal in removals:
            self._removals.add(removal)
            removal.add_done_callback(self._removals.discard)
        if removals:
            await asyncio.wait(removals, timeout=PATIENCE_SECONDS)

    async def close(self) -> None:
        """Give up what goes on still."""
        removals = list(self._removals)
        for removal in removals:
            removal.cancel()
        await asyncio.gather(*removals, return_exceptions=True)

    def _directories(self, job: Job) -> list[Directory]:
        """The directories that the engine made for a job at its facility."""
        scheduler = self._context.scheduler
        if job.name not in scheduler.job_allocations or is_stood_in(self._context, job):
            return []
        return [
            Directory(
                location.deployment,
                StreamFlowPath(directory, context=self._context, location=location),
            )
            for location in scheduler.get_locations(job.name)
            for directory in (job.input_directory, job.output_directory, job.tmp_directory)
            if directory and RANDOM_NAME.fullmatch(PurePosixPath(directory).name)
        ]


async def _remove(deployment: str, directories: Collection[StreamFlowPath]) -> None:
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            for path in directories:
                try:
                    await path.rmtree()
                except Exception as error:
                    logger.warning(f"{path} is left over at {deployment}: {error}")
    except TimeoutError:
        logger.warning(f"directories of jobs are left over at {deployment}, which is slow")
