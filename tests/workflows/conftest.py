"""The engines of these tests have their steps forked from a process that has the imports."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from crossfl.engine.forkserver.process import ForkServer
from crossfl.protocol.variables import FORKSERVER
from tests.support.processes import Run


@pytest.fixture(scope="session")
def run(run: Run, environment: Mapping[str, str]) -> Iterator[Run]:
    """Run a command as `run` of the other tests does, with warm steps.

    A server runs steps with its own environment only; any other step starts by itself. So there is
    one for each environment that steps have here, started when it is first needed.
    """
    path = environment["PATH"]
    local = os.pathsep.join([str(Path(sys.executable).parent), path])
    environments = {
        "cwltool": {"PATH": path},  # and what it is told to preserve
        "./streamflow-runner": environment,
        "streamflow": {**environment, "PATH": local},  # of `crossfl.local`
    }
    servers: dict[str, ForkServer] = {}
    with ExitStack() as stack:

        def command(
            *words: str | Path, cwd: Path, timeout: float = 300, **variables: str
        ) -> "subprocess.CompletedProcess[str]":
            engine = next((name for name in environments if name in words), "")
            if engine and engine not in servers:
                servers[engine] = ForkServer(environments[engine])
                stack.callback(servers[engine].end)
            server = {FORKSERVER: str(servers[engine].folder)} if engine else {}
            return run(*words, cwd=cwd, timeout=timeout, **(server | variables))

        yield command
