"""A warm step is to its caller, and to itself, what a cold one is; where it cannot be, it is cold.

Steps are any code, and their server has no imports: tests/workflows/test_warm.py has the real ones.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from crossfl.engine.forkserver import process
from crossfl.engine.forkserver.client import LARGEST_MESSAGE, SOCKET
from crossfl.engine.forkserver.process import ForkServer
from crossfl.engine.forkserver.server import MOST
from crossfl.engine.placement import runs_steps_here
from crossfl.protocol.variables import FORKSERVER
from tests.support.engine import heed_signals
from tests.support.paths import ROOT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
ENVIRONMENT.pop("PYTHONUNBUFFERED", None)
PROBE = "tests.support.probe"
SECONDS = 10.0


@contextlib.contextmanager
def serving(environment: dict[str, str] = ENVIRONMENT) -> Iterator[ForkServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "MODULE", PROBE)
        server = ForkServer(environment)
    try:
        yield server
    finally:
        server.end()


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with serving() as running:
        yield running


def start(
    code: str, folder: Path | str = "", environment: Mapping[str, str] | None = None, **options: Any
) -> "subprocess.Popen[str]":
    """Start a step of a server; without a folder, a cold one."""
    values: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    values |= {"preexec_fn": heed_signals} | options
    return subprocess.Popen(
        [sys.executable, "-m", PROBE, code],
        env={**ENVIRONMENT, **(environment or {}), FORKSERVER: str(folder)},
        text=True,
        **values,
    )


def outcome(step: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = step.communicate(timeout=SECONDS)
    return step.returncode, out, err


def ends_within(seconds: float, process: int) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            state = Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                time.sleep(0.02)
                continue
        return True
    return False


def state_of(process: int) -> str:
    return Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()[0]


WARM = "print(WARM); "


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("raise SystemExit(1)", 1),
        ("raise SystemExit(42)", 42),
        ("raise SystemExit('no')", 1),
        ("1 / 0", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import os; os.abort()", -signal.SIGABRT),
        ("import os; os._exit(255)", 255),
        ("import atexit; atexit.register(print, 'left')", 0),
        ("import threading; threading.Timer(0.2, print, ['late']).start()", 0),
        ("import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); print('lost')", 120),
    ],
)
def test_ends_as_a_cold_step_does(server: ForkServer, code: str, status: int) -> None:
    code = f"print('out', flush=True); {code}"
    cold, warm = outcome(start(code)), outcome(start(code, server.folder))
    assert warm[0] == cold[0] == status
    assert warm[1] == cold[1]
    assert warm[2].splitlines()[-1:] == cold[2].splitlines()[-1:]
    assert outcome(start(WARM, server.folder)) == (0, "True\n", "")


LOOK = """
import json, os, random, resource, signal, sys, tempfile
umask = os.umask(0)
print(json.dumps({
    "descriptors": {n: os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                    if os.path.exists(f"/proc/self/fd/{n}")},
    "environment": {k: v for k, v in os.environ.items()},
    "cwd": os.getcwd(), "umask": umask, "argv": sys.argv[1:], "path": sys.path,
    "ignored": [n for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN],
    "default": [n for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_DFL],
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "limits": [resource.getrlimit(n) for n in range(resource.RLIM_NLIMITS)]
        if hasattr(resource, "RLIM_NLIMITS") else resource.getrlimit(resource.RLIMIT_NOFILE),
    "nice": os.nice(0), "temporary": tempfile.gettempdir(), "input": sys.stdin.read(),
    "terminal": [s.isatty() for s in (sys.stdin, sys.stdout, sys.stderr)],
    "buffering": [s.line_buffering for s in (sys.stdout, sys.stderr)],
    "threads": len(os.listdir("/proc/self/task")),
}))
"""
SPOIL = """
import os, random, resource, signal, tempfile
open("/dev/null"), os.open("/", os.O_RDONLY), tempfile.gettempdir()
os.umask(0o123); os.chdir("/"); os.environ["SPOILT"] = "1"; os.nice(3)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); random.seed(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(WARM)
"""


def test_finds_what_a_cold_step_finds_and_nothing_of_the_step_before(
    server: ForkServer, tmp_path: Path
) -> None:
    (tmp_path / "input").write_text("given")
    (tmp_path / "tmp").mkdir()

    def look(folder: Path | str) -> dict[str, Any]:
        def before() -> None:
            os.umask(0o027)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])

        with (tmp_path / "input").open() as stream, (tmp_path / "err").open("w") as err:
            step = start(
                LOOK,
                folder,
                stdin=stream,
                stderr=err,
                cwd=tmp_path,
                preexec_fn=before,
                environment={"TMPDIR": str(tmp_path / "tmp"), "CROSSFL_X": "é"},
            )
            out, _ = step.communicate(timeout=SECONDS)
        facts: dict[str, Any] = json.loads(out)
        facts["descriptors"].pop("1")  # a pipe of its own
        return facts

    spoilt = start(SPOIL, server.folder)
    assert outcome(spoilt) == (0, "True\n", "")
    cold, warm = look(""), look(server.folder)
    assert warm == cold
    assert warm["temporary"] == str(tmp_path / "tmp")


def test_streams_are_those_of_the_command(tmp_path: Path) -> None:
    """Also where the engine prints into a file, and a step into a pipe; and errors at once."""
    code = (
        "import sys; [s.reconfigure(errors='backslashreplace') for s in (sys.stdout, sys.stderr)]; "
        "print('out', sys.stdout.line_buffering); print('err', file=sys.stderr); print(WARM)"
    )
    saved = os.dup(1), os.dup(2)
    with (tmp_path / "log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        with serving() as running:
            found = outcome(start(code, running.folder))
    finally:
        for number, stream in enumerate(saved, 1):
            os.dup2(stream, number)
            os.close(stream)
    assert found == (0, "out False\nTrue\n", "err\n")
    assert (tmp_path / "log").read_text() == ""


def test_draws_at_random_what_no_other_step_draws(server: ForkServer) -> None:
    code = "import random; print(random.random())"
    assert len({outcome(start(code, server.folder))[1] for _ in range(3)}) == 3


TRAP = """
import os, signal, time
caught = []
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: caught.append(number))
print(os.getpid(), flush=True)
while len(caught) < 4:
    time.sleep(0.01)
