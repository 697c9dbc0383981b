"""The server's side: one thread that waits, and forks a process for each step."""

import contextlib
import gc
import json
import os
import selectors
import shutil
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from crossfl.engine.forkserver import step
from crossfl.engine.forkserver.client import EXIT_STATUS, LARGEST_MESSAGE, REFUSED, peer
from crossfl.engine.forkserver.passport import passport

POLL_SECONDS = 0.5
"""Between two looks at whether a command was stopped, which nothing else tells."""
MOST = 64
"""Steps at once."""


@dataclass
class Running:
    """A step that runs, and the command that had it run."""

    process: int
    handle: int
    """A descriptor of the process, readable once it has ended."""
    command: int
    stopped: bool = False


class Server:
    """Forks this process for each step that a command asks for.

    Args:
        engine: its process, the parent; this one, and with it every step, ends with it.
        listener: descriptor of the socket, which lies in the working folder; that is removed when
            this process ends.
    """

    def __init__(self, engine: int, listener: int) -> None:
        self._folder, self._process = Path.cwd(), os.getpid()
        signal.signal(signal.SIGTERM, lambda *_: self.end())
        if not step.end_with_parent(engine, signal.SIGTERM):
            self.end()
        self._passport = passport()
        self._running: list[Running] = []
        self._selector = selectors.PollSelector()  # unlike others, it is no descriptor itself
        commands = socket.socket(fileno=listener)
        self._watch(commands, partial(self._accept, commands))

    def end(self) -> NoReturn:
        """End this process, and every step that runs; commands that wait do without it."""
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(0)

    def serve(self) -> None:
        """Fork for every step; returns in the step, which is then to run the command."""
        gc.collect()
        gc.freeze()  # steps that look for garbage do not touch, and so copy, what is imported
        while True:
            for key, _ in self._selector.select(POLL_SECONDS if self._running else None):
                # What an event is about may have been closed by one before it.
                if self._selector.get_map().get(key.fd) is key and key.data():
                    return
            for running in self._running:
                _stop_with_command(running)

    def _watch(self, source: socket.socket | int, act: Callable[[], bool | None]) -> None:
        self._selector.register(source, selectors.EVENT_READ, act)

    def _leave(self, source: socket.socket | int) -> None:
        with contextlib.suppress(KeyError, ValueError):  # the command has left already
            self._selector.unregister(source)
        if isinstance(source, int):
            os.close(source)
        else:
            source.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the command has left, or too many files are open
            connection, _ = listener.accept()
            if peer(connection)[1] != os.geteuid() or len(self._running) >= MOST:
                connection.close()
                return
            self._watch(connection, partial(self._begin, connection))
            connection.send(self._passport)

    def _begin(self, connection: socket.socket) -> bool:
        """Fork for the request of a command; whether this process is now its step."""
        message, streams = _receive(connection)
        if not message:  # the command does without us
            self._leave(connection)
            return False
        # A signal that is for the step is not to meet the server's handler in it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        process = _fork() if len(streams) == 3 else None
        if process == 0:
            for key in list(self._selector.get_map().values()):
                if isinstance(key.fileobj, socket.socket | int):
                    self._leave(key.fileobj)
            if not step.end_with_parent(self._process, signal.SIGKILL):
                os._exit(1)
            step.become(json.loads(message), streams)
            return True
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for stream in streams:
            os.close(stream)
        if process is None:
            with contextlib.suppress(OSError):
                connection.send(REFUSED)
            self._leave(connection)
            return False
        running = Running(process, os.pidfd_open(process), peer(connection)[0])
        self._running.append(running)
        self._selector.unregister(connection)
        self._watch(connection, partial(self._pass_on, running, connection))
        self._watch(running.handle, partial(self._end, running, connection))
        return False

    def _pass_on(self, running: Running, connection: socket.socket) -> None:
        """Give the step a signal that its command got, or kill it if the command was."""
        message, _ = _receive(connection)
        signal.pidfd_send_signal(running.handle, message[0] if message else signal.SIGKILL)
        if not message:
            self._leave(connection)

    def _end(self, running: Running, connection: socket.socket) -> None:
        _, status = os.waitpid(running.process, 0)
        with contextlib.suppress(OSError):  # the command was killed
            connection.send(EXIT_STATUS.pack(os.waitstatus_to_exitcode(status)))
        self._running.remove(running)
        self._leave(running.handle)
        self._leave(connection)


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """A message and the descriptors that came with it; nothing where the command has left."""
    with contextlib.suppress(OSError):
        message, descriptors, _, _ = socket.recv_fds(connection, LARGEST_MESSAGE, 3)
        return message, descriptors
    return b"", []


def _fork() -> int | None:
    with contextlib.suppress(OSError):  # no memory, or too many processes
        return os.fork()
    return None


def _stop_with_command(running: Running) -> None:
    """Stop a step whose command was stopped, or let it go on: no signal tells of it."""
    try:
        status = Path("/proc", str(running.command), "stat").read_text("utf-8")
    except OSError:  # it has ended
        return
    stopped = status.rpartition(")")[2].split()[0] == "T"
    if stopped != running.stopped:
        running.stopped = stopped
        number = signal.SIGSTOP if stopped else signal.SIGCONT
        signal.pidfd_send_signal(running.handle, number)
