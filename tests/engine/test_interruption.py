"""The line that an interrupted run leaves."""

import asyncio
import signal
from pathlib import Path

import pytest

from crossfl.engine.interruption import Interruption, finish


def test_what_was_ended_is_told_apart_from_what_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.excepthook", None)
    monkeypatch.setattr("crossfl.engine.interruption.silence", lambda: None)
    interruption = Interruption(number=signal.SIGTERM)
    with interruption.running("leonardo"), interruption.running("vm"):
        interruption._end()
    interruption.cancel("alpha", "Slurm", ["17", "18"]).problem = None
    interruption.cancel("gamma", "PBS", ["4.server"]).problem = "it is \x1b[2J away"
    interruption.journals.append(Path("/j"))
    assert interruption.summary() == (
        "interrupted (SIGTERM): ended the jobs at alpha (Slurm 17 18), leonardo, vm; "
        "PBS jobs 4.server at gamma could not be cancelled, cancel them there: "
        r"it is \x1b[2J away; "
        "finished rounds are kept in /j; the same command goes on from there"
    )
    assert "it did not end within 45 s: look for jobs that are left" in interruption.summary(
        late=True
    )
    assert interruption.status == 143


def test_jobs_that_are_cancelled_in_the_course_of_a_run_are_no_part_of_it() -> None:
    interruption = Interruption()
    interruption.cancel("alpha", "Slurm", ["17"])
    interruption.number = signal.SIGINT
    assert interruption.summary() == (
        "interrupted (SIGINT): no job was going on; there is no journal here; the same command "
        "begins anew"
    )


async def test_what_has_to_be_finished_is_finished_before_it_is_cancelled() -> None:
    done = []

    async def work() -> None:
        await asyncio.sleep(0.1)
        done.append(True)

    task = asyncio.create_task(finish(work()))
    for _ in range(3):
        await asyncio.sleep(0.01)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == [True]


def test_a_signal_after_the_run_does_what_it_always_does() -> None:
    interruption = Interruption()
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            interruption._receive(signal.SIGINT, None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert interruption.number is None
