"""The connector `crossfl.ssh`: the engine's, with clear errors, and hosts that may come back.

The engine gives a host up for the whole run after some failures, takes a wrong host key for a
passing one, and its message names neither the deployment nor the cause.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import time
from collections.abc import MutableMapping, MutableSequence
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import asyncssh
from streamflow.core.data import StreamWrapper
from streamflow.core.deployment import ExecutionLocation
from streamflow.core.exception import UnrecoverableWorkflowException, WorkflowExecutionException
from streamflow.core.scheduling import AvailableLocation
from streamflow.deployment.connector.ssh import (
    SSHConfig,
    SSHContext,
    SSHContextFactory,
    SSHContextManager,
    SSHStreamWriterWrapper,
    SSHStreamWriterWrapperContextManager,
    get_param_from_file,
    parse_hostname,
)
from streamflow.deployment.connector.ssh import SSHConnector as EngineSSHConnector
from streamflow.log_handler import logger

from crossfl.engine.connectors.stand_in import StandsIn
from crossfl.engine.private import UNDER_UMASK, PrivateFolders, heeding_umask
from crossfl.engine.transfer import SafeStreams

KEEPALIVE_SECONDS = 15
"""A connection that is silent for four times this long is dead, and said to be so."""

MOST_JOBS = 1000
"""On a host of which nothing is known yet."""

PROBE_SECONDS = 10
"""A host that was down and does not let us in within this is down still."""

CIPHERS = [
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "aes128-ctr",
    "aes256-ctr",
    "chacha20-poly1305@openssh.com",
]
"""Those with help from the processor first: transfers are bound by them."""


class UnreachableError(WorkflowExecutionException):
    """The host may come back: it refused, did not answer, or the connection was lost."""


class RefusedLoginError(WorkflowExecutionException):
    """The host is there and will not have us: a login, or a certificate that has run out."""


class MisconfiguredError(UnrecoverableWorkflowException):
    """It is for a person to put right, before anything else goes there: a key, a host key."""


class HostKeyError(MisconfiguredError):
    """The host is not known, or not the one that is known."""


class Context(SSHContext):
    """One connection to a host, which says what is wrong with it."""

    def __init__(self, *args: Any, connector: SSHConnector, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ssh_connection: asyncssh.SSHClientConnection | None = None
        self._connector = connector
        self._lock = asyncio.Lock()
        self._given_up: tuple[float, UnreachableError] | None = None

    async def get_connection(self) -> asyncssh.SSHClientConnection | None:
        async with self._lock:
            if self._ssh_connection is None or self._ssh_connection.is_closed():
                self._ssh_connection = await self._connect()
            return self._ssh_connection

    async def probe(self) -> None:
        """Connect with one short attempt, or raise."""
        async with self._lock:
            if self._ssh_connection is None or self._ssh_connection.is_closed():
                async with asyncio.timeout(PROBE_SECONDS):
                    self._ssh_connection = await self._try()

    async def _connect(self) -> asyncssh.SSHClientConnection | None:
        delay, retries = self._connector.retryDelay, self._connector.retries
        if self._given_up and time.monotonic() - self._given_up[0] < retries * delay:
            # The engine asks for several things at once: one answer is enough for all of them.
            raise self._given_up[1]
        for _ in range(retries - 1):
            try:
                return await self._get_connection(self._config)
            except UnreachableError as error:
                logger.warning(f"{error}; trying again in {delay} s")
                await asyncio.sleep(delay)
        return await self._try()

    async def _try(self) -> asyncssh.SSHClientConnection | None:
        try:
            connection = await self._get_connection(self._config)
        except UnreachableError as error:
            self._given_up = time.monotonic(), error
            raise
        self._given_up = None
        return connection

    async def _get_connection(
        self, config: SSHConfig | None
    ) -> asyncssh.SSHClientConnection | None:
        if config is None:
            return None
        host, port = parse_hostname(config.hostname)
        where = f"Deployment {self._connector.deployment_name}, host {config.hostname}"
        trusted = self._connector.known_hosts
        unknown = HostKeyError(
            f"{where}: unknown host, no key of it in {trusted}. Compare its fingerprint with the "
            f"site's, then: ssh-keyscan -p {port} {host} >> {trusted}"
        )
        if config.check_host_key and not trusted.is_file():
            raise unknown
        keys = self._load_keys(config, where)
        tunnel = await self._get_connection(config.tunnel)
        try:
            return await asyncssh.connect(
                host,
                port,
                tunnel=tunnel,
                username=config.username or (),
                client_keys=keys or (),
                password=get_param_from_file(config.password_file, self._streamflow_config_dir),
                known_hosts=str(trusted) if config.check_host_key else None,
                connect_timeout=config.connect_timeout,
                compression_algs=None,
                encryption_algs=CIPHERS,
                keepalive_interval=KEEPALIVE_SECONDS,
            )
        except asyncssh.HostKeyNotVerifiable as error:
            known = asyncssh.match_known_hosts(
                str(trusted), host, "", None if port == asyncssh.DEFAULT_PORT else port
            )
            if any(known[:2]):
                raise HostKeyError(
                    f"{where}: WRONG HOST KEY, not the one in {trusted}. Somebody may be posing as "
                    f"this host; ask the site for its fingerprint before you trust the new key"
                ) from error
            raise unknown from error
        except asyncssh.PermissionDenied as error:
            raise RefusedLoginError(
                f"{where}: login refused for user {config.username or '(yours)'}: {error.reason}. "
                f"Check `username` and `sshKey`; a certificate may have run out"
            ) from error
        except ConnectionRefusedError as error:
            raise UnreachableError(
                f"{where}: connection refused. Nothing listens on port {port} there; check "
                f"`nodes`, or wait for the end of a maintenance"
            ) from error
        except TimeoutError as error:
            raise UnreachableError(
                f"{where}: no answer within {config.connect_timeout} s. Check `nodes`, a firewall, "
                f"or raise `connectTimeout`"
            ) from error
        except socket.gaierror as error:
            raise UnreachableError(
                f"{where}: unknown host, its name is not found ({error.strerror}). Check `nodes`"
            ) from error
        except (OSError, asyncssh.Error) as error:
            raise UnreachableError(f"{where}: cannot connect: {error}") from error

    def _load_keys(self, config: SSHConfig, where: str) -> list[asyncssh.SSHKeyPair]:
        """Read the keys here, so that a key that cannot be read is not taken for another fault."""
        paths = [
            str(Path(self._streamflow_config_dir) / Path(key).expanduser())
            for key in config.client_keys
        ]
        try:
            passphrase = get_param_from_file(
                config.ssh_key_passphrase_file, self._streamflow_config_dir
            )
            return list(asyncssh.load_keypairs(paths, passphrase)) if paths else []
        except (OSError, ValueError) as error:
            raise MisconfiguredError(
                f"{where}: the key {' '.join(paths)} cannot be read: {error}. Check `sshKey`, its "
                f"permissions and `sshKeyPassphraseFile`"
            ) from error


class Sink(SSHStreamWriterWrapper):
    """What a command at the host reads: closed, it is at its end, and the command goes on."""

    async def _close(self) -> None:
        self.stream.write_eof()


class Upload(SSHStreamWriterWrapperContextManager):
    """Waits for the command that reads the stream: only it knows whether all came and was kept.

    The engine drops the connection's channel instead, and takes whatever was sent as arrived.
    """

    def __init__(self, *args: Any, connector: SSHConnector, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._connector = connector

    async def __aenter__(self) -> StreamWrapper:
        self.ssh_context = self.ssh_context_factory.get(
            command=" ".join(self.command),
            environment=self.environment,
            stdout=asyncio.subprocess.DEVNULL,
            encoding=None,
        )
        self._process: asyncssh.SSHClientProcess[bytes] = await self.ssh_context.__aenter__()
        self.stream = Sink(self._process.stdin)
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
            stderr = cast(bytes, done.stderr).decode(errors="replace")
            first_line = stderr.partition("\n")[0][:200]
            raise UnreachableError(
                f"Deployment {self._connector.deployment_name}: what was sent there did not arrive "
                f"whole: {first_line or 'the connection was lost'}"
            )


class SSHConnector(StandsIn, PrivateFolders, SafeStreams, EngineSSHConnector):
    """Hosts reached over SSH.

    Args:
        knownHosts: the file with the host keys that are trusted; a relative path counts from the
            StreamFlow file.
    """

    def __init__(self, *args: Any, knownHosts: str = "~/.ssh/known_hosts", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.known_hosts = Path(self.config_dir) / Path(knownHosts).expanduser()
        self._cls_context = functools.partial(Context, connector=self)

    @classmethod
    def get_schema(cls) -> str:
        return files("crossfl.engine").joinpath("schemas", "ssh.json").read_text("utf-8")

    async def probe(self) -> None:
        """Say shortly whether every host answers, by raising where one does not."""
        for location in self.nodes.values():
            factory = self._get_ssh_context_factory(
                ExecutionLocation(
                    deployment=self.deployment_name,
                    hostname=location.hostname,
                    name=location.hostname,
                )
            )
            try:
                await factory._contexts[0].probe()
            except TimeoutError:
                raise UnreachableError(
                    f"Deployment {self.deployment_name}, host {location.hostname}: no answer "
                    f"within {PROBE_SECONDS} s"
                ) from None

    async def get_available_locations(
        self, service: str | None = None
    ) -> MutableMapping[str, AvailableLocation]:
        """The hosts; one that cannot be reached is given without its hardware.

        The engine cannot make up for a failure before it has placed a job, only for one after.
        """
        try:
            locations: MutableMapping[str, AvailableLocation]
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
            for name in (location.hostname for location in self.nodes.values())
        }

    async def get_stream_writer(
        self, command: MutableSequence[str], location: ExecutionLocation
    ) -> Upload:
        return Upload(
            connector=self,
            command=[*UNDER_UMASK, *heeding_umask(command)],
            environment=location.environment,
            ssh_context_factory=self._get_ssh_context_factory(location),
        )

    def _revive(self) -> None:
        """Give each command its own attempts: a host that was given up may be up again."""
        for factories in (self.ssh_context_factories, self.data_transfer_context_factories):
            for factory in factories.values():
                for context in factory._contexts:
                    if context.connection_attempts >= self.retries:
                        context.connection_attempts = 0

    def _get_ssh_client_process(self, *args: Any, **kwargs: Any) -> SSHContextManager:
        self._revive()
        return super()._get_ssh_client_process(*args, **kwargs)

    def _get_ssh_context_factory(self, location: ExecutionLocation) -> SSHContextFactory:
        self._revive()
        return super()._get_ssh_context_factory(location)
