"""What schedulers do that is no failure of a job: be away or full, answer oddly, run it again."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.engine import Engine
from tests.support.testbed import Site

Shim = Callable[[Site, str, str], None]
SUBMIT = {"slurm": "sbatch", "pbs": "qsub"}
BUSY = {
    "slurm": "echo 'sbatch: error: Batch job submission failed: Unable to contact slurm controller'"
    "; exit 1",
    "pbs": "echo 'qsub: cannot connect to server pbs (errno=15010)'; exit 162",
}


def test_away_at_a_submission(site: Site, engine: Engine, shim: Shim) -> None:
    command = SUBMIT[site.scheduler]
    real = site.shell(f"command -v {command}").strip()
    site.shell("rm -f tries")
    shim(
        site,
        command,
        f"echo x >> ~/tries\n[ $(wc -l < ~/tries) -gt 2 ] || {{ {BUSY[site.scheduler]}; }} >&2\n"
        f'exec {real} "$@"',
    )
    done = engine.run_at(site, "echo done", site.walltime(60))
    assert done.code == 0, done.log
    assert done.log.count(" takes no job now: ") == 2
    assert Path(done.outputs["said"]["path"]).read_text() == "done\n"


@pytest.mark.parametrize("flag", ["away", "full"])
def test_a_server_that_is_away_or_full_for_a_while(gamma: Site, engine: Engine, flag: str) -> None:
    if not gamma.emulated:
        pytest.skip("a real server is not stopped for a test")
    gamma.shell(f"mkdir -p .pbs; touch .pbs/{flag}")
    try:
        process = engine.start_at(gamma, "echo done", gamma.walltime(60))
        deadline = time.monotonic() + 60
        while "takes no job now" not in engine.log():
            assert time.monotonic() < deadline and process.poll() is None, engine.log()
            time.sleep(0.2)
    finally:
        gamma.shell(f"rm .pbs/{flag}")
    done = engine.wait(process, time.monotonic())
    assert done.code == 0, done.log


def test_variables_that_spoil_the_json(gamma: Site, engine: Engine) -> None:
    service = gamma.walltime(60) | {"variableList": "A=nan,B=005,C=inf,D=it's,TOKEN=canary-7"}
    done = engine.run_at(gamma, ['echo "$A"', "exit 3"], service)
    assert done.code != 0
    assert "ended in FAILED (exit code 3)" in done.log
    assert "could not be asked" not in done.log
    assert "canary-7" not in done.log.replace("-v", "")


def test_a_job_that_is_run_again(gamma: Site, engine: Engine) -> None:
    mark = f"../ran-{uuid.uuid4()}"
    script = f"if [ -e {mark} ]; then rm {mark}; echo done; else touch {mark}; sleep 300; fi"
    process = engine.start_at(gamma, script, gamma.walltime(400))
    (job,) = gamma.wait_for_jobs(1)
    deadline = time.monotonic() + 30
    while "job_state = R" not in gamma.shell(f"qstat -f {job}"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(2)
    gamma.operate("qrerun", job)
    done = engine.wait(process, time.monotonic())
    assert done.code == 0, done.log
    assert Path(done.outputs["said"]["path"]).read_text() == "done\n"


def test_killed_inside(site: Site, engine: Engine) -> None:
    done = engine.run_at(site, "echo 'Detected 1 oom_kill event' >&2; exit 137", site.walltime(60))
    assert done.code != 0
    assert "ended in OUT_OF_MEMORY" in done.log, done.log


def test_deleting_a_job_that_exits(gamma: Site, engine: Engine) -> None:
    """One job of two fails while the other exits: there is nothing to cancel by hand."""
    if not gamma.emulated:
        pytest.skip("a real server shows a job in state E for too short a time")
    gamma.shell("mkdir -p .pbs; touch .pbs/exiting")
    try:
        done = engine.run_at(gamma, ["sleep 2; exit 3", "sleep 20"], gamma.walltime(60))
    finally:
        gamma.shell("rm .pbs/exiting")
    assert done.code != 0
    assert "cancelling PBS jobs" in done.log and "cancel them by hand" not in done.log
