"""Signatures: with OpenSSH keys, that an update is whole becomes that it is its facility's own.

A facility with `CROSSFL_SIGNING_KEY` signs the manifest of each update, which names facility,
round, model and the sha256 of every file. Where `CROSSFL_ALLOWED_SIGNERS` names a file, the gate
admits no update without a signature by a key that is listed there for the facility's name.

Formats: ALLOWED SIGNERS in ssh-keygen(1), https://man.openbsd.org/ssh-keygen.1
"""

import os
import subprocess
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.storage import manifest

KEY = "CROSSFL_SIGNING_KEY"
SIGNERS = "CROSSFL_ALLOWED_SIGNERS"
NAMESPACE = "update@crossfl"
SECONDS = 60


def sign(directory: Path) -> None:
    """Sign the manifest of an update, where this facility has a key for it.

    Raises:
        CrossFLError: the key cannot be used.
    """
    if not (key := os.environ.get(KEY)):
        return
    done = _keygen("sign", "-f", key, str(directory / manifest.FILE))
    if done.returncode:
        raise CrossFLError(f"{KEY}={key} cannot sign: {done.stderr.strip()}")


def check(directory: Path, facility: str) -> None:
    """Check who made an update, where it is said who may.

    Raises:
        CrossFLError: there is no signature, or it is not the facility's.
    """
    if not (signers := os.environ.get(SIGNERS)):
        return
    if not Path(signers).is_file():
        raise CrossFLError(f"{SIGNERS}={signers} is not a file: nobody can be trusted")
    signature = directory / manifest.SIGNATURE
    if not signature.is_file():
        raise CrossFLError(f"it is not signed; {facility} has to set {KEY}")
    content = (directory / manifest.FILE).read_text()
    words = ("-f", signers, "-I", facility, "-s", str(signature))
    if _keygen("verify", *words, given=content).returncode:
        raise CrossFLError(f"its signature is not {facility}'s, by {signers}")


def _keygen(action: str, *words: str, given: str = "") -> "subprocess.CompletedProcess[str]":
    command = ["ssh-keygen", "-Y", action, "-n", NAMESPACE, *words]
    try:
        return subprocess.run(command, input=given, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CrossFLError(f"ssh-keygen cannot be run: {error}") from None
