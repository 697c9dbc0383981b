"""The engine's side: the process of the server, from its start to its end."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from crossfl.engine.forkserver.client import address
from crossfl.engine.forkserver.passport import FREE_PREFIX
from crossfl.protocol import variables

MODULE = "crossfl.warm"
WAITING = 64
"""Commands that may wait to be heard."""


class ForkServer:
    """A server of warm steps, and the private folder with its socket.

    Commands that come before it has imported everything wait. It ends with this process, too.

    Args:
        environment: what its steps will have; of ours, nothing is taken.

    Raises:
        OSError: there can be no socket or no process.
    """

    _shared: "ClassVar[ForkServer | None]" = None

    @classmethod
    def shared(cls) -> "ForkServer | None":
        """The one of all local deployments, started now if there is none; None if none is wanted.

        None as well where there can be none: every step then starts by itself.
        """
        if cls._shared is None and variables.FORKSERVER not in os.environ:
            with contextlib.suppress(OSError):
                cls._shared = cls({**os.environ, "PATH": search_path()})
        return cls._shared

    @classmethod
    def release(cls, at_once: bool) -> None:
        """Part from the shared one; where steps still run, it ends with this process."""
        if cls._shared is not None and at_once:
            cls._shared.end()
        cls._shared = None

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="crossfl-forkserver-"))
        kept = {k: v for k, v in environment.items() if not k.startswith(FREE_PREFIX)}
        # What it looks for in these is not the user's, as it is not with a step.
        folders = {"HOME": str(self.folder), "TMPDIR": str(self.folder)}
        with _listening(self.folder) as listener:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(os.getpid()), str(listener.fileno())],
                cwd=self.folder,
                env={**kept, **folders},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # what a terminal sends, commands pass on
            )

    def end(self) -> None:
        """End it, with every step that still runs."""
        self._process.kill()  # it may be importing, and would heed no other signal for seconds
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def search_path() -> str:
    """The PATH of steps on this machine: the commands of this Python come first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _listening(folder: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        listener.bind(address(descriptor))
    finally:
        os.close(descriptor)
    listener.listen(WAITING)
    return listener
