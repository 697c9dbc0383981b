"""The command's side: it has its step run by the server, and is to its caller as the step itself.

It imports next to nothing: every `crossfl` command imports it.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import stat
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from crossfl.engine.forkserver.passport import passport
from crossfl.protocol import variables

SOCKET = "socket"
"""Its name in the server's folder."""
LARGEST_MESSAGE = 1 << 20
"""Bytes; the kernel's limit of one message is less."""
PATIENCE = 120
"""Seconds to wait for the server, which may still be importing."""
EXIT_STATUS = struct.Struct("i")
"""How a step ended, as `os.waitstatus_to_exitcode` has it."""
REFUSED = b"refused"
"""In place of a status: the step was not begun."""
PASSED_ON = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGTERM,
)
"""What the step gets in place of the command. Any other signal that ends the command kills it."""


def run_warm() -> int | None:
    """Have this very command run by the server that `CROSSFL_FORKSERVER` names.

    Returns:
        The exit status; None where nothing was begun, and this process is to do it.
    """
    # The step itself, and what it starts, ask no server again.
    folder = os.environ.pop(variables.FORKSERVER, None)
    if not folder:
        return None
    try:
        connection = _connect(folder)
    except OSError:
        return None
    if connection is None:
        return None
    with connection:
        return _run(connection)


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end."""
    size = struct.calcsize("3i")
    answer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    process, user, _ = struct.unpack("3i", answer)
    return process, user


def address(folder: int) -> str:
    """The socket in an open folder, whose own path may be too long for an address."""
    return f"/proc/self/fd/{folder}/{SOCKET}"


def _connect(path: str) -> socket.socket | None:
    """A connection to the server, if it is ours and like this process."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        status = os.fstat(folder)
        if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == stat.S_IRWXU:
            connection.setblocking(False)  # where too many wait already, this is not one more
            connection.connect(address(folder))
            connection.settimeout(PATIENCE)
            if peer(connection)[1] == os.geteuid() and (
                connection.recv(LARGEST_MESSAGE) == passport()
            ):
                connection.settimeout(None)
                return connection
    except OSError:
        connection.close()
        raise
    finally:
        os.close(folder)
    connection.close()
    return None


def _run(connection: socket.socket) -> int | None:
    # Not before the request has gone: a signal of ours is not to come before it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    try:
        try:
            socket.send_fds(connection, [_request(mask)], (0, 1, 2))
        except OSError:  # a stream is closed, the folder gone, or it is too much for one message
            return None
        with _passing_on(connection, mask):
            try:
                answer = connection.recv(LARGEST_MESSAGE)
            except OSError:
                answer = b""
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if answer == REFUSED:
        return None
    # Without an answer, the server is gone, and the step went with it.
    status = EXIT_STATUS.unpack(answer)[0] if answer else -signal.SIGKILL
    if status < 0:
        _die_by(-status)
        return 128 - int(status)
    return int(status)


def _request(mask: set[int | signal.Signals]) -> bytes:
    umask = os.umask(0o077)
    os.umask(umask)
    request = {
        "argv": sys.argv,
        "path": sys.path[0],
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "umask": umask,
        "ignored": [n for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN],
        "blocked": list(mask),
    }
    return json.dumps(request).encode()


@contextlib.contextmanager
def _passing_on(connection: socket.socket, mask: set[int | signal.Signals]) -> Iterator[None]:
    """Pass signals on to the step; those that are ignored stay so, of the step as well."""

    def pass_on(number: int, frame: object) -> None:
        with contextlib.suppress(OSError):
            connection.send(bytes([number]))

    heeded: Sequence[signal.Signals]
    heeded = [n for n in PASSED_ON if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in heeded}
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_by(number: int) -> None:
    """End this process by the signal that ended the step, leaving no core of its own."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # SIGKILL
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
