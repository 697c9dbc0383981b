"""What makes a fork of the server the process that a command would have been."""

import atexit
import ctypes
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

PR_SET_PDEATHSIG = 1
"""An option of prctl, as linux/prctl.h numbers it."""
CATCHABLE = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}


def become(request: dict[str, Any], streams: Sequence[int]) -> None:
    """Take over the command's streams, arguments, environment, folder, umask and signals.

    Raises:
        OSError: the folder cannot be entered.
    """
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    # Those that Python made are of other files: where theirs could be sought in, and ours is a
    # pipe, they fail as soon as they are configured.
    sys.stdout = open(1, "w", encoding=sys.stdout.encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(  # noqa: SIM115
        2, "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace", closefd=False
    )
    sys.argv, sys.path[0] = request["argv"], request["path"]
    os.environ.clear()
    os.environ.update(request["environment"])
    os.umask(request["umask"])
    os.chdir(request["folder"])
    # What the server looked up or drew is not what this process would have.
    tempfile.tempdir = None
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    for number in CATCHABLE:
        ignored = number in request["ignored"]
        signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    if signal.SIGINT not in request["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])


def end_with_parent(parent: int, number: signal.Signals) -> bool:
    """Have the kernel send this process a signal when its parent ends; False if it has ended."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    return os.getppid() == parent


def leave(status: int) -> None:
    """End this process as Python would, but leave its memory as it is: taking that apart copies it.

    Returns where the streams cannot be flushed, which Python has its own way to end with.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()  # neither has another name
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        return
    os._exit(status)
