"""No job outlives its run, however the run ends."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable

import pytest

from tests.support.engine import Engine
from tests.support.testbed import Site, closed

Shim = Callable[[Site, str, str], None]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(site: Site, engine: Engine, number: signal.Signals) -> None:
    process = engine.start_at(site, ["sleep 120", "sleep 121"], site.walltime(300))
    jobs = site.wait_for_jobs(2)
    logged, began = len(engine.log()), time.monotonic()
    process.send_signal(number)
    time.sleep(0.5)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)  # from somebody who cannot wait
    done = engine.wait(process, began, seconds=30)
    assert done.code == 128 + number
    site.wait_for_jobs(0, seconds=30 - (time.monotonic() - began))
    (line,) = [x for x in done.log[logged:].splitlines() if not x.startswith("still ending")]
    assert line.startswith(f"interrupted ({number.name}): ended the jobs at {site.name} (")
    assert line.endswith("; there is no journal here; the same command begins anew")
    assert all(job.partition(".")[0] in line for job in jobs)


def test_a_scheduler_that_takes_no_orders(alpha: Site, engine: Engine, shim: Shim) -> None:
    process = engine.start_at(alpha, "sleep 120", alpha.walltime(300))
    (job,) = alpha.wait_for_jobs(1)
    shim(alpha, "scancel", "echo 'the controller is away' >&2; exit 1")
    process.send_signal(signal.SIGTERM)
    done = engine.wait(process, time.monotonic(), seconds=30)
    assert done.code == 143
    line = done.log.splitlines()[-1]
    assert f"Slurm jobs {job} at alpha could not be cancelled, cancel them there: " in line
    assert "the controller is away" in line


def test_interrupted_without_a_scheduler(alpha: Site, engine: Engine) -> None:
    """A job that the login node itself runs would go on for ever after."""
    process = engine.start(
        "one.cwl",
        {"script": "sleep 1234.5"},
        {"alpha-login": alpha.login()},
        {"deployment": "alpha-login"},
    )
    running = "pgrep -u $USER -xf 'sleep 1234[.]5'"
    deadline = time.monotonic() + 30
    while not alpha.shell(running):
        assert time.monotonic() < deadline, engine.log()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    done = engine.wait(process, time.monotonic(), seconds=30)
    assert done.code == 143
    assert "interrupted (SIGTERM): ended the jobs at alpha-login; " in done.log
    time.sleep(1)
    assert not alpha.shell(running)


def test_interrupted_in_the_queue(site: Site, engine: Engine) -> None:
    process = engine.start_at(site, "true", closed(site))
    site.wait_for_jobs(1)
    process.send_signal(signal.SIGTERM)
    assert engine.wait(process, time.monotonic(), seconds=30).code != 0
    site.wait_for_jobs(0)


def test_interrupted_while_submitting(site: Site, engine: Engine, shim: Shim) -> None:
    """The scheduler has taken the job, and the run has not heard of it yet."""
    name = "sbatch" if site.scheduler == "slurm" else "qsub"
    real = site.shell(f"command -v {name}").strip()
    shim(site, name, f'{real} "$@"; status=$?; sleep 3; exit $status')
    process = engine.start_at(site, "sleep 120", site.walltime(300))
    site.wait_for_jobs(1)
    process.send_signal(signal.SIGTERM)
    assert engine.wait(process, time.monotonic(), seconds=30).code != 0
    site.wait_for_jobs(0)


def test_a_failed_run_takes_its_other_jobs_along(site: Site, engine: Engine) -> None:
    done = engine.run_at(site, ["sleep 3; exit 3", "sleep 300"], site.walltime(300))
    assert done.code != 0
    assert "ended in FAILED (exit code 3)" in done.log
    site.wait_for_jobs(0)
