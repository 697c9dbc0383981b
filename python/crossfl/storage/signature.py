"""Signatures: with OpenSSH keys, that a directory is whole becomes that it is its facility's own.

A facility with `CROSSFL_SIGNING_KEY` signs the manifest of each update and evaluation, which names
facility, federation, round, model and the sha256 of every file. Where the aggregation record names
signers, the server admits nothing without a signature by a key that they list for the facility.

Formats: ALLOWED SIGNERS in ssh-keygen(1), https://man.openbsd.org/ssh-keygen.1
"""

import os
import subprocess
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.protocol.layout import MANIFEST, SIGNATURE
from crossfl.protocol.variables import SIGNING_KEY

NAMESPACE = "update@crossfl"
SECONDS = 60
LARGEST = 1 << 16
"""Bytes of a signature; more is refused unread."""


def sign(directory: Path) -> None:
    """Sign the manifest of a directory, where this facility has a key for it.

    Raises:
        CrossFLError: the key cannot be used.
    """
    if not (key := os.environ.get(SIGNING_KEY)):
        return
    process = _keygen("sign", "-f", key, str(directory / MANIFEST))
    if process.returncode:
        raise CrossFLError(f"{SIGNING_KEY}={key} cannot sign: {process.stderr.strip()}")


def check(directory: Path, facility: str, signers: Path | None) -> None:
    """Check who made a directory, where it is said who may.

    Args:
        directory: the directory, with its manifest.
        facility: who should have made it.
        signers: allowed-signers file; None, where no signature is asked for.

    Raises:
        CrossFLError: there is no signature, or it is not the facility's.
    """
    if signers is None:
        return
    signature = directory / SIGNATURE
    if not signature.is_file():
        raise CrossFLError(f"it is not signed: {facility} has to set {SIGNING_KEY}")
    if signature.stat().st_size > LARGEST:
        raise CrossFLError(f"{SIGNATURE} has more than {LARGEST} bytes: it is no signature")
    content = (directory / MANIFEST).read_bytes()
    words = ("-f", str(signers), "-I", facility, "-s", str(signature))
    if _keygen("verify", *words, given=content).returncode:
        raise CrossFLError(f"its signature is not by a key that the signers list for {facility}")


def _keygen(action: str, *words: str, given: bytes = b"") -> "subprocess.CompletedProcess[str]":
    command = ["ssh-keygen", "-Y", action, "-n", NAMESPACE, *words]
    try:
        process = subprocess.run(command, input=given, capture_output=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CrossFLError(f"ssh-keygen cannot be run: {error}") from None
    return subprocess.CompletedProcess(
        command,
        process.returncode,
        process.stdout.decode(),
        process.stderr.decode(errors="replace"),
    )
