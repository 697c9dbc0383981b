"""The queues of the simulator: what is drawn, and a machine that others use."""

import gzip
import itertools
import statistics
from pathlib import Path

import pytest
from numpy.random import default_rng

from crossfl.errors import CrossFLError
from crossfl.simulation.virtual import queues, sites
from crossfl.simulation.virtual.clock import Clock
from crossfl.simulation.virtual.queues import DAY, Backfill, Drawn, Request, Spell, TraceJob


def _waits(clock: Clock, queue: queues.Queue, gap: float, number: int) -> list[float]:
    """Waits of jobs of a node and an hour, submitted one after the other."""
    waits: list[float] = []

    def submit() -> None:
        begun = clock.now

        def start() -> None:
            waits.append(clock.now - begun)
            clock.after(600.0, queue.release, request)

        request = Request(1, 3600.0, start)
        queue.submit(request)

    for place in range(number):
        clock.after(place * gap, submit)
    clock.run(lambda: len(waits) == number, 1e12)
    return waits


def test_drawn_waits_are_of_their_distribution_and_jobs_keep_their_order() -> None:
    clock = Clock()
    waits = _waits(clock, Drawn(clock, queues.lognormal(default_rng(1), 120.0, 0.8)), 1e5, 2000)
    assert statistics.median(waits) == pytest.approx(120, rel=0.1)
    draws = iter([100.0, 1.0])
    clock = Clock()
    assert _waits(clock, Drawn(clock, lambda _now: next(draws)), 10.0, 2) == [100.0, 90.0]


def test_a_queue_of_spells_is_calm_and_busy_in_turns() -> None:
    clock = Clock()
    calm, busy = Spell(60.0, 0.1, 50_000.0), Spell(9000.0, 0.1, 50_000.0)
    waits = _waits(
        clock, Drawn(clock, queues.modulated(default_rng(1), calm, busy)), 20_000.0, 1000
    )
    quick = [wait < 100 for wait in waits]
    assert 0.35 < sum(quick) / len(quick) < 0.65
    changes = sum(one != other for one, other in itertools.pairwise(quick))
    assert changes < 0.4 * len(quick)  # half of them, were each wait drawn on its own


def test_what_was_recorded_is_drawn_again(tmp_path: Path) -> None:
    clock = Clock()
    waits = _waits(clock, Drawn(clock, queues.recorded(default_rng(1), [1.0, 2.0])), 1e4, 50)
    assert set(waits) == {1.0, 2.0}


def _machine(nodes: int, trace: list[TraceJob]) -> tuple[Clock, Backfill, dict[str, float]]:
    """A machine without other users, on which the jobs of a trace start at these moments."""
    clock = Clock()
    machine = Backfill(clock, nodes, lambda: TraceJob(1e15, 1, 1.0, 1.0))
    started: dict[str, float] = {}
    for number, job in enumerate(trace):
        name = chr(ord("a") + number)

        def submit(name: str = name, job: TraceJob = job) -> None:
            def start() -> None:
                started[name] = clock.now
                clock.after(job.seconds, machine.release, request)

            request = Request(job.nodes, job.walltime, start)
            machine.submit(request)

        clock.after(job.gap, submit)
    clock.run(lambda: len(started) == len(trace), 1e9)
    return clock, machine, started


def test_a_short_job_is_backfilled_and_a_long_one_is_not() -> None:
    jobs = [
        TraceJob(0, 3, 100, 100),  # a runs, one node is idle
        TraceJob(1, 4, 100, 100),  # b needs all: reserved at 100
        TraceJob(2, 1, 500, 500),  # c would delay b
        TraceJob(3, 1, 50, 60),  # d ends before
    ]
    _, _, started = _machine(4, jobs)
    assert started == {"a": 0, "b": 100, "c": 200, "d": 3}


def test_a_long_job_is_backfilled_on_nodes_that_the_first_does_not_need() -> None:
    jobs = [TraceJob(0, 3, 100, 100), TraceJob(1, 2, 100, 100), TraceJob(2, 1, 500, 500)]
    _, _, started = _machine(4, jobs)
    assert started == {"a": 0, "b": 100, "c": 2}


@pytest.mark.parametrize("load", [0.5, 0.85])
def test_other_users_keep_a_machine_busy_to_its_load(load: float) -> None:
    clock = Clock()
    machine = Backfill(clock, 64, queues.synthetic(default_rng(2), 64, load))
    seen: list[float] = []

    def look() -> None:
        assert 0 <= machine.busy <= 64
        seen.append(machine.busy / 64)
        clock.after(3600.0, look)

    clock.after(5 * DAY, look)
    clock.run(lambda: False, 65 * DAY)
    assert statistics.fmean(seen) == pytest.approx(load, abs=0.1)


def test_a_fuller_machine_makes_a_job_wait_longer() -> None:
    means = []
    for load in (0.6, 0.95):
        clock = Clock(-4 * DAY)
        machine = Backfill(clock, 64, queues.synthetic(default_rng(3), 64, load))
        clock.run(lambda: False, 0.0)
        means.append(statistics.fmean(_waits(clock, machine, 7200.0, 200)))
    assert means[1] > 3 * means[0]


SWF = """\
; UnixStartTime: 0
1 0 5 100 4 -1 -1 4 200 -1 1 1 1 1 1 -1 -1 -1
2 60 5 -1 4 -1 -1 4 200 -1 0 1 1 1 1 -1 -1 -1
3 90 5 50 -1 -1 -1 2 -1 -1 1 1 1 1 1 -1 -1 -1
"""


def test_a_trace_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.swf").write_text(SWF)
    (tmp_path / "t.swf.gz").write_bytes(gzip.compress(SWF.encode()))
    expected = [TraceJob(0.0, 4, 100.0, 200.0), TraceJob(90.0, 2, 50.0, 50.0)]
    assert sites.read_swf(tmp_path / "t.swf") == expected == sites.read_swf(tmp_path / "t.swf.gz")
    others = queues.replayed(default_rng(1), expected, nodes=10, load=0.5)
    jobs = [others() for _ in range(1000)]
    work = sum(job.nodes * job.seconds for job in jobs) / sum(job.gap for job in jobs)
    assert work / 10 == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("1 2 3\n", "line 1 is no job in SWF"),
        ("; nothing\n", "fewer than two jobs"),
        (SWF + "4 x 5 100 4 -1 -1 4 200\n", "line 5 is no job"),
    ],
)
def test_a_trace_that_is_none(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "t.swf").write_text(text)
    with pytest.raises(CrossFLError, match=message):
        sites.read_swf(tmp_path / "t.swf")
