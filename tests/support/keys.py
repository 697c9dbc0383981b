"""OpenSSH keys of facilities, and the file that says whose they are."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from crossfl.protocol.layout import SIGNATURE
from crossfl.protocol.variables import SIGNING_KEY
from crossfl.storage import signature


def make_keys(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """A key for each facility in a folder, and there the file `signers` that lists them all."""
    keys = {name: folder / f"key-{name}" for name in names}
    lines = []
    for name, key in keys.items():
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", key]
        subprocess.run(command, check=True)
        lines.append(f"{name} {key.with_suffix('.pub').read_text()}")
    (folder / "signers").write_text("".join(lines))
    return keys


def sign(directory: Path, key: Path) -> None:
    """Sign an update or evaluation with a key, in place of any signature it has."""
    (directory / SIGNATURE).unlink(missing_ok=True)
    with patch.dict(os.environ, {SIGNING_KEY: str(key)}):
        signature.sign(directory)
