"""No job outlives its run, however the run ends."""

from __future__ import annotations

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
    site.wait_for_jobs(2)
    began = time.monotonic()
    process.send_signal(number)
    done = engine.wait(process, began, seconds=30)
    assert done.code != 0
    site.wait_for_jobs(0, seconds=30 - (time.monotonic() - began))
    assert f"Deployment {site.name}: cancelling" in done.log


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
