"""Certificates of some hours: one that ran out is refused, and a new one at its path is taken."""

import time
from pathlib import Path

import asyncssh
import pytest

from crossfl.engine.connectors.ssh import SSHConnector
from crossfl.engine.connectors.ssh_connection import RefusedLoginError

HOUR = 3600


def certify(authority: asyncssh.SSHKey, key: asyncssh.SSHKey, path: Path, until: float) -> None:
    """Put a certificate beside a key."""
    certificate = authority.generate_user_certificate(
        key, "me", principals=["me"], valid_after=int(until - HOUR), valid_before=int(until)
    )
    certificate.write_certificate(f"{path}-cert.pub")


async def test_a_certificate_is_renewed_at_its_path(tmp_path: Path) -> None:
    authority, key, host = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(3))
    path = tmp_path / "key"
    key.write_private_key(str(path))
    path.chmod(0o600)
    trusted = f"cert-authority {authority.export_public_key().decode()}"
    server = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_host_keys=[host],
        authorized_client_keys=asyncssh.import_authorized_keys(trusted),
    )
    async with server:
        port = server.sockets[0].getsockname()[1]
        public = host.export_public_key().decode()
        (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {public}")
        connector = SSHConnector(
            deployment_name="site-login",
            config_dir=str(tmp_path),
            nodes=[f"127.0.0.1:{port}"],
            username="me",
            sshKey="key",
            knownHosts="known",
            retries=1,
            retryDelay=0,
        )
        certify(authority, key, path, time.time() - 1)
        with pytest.raises(RefusedLoginError, match="a certificate may have run out"):
            await connector.probe()
        certify(authority, key, path, time.time() + HOUR)
        await connector.probe()
        certify(authority, key, path, time.time() - 1)
        await connector.probe()  # a connection that is open stays open
        await connector.undeploy(False)
