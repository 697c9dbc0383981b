"""The connector `crossfl.ssh`: the engine's, with uploads that are checked.

Logins and their errors are in `ssh_connection`, the way of a command through a login shell in
`login_shell`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import MutableMapping, MutableSequence
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import asyncssh
from streamflow.core.data import StreamWrapper
from streamflow.core.deployment import ExecutionLocation
from streamflow.core.scheduling import AvailableLocation
from streamflow.deployment.connector.ssh import (
    SSHConfig,
    SSHStreamWriterWrapper,
    SSHStreamWriterWrapperContextManager,
)
from streamflow.deployment.connector.ssh import SSHConnector as EngineSSHConnector
from streamflow.log_handler import logger

from crossfl.engine.connectors.login_shell import Session, Sessions
from crossfl.engine.connectors.presence import WITHOUT_HARDWARE
from crossfl.engine.connectors.ssh_connection import PROBE_SECONDS, Context, UnreachableError
from crossfl.engine.connectors.stand_in import StandsIn
from crossfl.engine.live import TRANSFER, Count
from crossfl.engine.private import UNDER_UMASK, PrivateFolders, heeding_umask
from crossfl.engine.transfer import SafeStreams

END_SECONDS = 5
"""A host that has not ended our jobs within this does not hear us."""

MOST_JOBS = 1000
"""On a host of which nothing is known yet."""


class Sink(SSHStreamWriterWrapper):
    """What a command at the host reads: closed, it is at its end, and the command goes on."""

    def __init__(self, stream: Any, count: Count | None = None) -> None:
        super().__init__(stream)
        self._count = count

    async def write(self, data: Any) -> None:
        await super().write(data)
        if self._count:
            self._count(len(data))

    async def _close(self) -> None:
        self.stream.write_eof()


class Upload(SSHStreamWriterWrapperContextManager):
    """Waits for the command that reads the stream: only it knows whether all came and was kept.

    The engine drops the connection's channel instead, and takes whatever was sent as arrived.
    """

    def __init__(self, *args: Any, connector: SSHConnector, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._connector = connector
        self._count = TRANSFER.get()

    async def __aenter__(self) -> StreamWrapper:
        self.ssh_context = self.ssh_context_factory.get(
            command=" ".join(self.command),
            environment=self.environment,
            stderr=asyncio.subprocess.STDOUT,
            encoding=None,
        )
        self._process: asyncssh.SSHClientProcess[bytes] = await self.ssh_context.__aenter__()
        self.stream = Sink(self._process.stdin, self._count)
        return self.stream

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None or issubclass(kind, OSError | asyncssh.Error):
                with contextlib.suppress(OSError):  # the command has ended before its input
                    await self.stream.close()
                await self._end()
        finally:
            await self.ssh_context.__aexit__(kind, error, trace)

    async def _end(self) -> None:
        done = await self._process.wait()
        if done.exit_status != 0:
            answer = cast(bytes, done.stdout).decode(errors="replace")
            first_line = answer.partition("\n")[0][:200]
            raise UnreachableError(
                f"Deployment {self._connector.deployment_name}: what was sent there did not arrive "
                f"whole: {first_line or 'the connection was lost'}"
            )


class SSHConnector(StandsIn, PrivateFolders, SafeStreams, EngineSSHConnector):
    """Hosts reached over SSH.

    Args:
        knownHosts: the file with the host keys that are trusted; a relative path counts from the
            StreamFlow file.
        proxyJump: a host to log in through, as ``user@host:port``, with the same key.
    """

    def __init__(
        self,
        *args: Any,
        knownHosts: str = "~/.ssh/known_hosts",
        proxyJump: str | None = None,
        **kwargs: Any,
    ) -> None:
        if proxyJump is not None:
            username, _, hostname = proxyJump.rpartition("@")
            kwargs["tunnel"] = {"hostname": hostname} | ({"username": username} if username else {})
        super().__init__(*args, **kwargs)
        self._jobs: set[asyncio.Task[Any]] = set()
        self.known_hosts = Path(self.config_dir) / Path(knownHosts).expanduser()

    @classmethod
    def get_schema(cls) -> str:
        return files("crossfl.engine").joinpath("schemas", "ssh.json").read_text("utf-8")

    async def probe(self) -> None:
        """Say shortly whether every host answers, by raising where one does not."""
        for host in self.nodes:
            try:
                await self._sessions(host).context.probe()
            except TimeoutError:
                raise UnreachableError(
                    f"Deployment {self.deployment_name}, host {host}: no answer within "
                    f"{PROBE_SECONDS} s"
                ) from None

    async def get_available_locations(
        self, service: str | None = None
    ) -> MutableMapping[str, AvailableLocation]:
        """The hosts; one that cannot be reached is given without its hardware.

        The engine cannot make up for a failure before it has placed a job, only for one after.
        """
        try:
            locations: MutableMapping[str, AvailableLocation]
            if not WITHOUT_HARDWARE.get():
                locations = await super().get_available_locations(service)
                return locations
        except UnreachableError as error:
            logger.warning(str(error))
        return {
            name: AvailableLocation(
                name=name,
                deployment=self.deployment_name,
                service=service,
                hostname=name,
                slots=MOST_JOBS,
            )
            for name in self.nodes
        }

    async def run(
        self, *args: Any, job_name: str | None = None, **kwargs: Any
    ) -> tuple[str, int] | None:
        answer: tuple[str, int] | None
        task = asyncio.current_task()
        if job_name is None or task is None:
            answer = await super().run(*args, job_name=job_name, **kwargs)
            return answer
        self._jobs.add(task)
        try:
            answer = await super().run(*args, job_name=job_name, **kwargs)
            return answer
        finally:
            self._jobs.discard(task)

    async def undeploy(self, external: bool) -> None:
        """End the jobs that still run at the hosts, which would outlive the connection."""
        for task in (jobs := list(self._jobs)):
            task.cancel()
        if jobs:
            await asyncio.wait(jobs, timeout=END_SECONDS)
        await super().undeploy(external)

    async def get_stream_writer(
        self, command: MutableSequence[str], location: ExecutionLocation
    ) -> Upload:
        return Upload(
            connector=self,
            command=[*UNDER_UMASK, *heeding_umask(command)],
            environment=location.environment,
            ssh_context_factory=self._get_ssh_context_factory(location),
        )

    def _get_ssh_client_process(self, location: str, command: str, **streams: Any) -> Session:
        streams.setdefault("environment", None)
        return self._sessions(location).get(command, **streams)

    def _get_ssh_context_factory(self, location: ExecutionLocation) -> Sessions:
        return self._sessions(location.name, self.dataTransferConfig)

    def _sessions(self, host: str, transfer: SSHConfig | None = None) -> Sessions:
        """The connections to a host; those for transfers where a deployment has them apart."""
        all_sessions: MutableMapping[str, Sessions] = (
            self.data_transfer_context_factories if transfer else self.ssh_context_factories
        )
        if host not in all_sessions:
            all_sessions[host] = Sessions(
                cls_context=functools.partial(
                    Context,
                    deployment=self.deployment_name,
                    known_hosts=self.known_hosts,
                    retries=self.retries,
                    retry_delay=self.retryDelay,
                ),
                streamflow_config_dir=self.config_dir,
                config=transfer or self.nodes[host],
                max_concurrent_sessions=self.maxConcurrentSessions,
                max_connections=self.maxConnections,
                retries=self.retries,
                retry_delay=self.retryDelay,
            )
        return all_sessions[host]
