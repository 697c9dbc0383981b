"""How connectors bring what a job left: through archives that are not trusted (`archive`)."""

from __future__ import annotations

import asyncio
import contextlib
import posixpath
import shlex
from abc import ABC
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any, cast

from streamflow.core.data import StreamWrapper
from streamflow.core.deployment import Connector, ExecutionLocation
from streamflow.core.exception import WorkflowExecutionException
from streamflow.log_handler import logger

from crossfl.engine.archive import END, MAX_BYTES, MAX_MEMBERS, Limits, RefusedError, copy, extract
from crossfl.engine.live import Count, Transfer, sending
from crossfl.protocol import events

STALL_SECONDS = 600
"""A site that sends nothing for this long will send nothing more."""


class Bridge:
    """An asynchronous stream for a thread to read, which leaves the event loop to the others."""

    def __init__(self, stream: StreamWrapper, count: Count) -> None:
        self.stream = stream
        self.count = count
        self.loop = asyncio.get_running_loop()
        self.closed = False

    def read(self, size: int) -> bytes:
        if self.closed:
            raise RefusedError("the transfer was given up")
        chunk = asyncio.run_coroutine_threadsafe(self.stream.read(size), self.loop)
        try:
            content = cast(bytes, chunk.result(STALL_SECONDS))
        except TimeoutError as error:
            raise RefusedError(f"nothing came for {STALL_SECONDS} s") from error
        self.count(len(content))
        return content


async def receive(
    connector: Connector, location: ExecutionLocation, src: str, dst: str, limits: Limits
) -> None:
    """Bring a file or folder from a site, through a connector's own stream."""
    parent, root = posixpath.split(src.rstrip("/"))
    script = (
        f"tar chf - -C {shlex.quote(parent or '/')} -- {shlex.quote(root)}"
        f" && printf '%s\\n' {shlex.quote(END.decode().strip())}"
    )
    logger.info(f"COPYING from {src} on location {location} to {dst} on local file-system")
    reader = await connector.get_stream_reader(["sh", "-c", shlex.quote(script)], location)
    async with reader as stream:
        transfer = Transfer(connector.deployment_name, events.FETCHING)
        bridge = Bridge(stream, transfer)
        try:
            await asyncio.to_thread(extract, bridge, root, Path(dst), limits)
        except BaseException as error:
            # The engine would wait for a local tar to end, and that tar for somebody to read.
            if (process := getattr(reader, "proc", None)) is not None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            if isinstance(error, RefusedError):
                raise refusal(connector, src, error) from error
            raise
        finally:
            bridge.closed = True
    transfer.end(events.FETCHED)
    logger.info(f"COMPLETED copy from {src} on location {location} to {dst} on local file-system")


def refusal(connector: Connector, src: str, error: Exception) -> WorkflowExecutionException:
    return WorkflowExecutionException(
        f"Deployment {connector.deployment_name}: what came for {src} is refused, and nothing of "
        f"it was kept: {error}"
    )


class Limited(Connector, ABC):
    """A connector whose deployment sets how much one transfer may bring."""

    def __init__(
        self,
        *args: Any,
        maxArchiveBytes: int = MAX_BYTES,
        maxArchiveMembers: int = MAX_MEMBERS,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.limits = Limits(bytes=maxArchiveBytes, members=maxArchiveMembers)


class SafeStreams(Limited, ABC):
    """For connectors that bring files as tar streams: SSH, and the queue managers behind it."""

    async def copy_local_to_remote(
        self,
        src: str,
        dst: str,
        locations: MutableSequence[ExecutionLocation],
        read_only: bool = False,
    ) -> None:
        with sending(self.deployment_name, Path(src)):
            await super().copy_local_to_remote(src, dst, locations, read_only)

    async def copy_remote_to_local(
        self, src: str, dst: str, location: ExecutionLocation, read_only: bool = False
    ) -> None:
        await receive(self, location, src, dst, self.limits)


class SafeCopies(Limited, ABC):
    """For the connector to this machine, which copies files instead of sending streams."""

    async def _copy(self, src: str, dst: str) -> None:
        try:
            await asyncio.to_thread(copy, Path(src), Path(dst), self.limits)
        except (RefusedError, FileNotFoundError) as error:
            raise refusal(self, src, error) from error

    async def copy_local_to_remote(
        self,
        src: str,
        dst: str,
        locations: MutableSequence[ExecutionLocation],
        read_only: bool = False,
    ) -> None:
        # From here to here: the engine takes this way also for what a job of ours has left.
        if read_only:
            await super().copy_local_to_remote(src, dst, locations, read_only)
        else:
            await self._copy(src, dst)

    async def copy_remote_to_local(
        self, src: str, dst: str, location: ExecutionLocation, read_only: bool = False
    ) -> None:
        if read_only:  # a link to it, nothing is copied
            await super().copy_remote_to_local(src, dst, location, read_only)
        else:
            await self._copy(src, dst)

    async def copy_remote_to_remote(
        self,
        src: str,
        dst: str,
        locations: MutableSequence[ExecutionLocation],
        source_location: ExecutionLocation,
        source_connector: Connector | None = None,
        read_only: bool = False,
    ) -> None:
        if source_location.local and not read_only:
            await self._copy(src, dst)
        else:
            await super().copy_remote_to_remote(
                src, dst, locations, source_location, source_connector, read_only
            )
