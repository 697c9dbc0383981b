"""A queue may take as long as it takes."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from crossfl.engine.connectors import queue
from crossfl.engine.connectors.slurm import SlurmConnector
from tests.support.faults import Login
from tests.support.testbed import ssh

DAY = 24 * 3600
SECONDS = 12
"""That the day takes here."""


async def test_a_day_in_the_queue_is_no_failure(
    alpha: Any, login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the connector's clock the job is pending for a day; then it runs, and nothing was lost."""
    begun = time.monotonic()

    def clock() -> float:
        return begun + (time.monotonic() - begun) * DAY / SECONDS

    monkeypatch.setattr(queue, "time", SimpleNamespace(monotonic=clock))
    inner = ssh(alpha)
    connector = SlurmConnector(
        deployment_name="alpha",
        config_dir="/",
        connector=inner,
        service=None,
        pollingInterval=1,
        services={"train": {"partition": "closed"}},
    )
    try:
        available = await connector.get_available_locations("train")
        location = next(iter(available.values())).location
        running = asyncio.create_task(
            connector.run(
                location,
                ["echo", "at last"],
                workdir=alpha.facts["workdir"],
                capture_output=True,
                job_name="/federate/train/0.0.0",
            )
        )
        await asyncio.sleep(SECONDS)
        assert not running.done()
        assert clock() - begun > DAY
        (job,) = alpha.jobs()
        login.slurm("scontrol", "update", f"JobId={job}", "Partition=boost")
        assert await asyncio.wait_for(running, 60) == ("at last", 0)
    finally:
        await connector.undeploy(external=False)
        await inner.undeploy(external=False)
