"""Commands for a host, whatever its login shell is and whatever that prints.

The ssh daemon hands each command to the user's login shell: bash, tcsh or fish. They quote in
different ways, and their start-up files may greet. So every command is encoded, `/bin/sh` decodes
and runs it, and what came before a mark is skipped.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shlex
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any, cast

import asyncssh
from streamflow.deployment.connector.ssh import SSHContextFactory, SSHContextManager

from crossfl.engine.connectors.ssh_connection import Context, UnreachableError
from crossfl.protocol.text import printable

MARK = "crossfl: output begins\n"
"""Printed before the command runs."""
# Between single quotes, no shell gives a meaning to any of this. The mark is not in it as it is
# printed: a login shell may print each command before it runs it.
LAUNCH = (
    """exec /bin/sh -c 'echo "crossfl:" "output begins"; eval "$(printf %s "$@" | base64 -d)"' sh"""
)
WORD = 800
"""Characters of a word, a multiple of 4, so that none begins with `=`; csh refuses over 1,024."""
LONGEST_GREETING = 300
"""Characters of what a login shell printed that are shown where it ran nothing."""


def interpreter(script: str) -> list[str]:
    """The program that the first line of a script names, with its arguments; else `/bin/sh`."""
    line = script.partition("\n")[0]
    return shlex.split(line[2:]) if line.startswith("#!") else ["/bin/sh"]


def encoded(command: str, *, merged: bool) -> str:
    """What any login shell understands as a command for `/bin/sh`.

    Args:
        command: the command. A script with a line `#!…` is run by the program that it names.
        merged: let its errors appear where its output does.
    """
    if command.startswith("#!"):
        command = f"exec {shlex.join(interpreter(command))} -c {shlex.quote(command)}"
    if merged:
        command = f"exec 2>&1\n{command}"
    code = base64.b64encode(command.encode()).decode()
    return " ".join([LAUNCH, *(code[i : i + WORD] for i in range(0, len(code), WORD))])


class Session(SSHContextManager):
    """A command at a host, whose output begins where the command's does.

    A command that is given up is ended there: the ssh daemon would let it run on.
    """

    async def __aenter__(self) -> asyncssh.SSHClientProcess[Any]:
        process: asyncssh.SSHClientProcess[Any] = await super().__aenter__()
        try:
            await process.stdout.readuntil(MARK if self.encoding else MARK.encode())
        except asyncio.IncompleteReadError as error:
            await self.__aexit__(None, None, None)
            answer: Any = error.partial
            text = answer if self.encoding else answer.decode(errors="replace")
            shown = printable(text.strip(), longest=LONGEST_GREETING)
            raise UnreachableError(
                f"{cast(Context, self._contexts[0]).where}: the login shell there ran no command: "
                f"{shown or 'it printed nothing'}. Look at its start-up files"
            ) from None
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        return process

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and self._proc is not None:
            with contextlib.suppress(OSError, asyncssh.Error):  # it has ended, or nobody is there
                self._proc.terminate()
        await super().__aexit__(kind, error, trace)


class Sessions(SSHContextFactory):
    """The connections to a host, over which commands run."""

    @property
    def context(self) -> Context:
        """The first of them."""
        return cast(Context, self._contexts[0])

    def get(
        self,
        command: str,
        environment: MutableMapping[str, str] | None,
        stdin: int = asyncio.subprocess.PIPE,
        stdout: int = asyncio.subprocess.PIPE,
        stderr: int = asyncio.subprocess.PIPE,
        encoding: str | None = "utf-8",
    ) -> Session:
        """A command, which has attempts of its own: a host that was given up may be up again."""
        for context in self._contexts:
            if context.connection_attempts >= self._retries:
                context.connection_attempts = 0
        # Merged at the host, in the order in which the command wrote them, and without what a
        # login shell writes to its standard error.
        merged = stderr == asyncio.subprocess.STDOUT
        return Session(
            condition=self._condition,
            contexts=self._contexts,
            command=encoded(command, merged=merged),
            environment=environment,
            stdin=stdin,
            stdout=stdout,
            stderr=asyncio.subprocess.DEVNULL if merged else stderr,
            encoding=encoding,
            retries=self._retries,
            retry_delay=self._retry_delay,
        )