print(*caught)
raise SystemExit(3)
"""
SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"


def process_of(step: "subprocess.Popen[str]") -> int:
    assert step.stdout is not None
    return int(step.stdout.readline())


def test_signals_reach_the_step(server: ForkServer) -> None:
    step = start(TRAP, server.folder)
    process_of(step)
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        step.send_signal(number)
        time.sleep(0.1)
    code, out, _ = outcome(step)
    assert (code, out) == (3, "10 2 15 1\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_both(server: ForkServer, number: signal.Signals) -> None:
    step = start(SLEEP, server.folder)
    process = process_of(step)
    step.send_signal(number)
    assert outcome(step)[0] == -number
    assert ends_within(2, process)


def test_a_command_killed_takes_its_step_along(server: ForkServer) -> None:
    step = start(SLEEP, server.folder)
    process = process_of(step)
    step.kill()
    assert ends_within(2, process)
    assert outcome(start(WARM, server.folder)) == (0, "True\n", "")


def test_a_step_stops_and_goes_on_with_its_command(server: ForkServer) -> None:
    step = start(SLEEP, server.folder)
    process = process_of(step)
    for number, state in ((signal.SIGSTOP, "T"), (signal.SIGCONT, "S")):
        step.send_signal(number)
        deadline = time.monotonic() + SECONDS
        while state_of(process) != state:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    step.kill()
    assert ends_within(2, process)


DIFFERENT: dict[str, dict[str, Any]] = {
    "threads": {"environment": {"OMP_NUM_THREADS": "7"}},
    "a variable of a library": {"environment": {"NUMBA_DISABLE_JIT": "1"}},
    "niceness": {"preexec_fn": lambda: os.nice(1)},
    "limits": {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))},
    "no output": {"preexec_fn": lambda: os.close(2)},
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_step_that_is_not_like_the_server_is_cold(server: ForkServer, case: str) -> None:
    step = start(WARM, server.folder, **DIFFERENT[case])
    assert outcome(step)[:2] == (0, "False\n")


def test_another_version_of_the_package_is_cold(server: ForkServer) -> None:
    code = (
        "import crossfl, sys; crossfl.__version__ = '9'; sys.argv = ['', 'print(WARM)'];"
        "from tests.support import probe; probe.main()"
    )
    environment = {**ENVIRONMENT, FORKSERVER: str(server.folder)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout == "False\n"


def test_a_folder_that_others_may_enter_is_not_trusted() -> None:
    with serving() as server:
        server.folder.chmod(0o755)
        assert outcome(start(WARM, server.folder)) == (0, "False\n", "")
        server.folder.chmod(0o700)
        assert outcome(start(WARM, server.folder)) == (0, "True\n", "")


def test_a_server_that_was_killed_is_done_without() -> None:
    with serving() as server:
        step = start(SLEEP, server.folder)
        process = process_of(step)
        server._process.kill()
        server._process.wait()
        assert outcome(step)[0] == -signal.SIGKILL
        assert ends_within(2, process)
        assert outcome(start(WARM, server.folder)) == (0, "False\n", "")  # its socket is stale
    assert outcome(start(WARM, server.folder)) == (0, "False\n", "")  # its folder is gone


def test_a_server_that_is_full_is_done_without(tmp_path: Path) -> None:
    request = json.dumps(
        {
            "argv": ["", "import time; time.sleep(100)"],
            "path": "",
            "environment": ENVIRONMENT,
            "folder": str(tmp_path),
            "umask": 0o077,
            "ignored": [],
            "blocked": [],
        }
    ).encode()
    with serving() as server, contextlib.ExitStack() as stack:
        for _ in range(MOST):
            command = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            command.connect(str(server.folder / SOCKET))
            assert command.recv(LARGEST_MESSAGE)
            socket.send_fds(command, [request], (0, 1, 2))
        assert outcome(start(WARM, server.folder)) == (0, "False\n", "")
        command.close()  # and its step is killed
        deadline = time.monotonic() + SECONDS
        while outcome(start(WARM, server.folder))[1] == "False\n":
            assert time.monotonic() < deadline


def test_a_request_that_cannot_be_served_is_refused() -> None:
    with serving() as server:
        assert outcome(start(WARM, server.folder))[1] == "True\n"
        number = server._process.pid
        limits = resource.prlimit(number, resource.RLIMIT_NOFILE)
        used = len(list(Path("/proc", str(number), "fd").iterdir()))
        resource.prlimit(number, resource.RLIMIT_NOFILE, (used + 2, limits[1]))
        assert outcome(start(WARM, server.folder)) == (0, "False\n", "")
        resource.prlimit(number, resource.RLIMIT_NOFILE, limits)
        assert outcome(start(WARM, server.folder))[1] == "True\n"


def test_two_servers_do_not_mix() -> None:
    code = "import os; print(os.getppid())"
    with serving() as one, serving() as other:
        for server in (one, other, one):
            parent = int(outcome(start(code, server.folder))[1])
            assert parent == server._process.pid


def test_the_folder_is_private_and_goes_with_the_server() -> None:
    with serving() as server:
        status = server.folder.stat()
        assert (status.st_mode & 0o777, status.st_uid) == (0o700, os.geteuid())
        step = start(SLEEP, server.folder)
        process = process_of(step)
    assert not server.folder.exists()
    assert ends_within(2, process)
    assert outcome(step)[0] == -signal.SIGKILL


ENGINE = f"""
import os, time
from crossfl.engine.forkserver import process
process.MODULE = "{PROBE}"
server = process.ForkServer(os.environ)
print(server.folder, server._process.pid, flush=True)
time.sleep(100)
"""


def test_an_engine_killed_takes_server_and_steps_along() -> None:
    engine = subprocess.Popen(
        [sys.executable, "-c", ENGINE], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert engine.stdout is not None
    folder, server = engine.stdout.readline().split()
    step = start(SLEEP, folder)
    process = process_of(step)
    engine.kill()
    engine.wait()
    assert ends_within(3, int(server))
    assert ends_within(3, process)
    assert outcome(step)[0] == -signal.SIGKILL
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    ("kinds", "starts"),
    [(["crossfl.slurm", "crossfl.local"], True), (["crossfl.slurm", "local"], False), ([], False)],
)
def test_a_run_without_steps_here_needs_none(kinds: list[str], starts: bool) -> None:
    document = {"deployments": {str(i): {"type": kind} for i, kind in enumerate(kinds)}}
    assert runs_steps_here(document) == starts


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORKSERVER, "")
    assert ForkServer.shared() is None
    monkeypatch.delenv(FORKSERVER)
    monkeypatch.setattr(process, "MODULE", PROBE)
    server = ForkServer.shared()
    assert server is not None
    assert ForkServer.shared() is server
    ForkServer.release(at_once=True)
    assert not server.folder.exists()
