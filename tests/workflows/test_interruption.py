"""A run that is interrupted says so in one line, whatever the signal and whoever started it."""

import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.support.engine import STREAMFLOW, Engine, unset

STEP = """\
cwlVersion: v1.2
class: CommandLineTool
inputs: {}
baseCommand: [sh, -c, 'echo $$ > $MARK; trap "" INT; sleep 60; true']
requirements: {EnvVarRequirement: {envDef: {MARK: %s}}}
outputs: {}
"""
SECONDS = 30


class Interrupted:
    """A run with one step that takes a minute, in a shell that starts it in one way or another."""

    def __init__(self, folder: Path, start: str, journal: bool) -> None:
        self.mark = folder / "mark"
        (folder / "step.cwl").write_text(STEP % self.mark)
        config = {"journal": "journal"} if journal else {"facility": "leonardo"}
        path = Engine(folder).write(
            str(folder / "step.cwl"),
            {},
            {"place": {"type": "crossfl.local", "config": config}},
            {"deployment": "place"},
            step="/",
        )
        run = f"exec {STREAMFLOW} run --outdir {folder / 'out'} {path}"
        self.log = (folder / "log").open("w+")
        self.shell = subprocess.Popen(
            ["sh", "-c", start.replace("RUN", f"sh -c '{run}'")],
            stdout=subprocess.DEVNULL,
            stderr=self.log,
            env=unset(),
            start_new_session=True,
            preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (1, 2, 15)],
        )
        deadline = time.monotonic() + SECONDS
        while not self.mark.exists() or not self.mark.read_text():
            assert time.monotonic() < deadline and self.shell.poll() is None, self.text()
            time.sleep(0.05)
        self.engine = next(
            process
            for process in [psutil.Process(self.shell.pid), *self.children()]
            if "streamflow" in " ".join(process.cmdline()[:2])
        )

    def children(self) -> list[psutil.Process]:
        children: list[psutil.Process] = psutil.Process(self.shell.pid).children(recursive=True)
        return children

    def text(self) -> str:
        self.log.seek(0)
        return self.log.read()


@pytest.mark.engine
@pytest.mark.parametrize(
    ("number", "start", "status"),
    [
        (signal.SIGINT, "exec RUN", 130),
        (signal.SIGTERM, "exec RUN", 143),
        (signal.SIGHUP, "exec RUN", 129),
        # A shell that is no terminal's lets what it starts with `&` ignore SIGINT.
        (signal.SIGTERM, "RUN & wait $!; exit $?", 143),
    ],
    ids=["Ctrl-C", "SIGTERM", "SIGHUP", "in the background"],
)
def test_one_line(tmp_path: Path, number: int, start: str, status: int) -> None:
    run = Interrupted(tmp_path, start, journal=status != 129)
    logged = run.text()
    begun = time.monotonic()
    step = psutil.Process(int(run.mark.read_text()))
    run.engine.send_signal(number)
    if status == 130:  # from an impatient person
        time.sleep(0.05)
        run.engine.send_signal(number)
    assert run.shell.wait(SECONDS) == status
    assert time.monotonic() - begun < 10
    lines = [x for x in run.text().removeprefix(logged).splitlines() if "still ending" not in x]
    kept = (
        f"finished rounds are kept in {tmp_path}/journal; the same command goes on from there"
        if status != 129
        else "there is no journal here; the same command begins anew"
    )
    name = signal.Signals(number).name
    assert lines == [f"interrupted ({name}): ended the jobs at place; {kept}"]
    assert not step.is_running() or step.status() == psutil.STATUS_ZOMBIE


@pytest.mark.engine
def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    run = Interrupted(tmp_path, "trap '' HUP; RUN & wait $!; exit $?", journal=False)
    for number in (signal.SIGINT, signal.SIGHUP):
        run.engine.send_signal(number)
    time.sleep(1)
    assert run.engine.is_running()
    # Nor would anything be left of the progress, were it killed now.
    assert not list(Path(tempfile.gettempdir()).glob("crossfl-progress*"))
    run.engine.send_signal(signal.SIGTERM)
    assert run.shell.wait(SECONDS) == 143
