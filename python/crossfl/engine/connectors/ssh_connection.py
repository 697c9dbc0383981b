"""One connection to a host, with an error for each cause, each with the deployment's name.

The engine gives a host up for the whole run after some failures, takes a wrong host key for a
passing one, and its message names neither the deployment nor the cause.
"""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

import asyncssh
from streamflow.core.exception import UnrecoverableWorkflowException, WorkflowExecutionException
from streamflow.deployment.connector.ssh import (
    SSHConfig,
    SSHContext,
    get_param_from_file,
    parse_hostname,
)
from streamflow.log_handler import logger

KEEPALIVE_SECONDS = 15
"""A connection that is silent for four times this long is dead, and said to be so."""

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

    def __init__(
        self,
        *args: Any,
        deployment: str,
        known_hosts: Path,
        retries: int,
        retry_delay: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._ssh_connection: asyncssh.SSHClientConnection | None = None
        self._deployment = deployment
        self._known_hosts = known_hosts
        self._retries = retries
        self._retry_delay = retry_delay
        self._lock = asyncio.Lock()
        self._given_up: tuple[float, UnreachableError] | None = None

    @property
    def where(self) -> str:
        """The deployment and the host, for messages."""
        return f"Deployment {self._deployment}, host {self.get_hostname()}"

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
        delay, retries = self._retry_delay, self._retries
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
        where = f"Deployment {self._deployment}, host {config.hostname}"
        trusted = self._known_hosts
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
                errors="replace",  # a site may print in any encoding
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
